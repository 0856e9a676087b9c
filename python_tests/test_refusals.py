"""What is not differentiated is refused in words: teachers, second derivatives, forward mode, functorch's transforms."""

from __future__ import annotations

import re

import cases
import pytest
import torch
from cases import F16, F32
from torch.autograd import forward_ad

from sortkd_kernels import fused_sort_dkd, fused_sort_kd, fused_sort_kd_topk, sort_logits

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EVERY_BACKEND = pytest.mark.parametrize("backend", cases.BACKENDS)
FUSED_BACKENDS = pytest.mark.parametrize("backend", [b for b in cases.BACKENDS if b != "reference"])
SECOND = "second derivatives of the fused losses are not implemented"


@EVERY_BACKEND
def test_a_teacher_that_requires_grad(backend):
    student, teacher, target = cases.make_rows(12, 9)
    values, indices = teacher.topk(3)
    words = "without requires_grad, since no gradient flows to the teacher; run the teacher under torch.no_grad()"
    for function in (fused_sort_kd, fused_sort_dkd):
        with pytest.raises(ValueError, match=re.escape(f"{function.__name__}: expected teacher {words}")):
            function(student, teacher.clone().requires_grad_(), target, backend=backend)
    with pytest.raises(ValueError, match="sort_logits: expected teacher without requires_grad"):
        sort_logits(teacher.clone().requires_grad_(), target, backend=backend)
    with pytest.raises(ValueError, match="fused_sort_kd_topk: expected teacher_values without requires_grad"):
        fused_sort_kd_topk(student, values.requires_grad_(), indices, target, backend=backend)


@pytest.mark.parametrize("dtype", (F32, F16), ids=str)
@FUSED_BACKENDS
def test_second_derivatives(backend, dtype):
    """Asked for in any way, they raise, and are never a silent None or 0."""
    student, teacher, target = cases.make_rows(12, 9, (dtype, dtype))
    student.requires_grad_()
    temperature = torch.tensor(3.0, requires_grad=True)
    for with_graph in (False, True):
        loss = fused_sort_kd(student, teacher, target, temperature=temperature, backend=backend)
        grad_output = torch.tensor(1.5, requires_grad=with_graph)
        if backend == "triton":  # its autograd is Python's: it refuses where the graph of the gradient would begin
            with pytest.raises(RuntimeError, match=SECOND):
                torch.autograd.grad(loss, (student, temperature), grad_output, create_graph=True)
            continue
        grads = torch.autograd.grad(loss, (student, temperature), grad_output, create_graph=True)
        for grad in grads:
            assert grad.requires_grad
            with pytest.raises(RuntimeError, match=SECOND):
                grad.sum().backward(retain_graph=True)


@pytest.mark.parametrize("dtype", (F32, F16), ids=str)
def test_second_derivatives_by_name(dtype):
    student, teacher, target = cases.make_rows(12, 9, (dtype, dtype))
    student.requires_grad_()
    temperature = torch.tensor(3.0, requires_grad=True)
    loss = fused_sort_kd(student, teacher, target, temperature=temperature)
    for grad in torch.autograd.grad(loss, (student, temperature), create_graph=True):
        for by in (student, temperature):
            with pytest.raises(RuntimeError, match="second derivatives of the fused losses are not implemented"):
                torch.autograd.grad(grad.sum(), by, retain_graph=True, allow_unused=True)


def test_the_reference_has_second_derivatives():
    student, teacher, target = cases.make_rows(6, 4, (torch.float64, torch.float64))
    torch.autograd.gradgradcheck(
        lambda s: fused_sort_kd(s, teacher, target, temperature=2.0, backend="reference"), student.requires_grad_()
    )


@pytest.mark.parametrize("learned", (False, True))
def test_forward_mode(learned):
    """A tangent of the student or of the temperature would be lost without a word."""
    student, teacher, target = cases.make_rows(12, 9)
    temperature = torch.tensor(3.0)
    with forward_ad.dual_level():
        if learned:
            temperature = forward_ad.make_dual(temperature, torch.tensor(1.0))
        else:
            student = forward_ad.make_dual(student, torch.ones_like(student))
        with pytest.raises(
            NotImplementedError, match="forward-mode derivatives of the fused losses are not implemented"
        ):
            fused_sort_kd(student, teacher, target, temperature=temperature)


@pytest.mark.parametrize("function", (fused_sort_kd, fused_sort_dkd))
def test_functorch_transforms(function):
    student, teacher, target = cases.make_rows(12, 9)
    words = r"cannot use C\+\+ torch::autograd::Function with functorch transforms \(vmap, grad, vjp, etc\)"

    def loss(student, teacher=teacher, target=target):
        return function(student, teacher, target)

    for transformed in (
        lambda: torch.func.grad(loss)(student),
        lambda: torch.func.vjp(loss, student),
        lambda: torch.func.jvp(loss, (student,), (student,)),
        lambda: torch.func.jacrev(loss)(student),
        lambda: torch.func.hessian(loss)(student),
        lambda: torch.func.vmap(loss)(student.view(3, 4, 9), teacher.view(3, 4, 9), target.view(3, 4)),
        lambda: torch.func.vmap(loss, in_dims=(0, None, None))(student.expand(2, 12, 9), teacher, target),
    ):
        with pytest.raises(RuntimeError, match=words):
            transformed()


def test_the_reference_takes_functorch_transforms():
    student, teacher, target = cases.make_rows(6, 4)
    grad = torch.func.grad(lambda s: fused_sort_kd(s, teacher, target, backend="reference"))(student)
    leaf = student.requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(fused_sort_kd(leaf, teacher, target), leaf)[0])
