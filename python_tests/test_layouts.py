"""Logits of any shape and stride: leading batches, `class_dim`, channels_last, views; the gradient where it belongs."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import BF16, F16, F32, F64
from tolerance import assert_matches, expected

from sortkd_kernels import fused_sort_kd, fused_sort_kd_topk

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# What a layout meets: results of a row, a temperature of a row, a temperature for all.
VARIANTS = [cases.BY_NAME[n] for n in ("T4-ce-rows", "row-T-swap-rows", "dkd-lskd-scalar-T")]
# Rows in three dimensions: 36 neighbouring ones fill two tiles of 16 and a rest. An interpreter gets 12.
FULL, SMALL = ((3, 4, 3), cases.Shape(36, 11, "")), ((2, 3, 2), cases.Shape(12, 5, ""))
SLOW = cases.LOGITS_LIMIT


def as_is(x):
    return x


def transposed_memory(x):
    """The same values, last dimension not the fastest."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else x


def every_other(x):
    return torch.stack((x, x.flip(-1)), -1).flatten(-2)[..., ::2]


def shifted(x):
    """Storage that starts at an odd element: no vector load is aligned."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


# Name: how rows [a * b * c, C] become logits, and the class_dim; the strides come after.
FORMS = {
    "rows": (lambda x, a, b, c: x, -1),
    "leading batch": (lambda x, a, b, c: x.view(a, b, c, -1), -1),
    "dense": (lambda x, a, b, c: x.view(a, b, c, -1).movedim(-1, 1).contiguous(), 1),
    "dense, counted from behind": (lambda x, a, b, c: x.view(a, b, c, -1).movedim(-1, 1).contiguous(), -3),
    "classes first": (lambda x, a, b, c: x.T.contiguous(), 0),
    "sequence": (lambda x, a, b, c: x.view(a, b * c, -1).movedim(-1, 1).contiguous(), 1),
    "volume": (lambda x, a, b, c: x.view(a, 1, b, c, -1).movedim(-1, 1).contiguous(), 1),
    "classes last by name": (lambda x, a, b, c: x.view(a, b * c, -1), 2),
}


def check(backend, variant, dtypes, form, student_memory, teacher_memory):
    to_form, class_dim = FORMS[form]
    sizes, shape = SMALL if backend in SLOW else FULL
    want = expected(shape, variant.name, dtypes)

    def call(student, teacher, target, temperature):
        student, teacher = student_memory(to_form(student, *sizes)), teacher_memory(to_form(teacher, *sizes))
        row_shape = student.movedim(class_dim, -1).shape[:-1]
        if isinstance(temperature, torch.Tensor) and temperature.dim():
            temperature = temperature.view(row_shape)
        out = variant.function(
            student, teacher, target.view(row_shape), temperature=temperature, class_dim=class_dim, backend=backend,
            return_parts=True, **variant.options,
        )  # fmt: skip
        assert out.rank.shape == row_shape
        if out.loss.dim():
            assert out.loss.shape == out.kd.shape == out.ce.shape == row_shape
        return type(out)(*(x.flatten() if x.dim() else x for x in out))

    assert_matches(cases.run(want.rows, variant, backend, lambda _: call), want)


@pytest.mark.parametrize(("backend", "variant"), cases.calls(VARIANTS), ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_forms(backend, form, variant):
    check(backend, variant, (F32, F32), form, as_is, as_is)


@pytest.mark.parametrize("dtypes", [(F64, F64), (BF16, BF16), (F16, F16), (F32, F16)], ids=cases.dtype_id)
@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_dense_dtypes(backend, dtypes):
    for form in ("dense", "classes first"):
        check(backend, cases.BY_NAME["T4-ce-rows"], dtypes, form, as_is, as_is)


MEMORIES = (transposed_memory, every_other, shifted, channels_last)


@pytest.mark.parametrize("student_memory", MEMORIES, ids=lambda m: m.__name__)
@pytest.mark.parametrize("form", ("rows", "dense", "leading batch"))
@pytest.mark.parametrize("backend", cases.KERNELS)
def test_strides(backend, form, student_memory):
    for teacher_memory in (as_is, *MEMORIES):
        check(backend, cases.BY_NAME["scalar-T-ce"], (F32, F32), form, student_memory, teacher_memory)


@pytest.mark.parametrize("memory", MEMORIES, ids=lambda m: m.__name__)
@pytest.mark.parametrize("backend", [b for b in cases.BACKENDS if b not in cases.KERNELS])
def test_strides_of_the_others(backend, memory):
    check(backend, cases.BY_NAME["scalar-T-ce"], (F32, F32), "dense", memory, as_is)
    check(backend, cases.BY_NAME["scalar-T-ce"], (F32, F32), "leading batch", as_is, memory)


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_one_row_without_a_batch(backend):
    student, teacher, target = (x[0] for x in cases.make_rows(12, 9))
    out = fused_sort_kd(student, teacher, target, backend=backend, return_parts=True)
    batch = fused_sort_kd(student[None], teacher[None], target[None], backend=backend, return_parts=True)
    assert out.rank.shape == ()
    for one, many in zip(out, batch, strict=True):
        assert torch.equal(one, many.view_as(one))


def test_dense_logits_are_not_copied():
    """On the CPU, [N, C, H, W] of either memory format costs one gradient buffer and no transposed copy."""
    target = torch.randint(20, (4, 32, 32))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        student, teacher = (torch.randn(4, 20, 32, 32).contiguous(memory_format=memory_format) for _ in "st")
        student.requires_grad_()
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            fused_sort_kd(student, teacher, target, class_dim=1).backward()
        allocated = sum(e.self_cpu_memory_usage for e in profile.events() if e.self_cpu_memory_usage > 0)
        assert student.grad.stride() == student.stride()
        # Row losses and the like are 1 / C of the logits.
        assert student.nbytes <= allocated < 1.3 * student.nbytes


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_top_k_with_a_leading_batch(backend):
    student, teacher, target = cases.make_rows(12, 11)
    values, indices = teacher.topk(4)
    flat = fused_sort_kd_topk(student, values, indices, target, backend=backend, reduction="none")
    shaped = fused_sort_kd_topk(
        student.view(3, 4, 11), values.view(3, 4, 4), indices.view(3, 4, 4), target.view(3, 4), reduction="none",
        backend=backend,
    )  # fmt: skip
    assert torch.equal(shaped, flat.view(3, 4))
