"""The CUDA kernels at every launch choice, under the SIMT harness: lanes, a block or a cluster a row, rows read twice, lists
that shared memory does not hold; each in three orders of threads and blocks, to the same bits.

The choices that the kernels make themselves are tested as the backend "simt" by all the tests of the op.
"""

from __future__ import annotations

import cases
import pytest
import torch
from cases import BF16, F16, F32, F64, IGNORE, Shape
from simt import build
from tolerance import assert_matches, expect, expected

from sortkd_kernels import fused_sort_kd, fused_sort_kd_topk, reference, sort_logits

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(bool(build.missing()), reason=build.missing()),
    pytest.mark.parametrize("backend", ["simt"]),
]

# What is not named is as the kernels choose.
CHOICES = {
    "as chosen": {},
    "a GPU of 132 processors": {"multiprocessors": 132},  # few rows are spread over more lanes
    # So few blocks go from row to row, with the next one on its way.
    "a warp a row": {"lanes": 32, "blocks": 1},
    "a block a row": {"lanes": 64, "blocks": 1},
    "a cluster a row": {"lanes": 128, "cluster": 2, "blocks": 2},
    "clusters of three": {"lanes": 96, "cluster": 3, "blocks": 3},
    "clusters of four, ranks over 2 in a launch of their own": {
        "lanes": 256,
        "cluster": 4,
        "list_room": 2,
        "blocks": 8,
    },
    "a block a row, ranks over 2 in a launch of their own": {"lanes": 64, "list_room": 2, "blocks": 2},
    "read twice": {"from_memory": 1, "threads": 64},
    "read twice, ranks over 4 in a launch of their own": {"from_memory": 1, "threads": 64, "list_room": 4, "blocks": 1},
    "ranks over 2 in a launch of their own, over 9 in device memory": {"lanes": 64, "list_room": 2, "long_room": 9},
}
ORDERS = ("forward", "backward", "shuffled")
SHAPES = (
    Shape(6, 1, "one class"),
    Shape(12, 2, "two classes"),
    Shape(41, 9, "rows that begin anywhere"),
    Shape(7, 64, "whole vectors: no edges"),
    Shape(6, 129, "one past a power of two"),
    Shape(6, 1001, "edges at both ends of a long row"),
)
NAMES = ("sort", "T4-ce-rows", "T2.5-ce", "dkd-T1-warmup", "swap", "frozen-row-T-ce", "dkd-lskd-scalar-T")
VARIANTS = [cases.BY_NAME[name] for name in NAMES]


@pytest.fixture(params=CHOICES)
def choice(request, simt, monkeypatch):
    from simt import backend

    overrides = dict.fromkeys(("lanes", "threads", "cluster", "from_memory", "list_room", "long_room", "blocks"), 0)
    chosen = dict(CHOICES[request.param])
    monkeypatch.setattr(simt.settings, "multiprocessors", chosen.pop("multiprocessors", 2))
    extension, _ = backend.modules()
    extension.set_choices(*(overrides | chosen).values())
    yield
    extension.set_choices(*overrides.values())


def in_every_order(simt, run):
    """The result of ``run``, which no order may change by a bit."""
    results = []
    for order in ORDERS:
        simt.settings.order = getattr(simt.Order, order)
        results.append(run())
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            assert one is other or one is None or torch.equal(one, other)
    return results[0]


def run(want, backend):
    """`cases.run`, with the loss of a call that asks for no parts: KD alone has kernels of its own."""
    variant = want.variant

    def wrap(call):
        def without_parts(student, teacher, target, temperature):
            parts = call(student.detach(), teacher, target, temperature)
            options = dict(temperature=temperature, backend=backend, **variant.options)
            return parts._replace(loss=variant.function(student, teacher, target, **options))

        return without_parts

    return cases.run(want.rows, variant, backend, wrap)[:-1]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend, simt, choice, shape, variant):
    want = expected(shape, variant.name)
    got = in_every_order(simt, lambda: run(want, backend))
    assert_matches(cases.Result(*got), want)


@pytest.mark.parametrize("variant", [cases.BY_NAME[n] for n in ("sort", "T4-ce-rows", "dkd-lskd-scalar-T")], ids=str)
def test_in_place(backend, simt, choice, variant):
    """The gradient over the logits that the row's other threads may still have to read: to the bit as beside them."""
    for shape in SHAPES[2:]:
        student, teacher, target = cases.make_rows(shape.N, shape.C)

        def call(inplace, student=student, teacher=teacher, target=target):
            logits = student.clone().requires_grad_() * 1
            loss = variant.function(logits, teacher, target, inplace=inplace, backend=backend, **variant.options)
            return [loss.detach(), *torch.autograd.grad(loss.sum(), logits)]

        got = in_every_order(simt, lambda call=call: call(True))
        for one, other in zip(got, call(False), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtypes", [d for d in cases.DTYPES if d != (F32, F32)], ids=cases.dtype_id)
def test_dtypes(backend, simt, choice, dtypes):
    for shape, name in (
        (Shape(9, 67, "edges"), "T4-ce-rows"),
        (Shape(9, 64, "several rows a block"), "T2.5-ce"),
        (Shape(6, 264, "no edges"), "dkd-lskd-scalar-T"),
        (Shape(7, 264, "whole vectors"), "T4-ce-rows"),
        (Shape(5, 1100, "more than the lanes of a warp hold"), "dkd"),
    ):
        want = expected(shape, name, dtypes)
        got = in_every_order(simt, lambda want=want: run(want, backend))
        assert_matches(cases.Result(*got), want)


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16)], ids=cases.dtype_id)
def test_ranks_beyond_a_list(backend, simt, dtypes):
    """As the kernels choose, in a launch of their own: of halves by a table of their values, with many ties."""
    for shape, name in ((Shape(6, 4099, "edges"), "T4-ce-rows"), (Shape(6, 30008, "whole vectors"), "row-T-swap-rows")):
        want = expected(shape, name, dtypes)
        assert want.truth.rank.max() > 2048
        assert_matches(cases.Result(*in_every_order(simt, lambda want=want: run(want, backend))), want)


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F32, F16)], ids=cases.dtype_id)
def test_every_class_above_the_label(backend, simt, choice, dtypes):
    """Beside the vectors of such a row lie logits of the next one that are above its label and below all others."""
    student, teacher, target = cases.make_rows(6, 35, dtypes)
    for row in teacher:
        row.copy_(2 + torch.randperm(35))
    target[:] = torch.tensor([17, 20, 3, 34, 16, 30])
    teacher[range(6), target] = 1
    teacher[1::2, 0] = 1.5
    variant = cases.BY_NAME["T4-ce-rows"]
    want = expect(cases.Rows(student, teacher, target), variant)
    assert (want.truth.rank == 34).all()
    assert_matches(cases.Result(*in_every_order(simt, lambda: run(want, backend))), want)


@pytest.mark.parametrize("dtypes", [(F32, F32), (F16, F16), (BF16, BF16), (F16, F32), (F64, F64)], ids=cases.dtype_id)
def test_classes_in_the_middle(backend, simt, choice, dtypes):
    """Logits [3, C, 5]: classes five apart, neighbouring rows next to each other."""
    # 256 classes are the most that a block takes so, and with statistics what the smallest shared memory has room for.
    for classes, name in ((4, "T4-ce-rows"), (70, "sort"), (256, "dkd-lskd-scalar-T"), (257, "sort")):
        want = expected(Shape(15, classes, ""), name, dtypes)

        def call(student, teacher, target, temperature, variant=want.variant):
            student, teacher = (x.view(3, 5, -1).movedim(-1, 1).contiguous() for x in (student, teacher))
            options = dict(temperature=temperature, class_dim=1, backend=backend, **variant.options)
            out = variant.function(student.detach(), teacher, target.view(3, 5), return_parts=True, **options)
            out = out._replace(loss=variant.function(student, teacher, target.view(3, 5), **options))
            return type(out)(*(x.flatten() if x.dim() else x for x in out))

        got = in_every_order(
            simt, lambda want=want, c=call: cases.run(want.rows, want.variant, backend, lambda _: c)[:-1]
        )
        assert_matches(cases.Result(*got), want)


@pytest.mark.parametrize(("classes", "ce_weight"), ((90, 0.0), (96, 0.0), (96, 0.2)))
@pytest.mark.parametrize("tail", ("renormalize", "uniform"))
def test_top_k(backend, simt, choice, tail, classes, ce_weight):
    """Against the same teacher written out; 96 classes are whole vectors."""
    variant = cases.Variant("top-k", {"ce_weight": ce_weight})
    student, teacher, target = cases.make_rows(12, classes)
    values, indices = teacher.log_softmax(-1).topk(20)
    dense = reference.densify_top_k(values.double(), indices, classes, tail == "uniform")
    want = expect(cases.Rows(student, dense, target), variant)

    def call(student, *_):
        call = dict(tail=tail, ce_weight=ce_weight, backend=backend)
        parts = fused_sort_kd_topk(student.detach(), values, indices, target, **call, return_parts=True)
        return parts._replace(loss=fused_sort_kd_topk(student, values, indices, target, **call))

    got = in_every_order(simt, lambda: cases.run(want.rows, variant, backend, lambda _: call)[:-1])
    assert torch.equal(got[3], want.truth.rank)
    # The densified rows are float32 in the kernel: their logarithms have lost digits that float64 has.
    torch.testing.assert_close(got[0].double(), want.truth.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(got[4].double(), want.truth.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("correction", ("sort", "swap", "none"))
def test_sort_logits(backend, simt, choice, correction):
    """Values only move: exact, in every dtype."""
    for dtype in (F32, F64, BF16, F16):
        for classes in (1, 9, 129, 520):
            _, teacher, target = cases.make_rows(7, classes, (dtype, dtype))
            counts = (target != IGNORE).unsqueeze(-1)
            want = torch.where(counts, reference.correct_logits(teacher, target.clamp_min(0), correction), teacher)
            (got,) = in_every_order(
                simt, lambda t=teacher, y=target: [sort_logits(t, y, correction=correction, backend=backend)]
            )
            assert torch.equal(got, want)


@pytest.mark.parametrize("special", (torch.nan, torch.inf))
def test_a_broken_row_breaks_no_other(backend, simt, choice, special):
    """NaN or +inf in one row of either side, at the label or beside it; nothing hangs."""
    student, teacher, target = cases.make_rows(10, 45)
    target[target == IGNORE] = 3
    whole = fused_sort_kd(student, teacher, target, reduction="none", backend=backend)
    student[1, (target[1] + 1) % 45], teacher[3, (target[3] + 7) % 45] = special, special
    student[6, target[6]], teacher[8, target[8]] = special, special
    student.requires_grad_()
    loss = fused_sort_kd(student, teacher, target, reduction="none", backend=backend)
    loss.sum().backward()
    broken = torch.tensor([1, 3, 6, 8])
    others = torch.tensor([0, 2, 4, 5, 7, 9])
    assert loss[broken].isnan().all() and student.grad[broken].isnan().all()
    assert torch.equal(loss[others], whole[others]) and student.grad[others].isfinite().all()


@pytest.mark.parametrize("label", (-1, 45, 2**40))
def test_a_bad_label_stops_the_kernel(backend, simt, choice, label):
    """Labels on a GPU cannot be looked at by the host: the kernel's assertion speaks."""
    student, teacher, target = cases.make_rows(10, 45)
    target[4] = label
    with pytest.raises(RuntimeError, match=r"assertion .*a label is outside \[0, C\)"):
        fused_sort_kd(student, teacher, target, backend=backend)
    with pytest.raises(RuntimeError, match=r"assertion .*a label is outside \[0, C\)"):
        sort_logits(teacher, target, backend=backend)
    indices = torch.arange(10).expand(10, 10).clone()
    indices[4, 2] = label
    with pytest.raises(RuntimeError, match=r"assertion .*a teacher index is outside \[0, C\)"):
        fused_sort_kd_topk(student, teacher[:, :10], indices, torch.arange(10), backend=backend)


def test_sums_in_two_stages(backend, simt):
    """More rows than one block counts and sums."""
    variant = cases.BY_NAME["batchmean"]
    want = expected(Shape(9001, 3, "two blocks of sums"), variant.name)
    got = in_every_order(simt, lambda: cases.run(want.rows, variant, backend)[:-1])
    assert_matches(cases.Result(*got), want)
