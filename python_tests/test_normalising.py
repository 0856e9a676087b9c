"""What a loss is divided by, and the weights of its rows: in the same pass, and right in every reduction."""

from __future__ import annotations

import math

import cases
import pytest
import torch
from cases import F16, F32, F64, IGNORE
from torch._dynamo.testing import CompileCounterWithBackend

from sortkd_kernels import SortKDLoss, fused_sort_dkd, fused_sort_kd, fused_sort_kd_topk

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EVERY_BACKEND = pytest.mark.parametrize("backend", cases.BACKENDS)


def rows_of(N=12, C=9, dtype=F32):
    student, teacher, target = cases.make_rows(N, C, (dtype, dtype))
    return student.requires_grad_(), teacher, target


@pytest.mark.parametrize("dtype", (F32, F16), ids=str)
@EVERY_BACKEND
def test_micro_batches_with_one_denominator_are_the_batch(backend, dtype):
    """Four micro-batches, the second of them all ignored, as a trainer accumulates them: the mean of the whole batch."""
    student, teacher, target = rows_of(dtype=dtype)
    target[3:6] = IGNORE
    tokens = (target != IGNORE).sum()
    (want,) = torch.autograd.grad(fused_sort_kd(student, teacher, target, ce_weight=0.3, backend=backend), student)
    for denominator in (tokens, int(tokens), tokens.double()):
        student.grad, total = None, 0.0
        for part in torch.arange(12).split(3):
            loss = fused_sort_kd(
                student[part], teacher[part], target[part], ce_weight=0.3, reduction="sum", denominator=denominator,
                backend=backend,
            )  # fmt: skip
            loss.backward()
            total += loss.detach()
        torch.testing.assert_close(
            total, fused_sort_kd(student, teacher, target, ce_weight=0.3, backend=backend).detach()
        )
        # One rounding of the same number each; 1 / 9 is multiplied where the mean divides. A row that begins elsewhere
        # in memory may be summed in another order, and its gradient is a difference of probabilities.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(student.grad, want, rtol=4 * eps, atol=eps * want.abs().max().item())


@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
@pytest.mark.parametrize("method", ("kd", "dkd", "top-k", "learned"))
@EVERY_BACKEND
def test_row_weights(backend, method, reduction):
    """Each row's loss times its weight, by hand from the losses of the rows; parts and gradients alike."""
    student, teacher, target = rows_of()
    weight = torch.linspace(0, 2, 12)
    temperature = torch.tensor(2.0, requires_grad=True) if method == "learned" else 2.0
    values, indices = teacher.topk(3)

    def call(**options):
        options |= dict(temperature=temperature, ce_weight=0.3, return_parts=True)
        if method == "top-k":
            return fused_sort_kd_topk(student, values, indices, target, **options)
        return (fused_sort_dkd if method == "dkd" else fused_sort_kd)(student, teacher, target, **options)

    rows = call(reduction="none", backend="reference")
    count = {"none": 1, "sum": 1, "mean": (target != IGNORE).sum()}[reduction]
    by_hand = [(x * weight / count) if reduction == "none" else (x * weight).sum() / count for x in rows[:3]]
    got = call(reduction=reduction, row_weight=weight, backend=backend)
    inputs = [student, *([temperature] if method == "learned" else [])]
    for mine, other in zip(got[:3], by_hand, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert torch.equal(got.rank, rows.rank)
    grad_output = torch.linspace(1, 2, got.loss.numel()).view_as(got.loss)
    mine, other = (torch.autograd.grad((x * grad_output).sum(), inputs) for x in (got.loss, by_hand[0]))
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@EVERY_BACKEND
def test_both_in_a_compiled_step(backend, fresh_compiler):
    """A denominator that changes from step to step, as a tensor, compiles once."""
    student, teacher, target = rows_of()
    loss = SortKDLoss(reduction="sum", backend=backend)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda s, n, w: loss(s, teacher, target, denominator=n, row_weight=w), backend=counter, fullgraph=True
    )
    for tokens in (7, 9, 31):
        arguments = torch.tensor(tokens), torch.rand(12)
        grads = [
            torch.autograd.grad(f(student, *arguments), student)[0]
            for f in (compiled, lambda s, n, w: loss(s, teacher, target, denominator=n, row_weight=w))
        ]
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9)
    assert counter.frame_count == 1


def test_gradients_in_float64():
    student, teacher, target = rows_of(6, 5, F64)
    temperature = torch.tensor(2.0, dtype=F64, requires_grad=True)
    weight = torch.rand(6, dtype=F64)
    torch.autograd.gradcheck(
        lambda s, t: fused_sort_kd(
            s, teacher, target, temperature=t, row_weight=weight, reduction="sum", denominator=3.5, backend="native"
        ),
        (student, temperature),
    )


BAD = [
    ({"denominator": 0.0}, ValueError, "expected denominator to be positive, got 0.0"),
    ({"denominator": -2}, ValueError, "expected denominator to be positive, got -2"),
    ({"denominator": math.nan}, ValueError, "expected denominator to be finite, got nan"),
    ({"denominator": True}, TypeError, "expected denominator to be a number, got bool"),
    ({"denominator": torch.ones(2)}, ValueError, r"expected denominator to be a number or a 0-d tensor, got \(2,\)"),
    ({"denominator": torch.ones((), requires_grad=True)}, ValueError, "expected denominator without requires_grad"),
    ({"denominator": 3, "reduction": "mean"}, ValueError, "expected reduction=\"sum\" with a denominator, got reduction='mean'"),
    ({"denominator": 3, "reduction": "none"}, ValueError, "got reduction='none'"),
    ({"row_weight": torch.ones(3)}, ValueError, r"expected row_weight of shape \(12,\), one value a row, got \(3,\)"),
    ({"row_weight": torch.ones(12, dtype=torch.int64)}, TypeError, "row_weight to be a tensor of a float dtype, got int64"),
    ({"row_weight": 2.0}, TypeError, "row_weight to be a tensor of a float dtype, got float"),
    ({"row_weight": torch.ones(12, requires_grad=True)}, ValueError, "expected row_weight without requires_grad"),
    ({"row_weight": torch.ones(12, device="meta")}, ValueError, "expected row_weight on cpu like student, got meta"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "words"), BAD, ids=str)
def test_bad_input(options, kind, words):
    with pytest.raises(kind, match=words):
        fused_sort_kd(*rows_of(), **({"reduction": "sum"} | options))
