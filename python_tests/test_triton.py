"""The Triton kernels, run by Triton's interpreter against the reference in float64.

No GPU is needed and nothing here is a GPU timing. The interpreter executes what the kernels compute, not how a GPU
schedules it; what the compiled code shows is in test_gpu_static.py. The tables of cases.py run on this backend too; here
are its own paths: ranks past the limits, rows in blocks, launches, layouts.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import CORRECTIONS, MEAN, METHODS, NONE, SUM, check, expected, make, run

from sortkd_kernels import fused_sort_kd, reference
from sortkd_kernels.backends import triton as backend
from sortkd_kernels.backends.triton import launch
from sortkd_kernels.ops import reference_sort_logits

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, where the kernels mean inf and NaN
    pytest.mark.usefixtures("poisoned_memory"),
]
# N, C, rank of the labels: why.
CASES = (
    (1, 1, "right"),  # one class: every probability is 1, every sum without the label empty
    (5, 2, "random"),  # binary: without the label one class is left
    (4, 3, "random"),
    (5, 100, "few"),  # CIFAR-100 with a trained teacher: settled in registers, several rows a tile, N no multiple
    (3, 100, "random"),  # ranks past the limit: the second launch, one sorted run
    (2, 129, "last"),  # one past a power of two, and the worst rank
    (2, 1000, "right"),  # ImageNet: nothing to correct
    (1, 1000, "last"),  # many runs, merged
    (2, 17000, "few"),  # more than fits on chip
)  # fmt: skip


@pytest.fixture(params=["on chip", "streamed"])
def path(request, monkeypatch):
    """Both row kernels on the same rows; the streamed one in several blocks of classes and several launches."""
    if request.param == "streamed":
        monkeypatch.setattr(launch, "on_chip", lambda *_: False)
        monkeypatch.setattr(launch, "CLASS_BLOCK", 16)
        monkeypatch.setattr(launch, "ROWS_A_LAUNCH", 2)
    return request.param


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kd_and_ce(case, correction):
    inputs, keywords = make(*case), {"correction": correction}
    check(run(*inputs, **keywords), expected(*inputs, **keywords), expected(*inputs, **keywords, dtype=torch.float32))


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("correction", ["none", "sort"])
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
        torch.testing.assert_close(g, t, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reduction", [NONE, SUM, MEAN])
def test_reductions(reduction, monkeypatch):
    """With ignored rows, an upstream gradient, and row sums in one stage and in two."""
    monkeypatch.setattr(launch, "ROW_BLOCK", 2)
    inputs = make(19, 10, "random")
    inputs[2][::4] = -100
    keywords = {"reduction": reduction, "grad_loss": torch.rand(19) + 0.5 if reduction == NONE else torch.tensor(3.0)}
    got, plain = run(*inputs, **keywords), expected(*inputs, **keywords, dtype=torch.float32)
    check(got, expected(*inputs, **keywords), plain)
    without = run(*inputs, **keywords, with_grad=False)
    assert without[4].numel() == without[5].numel() == 0 and torch.equal(without[0], got[0])


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
    broken = torch.tensor([0, 1, 2, 3, 6])
    assert got[0][broken].isnan().all() and got[4][broken].isnan().all()
    torch.testing.assert_close(got[0][[4, 5, 7]].double(), truth[0][[4, 5, 7]], rtol=1e-6, atol=1e-6)
    q, p = (torch.softmax(x.double() / 4, -1) for x in (student, reference.sort_logits(teacher, target)))
    onehot = torch.nn.functional.one_hot(target, 21)
    gradient = 0.9 * 4 * (q - p) + 0.1 * (torch.softmax(student.double(), -1) - onehot)
    torch.testing.assert_close(got[4][[4, 5, 7]].double(), gradient[[4, 5, 7]], rtol=1e-5, atol=1e-6)


def test_dkd_of_a_certain_student():
    """q_y rounds to 1: the usual chain gives NaN, these gradients are finite and equal to the reference's."""
    student, teacher, target = make(2, 9, "few")
    student[torch.arange(2), target] += 400
    got, truth = (f(student, teacher, target, method=METHODS[4], reduction=SUM) for f in (run, expected))
    torch.testing.assert_close(got[4].double(), truth[4], rtol=1e-5, atol=1e-6)
    constant = run(torch.ones(2, 9), teacher, target, method=METHODS[2], reduction=NONE)
    truth = expected(torch.ones(2, 9), teacher, target, method=METHODS[2], reduction=NONE)
    torch.testing.assert_close(constant[0].double(), truth[0], rtol=4e-6, atol=0)


LAYOUTS = {
    "[N, C, H, W]": (1, lambda x: x.view(2, 3, 1, 40).permute(0, 3, 1, 2).contiguous()),
    "channels last": (1, lambda x: x.view(2, 3, 1, 40).permute(0, 3, 1, 2)),
    "transposed": (-1, lambda x: x.t().contiguous().t()),
    "expanded": (-1, lambda x: x[:1].expand(6, 40)),
    "sliced": (-1, lambda x: x.repeat_interleave(2, 1)[:, 1::2]),
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
    target = target[: shape.numel()].view(shape)
    got = run(*rows, target)
    want = run(*(x.reshape(-1, 40) for x in rows), target.reshape(-1))
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(got[4].reshape(-1, 40), want[4], rtol=1e-5, atol=1e-8)
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
    torch.testing.assert_close(got[0].double(), truth[0], rtol=3e-6, atol=1e-5)
    torch.testing.assert_close(got[4].double(), truth[4], rtol=1e-4, atol=1e-6)


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


class NoHostRead(TorchDispatchMode):
    """Fails on every op that would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func) and "nonzero" not in str(func) and "equal" not in str(func), func
        return func(*args, **(kwargs or {}))


def test_no_host_synchronisation():
    student, teacher, target = make(3, 20, "random")
    with NoHostRead():
        got = run(student, teacher, target, temperature=torch.tensor(2.0), grad_loss=torch.tensor(2.0))
        backend.scale_gradient(got[4], got[0])
        backend.sort_logits(teacher, target, 1, -100)
