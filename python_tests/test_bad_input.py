"""Errors are part of the interface: which argument, what was expected, what came."""

from __future__ import annotations

import warnings

import pytest
import torch

import sortkd_kernels as sk
from sortkd_kernels import backends

S, T, Y = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 4])
VALUES, INDICES = T.topk(3)


def kd(**changes):
    arguments = {"student": S, "teacher": T, "target": Y} | changes
    return sk.fused_sort_kd(arguments.pop("student"), arguments.pop("teacher"), arguments.pop("target"), **arguments)


REFUSED = [
    (dict(student=[1.0]), TypeError, "fused_sort_kd: expected student to be a torch.Tensor, got list"),
    (dict(student=S.int()), TypeError, "expected student of dtype float32, float64, bfloat16 or float16, got int32"),
    (dict(student=S[0, 0]), ValueError, r"expected student of shape \[..., C\], got a 0-d tensor"),
    (dict(student=S[:, :0], teacher=T[:, :0]), ValueError, r"student with at least one class, got shape \(4, 0\)"),
    (dict(teacher=None), TypeError, "expected teacher to be a torch.Tensor, got NoneType"),
    (dict(teacher=T.long()), TypeError, "expected teacher of dtype float32, .*, got int64"),
    (dict(teacher=T[:, :4]), ValueError, r"expected teacher of shape \(4, 5\) to match student, got \(4, 4\)"),
    (dict(teacher=T.clone().requires_grad_()), ValueError, r"expected teacher without requires_grad.*\.detach\(\)"),
    (dict(teacher=T.to("meta")), ValueError, "expected teacher on cpu like student, got meta"),
    (dict(target=Y.tolist()), TypeError, "expected target to be a torch.Tensor, got list"),
    (dict(target=Y.int()), TypeError, "expected target of dtype int64 .*, got int32"),
    (dict(target=Y[:3]), ValueError, r"expected target of shape \(4,\) to match student \(4, 5\), got \(3,\)"),
    (dict(target=Y.to("meta")), ValueError, "expected target on cpu like student, got meta"),
    (dict(class_dim=2), ValueError, "expected class_dim to name one of the 2 dimensions of student, got 2"),
    (dict(class_dim=0), ValueError, r"expected target of shape \(5,\) to match student \(4, 5\), got \(4,\)"),
    (dict(temperature=0), ValueError, "expected temperature to be positive, got 0"),
    (dict(temperature=-1.0), ValueError, "expected temperature to be positive, got -1.0"),
    (dict(temperature=float("nan")), ValueError, "expected temperature to be finite, got nan"),
    (dict(temperature=float("inf")), ValueError, "expected temperature to be finite, got inf"),
    (dict(temperature="4"), TypeError, "expected temperature to be a number, got str"),
    (dict(temperature=True), TypeError, "expected temperature to be a number, got bool"),
    (dict(temperature=torch.ones(3)), ValueError, r"temperature of shape \(\) or \(4,\), one value a row, got \(3,\)"),
    (dict(temperature=torch.tensor(4)), TypeError, "expected temperature of a float dtype, got int64"),
    (dict(ce_weight=float("inf")), ValueError, "expected ce_weight to be finite, got inf"),
    (dict(kd_weight=None), TypeError, "expected kd_weight to be a number, got NoneType"),
    (dict(correction="sorted"), ValueError, "expected correction to be one of 'none', 'sort', 'swap', got 'sorted'"),
    (dict(correction=None), ValueError, "expected correction to be one of .*, got None"),
    (dict(reduction="avg"), ValueError, "reduction to be one of 'none', 'sum', 'mean', 'batchmean', got 'avg'"),
    (dict(ignore_index=1.5), TypeError, "expected ignore_index to be an int, got float"),
    (dict(backend="cuda"), ValueError, "expected backend to be one of 'native', 'triton', 'reference' or None"),
]


@pytest.mark.parametrize(("changes", "error", "words"), REFUSED, ids=[r[2][:50] for r in REFUSED])
def test_refused(changes, error, words):
    with pytest.raises(error, match=words) as caught:
        kd(**changes)
    assert str(caught.value).startswith("fused_sort_kd: ")


def test_other_functions_name_themselves():
    with pytest.raises(ValueError, match=r"^fused_sort_dkd: expected beta to be finite, got nan"):
        sk.fused_sort_dkd(S, T, Y, beta=float("nan"))
    with pytest.raises(ValueError, match=r"^sort_logits: expected target of shape \(4,\) to match teacher"):
        sk.sort_logits(T, Y[:2])
    with pytest.raises(ValueError, match=r"^fused_sort_kd_topk: expected tail to be one of .*, got 'drop'"):
        sk.fused_sort_kd_topk(S, VALUES, INDICES, Y, tail="drop")
    with pytest.raises(ValueError, match=r"expected teacher_indices of shape \(4, 3\) to match teacher_values"):
        sk.fused_sort_kd_topk(S, VALUES, INDICES[:, :2], Y)
    with pytest.raises(ValueError, match=r"teacher_values of shape \(4, 'k'\) with 0 < k <= 5, got \(4, 6\)"):
        sk.fused_sort_kd_topk(S, torch.randn(4, 6), torch.zeros(4, 6, dtype=torch.long), Y)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("label", [5, -1, 2**40])
def test_a_label_outside_the_classes_names_row_and_value(backend, label):
    target = Y.clone()
    target[2] = label
    words = rf"expected target in \[0, 5\) or ignore_index -100, got {label} in row 2"
    for call in (sk.fused_sort_kd, sk.fused_sort_dkd):
        with pytest.raises(IndexError, match=words):
            call(S, T, target, backend=backend)
    with pytest.raises(IndexError, match=words):
        sk.sort_logits(T, target, backend=backend)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_top_k_index_outside_the_classes(backend):
    indices = INDICES.clone()
    indices[1, 2] = 7
    with pytest.raises(IndexError, match=r"expected teacher_indices in \[0, 5\), got 7"):
        sk.fused_sort_kd_topk(S, VALUES, indices, Y, backend=backend)


def test_a_label_that_is_the_ignore_index_is_never_out_of_range():
    assert kd(target=torch.tensor([0, 77, 2, 4]), ignore_index=77).isfinite()


def test_the_ops_guard_memory_themselves():
    """Callers who skip the Python function get an error too, not a read outside the tensor."""
    arguments = (None, 1.0, 1, False, 1.0, 1.0, 1.0, 0.0, False, False, -1, 2, -100, False, False)
    op = torch.ops.sortkd_kernels.sort_kd_loss.default
    for student, teacher, target, error in (
        (S, T[:, :3], Y, ValueError),
        (S, T, Y[:2], ValueError),
        (S, T, Y.int(), TypeError),
        (S.int(), T, Y, TypeError),
        (S, T, Y + 10, IndexError),
    ):
        with pytest.raises(error, match="sortkd_kernels: expected"):
            op(student, teacher, None, target, *arguments)


def test_a_backend_by_name_never_falls_back(monkeypatch):
    missing = backends.BackendState(False, (), "the compiled extension is not there (why)")
    monkeypatch.setitem(backends._STATES, "native", missing)
    with pytest.raises(RuntimeError, match=r"backend 'native' cannot run on cpu: the compiled extension is not there"):
        kd(backend="native")


def test_a_device_without_kernels_takes_the_reference_with_one_warning():
    backends._default.cache_clear()
    with pytest.warns(UserWarning, match="no compiled backend for meta .* PyTorch reference"):
        assert backends.choose("f", None, torch.device("meta")) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose("f", None, torch.device("meta")) == "reference"
