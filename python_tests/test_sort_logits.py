"""The correction alone, exactly: against the paper's two sorts, and the properties that the kernels rest on."""

from __future__ import annotations

import math

import cases
import pytest
import torch
from cases import BF16, F16, F32, F64, IGNORE
from hypothesis import given, settings
from hypothesis import strategies as st

from sortkd_kernels import fused_sort_kd, reference, sort_logits

pytestmark = pytest.mark.usefixtures("poisoned_memory")
# A thousand rows, one call each, are not for an interpreter; the tables above have its ties and ranks.
FAST_BACKENDS = [b for b in cases.BACKENDS if b not in cases.LOGITS_LIMIT]


def corrected(teacher, target, correction):
    """The reference on the rows that count; the others as they are."""
    counts = (target != IGNORE).unsqueeze(-1)
    rows = reference.correct_logits(teacher, target.clamp_min(0), correction)
    return torch.where(counts, rows, teacher)


# The reference is what the others are compared with; `by_hand` below is what it is compared with.
COMPARED = [
    (backend, shape, dtype, correction)
    for backend, shape in cases.backend_shapes((*cases.SHAPES, cases.LARGE))
    for dtype in ((F32, F64, BF16, F16) if str(shape) in ("41x9", "64x100", "6x4099") else (F32,))
    for correction in (("sort", "swap", "none") if str(shape) == "41x9" else ("sort", "swap"))
    if backend != "reference"
]


@pytest.mark.parametrize(("backend", "shape", "dtype", "correction"), COMPARED, ids=str)
def test_equals_the_two_sorts(backend, shape, dtype, correction):
    """Only values move, so nothing is rounded and the comparison is exact, halves in their own dtype."""
    _, teacher, target = cases.make_rows(shape.N, shape.C, (dtype, dtype))
    before = teacher.clone()
    got = sort_logits(teacher, target, correction=correction, backend=backend)
    assert got.dtype == dtype
    assert torch.equal(got, corrected(teacher, target, correction))
    assert torch.equal(teacher, before)
    assert not shape.N or got.data_ptr() != teacher.data_ptr()


RANKS = (0, 1, 2, 11, 12, 13, 23, 24, 25, 191, 192, 193, 300, 1999)
ORDERED = [
    *((F32, rank, "sort") for rank in RANKS),
    *((dtype, rank, "sort") for dtype in (F64, F16) for rank in (2, 13, 24, 193, 1999)),  # keys of other widths
    *((F32, rank, "swap") for rank in (1, 24, 1999)),  # which orders nothing
]


@pytest.mark.parametrize(("dtype", "rank", "correction"), ORDERED, ids=str)
@pytest.mark.parametrize("backend", cases.KERNELS)
def test_every_way_to_order(backend, dtype, rank, correction):
    """Ranks on both sides of where one ordering method hands over to the next; ties, and values of every exponent."""
    generator = torch.Generator().manual_seed(rank)
    wide = torch.randn(2000, generator=generator, dtype=F64) * 2.0 ** torch.randint(
        -12, 9, (2000,), generator=generator
    )
    equal = torch.randint(-9, 9, (2000,), generator=generator).double()
    for row in (wide, equal, -wide.abs(), wide.abs() + 1000):
        teacher = row.to(dtype)
        label = teacher.argsort(descending=True, stable=True)[rank]
        target = label.unsqueeze(0)
        assert torch.equal(
            sort_logits(teacher.unsqueeze(0), target, correction=correction, backend=backend),
            corrected(teacher.unsqueeze(0), target, correction),
        )


def by_hand(row: list[float], label: int) -> list[float]:
    """The paper's sentence in Python lists: classes by logit with the label in front, values in order, k-th to k-th."""
    classes = sorted(range(len(row)), key=lambda i: (i != label, -row[i], i))
    result = [math.nan] * len(row)
    for place, value in zip(classes, sorted(row, reverse=True), strict=True):
        result[place] = value
    return result


# The same examples every time, so that a failure on one machine is a failure on all; no deadline, since the first call
# of an op loads code; no database, so that a test run leaves nothing behind.
settings.register_profile("sortkd", deadline=None, derandomize=True, database=None, max_examples=100)
settings.load_profile("sortkd")

# Few distinct values make ties; -0.0 equals 0.0; lengths on both sides of every vector.
few = st.sampled_from([-2.0, -0.5, -0.0, 0.0, 0.5, 1.0, 3.0])
wide = st.floats(width=16, allow_nan=False, allow_infinity=False)
infinite = st.sampled_from([-math.inf, -1.0, 0.0, 2.0])
rows = st.one_of(*(st.lists(values, min_size=1, max_size=70) for values in (few, wide, infinite)))
dtypes = st.sampled_from([F32, F64, BF16, F16])


@st.composite
def labelled_rows(draw, dtype=None):
    """A row in some dtype, as its dtype holds it, and a label."""
    row = torch.tensor(draw(rows)).to(dtype or draw(dtypes))
    return row, draw(st.integers(0, len(row) - 1))


@pytest.fixture(params=FAST_BACKENDS, scope="module")
def correct(request):
    """``correct(row, label)`` on a backend, one row at a time."""
    return lambda row, label: sort_logits(row.unsqueeze(0), torch.tensor([label]), backend=request.param)[0]


@given(labelled_rows())
def test_rotation_is_the_two_sorts(correct, case):
    row, label = case
    assert correct(row, label).tolist() == by_hand(row.tolist(), label)


@given(labelled_rows())
def test_is_a_permutation(correct, case):
    row, label = case
    assert sorted(correct(row, label).tolist()) == sorted(row.tolist())


@given(labelled_rows())
def test_label_holds_the_maximum(correct, case):
    row, label = case
    assert correct(row, label)[label] == row.max()


@given(labelled_rows())
def test_other_classes_keep_their_order(correct, case):
    row, label = case
    others = [i for i in range(len(row)) if i != label]
    before, after = row[others], correct(row, label)[others]
    # Strictly apart before means not the other way round after; ties may come apart, the lower index staying ahead.
    assert not ((before.unsqueeze(0) > before.unsqueeze(1)) & (after.unsqueeze(0) < after.unsqueeze(1))).any()
    tied = (before.unsqueeze(0) == before.unsqueeze(1)).triu()
    assert not (tied.T & (after.unsqueeze(0) < after.unsqueeze(1))).any()


@given(labelled_rows())
def test_idempotent(correct, case):
    row, label = case
    once = correct(row, label)
    assert torch.equal(correct(once, label), once)


@given(labelled_rows())
def test_identity_where_the_teacher_is_right(correct, case):
    """Right means that no class is above the label; a tie is right."""
    row, label = case
    row[label] = row.max()
    assert torch.equal(correct(row, label), row)


@given(labelled_rows(F64), st.sampled_from([0.25, 1.0, 3.0]), st.floats(-5, 5))
def test_commutes_with_an_increasing_map(correct, case, factor, offset):
    """z-score, temperature and softmax may come before or after."""
    row, label = case

    def increasing(x):
        return torch.sinh(x.clamp(-40, 40) * factor) + offset

    assert torch.equal(correct(increasing(row), label), increasing(correct(row, label)))


@given(labelled_rows(F32))
def test_rank_is_what_moves(correct, case):
    """The loss reports as `rank` the number of classes above the label: with none, and only then, nothing moves."""
    row, label = case
    student, target = torch.zeros(1, len(row)), torch.tensor([label])
    rank = fused_sort_kd(student, row.unsqueeze(0), target, return_parts=True).rank.item()
    assert rank == (row > row[label]).sum().item()
    assert (rank == 0) == torch.equal(correct(row, label), row)


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_swap_exchanges_two_values(backend):
    teacher = torch.tensor([[1.0, 5.0, 3.0, 5.0], [4.0, 4.0, 1.0, 0.0]])
    got = sort_logits(teacher, torch.tensor([2, 1]), correction="swap", backend=backend)
    # The first of several largest is the one exchanged; a label that ties with the largest is right.
    assert got.tolist() == [[1.0, 3.0, 5.0, 5.0], [4.0, 4.0, 1.0, 0.0]]


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_half_precision_ties_break_by_index(backend):
    """Logits that differ in float32 and tie in bfloat16 are ties: the lower index takes the higher value."""
    teacher = torch.tensor([[1.0, 1.001, 1.002, 0.5]]).to(BF16)
    assert teacher.unique().numel() == 2
    got = sort_logits(teacher, torch.tensor([3]), backend=backend)
    assert got.tolist() == [[1.0, 1.0, 0.5, 1.0]]


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_any_leading_shape_and_stride(backend):
    teacher = torch.randn(8, 2, 3, 10)[..., ::2].transpose(0, 2)
    target = torch.randint(5, (8, 2, 3)).transpose(0, 2)
    assert not teacher.is_contiguous()
    got = sort_logits(teacher, target, backend=backend)
    assert got.shape == teacher.shape
    assert torch.equal(got, corrected(teacher.contiguous(), target, "sort"))


@pytest.mark.parametrize("compiler", ("aot_eager", "inductor"))
@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_compiled(backend, compiler, fresh_compiler):
    compiled = torch.compile(lambda t, y: sort_logits(t, y, backend=backend), fullgraph=True, backend=compiler)
    for N in (5, 6, 9):
        _, teacher, target = cases.make_rows(N, 9)
        assert torch.equal(compiled(teacher, target), corrected(teacher, target, "sort"))
