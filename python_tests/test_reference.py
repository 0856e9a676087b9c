"""The oracle itself, against the papers' sentences written in Python lists, and the facts that the kernels rest on."""

from __future__ import annotations

import math

import cases
import pytest
import torch
from cases import F64, IGNORE, VARIANTS
from torch.nn import functional as F

from sortkd_kernels import fused_sort_kd, reference

# The oracle's own rounding: float64 sums of ten terms.
EXACT = dict(rtol=1e-12, atol=1e-12)


@pytest.fixture
def rows():
    student, teacher, target = cases.make_rows(24, 7, (F64, F64))
    return student, teacher, target.clamp_min(0)


def softmax(row):
    top = max(row)
    powers = [math.exp(x - top) for x in row]
    return [p / sum(powers) for p in powers]


def kl(p, q):
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


def sorted_row(row, label):
    order = sorted(range(len(row)), key=lambda i: (i != label, -row[i], i))
    result = list(row)
    for place, value in zip(order, sorted(row, reverse=True), strict=True):
        result[place] = value
    return result


def swapped_row(row, label):
    result, top = list(row), row.index(max(row))
    result[top], result[label] = row[label], row[top]
    return result


def z_score(row):
    mean = math.fsum(row) / len(row)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in row) / (len(row) - 1))
    return [(x - mean) / (1e-7 + deviation) for x in row]


def by_hand(student, teacher, label, T, correction, decoupled, standardized, alpha, beta):
    """One row by the papers' formulas, in Python floats."""
    corrected = {"sort": sorted_row, "swap": swapped_row, "none": lambda row, _: row}[correction](teacher, label)
    s, t = (z_score(student), z_score(corrected)) if standardized else (student, corrected)
    q, p = softmax([x / T for x in s]), softmax([x / T for x in t])
    if not decoupled:
        return T**2 * kl(p, q)
    p_y, q_y = p[label], q[label]
    tckd = kl([p_y, 1 - p_y], [q_y, 1 - q_y])
    others = [i for i in range(len(p)) if i != label]
    nckd = kl([p[i] / (1 - p_y) for i in others], [q[i] / (1 - q_y) for i in others])
    return T**2 * (alpha * tckd + beta * nckd)


@pytest.mark.parametrize("standardized", (False, True))
@pytest.mark.parametrize("decoupled", (False, True))
@pytest.mark.parametrize("correction", ("sort", "swap", "none"))
@pytest.mark.parametrize("T", (1.0, 2.5, 4.0))
def test_formulas(rows, T, correction, decoupled, standardized):
    student, teacher, target = rows
    kd, ce, rank = reference.loss_rows(
        *rows,
        temperature=T,
        correction=correction,
        standardized=standardized,
        alpha=1.5,
        beta=6.0 if decoupled else None,
    )
    hand = [
        by_hand(s, t, y, T, correction, decoupled, standardized, 1.5, 6.0)
        for s, t, y in zip(student.tolist(), teacher.tolist(), target.tolist(), strict=True)
    ]
    torch.testing.assert_close(kd, torch.tensor(hand, dtype=F64), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ce, -student.log_softmax(-1)[torch.arange(24), target], **EXACT)
    assert rank.tolist() == [sum(x > t[y] for x in t) for t, y in zip(teacher.tolist(), target.tolist(), strict=True)]


def test_kl_is_pytorchs(rows):
    """kd = T^2 F.kl_div(log_softmax(s/T), softmax(t'/T)), what every training repository writes."""
    student, teacher, target = rows
    kd, _, _ = reference.loss_rows(*rows, temperature=4.0)
    corrected = reference.sort_logits(teacher, target)
    usual = F.kl_div(F.log_softmax(student / 4, -1), F.softmax(corrected / 4, -1), reduction="none").sum(-1) * 16
    torch.testing.assert_close(kd, usual, **EXACT)


@pytest.mark.parametrize("T", (1.0, 4.0))
def test_gradient_is_the_difference_of_two_distributions(rows, T):
    """Fact 3 of the design: T (softmax(s/T) - softmax(t'/T))."""
    student, teacher, target = rows
    kd, _, _ = reference.loss_rows(student.requires_grad_(), teacher, target, temperature=T)
    (grad,) = torch.autograd.grad(kd.sum(), student)
    corrected = reference.sort_logits(teacher, target)
    torch.testing.assert_close(grad, T * ((student / T).softmax(-1) - (corrected / T).softmax(-1)), **EXACT)


def test_gradient_by_temperature(rows):
    """Fact 6: four row sums, 2T KL - sum p (t - E_p t)(log p - log q) + E_p s - E_q s."""
    student, teacher, target = rows
    T = torch.full((24,), 3.0, dtype=F64, requires_grad=True)
    kd, _, _ = reference.loss_rows(student, teacher, target, temperature=T)
    (grad,) = torch.autograd.grad(kd.sum(), T)
    t = reference.sort_logits(teacher, target)
    log_p, log_q = (t / 3).log_softmax(-1), (student / 3).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    mean_t = (p * t).sum(-1, keepdim=True)
    expected = 6 * (p * (log_p - log_q)).sum(-1) - (p * (t - mean_t) * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(grad, expected + (p * student).sum(-1) - (q * student).sum(-1), **EXACT)


def test_gradient_of_the_z_score(rows):
    """ds = g / (std + eps) - (sum g z) z / ((C - 1) std), with g the gradient at z."""
    student, teacher, target = rows
    kd, _, _ = reference.loss_rows(student.requires_grad_(), teacher, target, temperature=2.0, standardized=True)
    (grad,) = torch.autograd.grad(kd.sum(), student)
    z = reference.standardize(student.detach()).requires_grad_()
    corrected = reference.standardize(reference.sort_logits(teacher, target))
    (g,) = torch.autograd.grad(reference.kd_rows(z, corrected, torch.full((24,), 2.0, dtype=F64)).sum(), z)
    std = student.detach().std(-1, keepdim=True)
    z = z.detach()
    torch.testing.assert_close(
        grad, g / (std + 1e-7) - (g * z).sum(-1, keepdim=True) * z / (6 * std), rtol=1e-9, atol=1e-12
    )


def test_kd_is_its_two_halves(rows):
    """KD = TCKD + (1 - p_y) NCKD: one kernel serves both."""
    kd, _, _ = reference.loss_rows(*rows)
    tckd, _, _ = reference.loss_rows(*rows, alpha=1.0, beta=0.0)
    nckd, _, _ = reference.loss_rows(*rows, alpha=0.0, beta=1.0)
    _, teacher, target = rows
    p_y = (reference.sort_logits(teacher, target) / 4).softmax(-1)[torch.arange(24), target]
    torch.testing.assert_close(kd, tckd + (1 - p_y) * nckd, **EXACT)


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_kernels_agree_that_kd_is_its_two_halves(backend):
    rows = cases.make_rows(24, 7, (F64, F64))
    variant = cases.BY_NAME["rows"]
    halves = [
        cases.run(rows, cases.Variant("", {"alpha": a, "beta": b, "reduction": "none"}, True), backend)
        for a, b in ((1.0, 0.0), (0.0, 1.0))
    ]
    whole = cases.run(rows, variant, backend)
    _, teacher, target = rows
    p_y = (reference.sort_logits(teacher, target.clamp_min(0)) / 4).softmax(-1)[torch.arange(24), target.clamp_min(0)]
    torch.testing.assert_close(whole.kd, halves[0].kd + (1 - p_y) * halves[1].kd, rtol=1e-10, atol=1e-12)


def test_sorting_keeps_entropy_maximum_and_logsumexp(rows):
    """Fact 2: t' is a permutation."""
    _, teacher, target = rows
    corrected = reference.sort_logits(teacher, target)
    torch.testing.assert_close(corrected.logsumexp(-1), teacher.logsumexp(-1), **EXACT)
    assert torch.equal(corrected.sort(-1).values, teacher.sort(-1).values)


def test_sorting_commutes_with_z_score_and_temperature(rows):
    """Fact 4, exactly: the same values move."""
    _, teacher, target = rows
    for increasing in (reference.standardize, lambda x: x / 4, torch.exp):
        # The z-score of the sorted row sums in another order.
        torch.testing.assert_close(
            increasing(reference.sort_logits(teacher, target)), reference.sort_logits(increasing(teacher), target),
            rtol=1e-13, atol=1e-14,
        )  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_ignored_rows_are_not_there(variant):
    """Whatever the method: the loss of a batch is that of its counted rows, and the others may hold any logits."""
    rows = cases.make_rows(24, 7, (F64, F64))
    kept = rows.target != IGNORE
    every = cases.truth(rows, variant)
    assert not every.grad[~kept].any() and not every.rank[~kept].any()
    others = rows._replace(student=torch.where(kept[:, None], rows.student, rows.student.flip(-1) * 5))
    for one, other in zip(every[:5], cases.truth(others, variant)[:5], strict=True):
        assert torch.equal(one, other)
    # With fewer rows, temperatures and the loss gradient of a row would be others.
    if "row" not in str(variant.temperature) and variant.options.get("reduction") != "none":
        some = cases.truth(cases.Rows(*(x[kept] for x in rows)), variant)
        torch.testing.assert_close(some.loss, every.loss, **EXACT)
        torch.testing.assert_close(some.grad, every.grad[kept], **EXACT)


def test_the_share_of_corrected_rows():
    """`rank`, as the documentation uses it."""
    teacher = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [2.0, 2.0, 1.0]])
    out = fused_sort_kd(torch.zeros(4, 3), teacher, torch.tensor([0, 1, 2, 1]), return_parts=True)
    assert out.rank.tolist() == [0, 2, 1, 0]
    assert (out.rank > 0).float().mean() == 0.5
