"""`inplace=True` writes the gradient over the student's logits, and is refused wherever somebody still needs them.

The reference backend accepts the word and keeps the logits: nothing is lost, only memory.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import cases
import pytest
import torch
from cases import BF16, F16, F32, F64

from sortkd_kernels import fused_sort_dkd, fused_sort_kd, fused_sort_kd_topk

pytestmark = pytest.mark.usefixtures("poisoned_memory")
BACKENDS = pytest.mark.parametrize("backend", [b for b in cases.BACKENDS if b != "reference"])
EVERY_DTYPE = pytest.mark.parametrize("dtype", (F32, F64, BF16, F16), ids=str)


def logits_of(dtype, C=9):
    """A leaf, logits that a model computed from it, teacher and labels."""
    rows = cases.make_rows(12, C, (dtype, dtype))
    leaf = rows.student.requires_grad_()
    return leaf, leaf + 0, rows.teacher, rows.target


def calls(teacher, target, backend):
    values, indices = teacher.topk(3)
    return {
        "kd": lambda s, **o: fused_sort_kd(s, teacher, target, ce_weight=0.2, backend=backend, **o),
        "dkd": lambda s, **o: fused_sort_dkd(s, teacher, target, backend=backend, **o),
        "lskd": lambda s, **o: fused_sort_kd(s, teacher, target, standardize=True, backend=backend, **o),
        "top-k": lambda s, **o: fused_sort_kd_topk(s, values, indices, target, backend=backend, **o),
        "bucket": lambda s, **o: fused_sort_kd_topk(
            s, values.log_softmax(-1) - 0.3, indices, target, tail="bucket", ce_weight=0.2, backend=backend, **o
        ),
    }


# Where the backend is slow, each method in float16, whose gradient is made in the backward pass, and KD in every dtype.
METHODS = [
    (backend, dtype, method)
    for backend, dtype, method in product(
        cases.BACKENDS, (F32, F64, BF16, F16), ("kd", "dkd", "lskd", "top-k", "bucket")
    )
    if backend in cases.KERNELS or (backend in cases.LOGITS_LIMIT and (dtype == F16 or method == "kd"))
]


@pytest.mark.parametrize(("backend", "dtype", "method"), METHODS, ids=str)
def test_gradient_lies_where_the_logits_were(backend, dtype, method):
    hows = [("mean", 3.0)] if backend in cases.LOGITS_LIMIT else product(("mean", "none"), (1.0, 3.0))
    for reduction, scale in hows:
        leaf, logits, teacher, target = logits_of(dtype)
        call = calls(teacher, target, backend)[method]
        (want,) = torch.autograd.grad((call(leaf, reduction=reduction) * scale).sum(), leaf)
        address = logits.data_ptr()
        loss = call(logits, reduction=reduction, inplace=True)
        (grad,) = torch.autograd.grad((loss * scale).sum(), logits)
        assert grad.data_ptr() == address
        assert torch.equal(grad, want), (reduction, scale)


@EVERY_DTYPE
@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_gradient_reaches_the_leaf(backend, dtype):
    """Through the op that made the logits, on every backend."""
    leaf, logits, teacher, target = logits_of(dtype)
    (want,) = torch.autograd.grad(fused_sort_kd(leaf, teacher, target, backend=backend), leaf)
    fused_sort_kd(logits, teacher, target, inplace=True, backend=backend).backward()
    assert torch.equal(leaf.grad, want)


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
@BACKENDS
def test_dense_logits(backend, memory_format):
    student, teacher = (torch.randn(2, 5, 4, 3).contiguous(memory_format=memory_format) for _ in "st")
    target = torch.randint(5, (2, 4, 3))
    leaf = student.requires_grad_()
    call = partial(fused_sort_kd, teacher=teacher, target=target, class_dim=1, backend=backend)
    (want,) = torch.autograd.grad(call(leaf), leaf)
    logits = leaf * 1
    if not logits.is_contiguous():
        with pytest.raises(ValueError, match="expected a contiguous student with inplace=True"):
            call(logits, inplace=True)
        return
    address = logits.data_ptr()
    (grad,) = torch.autograd.grad(call(logits, inplace=True), logits)
    assert grad.data_ptr() == address
    assert torch.equal(grad, want)


@BACKENDS
def test_a_leaf_is_refused(backend):
    leaf, _, teacher, target = logits_of(F32)
    before = leaf.detach().clone()
    with pytest.raises(ValueError, match="got a leaf tensor that requires grad, whose values would be lost"):
        fused_sort_kd(leaf, teacher, target, inplace=True, backend=backend)
    assert torch.equal(leaf, before)


VIEWS_OF_A_LEAF = {
    "reshaped": lambda p: p.view(12, 9),
    "a part": lambda p: p.view(2, 12, 9)[1],
    "a view of a view": lambda p: p.view(2, 12, 9)[0].view(4, 3, 9).flatten(0, 1),
    "detached": lambda p: p.detach().view(-1, 9)[:12].requires_grad_(),
}


@pytest.mark.parametrize("dtype", (F32, F16), ids=str)
@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_a_view_of_a_leaf_is_refused(backend, dtype):
    """The values of a parameter would be lost through it."""
    rows = cases.make_rows(12, 9)
    for name, view in VIEWS_OF_A_LEAF.items():
        sizes = (12 * 9,) if name == "reshaped" else (2 * 12 * 9,)
        parameter = torch.nn.Parameter(torch.randn(sizes).to(dtype))
        before = parameter.detach().clone()
        logits = view(parameter)
        with pytest.raises(
            ValueError, match=r"got a (view of a )?leaf tensor that requires grad, whose values would be lost"
        ):
            fused_sort_kd(logits, rows.teacher.to(dtype), rows.target, inplace=True, backend=backend)
        assert torch.equal(parameter, before), name


@pytest.mark.parametrize("dtype", (F32, F16), ids=str)
@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_a_teacher_that_overlaps_in_part_is_refused(backend, dtype):
    """One row further in the same memory, and the first classes of the same rows."""
    logits = cases.make_rows(13, 9, (dtype, dtype)).student.requires_grad_() + 0
    target = cases.make_rows(12, 9).target
    before, student, values = logits.detach().clone(), logits[1:], logits.detach()[1:, :3]
    with pytest.raises(ValueError, match="one that overlaps it in part"):
        fused_sort_kd(student, logits.detach()[:-1], target, inplace=True, backend=backend)
    with pytest.raises(ValueError, match="one that overlaps it in part"):
        fused_sort_kd_topk(student, values, values.argsort(-1), target, inplace=True, backend=backend)
    assert torch.equal(logits, before)


@EVERY_DTYPE
@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_the_student_as_its_own_teacher(backend, dtype):
    """The very same elements on both sides: the teacher's are read after the first gradients are written."""
    for N, C in ((12, 9), (3, 130) if backend in cases.LOGITS_LIMIT else (12, 400)):
        rows = cases.make_rows(N, C, (dtype, dtype))
        leaf = rows.student.requires_grad_()
        call = partial(fused_sort_kd, target=rows.target, ce_weight=0.2, backend=backend)
        (want,) = torch.autograd.grad(call(leaf, leaf.detach().clone()), leaf)
        logits = leaf + 0
        (grad,) = torch.autograd.grad(call(logits, logits.detach(), inplace=True), logits)
        assert torch.equal(grad, want)


@BACKENDS
def test_strided_logits_are_refused(backend):
    _, logits, teacher, target = logits_of(F32)
    with pytest.raises(ValueError, match=r"expected a contiguous student with inplace=True.*got strides \[1, 12\]"):
        fused_sort_kd(logits.T.contiguous().T, teacher, target, inplace=True, backend=backend)


@EVERY_DTYPE
@BACKENDS
def test_an_op_that_needs_the_logits_raises(backend, dtype):
    """tanh's derivative is a function of its output, which is gone: an error, never a wrong gradient."""
    for activation in (torch.tanh, torch.sigmoid, torch.exp):
        leaf, _, teacher, target = logits_of(dtype)
        loss = fused_sort_kd(activation(leaf), teacher, target, inplace=True, backend=backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@EVERY_DTYPE
@BACKENDS
def test_retained_graph(backend, dtype):
    """Two backward calls through one graph give the same gradient, in place or not."""
    leaf, logits, teacher, target = logits_of(dtype)
    (want,) = torch.autograd.grad(fused_sort_kd(leaf, teacher, target, backend=backend) * 3, leaf)
    loss = fused_sort_kd(logits, teacher, target, inplace=True, backend=backend) * 3
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(kept, want)
    assert torch.equal(second, want)


@BACKENDS
def test_without_gradient_nothing_is_written(backend):
    _, logits, teacher, target = logits_of(F32)
    before = logits.detach().clone()
    with torch.no_grad():
        fused_sort_kd(logits, teacher, target, inplace=True, backend=backend)
    temperature = torch.tensor(2.0, requires_grad=True)
    frozen = logits.detach()
    fused_sort_kd(frozen, teacher, target, temperature=temperature, inplace=True, backend=backend).backward()
    assert torch.equal(logits, before) and torch.equal(frozen, before)


@BACKENDS
def test_rows_of_a_larger_tensor(backend):
    """A view is written through: its base loses those rows only."""
    leaf, logits, teacher, target = logits_of(F32)
    (want,) = torch.autograd.grad(fused_sort_kd(leaf[3:7], teacher[3:7], target[3:7], backend=backend), leaf)
    before = logits.detach().clone()
    fused_sort_kd(logits[3:7], teacher[3:7], target[3:7], inplace=True, backend=backend).backward()
    assert torch.equal(leaf.grad, want)
    assert torch.equal(logits[:3], before[:3]) and torch.equal(logits[7:], before[7:])


@BACKENDS
def test_compiled(backend, fresh_compiler):
    """In a trace the compiler plans the memory: the permission is not used, and the gradient is right."""
    leaf, _, teacher, target = logits_of(F32)
    (want,) = torch.autograd.grad(fused_sort_kd(leaf, teacher, target, backend=backend), leaf)
    compiled = torch.compile(
        lambda s: fused_sort_kd(s + 0, teacher, target, inplace=True, backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    compiled(leaf).backward()
    assert torch.equal(leaf.grad, want)
