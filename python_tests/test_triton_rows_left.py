"""Rows that one launch of the Triton backend leaves to the next, in any order, and gradients over the student's logits.

Under the interpreter: a run is 32 keys there, so that a hundred classes take every path.
"""

from __future__ import annotations

import pytest
import torch
from triton_cases import CORRECTIONS, METHODS, NONE, make, run

from sortkd_kernels import fused_sort_kd
from sortkd_kernels.backends import triton as backend
from sortkd_kernels.backends.triton import launch
from sortkd_kernels.ops import reference_sort_logits

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, where the kernels mean inf and NaN
    pytest.mark.usefixtures("poisoned_memory"),
]


@pytest.fixture(params=["on chip", "streamed"])
def path(request, monkeypatch):
    """Who leaves rows: the tile kernel, or the streaming one, which then takes several blocks of classes."""
    if request.param == "streamed":
        monkeypatch.setattr(launch, "on_chip", lambda *_: False)
        monkeypatch.setattr(launch, "CLASS_BLOCK", 16)


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


class OtherOrder:
    """The second launch of a kernel, before which the list of rows is turned round, as another schedule would have."""

    def __init__(self, kernel):
        self.kernel, self.turned = kernel, 0

    def __getitem__(self, grid):
        def launched(*args, LEFT, **keywords):
            values = dict(zip(self.kernel.arg_names, args, strict=False))
            if LEFT:
                rows = values["listed"][: int(values["tally"][0])]
                assert len(rows) > 1 and rows.unique().numel() == len(rows)
                rows.copy_(rows.flip(0))
                self.turned += 1
            return self.kernel[grid](*args, LEFT=LEFT, **keywords)

        return launched


def test_order_of_the_list(path, monkeypatch):
    """Which rows are left is for one launch to say, in whatever order its programs come: no result depends on it."""
    inputs = make(7, 70, "last")
    inputs[2][2] = inputs[1][2].argmax()
    want = run(*inputs, reduction=NONE)
    monkeypatch.setattr(backend.loss, "sort_kd_stream", kernel := OtherOrder(backend.loss.sort_kd_stream))
    got = run(*inputs, reduction=NONE)
    assert kernel.turned == 1
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("correction", CORRECTIONS[1:])
def test_order_of_the_list_of_sort_logits(correction, monkeypatch):
    _, teacher, target = make(5, 70, "last")
    code = CORRECTIONS.index(correction)
    monkeypatch.setattr(backend.logits, "sort_kd_logits", kernel := OtherOrder(backend.logits.sort_kd_logits))
    assert torch.equal(
        backend.sort_logits(teacher, target, code, -100), reference_sort_logits(teacher, target, code, -100)
    )
    assert kernel.turned == 1


def test_one_memory_for_no_gradient():
    """A student that asks for a gradient gets no memory for one under `torch.no_grad()`."""
    student, teacher, target = make(3, 20, "few")
    sizes = []
    forward = backend.loss_forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "loss_forward", lambda *a, **k: sizes.append(forward(*a, **k)) or sizes[-1])
        with torch.no_grad():
            fused_sort_kd(student.requires_grad_(), teacher, target, backend="triton")
    assert sizes[0][4].numel() == 0
