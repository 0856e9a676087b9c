"""A teacher served as its top k: the same loss as the full row that it stands for, label inside or outside."""

from __future__ import annotations

import math

import cases
import pytest
import torch
from cases import BF16, F16, F32, F64, IGNORE, Rows, Variant
from tolerance import Yardstick, assert_matches, expect

from sortkd_kernels import fused_sort_kd, fused_sort_kd_topk

pytestmark = pytest.mark.usefixtures("poisoned_memory")

VARIANTS = (
    Variant("scalar-T-rows-ce", {"reduction": "none", "ce_weight": 0.3}, temperature="scalar"),
    Variant("rows-ce", {"reduction": "none", "ce_weight": 0.3}),
    Variant("sort"),
    Variant("swap-T1", {"correction": "swap", "ce_weight": 0.5}, temperature=1.0),
    Variant("none", {"correction": "none", "reduction": "sum"}, temperature=2.0),
    Variant("row-T", temperature="row"),
)


def make_top_k(N, C, k, tail, dtypes=(F32, F32)):
    """Rows, and the k largest of each teacher, shuffled. Labels lie inside and outside the k."""
    rows = cases.make_rows(N, C, dtypes)
    teacher = rows.teacher.double()
    if tail == "uniform":
        teacher = teacher.log_softmax(-1)
    values, indices = teacher.topk(k)
    order = torch.rand(N, k, generator=torch.Generator().manual_seed(k)).argsort(-1)
    return rows, values.gather(1, order).to(dtypes[1]), indices.gather(1, order)


def full_row(values: list[float], indices: list[int], C: int, tail: str) -> list[float]:
    """What a top-k row stands for, by the docstring, in Python floats."""
    left = max(0.0, 1 - math.fsum(math.exp(v) for v in values))
    absent = math.log(left / (C - len(values))) if tail == "uniform" and len(values) < C and left else -math.inf
    row = [absent] * C
    for value, index in zip(values, indices, strict=True):
        row[index] = value
    return row


def conditioned(yardstick: Yardstick, values: torch.Tensor) -> Yardstick:
    """What the values leave to 1 has, in float32, the error of a number near 1. The native kernel has it in float64."""
    left = (1 - values.double().exp().sum(-1)).clamp_min(torch.finfo(F32).eps)
    worst = 1 / left.min()
    return Yardstick(*(x * (1 / left).view(-1, *(1,) * (x.dim() - 1)) if x.dim() else x * worst for x in yardstick))


def check(backend, variant, tail, N, C, k, dtypes=(F32, F32), wrap=lambda f: f):
    rows, values, indices = make_top_k(N, C, k, tail, dtypes)
    full = [full_row(v, i, C, tail) for v, i in zip(values.double().tolist(), indices.tolist(), strict=True)]
    want = expect(Rows(rows.student, torch.tensor(full, dtype=F64).view(N, C), rows.target), variant)
    # The truth takes the full rows in float64; the call's arithmetic follows the dtype of the values.
    want = want._replace(rows=Rows(rows.student, values, rows.target))
    if tail == "uniform" and backend != "native":
        want = want._replace(yardstick=conditioned(want.yardstick, values))

    def call(student, values, target, temperature):
        return fused_sort_kd_topk(
            student, values, indices.to(student.device), target, tail=tail, temperature=temperature, backend=backend, return_parts=True,
            **variant.options,
        )  # fmt: skip

    assert_matches(cases.run(want.rows, variant, backend, lambda _: wrap(call)), want)


@pytest.mark.parametrize(("backend", "variant"), cases.calls(VARIANTS), ids=str)
@pytest.mark.parametrize("tail", ("renormalize", "uniform"))
def test_stands_for_a_full_row(backend, tail, variant):
    interpreted = backend in cases.LOGITS_LIMIT
    for k in (2, 12) if interpreted else (1, 2, 7, 12):
        check(backend, variant, tail, 7 if interpreted else 24, 12, k)


@pytest.mark.parametrize("dtypes", [(F64, F64), (BF16, BF16), (F16, F16), (F32, F16), (F16, F64)], ids=cases.dtype_id)
@pytest.mark.parametrize("tail", ("renormalize", "uniform"))
@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_dtypes(backend, tail, dtypes):
    check(backend, VARIANTS[1], tail, 6, 12, 5, dtypes)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("tail", ("renormalize", "uniform"))
def test_few_of_many(tail, variant):
    """The native kernel never writes the absent classes out: whole vectors, and blocks of them, hold nothing of the k."""
    for k in (1, 7, 64):
        check("native", variant, tail, 24, 3001, k)


@pytest.mark.parametrize("tail", ("renormalize", "uniform"))
def test_a_vocabulary(tail):
    check("native", VARIANTS[1], tail, 7, 32000, 64)


@pytest.mark.parametrize(("backend", "variant"), cases.calls(VARIANTS), ids=str)
def test_label_among_the_k_below_the_tail(backend, variant):
    """A server may append the label's own value, however small: then absent classes are above it, and move too."""
    C, k = 40, 3
    rows = cases.make_rows(6, C)
    target = torch.tensor([0, 17, 39, 20, 31, 16])
    indices = torch.stack([(target + 5) % C, target, (target + 23) % C], 1)
    values = torch.tensor([[0.3, 1e-6, 0.2]]).log().expand(6, k).contiguous()
    full = [full_row(v, i, C, "uniform") for v, i in zip(values.double().tolist(), indices.tolist(), strict=True)]
    want = expect(Rows(rows.student, torch.tensor(full, dtype=F64), target), variant)
    want = want._replace(rows=Rows(rows.student, values, target), yardstick=conditioned(want.yardstick, values))

    def call(student, values, target, temperature):
        return fused_sort_kd_topk(
            student, values, indices, target, tail="uniform", temperature=temperature, backend=backend,
            return_parts=True, **variant.options,
        )  # fmt: skip

    result = cases.run(want.rows, variant, backend, lambda _: call)
    assert_matches(result, want)


@pytest.mark.parametrize(("backend", "variant"), cases.calls(VARIANTS), ids=str)
@pytest.mark.parametrize("tail", ("renormalize", "uniform"))
def test_k_of_all_classes_is_the_full_op(backend, tail, variant):
    """With k = C nothing is absent, the values need not be log-probabilities, and the truth is that of the full op."""
    rows = cases.make_rows(6 if backend in cases.LOGITS_LIMIT else 24, 12)
    values, indices = rows.teacher.sort(descending=True)

    def call(student, _, target, temperature):
        return fused_sort_kd_topk(
            student, values, indices, target, tail=tail, temperature=temperature, backend=backend, return_parts=True,
            **variant.options,
        )  # fmt: skip

    assert_matches(cases.run(rows, variant, backend, lambda _: call), expect(rows, variant))


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_label_outside_is_below_all_of_the_k(backend):
    """It takes the largest value, each of the k the next lower one, and the last of them what is absent: -inf."""
    student = torch.randn(1, 6)
    values, indices = torch.tensor([[3.0, 1.0]]), torch.tensor([[4, 2]])
    out = fused_sort_kd_topk(student, values, indices, torch.tensor([0]), backend=backend, return_parts=True)
    corrected = torch.tensor([[3.0, -math.inf, -math.inf, -math.inf, 1.0, -math.inf]])
    assert out.rank.item() == 2
    torch.testing.assert_close(
        out.loss, fused_sort_kd(student, corrected, torch.tensor([0]), correction="none", backend="reference")
    )


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_log_probabilities_that_sum_to_more_than_one(backend):
    """Rounding leaves a hair above 1: then nothing is left for the tail, and nothing is NaN."""
    student = torch.randn(2, 6, requires_grad=True)
    values = torch.tensor([[math.log(0.75) + 1e-6, math.log(0.25) + 1e-6]]).expand(2, 2)
    indices, target = torch.tensor([[4, 2], [1, 0]]), torch.tensor([4, 3])
    losses = [
        fused_sort_kd_topk(student, values, indices, target, tail=tail, backend=backend)
        for tail in ("renormalize", "uniform")
    ]
    assert losses[0].isfinite()
    assert torch.equal(*losses)


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_rules_hold_for_top_k(backend):
    """NaN touches its own row only; an ignored row may hold anything, indices in range."""
    student, teacher, target = cases.make_rows(6, 12)
    values, indices = teacher.topk(5)
    target[:] = torch.arange(6)
    target[4] = IGNORE
    call = dict(reduction="none", backend=backend)
    clean = fused_sort_kd_topk(student, values, indices, target, **call)
    for tail in ("renormalize", "uniform"):
        dirty_values, dirty_student = values.log_softmax(-1).clone(), student.clone()
        clean = fused_sort_kd_topk(student, dirty_values, indices, target, tail=tail, **call)
        dirty_values[1, 3] = dirty_values[4, 0] = math.nan
        dirty_student[2, 7] = dirty_student[4, 7] = math.nan
        dirty_student.requires_grad_()
        loss = fused_sort_kd_topk(dirty_student, dirty_values, indices, target, tail=tail, **call)
        loss.sum().backward()
        hurt = torch.tensor([False, True, True, False, False, False])
        assert loss[hurt].isnan().all() and dirty_student.grad[hurt].isnan().all()
        assert torch.equal(loss[~hurt], clean[~hurt]) and dirty_student.grad[~hurt].isfinite().all()
        assert loss[4] == 0 and not dirty_student.grad[4].any()


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_compiled(backend, fresh_compiler):
    check(
        backend, VARIANTS[1], "uniform", 12, 12, 5,
        wrap=lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"),
    )  # fmt: skip
