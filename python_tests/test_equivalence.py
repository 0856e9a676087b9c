"""Every backend computes the formula: shapes, dtypes, corrections, reductions, weights, temperatures, against float64."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import F32, VARIANTS, Shape
from tolerance import ROUNDINGS, assert_matches, errors_in_roundings, expect, expected

import sortkd_kernels

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize(("backend", "shape", "variant"), cases.grid(), ids=str)
def test_shapes(backend, shape, variant):
    want = expected(shape, variant.name)
    assert_matches(cases.run(want.rows, variant, backend), want)


@pytest.mark.parametrize(("backend", "dtypes", "shape", "variant"), cases.dtype_grid(), ids=cases.case_id)
def test_dtypes(backend, dtypes, shape, variant):
    want = expected(shape, variant.name, dtypes)
    assert_matches(cases.run(want.rows, variant, backend), want)


@pytest.mark.parametrize("variant", cases.FEW_VARIANTS, ids=str)
@pytest.mark.parametrize("backend", cases.KERNELS)
def test_a_row_beyond_every_cache(backend, variant):
    want = expected(cases.LARGE, variant.name)
    assert_matches(cases.run(want.rows, variant, backend), want)


# Inductor writes and compiles C++ for the whole reference, seven seconds a variant; around an op there is nothing to
# write.
COMPILED = [
    (backend, variant, compiler)
    for backend in cases.BACKENDS
    for variant in (cases.FEW_VARIANTS if backend == "native" else cases.TWO_VARIANTS)
    for compiler in ("aot_eager", "inductor")
    if compiler == "aot_eager" or backend == "native" or variant.name == "T4-ce-rows"
]


@pytest.mark.parametrize(("backend", "variant", "compiler"), COMPILED, ids=str)
def test_compiled(backend, variant, compiler, fresh_compiler):
    want = expected(Shape(41, 9, "odd sizes"), variant.name)
    assert_matches(
        cases.run(want.rows, variant, backend, lambda f: torch.compile(f, fullgraph=True, backend=compiler)), want
    )


# Without z-scores: the mean of -inf and a number is no score.
POSSIBLE = [v for v in (*cases.FEW_VARIANTS, cases.BY_NAME["swap"], cases.BY_NAME["dkd-swap-rows"], cases.BY_NAME["T2.5-ce"])
            if not v.options.get("standardize")]  # fmt: skip


@pytest.mark.parametrize(("backend", "variant"), cases.calls(POSSIBLE), ids=str)
def test_teacher_with_impossible_classes(backend, variant):
    """Classes of -inf in the teacher, the label's among them: probability 0, contribution 0, gradient exact."""
    rows = cases.make_rows(30, 12)
    rows.teacher[torch.rand(rows.teacher.shape, generator=torch.Generator().manual_seed(5)) < 0.4] = -torch.inf
    rows.teacher[:, 7].clamp_min_(-3)  # each row keeps one class
    rows.teacher[::5].scatter_(1, rows.target[::5].clamp_min(0).unsqueeze(1), -torch.inf)
    want = expect(rows, variant)
    assert_matches(cases.run(rows, variant, backend), want)


@pytest.mark.parametrize("decoupled", (False, True))
@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_options_do_not_depend_on_parts(backend, decoupled):
    """return_parts adds outputs and changes none."""
    variant = cases.Variant("parts", {"ce_weight": 0.3, "reduction": "none"}, decoupled)
    student, teacher, target = cases.make_rows(41, 9)
    call = dict(temperature=4.0, backend=backend, **variant.options)
    alone = variant.function(student, teacher, target, **call)
    assert torch.equal(alone, variant.function(student, teacher, target, return_parts=True, **call).loss)


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_weighted_parts_make_the_loss(backend):
    student, teacher, target = cases.make_rows(41, 9)
    out = sortkd_kernels.fused_sort_kd(
        student, teacher, target, ce_weight=0.3, kd_weight=0.6, reduction="none", return_parts=True, backend=backend
    )
    # One rounding for each product and one for the sum.
    torch.testing.assert_close(out.loss, 0.6 * out.kd + 0.3 * out.ce, rtol=3 * torch.finfo(F32).eps, atol=0)
    assert not (out.kd.requires_grad or out.ce.requires_grad or out.rank.requires_grad)


def test_tolerance_is_tight():
    """Plain float32 PyTorch needs most of what is allowed; how much varies with the instruction set."""
    needed = dict.fromkeys(ROUNDINGS, 0.0)
    for shape in cases.SHAPES:
        for variant in VARIANTS:
            want = expected(shape, variant.name)
            errors = errors_in_roundings(cases.truth(want.rows, variant, F32), want)
            for name, error in errors.items():
                if error.numel():
                    needed[name] = max(needed[name], error.max().item())
    for name, allowed in ROUNDINGS.items():
        assert allowed / 6 < needed[name] <= allowed, f"{name}: plain float32 needs {needed[name]:.1f} of {allowed}"
