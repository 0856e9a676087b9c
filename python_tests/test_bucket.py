"""`tail="bucket"`: the k classes and one with the mass that is left, against a float64 form of full rows, merged.

The full row is that of `tail="uniform"`; it is corrected by `reference.correct_logits`, and the absent classes that still
hold a share are one class then.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cases
import pytest
import torch
from cases import BF16, F16, F32, F64, IGNORE, Variant
from torch.nn import functional as F

from sortkd_kernels import SortKDTopKOutput, fused_sort_kd_topk, ops, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

VARIANTS = (
    Variant("sort-T4-rows", {"reduction": "none", "ce_weight": 0.3}),
    Variant("none-T2-ce", {"correction": "none", "ce_weight": 0.5}, temperature=2.0),
    Variant("sort-T1"),
    Variant("swap-T1-ce", {"correction": "swap", "ce_weight": 0.5, "kd_weight": 0.7}, temperature=1.0),
    Variant("none-T1", {"correction": "none", "reduction": "sum"}, temperature=1.0),
    Variant("ce-alone", {"ce_weight": 1.0, "kd_weight": 0.0}),
    Variant("scalar-T", {"ce_weight": 0.2}, temperature="scalar"),
    Variant("none-row-T", {"correction": "none"}, temperature="row"),
    Variant("swap-row-T", {"correction": "swap", "reduction": "none"}, temperature="row"),
)


class Served(NamedTuple):
    student: torch.Tensor
    values: torch.Tensor
    indices: torch.Tensor
    target: torch.Tensor


def serve(N, C, k, dtype=F32, values_dtype=F32):
    """A teacher's top k, in any order; labels first, last, among and outside of the k, one of them listed twice."""
    generator = torch.Generator().manual_seed(C * 131 + k)
    student = 3 * torch.randn(N, C, generator=generator, dtype=F64)
    teacher = (3 * torch.randn(N, C, generator=generator, dtype=F64)).log_softmax(-1)
    values, indices = teacher.topk(k)
    order = torch.rand(N, k, generator=generator).argsort(-1)
    values, indices = values.gather(1, order), indices.gather(1, order)
    target = torch.randint(C, (N,), generator=generator)
    for n in range(N):
        kind = n % 6
        if kind < 3:
            target[n] = indices[n, (0, k - 1, k // 2)[kind]]
        if kind == 1 and k > 2:  # the label's own value, appended although it is there
            values[n, k - 1], indices[n, k - 1] = values[n, 0] - 2, indices[n, 0]
            target[n] = indices[n, 0]
        if kind == 3:
            target[n] = IGNORE
    return Served(student.to(dtype), values.to(values_dtype), indices, target)


def merged(s: torch.Tensor, groups: list[list[int]]) -> torch.Tensor:
    return torch.stack([s[group].logsumexp(0) if group else s.new_tensor(-math.inf) for group in groups])


def naive_row(s, values, indices, label, T, correction):
    """KD, the cross-entropy and the rank of a row: Python's floats and lists, by the docstring."""
    C, of_class = len(s), {}
    for value, c in zip(values, indices, strict=True):
        of_class.setdefault(c, value)
    absent = [c for c in range(C) if c not in of_class]
    left = max(0.0, 1 - math.fsum(map(math.exp, of_class.values())))
    share = math.log(left / len(absent)) if absent and left else -math.inf
    full = torch.full((C,), share, dtype=F64)
    if label in of_class:  # the bucket is above no label
        full[:] = -math.inf
    full[list(of_class)] = torch.tensor(list(of_class.values()), dtype=F64)
    rank = int((full > full[label]).sum())
    full = reference.correct_logits(full[None], torch.tensor([label]), correction)[0]
    full[[c for c in absent if c != label or label in of_class]] = share
    bucket = [c for c in absent if c != label or correction == "none"]
    inside = set(bucket)
    groups = [[c] for c in range(C) if c not in inside] + [bucket]
    s_groups, t_groups = merged(s, groups), merged(full, groups)
    if correction == "none" and absent:  # all of what is left, whoever holds it
        t_groups[-1] = math.log(left) if left else -math.inf
    keep = ~((s_groups == -math.inf) & (t_groups == -math.inf))
    log_p, log_q = (t_groups[keep] / T).log_softmax(0), (s_groups[keep] / T).log_softmax(0)
    kd = T**2 * (log_p.exp() * torch.where(log_p == -math.inf, 0.0, log_p - log_q)).sum()
    return kd, F.cross_entropy(s, torch.tensor(label)), rank


def truth(served: Served, variant: Variant) -> cases.Result:
    student = served.student.double().requires_grad_()
    temperature = variant.make_temperature(len(student), F64)
    rows_T = torch.as_tensor(temperature, dtype=F64).expand(len(student))
    kd, ce, rank = [], [], []
    for n, label in enumerate(served.target.tolist()):
        row = student[n].sum() * 0, student[n].sum() * 0, 0
        if label != IGNORE:
            row = naive_row(
                student[n], served.values[n].double().tolist(), served.indices[n].tolist(), label, rows_T[n],
                variant.options.get("correction", "sort"),
            )  # fmt: skip
        for many, one in zip((kd, ce, rank), row, strict=True):
            many.append(one)
    reduction, count = variant.options.get("reduction", "mean"), (served.target != IGNORE).sum()
    kd, ce = torch.stack(kd), torch.stack(ce)
    if reduction != "none":
        kd, ce = (x.sum() / (count if reduction == "mean" else 1) for x in (kd, ce))
    loss = variant.options.get("kd_weight", 1.0) * kd + variant.options.get("ce_weight", 0.0) * ce
    loss.backward(cases.grad_output_of(loss))
    of_T = cases.gradient_of(temperature)
    return cases.Result(
        *(x.detach() for x in (loss, kd, ce)), torch.tensor(rank, dtype=torch.int32), student.grad, of_T
    )


def run(served: Served, variant: Variant, backend, wrap=lambda f: f) -> cases.Result:
    def call(student, values, target, temperature):
        return fused_sort_kd_topk(
            student, values, served.indices.to(student.device), target, tail="bucket", temperature=temperature, backend=backend,
            return_parts=True, **variant.options,
        )  # fmt: skip

    rows = cases.Rows(served.student, served.values, served.target)
    return cases.run(rows, variant, backend, lambda _: wrap(call))


def compare(got: cases.Result, want: cases.Result, served: Served, variant: Variant) -> None:
    """A loss is a sum of some k terms, each a probability times a difference of logarithms of up to 30, and multiplied
    by T^2 <= 36: 2^10 roundings of one. A gradient is T times a difference of two probabilities, each with a rounding
    for each unit of its exponent, which is up to 30, and is rounded to the student's dtype once or, rescaled, twice.
    """
    work = cases.arithmetic(served.student.dtype, served.values.dtype)
    roundings = 2**10 * torch.finfo(work).eps / 2
    assert torch.equal(got.rank, want.rank)
    for name in ("loss", "kd", "ce"):
        assert getattr(got, name).dtype == work
        torch.testing.assert_close(getattr(got, name).double(), getattr(want, name), rtol=roundings, atol=roundings)
    if want.grad_temperature is not None:
        torch.testing.assert_close(
            got.grad_temperature.double(), want.grad_temperature, rtol=8 * roundings, atol=8 * roundings
        )
    dtype = torch.finfo(served.student.dtype)
    rounded = (4 if got.truncates else 1) * dtype.eps
    scale = 4 * want.grad.abs().max().item()
    torch.testing.assert_close(
        got.grad.double(), want.grad, rtol=rounded + roundings, atol=roundings / 4 * scale + 4 * dtype.smallest_normal
    )


def check(backend, variant, N, C, k, dtypes=(F32, F32), wrap=lambda f: f):
    served = serve(N, C, k, *dtypes)
    compare(run(served, variant, backend, wrap), truth(served, variant), served, variant)


@pytest.mark.parametrize(("backend", "variant"), cases.calls(VARIANTS), ids=str)
def test_matches_full_rows_merged(backend, variant):
    """k = C - 1 leaves one class absent, which a corrected label empties; k = C none."""
    interpreted = backend in cases.LOGITS_LIMIT
    for k in (1, 11, 12) if interpreted else (1, 2, 7, 11, 12):
        check(backend, variant, 7 if interpreted else 12, 12, k)


@pytest.mark.parametrize("dtypes", [(F64, F64), (BF16, BF16), (F16, F16), (F32, F16), (BF16, F32), (F32, F64)],
                         ids=cases.dtype_id)  # fmt: skip
@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_dtypes(backend, dtypes):
    for variant in VARIANTS[:2]:
        check(backend, variant, 7, 23, 5, dtypes)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_long_rows(variant):
    """Rows of many vectors with few breaks, and one in bfloat16 that is converted first."""
    check("native", variant, 12, 3001, 64)
    check("native", variant, 6, 1025, 7, (BF16, F16))


@pytest.mark.parametrize("backend", cases.KERNELS)
def test_a_label_far_from_the_rest(backend):
    """Exponentials relative to the label's logit overflow or vanish: the rows are taken relative to their maxima."""
    for shift in (-300.0, 300.0):
        for variant in VARIANTS[:2]:
            served = serve(12, 40, 5)
            labels = served.target.clamp_min(0)[:, None]
            served.student.scatter_add_(1, labels, torch.full_like(labels, shift, dtype=F32))
            compare(run(served, variant, backend), truth(served, variant), served, variant)


@pytest.mark.parametrize("tail", ("renormalize", "uniform", "bucket"))
@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_int32_indices_are_the_same(backend, tail):
    served = serve(7, 23, 5)
    results = []
    for dtype in (torch.int64, torch.int32):
        student = served.student.clone().requires_grad_()
        out = fused_sort_kd_topk(
            student, served.values, served.indices.to(dtype), served.target, tail=tail, ce_weight=0.1, backend=backend,
            return_parts=True,
        )  # fmt: skip
        out.loss.backward()
        results.append((*out, student.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tail", ("renormalize", "uniform", "bucket"))
@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_the_labels_first_entry_counts(backend, tail):
    """k + 1 entries with the label's own value at the end: where the label is among the k, they say nothing new."""
    served = serve(6, 23, 5)
    served = served._replace(target=served.indices[:, 0].contiguous())
    appended = torch.cat([served.values, torch.full((6, 1), -20.0)], 1)
    classes = torch.cat([served.indices, served.target[:, None]], 1)
    results = []
    for values, indices in ((served.values, served.indices), (appended, classes)):
        student = served.student.clone().requires_grad_()
        out = fused_sort_kd_topk(
            student, values, indices, served.target, tail=tail, reduction="none", ce_weight=0.1, backend=backend,
            return_parts=True,
        )  # fmt: skip
        out.loss.sum().backward()
        results.append((*out, student.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # sums of the same terms in another order


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_uncorrected_it_does_not_depend_on_a_label_outside(backend):
    served = serve(6, 23, 5)
    kd = []
    for which in (0, -1):
        outside = torch.tensor([[c for c in range(23) if c not in row][which] for row in served.indices.tolist()])
        out = fused_sort_kd_topk(
            served.student, served.values, served.indices, outside, tail="bucket", correction="none", reduction="none",
            backend=backend, return_parts=True,
        )  # fmt: skip
        kd.append(out.kd)
    torch.testing.assert_close(*kd, rtol=1e-5, atol=1e-6)  # the bucket's sum in another order


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_never_negative(backend):
    """The sum over the k alone goes below 0 where the student gives them more than the teacher does."""
    values = torch.tensor([[0.2, 0.1]]).log()
    indices, target = torch.tensor([[3, 1]]), torch.tensor([3])
    student = torch.tensor([[0.0, 4.0, 0.0, 5.0, 0.0]])
    log_q = student.log_softmax(-1).gather(1, indices)
    assert (values.exp() * (values - log_q)).sum() < 0
    for temperature in (1.0, 4.0):
        loss = fused_sort_kd_topk(
            student, values, indices, target, tail="bucket", temperature=temperature, backend=backend
        )
        assert loss > 0.1
    # And 0 where the two agree: a difference of terms of about 1, a few roundings each.
    agreed = torch.tensor([[0.3, 0.1, 0.3, 0.2, 0.1]]).log()
    loss = fused_sort_kd_topk(agreed, values, indices, target, tail="bucket", correction="none", backend=backend)
    assert abs(loss) < 16 * 16 * torch.finfo(F32).eps


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_nothing_left(backend):
    """Values that sum to 1, or by rounding to a hair more: the bucket's class is empty, and the label outside too."""
    student = torch.randn(2, 6, requires_grad=True)
    indices, target = torch.tensor([[4, 2], [1, 0]]), torch.tensor([4, 3])
    for hair in (0.0, 1e-6):
        values = torch.tensor([[math.log(0.75) + hair, math.log(0.25) + hair]]).expand(2, 2)
        losses = [
            fused_sort_kd_topk(student, values, indices, target, tail=tail, temperature=1.0, backend=backend)
            for tail in ("renormalize", "bucket")
        ]
        # Nothing of the teacher is in the bucket, and what the student has there is in no term but its normaliser.
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
        (grad,) = torch.autograd.grad(losses[1], student)
        assert grad.isfinite().all()


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("correction", ("none", "sort"))
def test_a_student_with_nothing_outside(backend, correction):
    """All absent classes at -inf, as a vocabulary's padding: infinite where the teacher has mass there, never NaN."""
    student = torch.full((1, 6), -math.inf)
    student[0, [4, 2]] = torch.tensor([1.0, 0.5])
    student.requires_grad_()
    values, indices, target = torch.tensor([[0.6, 0.3]]).log(), torch.tensor([[4, 2]]), torch.tensor([4])
    call = dict(tail="bucket", correction=correction, ce_weight=0.1, backend=backend)
    assert fused_sort_kd_topk(student, values, indices, target, **call) == math.inf
    # A little more than 1 in all: a logarithm rounded down would leave mass outside.
    everything = torch.tensor([[0.75, 0.25 + 2.0**-20]]).log()
    loss = fused_sort_kd_topk(student, everything, indices, target, **call)
    (grad,) = torch.autograd.grad(loss, student)
    assert loss.isfinite() and grad.isfinite().all() and not grad[0, [0, 1, 3, 5]].any()


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_masses(backend):
    """The student's and the teacher's probability of the k, for every tail; a class that comes twice counts once."""
    served = serve(7, 23, 5)
    q = served.student.double().softmax(-1)
    for tail in ("renormalize", "uniform", "bucket"):
        out = fused_sort_kd_topk(
            served.student.requires_grad_(), served.values, served.indices, served.target, tail=tail, backend=backend,
            return_parts=True,
        )  # fmt: skip
        assert isinstance(out, SortKDTopKOutput)
        assert not out.student_mass.requires_grad and not out.teacher_mass.requires_grad
        for n, label in enumerate(served.target.tolist()):
            of_class = {}
            for value, c in zip(served.values[n].double().tolist(), served.indices[n].tolist(), strict=True):
                of_class.setdefault(c, value)
            student = 0.0 if label == IGNORE else q[n, list(of_class)].sum().item()
            teacher = 0.0 if label == IGNORE else math.fsum(map(math.exp, of_class.values()))
            assert out.student_mass[n].item() == pytest.approx(student, rel=1e-5)
            assert out.teacher_mass[n].item() == pytest.approx(teacher, rel=1e-5)


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_rules(backend):
    """NaN touches its own row only; an ignored row may hold anything; an ignore_index may be a class."""
    served = serve(6, 23, 5)
    target = torch.arange(6)
    for ignore_index in (4, IGNORE):
        target[4] = ignore_index
        call = dict(tail="bucket", reduction="none", ce_weight=0.2, ignore_index=ignore_index, backend=backend)
        clean = fused_sort_kd_topk(served.student, served.values, served.indices, target, **call)
        values, student = served.values.clone(), served.student.clone()
        values[1, 3] = values[4, 0] = math.nan
        student[2, 7] = student[3, served.indices[3, 0]] = student[4, 7] = math.nan
        student.requires_grad_()
        loss = fused_sort_kd_topk(student, values, served.indices, target, **call)
        loss.sum().backward()
        hurt = torch.tensor([False, True, True, True, False, False])
        assert loss[hurt].isnan().all() and student.grad[hurt].isnan().all()
        assert torch.equal(loss[~hurt], clean[~hurt]) and student.grad[~hurt].isfinite().all()
        assert loss[4] == 0 and not student.grad[4].any()


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_normalising(backend):
    """Weights of rows and a denominator, as in every loss."""
    served = serve(7, 23, 5)
    arguments = served.values, served.indices, served.target
    weight = torch.linspace(0, 2, 7)
    student = served.student.requires_grad_()
    call = dict(tail="bucket", ce_weight=0.2, backend=backend)
    rows = fused_sort_kd_topk(student, *arguments, reduction="none", **call)
    (want,) = torch.autograd.grad((rows * weight).sum() / 7, student)
    loss = fused_sort_kd_topk(student, *arguments, reduction="sum", row_weight=weight, denominator=7, **call)
    (grad,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(loss, (rows * weight).sum() / 7)
    torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", [b for b in cases.BACKENDS if b != "reference"])
def test_leading_dimensions_and_strides(backend):
    served = serve(12, 23, 5)
    call = dict(tail="bucket", ce_weight=0.2, backend=backend)
    want = torch.autograd.grad(fused_sort_kd_topk(served.student.requires_grad_(), *served[1:], **call), served.student)
    values, indices, target = (x.view(3, 4, *x.shape[1:]) for x in served[1:])
    for student in (served.student.view(3, 4, 23), served.student.view(3, 4, 23).mT.contiguous().mT):
        student = student.detach().requires_grad_()
        (grad,) = torch.autograd.grad(fused_sort_kd_topk(student, values, indices, target, **call), student)
        assert grad.stride() == torch.empty_like(student).stride()
        torch.testing.assert_close(grad.reshape(12, 23), *want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_no_rows(backend):
    student = torch.empty(0, 9, requires_grad=True)
    out = fused_sort_kd_topk(
        student, torch.empty(0, 3), torch.empty(0, 3, dtype=torch.int32), torch.empty(0, dtype=torch.int64),
        tail="bucket", reduction="sum", backend=backend, return_parts=True,
    )  # fmt: skip
    out.loss.backward()
    assert out.loss == 0 and student.grad.shape == (0, 9) and out.student_mass.shape == (0,)


@pytest.mark.parametrize("correction", ("none", "sort", "swap"))
@pytest.mark.parametrize("backend", ("native", "reference"))
def test_gradcheck(backend, correction):
    served = serve(6, 9, 4, F64, F64)
    temperature = torch.tensor(2.5, dtype=F64, requires_grad=True)

    def loss(student, temperature):
        return fused_sort_kd_topk(
            student, *served[1:], tail="bucket", correction=correction, temperature=temperature, ce_weight=0.4,
            reduction="none", backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (served.student.requires_grad_(), temperature))


@pytest.mark.parametrize("backend", [b for b in cases.BACKENDS if b != "simt"])
def test_compiled(backend, fresh_compiler):
    check(backend, VARIANTS[0], 12, 12, 5, wrap=lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"))


@pytest.mark.parametrize("dtype", (F32, F16), ids=str)
def test_opcheck(dtype):
    served = serve(6, 9, 3, dtype)
    op = torch.ops.sortkd_kernels.sort_kd_forward.default
    for correction in (0, 1):
        config = ops.LossConfig(tail=ops.BUCKET, correction=correction, reduction=1, parts=True, ce_weight=0.1)
        teacher, _ = ops.bucket_teacher("native", *served[1:], 9, config, F32)
        torch.library.opcheck(
            op, (served.student, teacher, served.indices.int(), served.target, None, *config, None, True, False)
        )
    with pytest.raises(ValueError, match="expected reduction none or sum with the bucket, got mean"):
        op(
            served.student,
            teacher,
            served.indices,
            served.target,
            None,
            *config._replace(reduction=2),
            None,
            True,
            False,
        )


@pytest.mark.parametrize("backend", ("native", "reference"))
def test_a_class_that_is_not_there(backend):
    served = serve(6, 9, 3)
    for parts in (False, True):
        call = dict(tail="bucket", backend=backend, return_parts=parts)
        wrong = served.indices.int().index_fill(1, torch.tensor([2]), 9)
        with pytest.raises(IndexError, match=r"expected teacher_indices in \[0, 9\), got 9"):
            fused_sort_kd_topk(served.student, served.values, wrong, served.target, **call)
        with pytest.raises(IndexError, match="expected target in"):
            fused_sort_kd_topk(served.student, served.values, served.indices, served.target + 9, **call)
        with pytest.raises(ValueError, match="0 < k <= 9"):
            fused_sort_kd_topk(served.student, torch.randn(6, 10), torch.zeros(6, 10).int(), served.target, **call)
