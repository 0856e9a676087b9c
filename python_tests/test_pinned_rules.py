"""The rules that the paper's code leaves open: ties, NaN, infinities, ignored rows, no rows, one class."""

from __future__ import annotations

import itertools
import math

import cases
import pytest
import torch
from cases import F32, IGNORE, Variant
from tolerance import assert_matches, expect
from torch.nn import functional as F

from sortkd_kernels import fused_sort_dkd, fused_sort_kd, sort_logits

pytestmark = pytest.mark.usefixtures("poisoned_memory")

VARIANTS = [cases.BY_NAME[n] for n in ("rows", "T4-ce-rows", "row-T-swap-rows", "lskd-rows", "dkd-swap-rows")] + [
    Variant("dkd-rows-row-T", {"reduction": "none"}, True, "row"),
    Variant("lskd-rows-ce", {"reduction": "none", "standardize": True, "ce_weight": 0.2}, False, 2.0),
]  # fmt: skip
EVERY_BACKEND = pytest.mark.parametrize("backend", cases.BACKENDS)


def gradients(rows, variant, backend):
    result = cases.run(rows, variant, backend)
    return result.loss, result.grad, result.grad_temperature


@pytest.mark.parametrize(("backend", "variant"), cases.calls(VARIANTS), ids=str)
@pytest.mark.parametrize("side", ("student", "teacher"))
def test_nan_touches_its_own_row_only(backend, side, variant):
    """At the label, in the last class or in the largest other. The other rows, in the same tile and vector, keep every bit;
    the row's own loss and gradient are NaN."""
    slow = backend in cases.LOGITS_LIMIT
    clean_rows = cases.make_rows(6 if slow else 24, 17)
    clean = gradients(clean_rows, variant, backend)
    for place in ("label", "last class", "largest other"):
        rows = cases.Rows(*(x.clone() for x in clean_rows))
        logits = getattr(rows, side)
        hurt = torch.zeros(len(rows.target), dtype=torch.bool)
        for n in (1, 3) if slow else (3, 6, 7, 8, 21):  # of every kind: right, wrong by a few, random, last
            label = int(rows.target[n])
            others = logits[n].index_fill(0, torch.tensor(label), -math.inf)
            logits[n, {"label": label, "last class": 16, "largest other": int(others.argmax())}[place]] = math.nan
            hurt[n] = True
        assert not (hurt & (rows.target == IGNORE)).any()
        dirty = gradients(rows, variant, backend)
        for before, after in zip(clean, dirty, strict=True):
            if before is not None:
                assert after[hurt].isnan().all(), place
                assert torch.equal(after[~hurt], before[~hurt]), place


@pytest.mark.parametrize(
    ("C", "correction"), [*((C, "sort") for C in (1, 2, 8, 16, 17, 64, 3000)), (17, "swap"), (17, "none")], ids=str
)
@pytest.mark.parametrize("backend", cases.KERNELS)
def test_nan_anywhere_ends(backend, C, correction):
    """Each class in turn, the label above and below the others: nothing hangs or reads past the row."""
    places = range(C) if C < 100 else (0, 1, 1499, 2991, 2998, 2999)
    for ascending in (False, True):
        teacher = torch.arange(C, dtype=F32).repeat(len(places), 1)
        teacher = teacher if ascending else teacher.flip(-1)
        teacher[torch.arange(len(places)), torch.tensor(places)] = math.nan
        for label in (0, C // 2, C - 1):
            target = torch.full((len(places),), label)
            assert sort_logits(teacher, target, correction=correction, backend=backend).isnan().all()
            student = torch.randn(len(places), C, requires_grad=True)
            loss = fused_sort_kd(student, teacher, target, correction=correction, reduction="none", backend=backend)
            loss.sum().backward()
            assert loss.isnan().all() and student.grad.isnan().all()


@EVERY_BACKEND
def test_sort_logits_with_nan(backend):
    """A row with a NaN is all NaN; the others are exact; an ignored row is returned as it is, NaN included."""
    teacher = torch.randn(5, 9)
    target = torch.tensor([2, 2, IGNORE, 2, 2])
    clean = sort_logits(teacher, target, backend=backend)
    teacher[1, 4] = teacher[2, 4] = teacher[4, 2] = math.nan
    got = sort_logits(teacher, target, backend=backend)
    assert got[1].isnan().all() and got[4].isnan().all()
    assert torch.equal(got[[0, 3]], clean[[0, 3]])
    assert torch.equal(got[2].nan_to_num(7.0), teacher[2].nan_to_num(7.0))


@pytest.mark.parametrize(("backend", "variant"), cases.calls(VARIANTS), ids=str)
def test_ignored_rows_may_hold_anything(backend, variant):
    rows = cases.make_rows(18, 9)
    clean = gradients(rows, variant, backend)
    ignored = rows.target == IGNORE
    assert ignored.sum() == 3
    for filler in (math.nan, math.inf, -math.inf, 1e30):
        rows.student[ignored] = filler
        rows.teacher[ignored] = filler
        for before, after in zip(clean, gradients(rows, variant, backend), strict=True):
            if before is not None:
                assert torch.equal(before, after), filler
                assert not after[ignored].any()


@pytest.mark.parametrize("function", (fused_sort_kd, fused_sort_dkd))
@EVERY_BACKEND
def test_plus_infinity_makes_its_row_nan(backend, function):
    """Its softmax is inf / inf, as in F.cross_entropy; of the label 5 or of another class, on either side."""
    for side, place in itertools.product(("student", "teacher"), (5, 0)):
        rows = cases.make_rows(3, 9)
        target = torch.tensor([4, 5, 6])
        getattr(rows, side)[1, place] = math.inf
        student = rows.student.requires_grad_()
        loss = function(student, rows.teacher, target, ce_weight=0.1, reduction="none", backend=backend)
        loss.sum().backward()
        assert loss.isnan().tolist() == [False, True, False], (side, place)
        assert student.grad[1].isnan().all() and student.grad[[0, 2]].isfinite().all()


@EVERY_BACKEND
def test_label_of_minus_infinity_takes_the_maximum(backend):
    """... and -inf goes to the last class above it, whose probability is then 0."""
    teacher = torch.tensor([[1.0, -math.inf, 3.0, 2.0]])
    target = torch.tensor([1])
    assert sort_logits(teacher, target, backend=backend).tolist() == [[-math.inf, 3.0, 2.0, 1.0]]
    student = torch.randn(1, 4, requires_grad=True)
    loss = fused_sort_kd(student, teacher, target, temperature=2.0, backend=backend)
    (grad,) = torch.autograd.grad(loss, student)
    p = torch.tensor([[-math.inf, 3.0, 2.0, 1.0]]).div(2).softmax(-1)
    q = student.detach().div(2).softmax(-1)
    torch.testing.assert_close(grad, 2 * (q - p))
    torch.testing.assert_close(loss, 4 * torch.xlogy(p, p / q).sum())


@pytest.mark.parametrize("decoupled", (False, True))
@EVERY_BACKEND
def test_no_contribution_where_the_teacher_has_no_probability(backend, decoupled):
    """p' = 0 contributes 0 also where the student's logit is -inf; such a class might as well not be there."""
    function = fused_sort_dkd if decoupled else fused_sort_kd
    rows = cases.make_rows(12, 9)
    target = rows.target.clamp(0, 6)
    student, teacher = (F.pad(x[:, :7], (0, 2), value=-math.inf).requires_grad_() for x in rows[:2])
    short_student = rows.student[:, :7].clone().requires_grad_()
    call = dict(reduction="none", ce_weight=0.3, backend=backend)
    loss = function(student, teacher.detach(), target, **call)
    short = function(short_student, rows.teacher[:, :7], target, **call)
    loss.sum().backward()
    short.sum().backward()
    # beta = 8 times a difference of logarithms, each with a few roundings of its own sum.
    torch.testing.assert_close(loss, short, rtol=4e-6, atol=1e-6)
    torch.testing.assert_close(student.grad, F.pad(short_student.grad, (0, 2)))
    assert not student.grad[:, 7:].any()


@pytest.mark.parametrize("decoupled", (False, True))
@EVERY_BACKEND
def test_a_label_without_probability(backend, decoupled):
    """Uncorrected, a teacher may have -inf at the label, and so may the student then: every gradient is finite still."""
    rows = cases.make_rows(12, 9)
    for n, label in enumerate(rows.target.clamp(min=0)):
        rows.teacher[n, label] = -math.inf
        if n % 2:
            rows.student[n, label] = -math.inf
    variant = Variant("none", {"correction": "none", "reduction": "none"}, decoupled, "row")
    got, want = cases.run(rows, variant, backend), cases.truth(rows, variant)
    for name in ("kd", "grad", "grad_temperature"):
        # A temperature's gradient is a difference of terms of some 10, with a few roundings of its own sum each.
        torch.testing.assert_close(getattr(got, name).double(), getattr(want, name), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("C", (9, 1500))  # of which the kernels keep a row in lanes of a warp, and in a block
@pytest.mark.parametrize("mask", (-math.inf, torch.finfo(F32).min, -1e30, -(2.0**100), -65504.0))
@EVERY_BACKEND
def test_masked_classes_and_labels(backend, mask, C):
    """Whatever number means "not this class" to the user, also at the label: kernels have such a number of their own."""
    rows = cases.make_rows(12, C)
    student, teacher = rows.student.clone(), rows.teacher.clone()
    target = rows.target.clamp(0, C - 4)
    for logits in (student, teacher):
        logits[:, -3:] = mask
    if mask > -1e31:  # a label's loss of 1e38 times T^2 would be no float
        target[3], target[4] = C - 1, C - 2
        student[4, -2] = teacher[5, target[5]] = 2 * mask
    masked = cases.Rows(student, teacher, target)
    for variant in (cases.BY_NAME["rows"], cases.BY_NAME["T4-ce-rows"]):
        got, want = cases.run(masked, variant, backend), cases.truth(masked, variant)
        # A loss of some 1e30 times a probability, or of a few roundings of entropies about 1.
        torch.testing.assert_close(got.loss.double(), want.loss.double(), rtol=1e-5, atol=1e-5)
        # A float's spacing is 1e-7 of the probabilities' sum, at a temperature of at most 4.
        torch.testing.assert_close(got.grad.double(), want.grad.double(), rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize("temperature", (1.0, 2.0, 4.0, 2.5))
@EVERY_BACKEND
def test_a_student_that_is_wrong_by_far_keeps_its_digits(backend, temperature):
    """Sums relative to the label's logit grow with what it lies below the others, by 4 to 36 here, until they are taken
    relative to the largest."""
    rows = cases.make_rows(9, 33)
    target = rows.target.where(rows.target != IGNORE, 3)
    below = rows.student.max(-1, keepdim=True).values - 4 * torch.arange(1, 10).unsqueeze(-1)
    student = rows.student.scatter(1, target.unsqueeze(-1), below)
    variant = Variant("wrong by far", {"ce_weight": 0.5, "reduction": "none"}, temperature=temperature)
    want = expect(cases.Rows(student, rows.teacher, target), variant)
    assert_matches(cases.run(want.rows, variant, backend), want)


@pytest.mark.parametrize("temperature", (2.0, 2.5))
@EVERY_BACKEND
def test_a_row_that_masks_all_but_the_label(backend, temperature):
    """By the least number there is, whose difference from the label's logit times log2(e) would be none."""
    student = torch.full((1, 9), torch.finfo(F32).min)
    student[0, 5] = 1.0
    teacher, target = student.clone(), torch.tensor([5])
    student.requires_grad_()
    loss = fused_sort_kd(student, teacher, target, temperature=temperature, ce_weight=0.5, backend=backend)
    loss.backward()
    assert loss.item() == 0
    torch.testing.assert_close(student.grad, torch.zeros(1, 9))


@EVERY_BACKEND
def test_a_class_impossible_for_the_student_alone_costs_infinity(backend):
    """The formula's own value: p' > 0 where q = 0. The gradient there is -T p', not NaN."""
    student = torch.tensor([[1.0, -math.inf, 0.5]], requires_grad=True)
    teacher, target = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])
    loss = fused_sort_kd(student, teacher, target, temperature=1.0, backend=backend)
    loss.backward()
    assert loss.item() == math.inf
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - teacher.softmax(-1))


@pytest.mark.parametrize("function", (fused_sort_kd, fused_sort_dkd))
@EVERY_BACKEND
def test_all_rows_ignored(backend, function):
    """0 / 0 for the mean, as in F.cross_entropy; no gradient, and no NaN in it."""
    student = torch.randn(4, 9, requires_grad=True)
    teacher, target = torch.randn(4, 9), torch.full((4,), IGNORE)
    temperature = torch.tensor(3.0, requires_grad=True)
    for reduction, value in (("mean", math.nan), ("batchmean", math.nan), ("sum", 0.0), ("none", 0.0)):
        student.grad = temperature.grad = None
        out = function(
            student, teacher, target, ce_weight=0.5, temperature=temperature, reduction=reduction, return_parts=True,
            backend=backend,
        )  # fmt: skip
        for part in out[:3]:
            assert torch.equal(part.nan_to_num(7.0), torch.full_like(part, value).nan_to_num(7.0))
        assert not out.rank.any()
        out.loss.sum().backward()
        assert not student.grad.any()
        assert reduction in ("mean", "batchmean") or temperature.grad == 0


@pytest.mark.parametrize("shape", ((0, 7), (0, 3, 7), (3, 0, 7)), ids=str)
@EVERY_BACKEND
def test_no_rows_like_cross_entropy(backend, shape):
    student = torch.zeros(shape, requires_grad=True)
    target = torch.zeros(shape[:-1], dtype=torch.int64)
    other = torch.zeros(shape, requires_grad=True)
    for function, reduction in itertools.product((fused_sort_kd, fused_sort_dkd), ("mean", "sum", "none")):
        expected = F.cross_entropy(other.movedim(-1, 1) if len(shape) > 2 else other, target, reduction=reduction)
        loss = function(student, torch.zeros(shape), target, reduction=reduction, backend=backend)
        torch.testing.assert_close(loss, expected, rtol=0, atol=0, equal_nan=True)
        loss.sum().backward()
        assert student.grad.shape == shape
    assert sort_logits(torch.zeros(shape), target, backend=backend).shape == shape


@pytest.mark.parametrize("decoupled", (False, True))
@pytest.mark.parametrize("standardize", (False, True))
@EVERY_BACKEND
def test_one_class(backend, standardize, decoupled):
    """Both distributions are 1: the loss, its cross-entropy and every gradient are 0, exactly."""
    variant = Variant(
        "one", {"ce_weight": 0.5, "reduction": "none", "standardize": standardize}, decoupled, temperature="row"
    )
    rows = cases.make_rows(5, 1)
    result = cases.run(rows._replace(target=torch.zeros(5, dtype=torch.int64)), variant, backend)
    for part in result[:6]:
        assert torch.equal(part, torch.zeros_like(part))
    assert sort_logits(rows.teacher, rows.target.clamp_min(0), backend=backend).equal(rows.teacher)


@EVERY_BACKEND
def test_ignore_index_may_name_a_class(backend):
    student, teacher, _ = cases.make_rows(6, 4)
    target = torch.tensor([0, 1, 2, 3, 1, 0])
    loss = fused_sort_kd(student, teacher, target, ignore_index=1, reduction="none", backend=backend)
    kept = torch.tensor([0, 2, 3, 5])
    assert not loss[[1, 4]].any()
    assert torch.equal(loss[kept], fused_sort_kd(student, teacher, target, reduction="none", backend=backend)[kept])
    mean = fused_sort_kd(student, teacher, target, ignore_index=1, backend=backend)
    torch.testing.assert_close(mean, loss.sum() / 4)
    assert torch.equal(sort_logits(teacher, target, ignore_index=1, backend=backend)[1], teacher[1])


# 1 / (0 + 1e-7) makes a gradient of 0.5 from one rounding of float32: the kernels subtract equal numbers and have none,
# plain PyTorch has.
@pytest.mark.parametrize("decoupled", (False, True))
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, d) for b in cases.BACKENDS for d in (F32, torch.float64) if (b, d) != ("reference", F32)],
    ids=str,
)
def test_constant_rows_under_standardization(backend, dtype, decoupled):
    """Standard deviation 0: the z-scores are 0, both sides uniform, and only the cross-entropy has a gradient."""
    function = fused_sort_dkd if decoupled else fused_sort_kd
    for value in (1.0, 0.1, -333.3):
        student = torch.full((2, 5), value, dtype=dtype, requires_grad=True)
        teacher, target = torch.full((2, 5), 3 * value, dtype=dtype), torch.tensor([0, 3])
        out = function(student, teacher, target, standardize=True, ce_weight=0.5, return_parts=True, backend=backend)
        out.loss.backward()
        assert out.kd == 0
        torch.testing.assert_close(student.grad, 0.25 * (0.2 - F.one_hot(target, 5).to(dtype)))


# Finite logits of student and teacher beside those at -inf; the label is class 0, which may be one of them.
FINITE = {
    "teacher: the label alone": ((0, 1, 2, 3), (0,)),
    "student: the label alone": ((0,), (0, 1, 2, 3)),
    "both: the label alone": ((0,), (0,)),
    "teacher: the label and another": ((0, 1, 2, 3), (0, 2)),
    "both: the label and another": ((0, 2), (0, 2)),
    "teacher: another alone": ((0, 1, 2, 3), (1,)),
}


@pytest.mark.parametrize("finite", FINITE)
@EVERY_BACKEND
def test_dkd_with_nothing_beside_the_label(backend, finite):
    for alpha, beta in ((1.0, 8.0), (0.0, 1.0), (2.0, 0.0)):
        check_dkd_with_nothing_beside_the_label(backend, finite, alpha, beta)


def check_dkd_with_nothing_beside_the_label(backend, finite, alpha, beta):
    """A teacher with nothing there leaves nothing to match: NCKD and its gradient are 0. A student with nothing there
    matches no other teacher: its loss is infinite, unless its weight is 0."""
    of_student, of_teacher = FINITE[finite]
    student, teacher = torch.tensor([[1.0, 2.0, 0.5, 0.0]]), torch.tensor([[2.0, 1.0, -1.0, 0.5]])
    for logits, kept in ((student, of_student), (teacher, of_teacher)):
        logits[0, [i for i in range(4) if i not in kept]] = -math.inf
    target, T = torch.tensor([0]), 4.0

    # By hand, in float64. The correction moves the label to the front, so it holds the teacher's largest value.
    corrected = teacher[0].sort(descending=True).values if finite == "teacher: another alone" else teacher[0]
    corrected = [float(x) for x in corrected]
    p, q = (torch.tensor(x, dtype=torch.float64).div(T).softmax(-1) for x in (corrected, student[0].tolist()))
    pair = [(p[0], q[0]), (1 - p[0] if len(of_teacher) > 1 else p[0] * 0, q[1:].sum())]
    tckd = sum(float(torch.xlogy(a, a) - torch.xlogy(a, b)) for a, b in pair)
    nckd = 0.0
    if p[1:].sum() > 0:
        without_p, without_q = p[1:] / p[1:].sum(), q[1:] / q[1:].sum() if q[1:].sum() > 0 else q[1:]
        nckd = float((torch.xlogy(without_p, without_p) - torch.xlogy(without_p, without_q)).sum())
    want = T * T * sum(weight * term for weight, term in ((alpha, tckd), (beta, nckd)) if weight)

    leaf = student.requires_grad_()
    loss = fused_sort_dkd(leaf, teacher, target, alpha=alpha, beta=beta, reduction="sum", backend=backend)
    # Two classes' NCKD is a difference of logarithms of about 1, each with a few roundings, times T^2 and its weight.
    assert loss.item() == pytest.approx(want, rel=1e-5, abs=T * T * (alpha + beta) * 4 * 2**-24)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert grad.isfinite().all()
    if math.isinf(want) or 1 not in of_student:
        return
    # The derivative of the reference's loss in float64, and that of a loss of differences: no sum remains.
    assert abs(float(grad.sum())) < 1e-5
    double = student.detach().double().requires_grad_()
    options = dict(alpha=alpha, beta=beta, reduction="sum", backend="reference")
    (truth,) = torch.autograd.grad(fused_sort_dkd(double, teacher.double(), target, **options), double)
    torch.testing.assert_close(grad.double(), truth, rtol=1e-5, atol=1e-6)
    if beta == 8.0:
        torch.autograd.gradcheck(lambda s: fused_sort_dkd(s, teacher.double(), target, **options), (double,))
