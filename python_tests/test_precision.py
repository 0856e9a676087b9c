"""Where float32 ends: small probabilities, wide and shifted logits, long rows, a student that is certain."""

from __future__ import annotations

import itertools
import math

import cases
import pytest
import torch
from cases import F16, F32, F64, IGNORE, Rows, Variant
from tolerance import ROUNDINGS, Yardstick, assert_matches, errors_in_roundings, expect

from sortkd_kernels import fused_sort_dkd, fused_sort_kd

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EVERY_BACKEND = pytest.mark.parametrize("backend", cases.BACKENDS)
FUSED_BACKENDS = pytest.mark.parametrize("backend", [b for b in cases.BACKENDS if b != "reference"])


@pytest.mark.parametrize(
    ("backend", "variant"), [x for x in cases.calls(cases.FEW_VARIANTS) if x[0] != "reference"], ids=str
)
@pytest.mark.parametrize("scale", (1e-3, 10.0, 40.0))
def test_narrow_and_wide_logits(backend, scale, variant):
    """Logits of 1e-3 (two nearly equal distributions) and of 100 (nearly all probabilities 0)."""
    rows = cases.make_rows(30, 9)
    rows = Rows(rows.student * scale / 3, rows.teacher * scale / 3, rows.target)
    want = expect(rows, variant)
    # Below float32's normal range a probability is 0: what that leaves out is its size, times T, deviation and weights.
    floor = 2.0**-120
    want = want._replace(yardstick=Yardstick(*(x + floor for x in want.yardstick)))
    assert_matches(cases.run(rows, variant, backend), want)


FAR = (20, 40, 54, 56, 68, 70, 100, 110, 150, 300, 3000)


@pytest.mark.parametrize("decoupled", (False, True))
@pytest.mark.parametrize("T", (1.0, 2.0, 4.0, 2.5))
@FUSED_BACKENDS
def test_a_label_far_from_the_rest(backend, T, decoupled):
    """Above all others or below them, on both sides of where exponentials relative to the label leave float32's range."""
    distances = (-70, 56) if backend in cases.LOGITS_LIMIT else (*FAR, *(-d for d in FAR))
    for sides, distance in itertools.product((("student",), ("teacher",), ("student", "teacher")), distances):
        rows = cases.make_rows(12, 9)
        label = rows.target.clamp_min(0).unsqueeze(-1)
        for side in sides:
            logits = getattr(rows, side)
            logits.scatter_(1, label, logits.amax(-1, keepdim=True) + distance)
        options = {"reduction": "none", "ce_weight": 0.3, "correction": "none"}
        want = expect(rows, Variant("", options, decoupled, T))
        # Relative to the label, exponents of the likely classes are as deep as it is far: 100 in base 2, where ordinary
        # rows have 20. Where both sides are certain the loss is below what float64 makes of 1 - 1.
        floor = T**2 * 2.0**-28
        want = want._replace(yardstick=Yardstick(*(6 * x + floor for x in want.yardstick)))
        assert_matches(cases.run(rows, want.variant, backend), want)


@EVERY_BACKEND
def test_shifted_logits_change_nothing(backend):
    """Softmax does not see a constant; on a grid that the shift keeps exact neither do the results."""
    variant, rows = cases.BY_NAME["T4-ce-rows"], cases.make_rows(30, 9)
    rows = Rows(*(x.mul(64).round().div(64) for x in rows[:2]), rows.target)
    for shift in (1000.0, -30000.0):
        shifted = Rows(rows.student + shift, rows.teacher - shift / 2, rows.target)
        assert torch.equal(shifted.student - shift, rows.student)
        assert_matches(cases.run(shifted, variant, backend), expect(rows, variant))


@pytest.mark.parametrize("T", (1.0, 2.0, 4.0))
@FUSED_BACKENDS
def test_cross_entropy_as_a_power(backend, T):
    """Fact 5, exp(s) = exp(s/T)^T: no worse than an exponential of its own, which T + 1e-6 forces."""
    rows = cases.make_rows(30, 9)
    errors = []
    for temperature in (T, T * (1 + 1e-6)):
        variant = Variant("", {"ce_weight": 1.0, "kd_weight": 0.0, "reduction": "none"}, temperature=temperature)
        want = expect(rows, variant)
        got = cases.run(rows, variant, backend)
        assert_matches(got, want)
        errors.append((got.grad - want.truth.grad).abs().max())
    assert errors[0] < 8 * errors[1]


@EVERY_BACKEND
def test_a_certain_student(backend):
    """q_y rounds to 1, where log(1 - q_y) is -inf in the usual chain: DKD and its gradient are finite, and right."""
    variants = (Variant("", {"beta": 2.0}, True, temperature=1.0), Variant("", {"reduction": "none"}, True))
    for value, variant in itertools.product((30.0, 90.0, 200.0, 3000.0), variants):
        student = torch.zeros(4, 6)
        student[:, 1] = value
        student[:, 2:] = torch.linspace(-2, 2, 4)
        _, teacher, _ = cases.make_rows(4, 6)
        rows = Rows(student, teacher, torch.tensor([1, 1, 1, 3]))
        want = expect(rows, variant)
        assert want.truth.grad.isfinite().all() and want.truth.loss.isfinite().all()
        got = cases.run(rows, variant, backend)
        assert got.loss.isfinite().all() and got.grad.isfinite().all()
        if backend != "reference":  # plain float32 loses the others' share, 1 - q_y
            assert_matches(got, want)


@FUSED_BACKENDS
def test_the_label_of_a_certain_student_has_a_gradient(backend):
    """q_y - 1 to full precision: -1e-12 is not 0."""
    student = torch.full((1, 5), -30.0)
    student[0, 2] = 0.0
    leaf = student.clone().requires_grad_()
    teacher, target = torch.zeros(1, 5), torch.tensor([2])
    fused_sort_kd(leaf, teacher, target, kd_weight=0.0, ce_weight=1.0, temperature=2.0, backend=backend).backward()
    expected = student.double().softmax(-1)
    expected[0, 2] = -expected[0, [0, 1, 3, 4]].sum()
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=2e-6, atol=0)


@FUSED_BACKENDS
def test_each_small_probability_has_its_own_digits(backend):
    """Relative to itself, not to the row's largest: down to 1e-30."""
    student = torch.linspace(-70, 0, 40).repeat(2, 1)
    teacher = torch.full((2, 40), -1e4)
    teacher[:, 5] = 0.0
    leaf = student.clone().requires_grad_()
    fused_sort_kd(leaf, teacher, torch.tensor([5, 5]), temperature=1.0, reduction="sum", backend=backend).backward()
    q = student.double().softmax(-1)
    others = torch.arange(40) != 5
    assert q.min() < 1e-30
    # exp(-70) carries 70 roundings of its exponent in base 2.
    torch.testing.assert_close(leaf.grad.double()[:, others], q[:, others], rtol=110 * 2**-24, atol=0)


@pytest.mark.parametrize("variant", [cases.BY_NAME["rows"], cases.BY_NAME["dkd-swap-rows"]], ids=str)
def test_long_rows_of_equal_terms(variant):
    """A running float32 sum over 260,000 equal terms loses four digits; sums of blocks lose none."""
    C = 262144
    student, teacher = torch.zeros(2, C), torch.zeros(2, C)
    teacher[:, 0], student[:, 1] = 1.0, 2.0
    rows = Rows(student, teacher, torch.tensor([0, 3]))
    # Twice the usual: all exponentials have one and the same error here, which averages out nowhere. A running sum would
    # be off by thousands.
    for name, error in errors_in_roundings(cases.run(rows, variant, "native"), expect(rows, variant)).items():
        assert error.max() <= 2 * ROUNDINGS[name], name


@FUSED_BACKENDS
def test_loss_of_a_perfect_student(backend):
    """Equal logits: the loss is a rounding of 0, never negative by more, and the gradient as small."""
    _, teacher, target = cases.make_rows(30, 9)
    target = teacher.argmax(-1)
    for function in (fused_sort_kd, fused_sort_dkd):
        student = teacher.clone().requires_grad_()
        loss = function(student, teacher, target, reduction="none", backend=backend)
        loss.sum().backward()
        # T^2 and beta times a few roundings of entropies of about 2.
        assert loss.abs().max() < 16 * 9 * 2 * 4 * 2**-24
        assert student.grad.abs().max() < 4 * 9 * 4 * 2**-24


@FUSED_BACKENDS
def test_half_losses_are_float32_arithmetic(backend):
    """float16 logits whose squares and sums would overflow or vanish in float16."""
    student, teacher, target = cases.make_rows(30, 9, (F16, F16))
    student, teacher = student * 2000, teacher * 2000
    loss = fused_sort_kd(student, teacher, target, temperature=1.0, reduction="sum", backend=backend)
    assert loss.dtype == F32 and loss.isfinite() and loss > 65504
    want = fused_sort_kd(
        student.double(), teacher.double(), target, temperature=1.0, reduction="sum", backend="reference"
    )
    assert want.dtype == F64
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ("kd", "dkd", "lskd"))
@pytest.mark.parametrize("backend", [b for b in cases.BACKENDS if b not in (*cases.LOGITS_LIMIT, "reference")])
def test_temperature_gradient_of_a_long_row(backend, method):
    """Four sums of 40,000 terms that nearly cancel: no further from the truth than a plain float32 chain is.

    Not in proportion to the gradient, which may be as near to 0 as one likes: the largest error over the rows counts.
    """
    generator = torch.Generator().manual_seed(3)
    student, teacher = (3 * torch.randn(6, 40_000, generator=generator) for _ in "st")
    target = torch.randint(40_000, (6,), generator=generator)
    function, options = (fused_sort_dkd if method == "dkd" else fused_sort_kd), {"standardize": method == "lskd"}

    def gradient(backend, dtype):
        t = torch.full((6,), 4.0, dtype=dtype, requires_grad=True)
        logits = (x.to(dtype) for x in (student, teacher))
        loss = function(*logits, target, temperature=t, reduction="sum", backend=backend, **options)
        return torch.autograd.grad(loss, t)[0].double()

    truth = gradient("reference", F64)
    error, plain = ((gradient(b, F32) - truth).abs().max() for b in (backend, "reference"))
    assert error <= plain


@pytest.mark.parametrize("odds", (0.1, 1.0, 8.0, 32.0))
@FUSED_BACKENDS
def test_the_gradient_by_the_temperature_keeps_its_digits(backend, odds):
    """Its moments relative to a label that lies far below the others are large numbers with a small difference. `odds` are a
    mean class's over the label's."""
    variant = Variant("row-T-rows", {"correction": "none", "reduction": "none"}, temperature="row")
    N, C = (12, 33) if backend == "triton" else (400, 40)
    temperature = variant.make_temperature(N).detach()
    _, _, target = cases.make_rows(N, C)
    target = target.where(target != IGNORE, 3)
    sides = []
    for seed in (0, 1):
        logits = 4 * torch.randn(N, C, generator=torch.Generator().manual_seed(seed))
        mean = logits.scatter(1, target.unsqueeze(-1), -math.inf).logsumexp(-1) - math.log(C)
        logits = logits.scatter(1, target.unsqueeze(-1), (mean - math.log(odds)).unsqueeze(-1))
        sides.append(logits * temperature.unsqueeze(-1))
    want = expect(Rows(*sides, target), variant)
    error = errors_in_roundings(cases.run(want.rows, variant, backend), want)["grad_temperature"]
    assert error.max() <= ROUNDINGS["grad_temperature"]
