"""`inplace=True` writes the gradient over the student's logits, and is refused wherever somebody still needs them.

The other backends accept the word and keep the logits: nothing is lost, only memory.
"""

from __future__ import annotations

import cases
import pytest
import torch
from cases import BF16, F16, F32, F64

from sortkd_kernels import fused_sort_dkd, fused_sort_kd, fused_sort_kd_topk

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EVERY_DTYPE = pytest.mark.parametrize("dtype", (F32, F64, BF16, F16), ids=str)


def logits_of(dtype, C=9):
    """A leaf, logits that a model computed from it, teacher and labels."""
    rows = cases.make_rows(12, C, (dtype, dtype))
    leaf = rows.student.requires_grad_()
    return leaf, leaf + 0, rows.teacher, rows.target


def calls(teacher, target):
    values, indices = teacher.topk(3)
    return {
        "kd": lambda s, **o: fused_sort_kd(s, teacher, target, ce_weight=0.2, **o),
        "dkd": lambda s, **o: fused_sort_dkd(s, teacher, target, **o),
        "lskd": lambda s, **o: fused_sort_kd(s, teacher, target, standardize=True, **o),
        "top-k": lambda s, **o: fused_sort_kd_topk(s, values, indices, target, **o),
        "dense": lambda s, **o: fused_sort_kd(
            s.view(2, 3, 2, -1).movedim(-1, 1), teacher.view(2, 3, 2, -1).movedim(-1, 1).contiguous(),
            target.view(2, 3, 2), class_dim=1, **o,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("scale", (1.0, 3.0))
@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("method", ("kd", "dkd", "lskd", "top-k"))
@EVERY_DTYPE
def test_gradient_lies_where_the_logits_were(dtype, method, reduction, scale):
    leaf, logits, teacher, target = logits_of(dtype)
    call = calls(teacher, target)[method]
    (want,) = torch.autograd.grad((call(leaf, reduction=reduction) * scale).sum(), leaf)
    address = logits.data_ptr()
    loss = call(logits, reduction=reduction, inplace=True)
    (grad,) = torch.autograd.grad((loss * scale).sum(), logits)
    assert grad.data_ptr() == address
    assert torch.equal(grad, want)


@EVERY_DTYPE
@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_gradient_reaches_the_leaf(backend, dtype):
    """Through the op that made the logits, on every backend."""
    leaf, logits, teacher, target = logits_of(dtype)
    (want,) = torch.autograd.grad(fused_sort_kd(leaf, teacher, target, backend=backend), leaf)
    fused_sort_kd(logits, teacher, target, inplace=True, backend=backend).backward()
    assert torch.equal(leaf.grad, want)


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
def test_dense_logits(memory_format):
    student, teacher = (torch.randn(2, 5, 4, 3).contiguous(memory_format=memory_format) for _ in "st")
    target = torch.randint(5, (2, 4, 3))
    leaf = student.requires_grad_()
    (want,) = torch.autograd.grad(fused_sort_kd(leaf, teacher, target, class_dim=1), leaf)
    logits = leaf * 1
    if not logits.is_contiguous():
        with pytest.raises(ValueError, match="expected a contiguous student with inplace=True"):
            fused_sort_kd(logits, teacher, target, class_dim=1, inplace=True)
        return
    address = logits.data_ptr()
    (grad,) = torch.autograd.grad(fused_sort_kd(logits, teacher, target, class_dim=1, inplace=True), logits)
    assert grad.data_ptr() == address
    assert torch.equal(grad, want)


@EVERY_DTYPE
def test_a_leaf_is_refused(dtype):
    leaf, _, teacher, target = logits_of(dtype)
    before = leaf.detach().clone()
    with pytest.raises(ValueError, match="got a leaf tensor that requires grad, whose values would be lost"):
        fused_sort_kd(leaf, teacher, target, inplace=True)
    assert torch.equal(leaf, before)


@EVERY_DTYPE
def test_strided_logits_are_refused(dtype):
    _, logits, teacher, target = logits_of(dtype)
    with pytest.raises(ValueError, match=r"expected a contiguous student with inplace=True.*got strides \[1, 12\]"):
        fused_sort_kd(logits.T.contiguous().T, teacher, target, inplace=True)


@pytest.mark.parametrize("activation", (torch.tanh, torch.sigmoid, torch.exp), ids=lambda f: f.__name__)
@EVERY_DTYPE
def test_an_op_that_needs_the_logits_raises(dtype, activation):
    """tanh's derivative is a function of its output, which is gone: an error, never a wrong gradient."""
    leaf, _, teacher, target = logits_of(dtype)
    loss = fused_sort_kd(activation(leaf), teacher, target, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@EVERY_DTYPE
def test_retained_graph(dtype):
    """Two backward calls through one graph give the same gradient, in place or not."""
    leaf, logits, teacher, target = logits_of(dtype)
    (want,) = torch.autograd.grad(fused_sort_kd(leaf, teacher, target) * 3, leaf)
    loss = fused_sort_kd(logits, teacher, target, inplace=True) * 3
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(kept, want)
    assert torch.equal(second, want)


def test_without_gradient_nothing_is_written():
    _, logits, teacher, target = logits_of(F32)
    before = logits.detach().clone()
    with torch.no_grad():
        fused_sort_kd(logits, teacher, target, inplace=True)
    temperature = torch.tensor(2.0, requires_grad=True)
    frozen = logits.detach()
    fused_sort_kd(frozen, teacher, target, temperature=temperature, inplace=True).backward()
    assert torch.equal(logits, before) and torch.equal(frozen, before)


def test_rows_of_a_larger_tensor():
    """A view is written through: its base loses those rows only."""
    leaf, logits, teacher, target = logits_of(F32)
    (want,) = torch.autograd.grad(fused_sort_kd(leaf[3:7], teacher[3:7], target[3:7]), leaf)
    before = logits.detach().clone()
    fused_sort_kd(logits[3:7], teacher[3:7], target[3:7], inplace=True).backward()
    assert torch.equal(leaf.grad, want)
    assert torch.equal(logits[:3], before[:3]) and torch.equal(logits[7:], before[7:])


def test_compiled(fresh_compiler):
    """In a trace the compiler plans the memory: the permission is not used, and the gradient is right."""
    leaf, _, teacher, target = logits_of(F32)
    (want,) = torch.autograd.grad(fused_sort_kd(leaf, teacher, target), leaf)
    compiled = torch.compile(
        lambda s: fused_sort_kd(s + 0, teacher, target, inplace=True), fullgraph=True, backend="aot_eager"
    )
    compiled(leaf).backward()
    assert torch.equal(leaf.grad, want)
