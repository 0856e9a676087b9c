"""The Triton kernels, run by Triton's interpreter against the reference in float64.

No GPU is needed and nothing here is a GPU timing. The interpreter executes what the kernels compute, not how a GPU
schedules it; what the compiled code shows is in test_gpu_static.py. The tables of cases.py run on this backend too; here
are its own paths: ranks past the limits, rows in blocks, launches, layouts. A counted order is one of 16 keys there and
a sorted run 32, so that a hundred classes take every way.
"""

from __future__ import annotations

import os
import threading

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import CORRECTIONS, MEAN, METHODS, NONE, SUM, check, expected, make, near, run

from sortkd_kernels import available_backends, fused_sort_kd, reference
from sortkd_kernels.backends import triton as backend
from sortkd_kernels.backends.triton import choices, launch
from sortkd_kernels.ops import LossConfig, reference_sort_logits

TRITON = available_backends()["triton"]
pytestmark = [
    pytest.mark.skipif(not TRITON.available, reason=TRITON.reason),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, where the kernels mean inf and NaN
    pytest.mark.usefixtures("poisoned_memory"),
]
# N, C, rank of the labels: why.
CASES = (
    (1, 1, "right"),  # one class: every probability is 1, every sum without the label empty
    (5, 2, "random"),  # binary: without the label one class is left
    (4, 3, "random"),
    (5, 100, "few"),  # CIFAR-100 with a trained teacher: settled in registers, several rows a tile, N no multiple
    (3, 100, "random"),  # few classes: walked to any rank
    (3, 200, "random"),  # ranks past the limit: the second launch, runs that are merged
    (2, 129, "last"),  # one past a power of two, and the worst rank
    (2, 1000, "right"),  # ImageNet: nothing to correct
    (2, 9000, "few"),  # more than fits in registers
)  # fmt: skip


@pytest.fixture(autouse=True)
def signatures(monkeypatch):
    """A kernel's first call compiles what its later ones launch: for dtypes, and for alignments where it rests on them."""
    first, call = {}, choices.Launch.__call__

    def checked(self, pointers, numbers):
        names, anywhere = self.kernel.arg_names, self.kernel.kwargs["do_not_specialize"]
        now = [(n, x.dtype, n in anywhere or x.data_ptr() % 16 == 0) for n, x in zip(names, pointers, strict=False)]
        _, compiled = first.setdefault(id(self), (self, now))
        for (name, dtype, aligned), (_, dtype_now, aligned_now) in zip(compiled, now, strict=True):
            assert dtype == dtype_now and aligned_now >= aligned, (self.kernel.__name__, name)
        return call(self, pointers, numbers)

    monkeypatch.setattr(choices.Launch, "__call__", checked)


@pytest.fixture(autouse=True)
def tickets():
    """Every call leaves its counters at zero, or the next would find a group of rows half done."""
    yield
    assert all(not t.any() for t in launch._TICKETS.values())


@pytest.fixture
def patched(monkeypatch):
    """Launch choices replaced for a test: the plans made before and during it are forgotten."""
    caches = choices.plan, choices.logits_plan

    def patch(**values):
        for cache in caches:
            cache.cache_clear()
        for name, value in values.items():
            monkeypatch.setattr(choices, name, value)

    yield patch
    for cache in caches:
        cache.cache_clear()


@pytest.fixture(params=["short rows", "long rows"])
def path(request, patched):
    """Both row kernels on the same rows; that of long rows in several blocks, its programs with several rows each."""
    if request.param == "long rows":
        patched(SHORT_ROW=0, LONG_BLOCK=16, _programs=lambda *_: 2)
    return request.param


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kd_and_ce(case, correction):
    inputs, keywords = make(*case), {"correction": correction}
    check(run(*inputs, **keywords), expected(*inputs, **keywords), expected(*inputs, **keywords, dtype=torch.float32))


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("correction", ["sort"])
def test_methods(path, correction, method):
    """DKD, z-score and a temperature a row with its gradient, alone and together, in both kernels."""
    inputs = make(3, 70, "random")
    inputs[2][1] = -100
    temperature = torch.tensor([1.5, 3.0, 7.0]) if method[2] else 3.0
    keywords = {"temperature": temperature, "correction": correction, "method": method}
    check(run(*inputs, **keywords), expected(*inputs, **keywords), expected(*inputs, **keywords, dtype=torch.float32))


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_float64(path, correction):
    """Doubles keep their precision through every sum, and through a sort of twice 32 bits."""
    student, teacher, target = make(2, 90, "last", torch.float64)
    teacher[:, ::3] += 1e-12 * torch.arange(30)  # differences in the lower half of the bits only
    target[1] = teacher[1].argmax()
    keywords = {"temperature": torch.tensor(2.5, dtype=torch.float64), "correction": correction, "method": METHODS[-1]}
    got, truth = run(student, teacher, target, **keywords), expected(student, teacher, target, **keywords)
    assert torch.equal(got[3], truth[3])
    for g, t in ((got[0], truth[0]), (got[4], truth[4]), (got[5].sum(), truth[5])):
        # Two sums of 90 doubles in other orders, of terms about 1, and a logarithm's error: far from a float's 1e-7.
        torch.testing.assert_close(g, t, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("counted", [4096, 0], ids=["labels", "counts"])
@pytest.mark.parametrize("reduction", [NONE, SUM, MEAN])
def test_reductions(reduction, counted, patched):
    """With ignored rows, a gradient of the loss, rows counted in the launch and before, row sums in two stages."""
    patched(GROUP_BITS=3, COUNTED_ROWS=counted)
    inputs = make(19, 10, "random")
    inputs[2][::4] = -100
    keywords = {"reduction": reduction, "grad_output": torch.rand(19) + 0.5 if reduction == NONE else torch.tensor(3.0)}
    got, plain = run(*inputs, **keywords), expected(*inputs, **keywords, dtype=torch.float32)
    check(got, expected(*inputs, **keywords), plain)
    without = run(*inputs, **keywords, with_grad=False)
    assert without[4].numel() == without[5].numel() == 0 and torch.equal(without[0], got[0])


@pytest.mark.parametrize("reduction", [SUM, MEAN])
def test_rows_may_end_in_any_order(reduction, patched):
    """Rows that the second launch takes close their groups there; the sums are the same bit by bit."""
    inputs = make(9, 40, "last")
    inputs[2][::3] = inputs[1][::3].argmax(-1)
    want = run(*inputs, reduction=reduction)
    patched(GROUP_BITS=3, MAX_RANK=0, WALKED_CLASSES=0)
    once = run(*inputs, reduction=reduction)
    patched(GROUP_BITS=3, WALKED_CLASSES=40)  # none is left to a second launch
    again = run(*inputs, reduction=reduction)
    for value, other, whole in zip(once[:3], again[:3], want[:3], strict=True):
        # 9 rows of other kernels, each off by a few roundings of 6e-8, in another order.
        torch.testing.assert_close(value, other, rtol=4e-6, atol=0)
        torch.testing.assert_close(value, whole, rtol=4e-6, atol=0)
    assert all(torch.equal(x, y) for x, y in zip(again, run(*inputs, reduction=reduction), strict=True))


def test_rows_of_a_program_in_two_groups(patched):
    """Neighbouring rows, of which a program takes 32: of the second half's first 32 the last eight are the third group's."""
    patched(GROUP_BITS=5)
    student, teacher, target = make(80, 10, "random")
    want = run(student, teacher, target)
    dense = [x.view(2, 40, 10).movedim(-1, 1).contiguous().movedim(1, -1) for x in (student, teacher)]
    got = run(*dense, target.view(2, 40))
    for value, other in zip(got[:3], want[:3], strict=True):
        # 80 rows of another kernel, as in the test above.
        torch.testing.assert_close(value, other, rtol=4e-6, atol=0)


def test_empty_and_ignored():
    """What F.cross_entropy gives: NaN for the mean over no row, 0 for the sum, and gradients of 0."""
    student, teacher, _ = make(3, 7, "random")
    student[0, 0] = teacher[1, 1] = torch.nan
    for rows in (0, 3):
        inputs = student[:rows], teacher[:rows], torch.full((rows,), -100)
        mean, total = run(*inputs, reduction=MEAN), run(*inputs, reduction=SUM)
        assert mean[0].isnan() and total[0] == 0 and mean[4].shape == (rows, 7) and not mean[4].any()
        assert not mean[3].any()


def test_special_rows(path):
    """NaN and +inf spoil their row and no other; -inf is a class that is never chosen."""
    student, teacher, target = make(8, 21, "random")
    teacher[5] = teacher[4]
    student[0, 3], teacher[1, 4], student[2, target[2]], teacher[3, 2] = torch.nan, torch.nan, torch.inf, torch.inf
    teacher[6] = -torch.inf
    teacher[4, torch.arange(21) != target[4]] = -torch.inf  # certain
    teacher[5, target[5]] = -torch.inf  # takes the maximum all the same
    teacher[7, ::2] = student[7, ::2] = -torch.inf
    target[7] = 1
    got, truth = (f(student, teacher, target, reduction=NONE) for f in (run, expected))
    plain = expected(student, teacher, target, reduction=NONE, dtype=torch.float32)
    broken, whole = torch.tensor([0, 1, 2, 3, 6]), torch.tensor([4, 5, 7])
    assert got[0][broken].isnan().all() and got[4][broken].isnan().all()
    near(got[0][whole], truth[0][whole], plain[0][whole])

    def gradient(dtype):  # by its formula: autograd makes 0 * inf of these rows
        q, p = (torch.softmax(x.to(dtype) / 4, -1) for x in (student, reference.sort_logits(teacher, target)))
        onehot = torch.nn.functional.one_hot(target, 21)
        return (0.9 * 4 * (q - p) + 0.1 * (torch.softmax(student.to(dtype), -1) - onehot))[whole]

    near(got[4][whole], gradient(torch.float64), gradient(torch.float32))


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("method", (METHODS[0], METHODS[4]), ids=("kd", "dkd"))
def test_labels_far_from_the_others(path, method, correction):
    """Exponentials relative to the label's own logits would be infinite, or all 0: then the maxima take its place."""
    student, teacher, target = make(9, 70, "few")
    rows = torch.arange(9)
    # At temperature 1 the sums' range ends some 55 below the label, and 18 above it.
    student[rows, target] += torch.tensor([-30.0, 80, 0, 0, -1e4, 1e4, -30, 80, 17])
    teacher[rows, target] += torch.tensor([0.0, 0, -30, 80, -1e4, 1e4, 80, -30, -17])
    inputs = {"correction": correction, "method": method, "temperature": 1.0, "reduction": NONE}
    got, truth = run(student, teacher, target, **inputs), expected(student, teacher, target, **inputs)
    assert torch.equal(got[3], truth[3])
    for i in (0, 1, 2, 4):
        # Differences of probabilities and entropies of about 1, each off by some roundings of 6e-8, or losses of 1e4.
        torch.testing.assert_close(got[i].double(), truth[i], rtol=4e-6, atol=4e-6)


def test_dkd_of_a_certain_student():
    """q_y rounds to 1: the usual chain gives NaN, these gradients are finite and equal to the reference's."""
    student, teacher, target = make(2, 9, "few")
    student[torch.arange(2), target] += 400
    rows = student, teacher, target
    for inputs, keywords in (
        (rows, {"method": METHODS[4], "reduction": SUM}),
        ((torch.ones(2, 9), *rows[1:]), {"method": METHODS[2], "reduction": NONE}),  # no deviation to divide by
    ):
        got, truth = (f(*inputs, **keywords) for f in (run, expected))
        plain = expected(*inputs, **keywords, dtype=torch.float32)
        near(got[0], truth[0], plain[0])
        if truth[4].isfinite().all():
            near(got[4], truth[4], plain[4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # a double is kept in a buffer of its own
@pytest.mark.parametrize("correction", CORRECTIONS[1:])
def test_inplace_is_the_same_gradient(path, correction, dtype):
    """Bit for bit, over the logits: nothing reads a logit after its gradient has taken its place."""
    student, teacher, target = make(3, 70, "last", dtype)
    target[0] = teacher[0].argmax()
    target[1] = -100
    keywords = {"correction": correction, "method": METHODS[-1], "temperature": torch.tensor(3.0)}
    want = run(student, teacher, target, **keywords)
    logits = student.clone()
    got = run(logits, teacher, target, **keywords, inplace=True)
    assert got[4].data_ptr() == logits.data_ptr()
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_no_memory_for_no_gradient(monkeypatch):
    """A student that asks for a gradient gets no memory for one under `torch.no_grad()`."""
    student, teacher, target = make(3, 20, "few")
    sizes, forward = [], backend.loss_forward
    monkeypatch.setattr(backend, "loss_forward", lambda *a, **k: sizes.append(forward(*a, **k)) or sizes[-1])
    with torch.no_grad():
        fused_sort_kd(student.requires_grad_(), teacher, target, backend="triton")
    assert sizes[0][4].numel() == 0


LAYOUTS = {
    "[N, C, H, W]": (1, lambda x: x.view(2, 3, 1, 40).permute(0, 3, 1, 2).contiguous()),
    "channels last": (1, lambda x: x.view(2, 3, 1, 40).permute(0, 3, 1, 2)),
    "transposed": (-1, lambda x: x.t().contiguous().t()),
    "expanded": (-1, lambda x: x[:1].expand(6, 40)),
    "sliced": (-1, lambda x: x.repeat_interleave(2, 1)[:, 1::2]),
    "cut": (-1, lambda x: x.view(2, 3, 40)[:, :2, :37]),
    "permuted": (-1, lambda x: x.repeat(4, 1).view(2, 2, 2, 3, 40).permute(3, 1, 0, 2, 4)),
    "one row": (-1, lambda x: x[0]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    """Any strides, against the same rows made contiguous; and the rescaling of a gradient of that layout."""
    class_dim, view = LAYOUTS[layout]
    *logits, target = make(6, 40, "few")
    logits = [view(x) for x in logits]
    rows = [x.movedim(class_dim, -1) for x in logits]
    shape = rows[0].shape[:-1]
    target = target.repeat(4)[: shape.numel()].view(shape)
    target = target % rows[0].shape[-1]
    got = run(*rows, target)
    flat = *(x.reshape(-1, x.shape[-1]) for x in rows), target.reshape(-1)
    truth, plain = expected(*flat), expected(*flat, dtype=torch.float32)
    near(got[0], truth[0], plain[0])
    near(got[4].reshape(truth[4].shape), truth[4], plain[4])
    assert got[4].stride() == torch.empty_like(rows[0]).stride()
    for factor in (torch.tensor(1.0), torch.tensor(3.0), torch.rand(shape)):
        scaled = backend.scale_gradient(got[4].clone(), factor)
        assert torch.equal(scaled, got[4] * (factor.unsqueeze(-1) if factor.dim() else factor))


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("k", [8, 40])
def test_top_k_teacher(k, uniform):
    """The full op on the row written out; labels outside the k, and below the tail (a server's appended label)."""
    student, teacher, target = make(3, 40, "random")
    values, indices = torch.log_softmax(teacher, -1).topk(k, -1, sorted=False)
    target[0], target[1] = indices[0, 3], indices[1, 2]
    values[1, 2], target[2] = -40.0, next((c for c in range(40) if c not in indices[2]), 0)
    dense = reference.densify_top_k(values.double(), indices, 40, uniform)
    got = run(student, values, target, indices=indices, uniform=uniform, reduction=NONE)
    truth = expected(student, dense, target, reduction=NONE)
    assert torch.equal(got[3], truth[3])
    dense = reference.densify_top_k(values, indices, 40, uniform)  # what the k leave is a difference from 1
    plain = expected(student, dense, target, reduction=NONE, dtype=torch.float32)
    near(got[0], truth[0], plain[0])
    near(got[4], truth[4], plain[4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_sort_logits(correction, dtype):
    """Bit for bit: values only move."""
    _, teacher, target = make(4, 90, "random", dtype)
    teacher[0, 7], target[1], teacher[1, 3] = torch.nan, -100, torch.nan
    teacher[2, :9], teacher[2, 10] = 0.0, -0.0
    got = backend.sort_logits(teacher, target, CORRECTIONS.index(correction), -100)
    want = reference_sort_logits(teacher, target, CORRECTIONS.index(correction), -100)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_bad_label():
    """On CPU tensors what the CPU kernels raise; the assertion of the GPU is in test_gpu_static.py."""
    student, teacher, _ = make(2, 5, "right")
    with pytest.raises(IndexError, match=r"target in \[0, 5\) or ignore_index -100, got 5 in row 1"):
        fused_sort_kd(student, teacher, torch.tensor([0, 5]), backend="triton")


def test_arguments_of_later_calls(monkeypatch):
    """After a kernel's first call Triton's binder is passed by: the arguments must be the parameters in order."""
    calls = []

    def launched(self, pointers, numbers):
        calls.append(self.kernel.arg_names)
        names = [*self.kernel.arg_names]
        given = len(pointers) + len(numbers)
        assert names[given:] == list(self.constants)
        floats = [isinstance(x, float) for x in numbers]
        typed = [
            str(self.kernel.fn.__annotations__.get(n, "")).startswith("tl.float") for n in names[len(pointers) : given]
        ]
        assert floats == typed, list(zip(names[len(pointers) :], numbers, strict=False))

    monkeypatch.setattr(choices.Launch, "__call__", launched)
    student, teacher, target = make(3, 140, "random")
    loss = run(student, teacher, target)[0]
    run(student, teacher[:, :8], target, indices=torch.arange(24).view(3, 8))
    backend.scale_gradient(student, loss)
    backend.sort_logits(teacher, target, 1, -100)
    assert len(calls) == 7


@pytest.mark.parametrize(("C", "launches"), ((128, 1), (129, 2)))
def test_few_classes_take_one_launch(monkeypatch, C, launches):
    launched, call = [], choices.Launch.__call__
    monkeypatch.setattr(choices.Launch, "__call__", lambda self, *given: (launched.append(self), call(self, *given)))
    run(*make(2, C, "random"))
    assert len(launched) == launches


@pytest.mark.parametrize("C", (9, 9000))
def test_kernels_of_one_shape(C):
    """What may change from call to call of one shape; `signatures` has the kernels checked."""
    *logits, target = make(4, C, "few")
    for dtype in (torch.float32, torch.float64, torch.float16):
        run(*logits, target, temperature=torch.tensor(2.0, dtype=dtype))
        run(*logits, target, temperature=torch.tensor([2.0, 3, 4, 5], dtype=dtype), method=METHODS[2])
    student = logits[0].requires_grad_()
    for teacher in (logits[1], logits[1].double()):
        # The loss, and what comes back to it, is a double beside a double.
        loss = fused_sort_kd(student, teacher, target, backend="triton")
        (gradient,) = torch.autograd.grad(loss, student, torch.full_like(loss, 3))
        (once,) = torch.autograd.grad(fused_sort_kd(student, teacher, target, backend="triton"), student)
        torch.testing.assert_close(gradient, 3 * once, rtol=2e-7, atol=0)
    between = torch.zeros(4 * C + 1)[1:].view(4, C)  # no multiple of 16 bytes
    for inplace in (False, True):
        run(between.copy_(logits[0].detach()), logits[1], target, inplace=inplace)


@pytest.fixture
def two_launches():
    """Rows of which each of a call's two launches takes some."""
    student, teacher, target = make(9, 140, "last")
    target[::3] = teacher[::3].argmax(-1)
    return student, teacher, target


def test_a_call_of_another_thread_between_the_launches(monkeypatch, two_launches):
    inputs = two_launches
    want, results, call = run(*inputs), [], choices.Launch.__call__

    def interrupted(self, pointers, numbers):
        call(self, pointers, numbers)
        if not results:
            results.append(None)
            other = threading.Thread(target=lambda: results.append(run(*inputs)))
            other.start()
            other.join()

    monkeypatch.setattr(choices.Launch, "__call__", interrupted)
    assert all(torch.equal(x, y) for x, y in zip(run(*inputs), want, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(results[1], want, strict=True))


def test_a_call_that_ends_between_the_launches(monkeypatch, two_launches):
    """Its first launch has counted rows that its second one never takes: the next call has other counters."""
    inputs, launched, call = two_launches, [], choices.Launch.__call__
    want = run(*inputs)

    def broken(self, pointers, numbers):
        launched.append(self)
        if len(launched) == 2:
            raise MemoryError
        call(self, pointers, numbers)

    monkeypatch.setattr(choices.Launch, "__call__", broken)
    with pytest.raises(MemoryError):
        run(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(run(*inputs), want, strict=True))


def test_counters_are_zeroed_where_they_count(monkeypatch):
    """Those of another stream, or thread, may still be waiting to be zeroed there."""
    blocks = set()
    for ident in (-1, -2):
        monkeypatch.setattr(threading, "get_ident", lambda i=ident: i)
        blocks.add(launch._tickets(torch.device("cpu"), False).untyped_storage().data_ptr())
    assert len(blocks) == 2


def test_a_trace_keeps_no_memory():
    """In a graph of torch.compile's, what a call kept would lie in the graph's memory."""
    *logits, target = make(4, 9, "few")
    launch._TICKETS.clear()
    blocks = len(launch._BLOCKS)
    torch.ops.sortkd_kernels.sort_kd_forward_triton(*logits, None, target, None, *LossConfig(), None, True, False)
    assert not launch._TICKETS and len(launch._BLOCKS) == blocks


class Compiled:
    """What Triton's compiler hands back, as far as `choices.Launch` knows it."""

    def __init__(self, seen):
        self.seen = seen

    def __getitem__(self, grid):
        return lambda *arguments: self.seen.append((grid, arguments))


def test_later_calls_launch_what_the_first_compiled(monkeypatch):
    seen = []

    class Kernel:
        arg_names, kwargs = ["x"], {"do_not_specialize": []}

        def __getitem__(self, grid):
            return lambda *a, **k: (seen.append((grid, a, k)), Compiled(seen))[1]

    monkeypatch.setattr(choices, "INTERPRETED", False)
    launched = choices.Launch(Kernel(), 3, 2, C=5)
    x = torch.zeros(2)
    launched((x,), (7,))
    launched((x,), (8,))
    assert seen[0] == ((3, 1, 1), (x, 7), {"C": 5, **choices.options(2, choices.REGISTERS)})
    assert seen[1] == ((3, 1, 1), (x.data_ptr(), 8, 5))


class NoHostRead(TorchDispatchMode):
    """Fails on every op that would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func) and "nonzero" not in str(func) and "equal" not in str(func), func
        return func(*args, **(kwargs or {}))


def test_no_host_synchronisation():
    student, teacher, target = make(3, 20, "random")
    with NoHostRead():
        got = run(student, teacher, target, temperature=torch.tensor(2.0), grad_output=torch.tensor(2.0))
        backend.scale_gradient(got[4], got[0])
        backend.sort_logits(teacher, target, 1, -100)
