"""What bad input gets: the kind of error, and words with the function, the argument, what was expected and what came."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import cases
import pytest
import torch
from cases import BF16, F16, F32, F64

import sortkd_kernels
from sortkd_kernels import fused_sort_dkd, fused_sort_kd, fused_sort_kd_topk, sort_logits

N, C, K = 4, 10, 3
FUNCTIONS = {f.__name__: f for f in (fused_sort_kd, fused_sort_dkd, fused_sort_kd_topk, sort_logits)}
LOSSES = ("fused_sort_kd", "fused_sort_dkd", "fused_sort_kd_topk")
FULL = ("fused_sort_kd", "fused_sort_dkd")
LOGITS = "float32, float64, bfloat16 or float16"
META = torch.device("meta")  # a second device on every machine


def arguments(name):
    """A correct call of a function, by argument name."""
    call = {"target": torch.tensor([0, 1, 2, 3])}
    if name != "sort_logits":
        call["student"] = torch.randn(N, C)
    if name == "fused_sort_kd_topk":
        call["teacher_values"], call["teacher_indices"] = torch.randn(N, C).topk(K)
    else:
        call["teacher"] = torch.randn(N, C)
    return call



# Functions, the argument that is wrong, its value, the error, and the words behind "function: ".
WRONG_TENSORS = [
    (LOSSES, "student", [1.0], TypeError, "expected student to be a torch.Tensor, got list"),
    (LOSSES, "student", None, TypeError, "expected student to be a torch.Tensor, got NoneType"),
    (LOSSES, "student", torch.ones(N, C, dtype=torch.int64), TypeError, f"expected student of dtype {LOGITS}, got int64"),
    (LOSSES, "student", torch.ones(N, C, dtype=torch.complex64), TypeError, f"expected student of dtype {LOGITS}, got complex64"),
    (LOSSES, "student", torch.tensor(1.0), ValueError, "expected student of shape [..., C], got a 0-d tensor"),
    ((*FULL, "sort_logits"), "teacher", "logits", TypeError, "expected teacher to be a torch.Tensor, got str"),
    ((*FULL, "sort_logits"), "teacher", torch.ones(N, C, dtype=torch.bool), TypeError, f"expected teacher of dtype {LOGITS}, got bool"),
    (FULL, "teacher", torch.randn(N, 7), ValueError, "expected teacher of shape (4, 10) to match student, got (4, 7)"),
    (FULL, "teacher", torch.randn(N, C, 1), ValueError, "expected teacher of shape (4, 10) to match student, got (4, 10, 1)"),
    (FULL, "teacher", torch.randn(N, C, device=META), ValueError, "expected teacher on cpu like student, got meta"),
    (LOSSES, "target", [0, 1, 2, 3], TypeError, "expected target to be a torch.Tensor, got list"),
    (LOSSES, "target", torch.zeros(N), TypeError, "expected target of dtype int64 (class indices), got float32"),
    (LOSSES, "target", torch.zeros(N, dtype=torch.int32), TypeError, "expected target of dtype int64 (class indices), got int32"),
    (LOSSES, "target", torch.zeros(N, C, dtype=torch.int64), ValueError, "expected target of shape (4,) to match student (4, 10), got (4, 10)"),
    (LOSSES, "target", torch.zeros(5, dtype=torch.int64), ValueError, "expected target of shape (4,) to match student (4, 10), got (5,)"),
    (LOSSES, "target", torch.zeros(N, dtype=torch.int64, device=META), ValueError, "expected target on cpu like student, got meta"),
    (("sort_logits",), "teacher", torch.tensor(1.0), ValueError, "expected teacher of shape [..., C], got a 0-d tensor"),
    (("sort_logits",), "target", torch.zeros(5, dtype=torch.int64), ValueError, "expected target of shape (4,) to match teacher (4, 10), got (5,)"),
    (("sort_logits",), "target", torch.zeros(N), TypeError, "expected target of dtype int64 (class indices), got float32"),
    (("fused_sort_kd_topk",), "teacher_values", [[1.0]], TypeError, "expected teacher_values to be a torch.Tensor, got list"),
    (("fused_sort_kd_topk",), "teacher_values", torch.ones(N, K, dtype=torch.int64), TypeError, f"expected teacher_values of dtype {LOGITS}, got int64"),
    (("fused_sort_kd_topk",), "teacher_values", torch.randn(N, 11), ValueError, "expected teacher_values of shape (4, 'k') with 0 < k <= 10, got (4, 11)"),
    (("fused_sort_kd_topk",), "teacher_values", torch.randn(N, 0), ValueError, "expected teacher_values of shape (4, 'k') with 0 < k <= 10, got (4, 0)"),
    (("fused_sort_kd_topk",), "teacher_values", torch.randn(5, K), ValueError, "expected teacher_values of shape (4, 'k') with 0 < k <= 10, got (5, 3)"),
    (("fused_sort_kd_topk",), "teacher_indices", [[1]], TypeError, "expected teacher_indices to be a torch.Tensor, got list"),
    (("fused_sort_kd_topk",), "teacher_indices", torch.zeros(N, K, dtype=torch.int32), TypeError, "expected teacher_indices of dtype int64, got int32"),
    (("fused_sort_kd_topk",), "teacher_indices", torch.zeros(N, 2, dtype=torch.int64), ValueError, "expected teacher_indices of shape (4, 3) to match teacher_values, got (4, 2)"),
    (("fused_sort_kd_topk",), "teacher_indices", torch.zeros(N, K, dtype=torch.int64, device=META), ValueError, "expected teacher_indices on cpu like student, got meta"),
]  # fmt: skip  # noqa: E501


@pytest.mark.parametrize(
    ("name", "argument", "value", "error", "words"),
    [(name, *case[1:]) for case in WRONG_TENSORS for name in case[0]],
    ids=[f"{name}-{case[4]}" for case in WRONG_TENSORS for name in case[0]],
)
def test_tensors(name, argument, value, error, words):
    with pytest.raises(error, match=re.escape(f"{name}: {words}")):
        FUNCTIONS[name](**arguments(name) | {argument: value})


def numbers(argument):
    return [
        (argument, math.nan, ValueError, f"expected {argument} to be finite, got nan"),
        (argument, math.inf, ValueError, f"expected {argument} to be finite, got inf"),
        (argument, -math.inf, ValueError, f"expected {argument} to be finite, got -inf"),
        (argument, "4", TypeError, f"expected {argument} to be a number, got str"),
        (argument, None, TypeError, f"expected {argument} to be a number, got NoneType"),
        (argument, True, TypeError, f"expected {argument} to be a number, got bool"),
        (argument, Fraction(1, 2), TypeError, f"expected {argument} to be a number, got Fraction"),
    ]


BACKENDS_EXPECTED = "expected backend to be one of 'native', 'triton', 'reference' or None"
REDUCTIONS_EXPECTED = "expected reduction to be one of 'none', 'sum', 'mean', 'batchmean'"
WRONG_OPTIONS = [
    *((LOSSES, *case) for case in numbers("temperature")),
    (LOSSES, "temperature", 0.0, ValueError, "expected temperature to be positive, got 0.0"),
    (LOSSES, "temperature", -4, ValueError, "expected temperature to be positive, got -4"),
    (LOSSES, "temperature", torch.tensor(4), TypeError, "expected temperature of a float dtype, got int64"),
    (LOSSES, "temperature", torch.ones(3), ValueError, "expected temperature of shape () or (4,), one value a row, got (3,)"),
    (LOSSES, "temperature", torch.ones(1), ValueError, "expected temperature of shape () or (4,), one value a row, got (1,)"),
    (LOSSES, "temperature", torch.ones(4, 1), ValueError, "expected temperature of shape () or (4,), one value a row, got (4, 1)"),
    (LOSSES, "temperature", torch.ones((), device=META), ValueError, "expected temperature on cpu like student, got meta"),
    *((LOSSES, *case) for name in ("kd_weight", "ce_weight") for case in numbers(name)),
    *((("fused_sort_dkd",), *case) for name in ("alpha", "beta") for case in numbers(name)),
    ((*LOSSES, "sort_logits"), "correction", "rotate", ValueError, "expected correction to be one of 'none', 'sort', 'swap', got 'rotate'"),
    ((*LOSSES, "sort_logits"), "correction", None, ValueError, "expected correction to be one of 'none', 'sort', 'swap', got None"),
    ((*LOSSES, "sort_logits"), "correction", 1, ValueError, "expected correction to be one of 'none', 'sort', 'swap', got 1"),
    (LOSSES, "reduction", "avg", ValueError, f"{REDUCTIONS_EXPECTED}, got 'avg'"),
    (LOSSES, "reduction", ["mean"], ValueError, f"{REDUCTIONS_EXPECTED}, got ['mean']"),
    ((*LOSSES, "sort_logits"), "ignore_index", 1.0, TypeError, "expected ignore_index to be an int, got float"),
    ((*LOSSES, "sort_logits"), "ignore_index", None, TypeError, "expected ignore_index to be an int, got NoneType"),
    ((*LOSSES, "sort_logits"), "ignore_index", True, TypeError, "expected ignore_index to be an int, got bool"),
    ((*LOSSES, "sort_logits"), "backend", "cudnn", ValueError, f"{BACKENDS_EXPECTED}, got 'cudnn'"),
    ((*LOSSES, "sort_logits"), "backend", 3, ValueError, f"{BACKENDS_EXPECTED}, got 3"),
    (FULL, "class_dim", 2, ValueError, "expected class_dim to name one of the 2 dimensions of student, got 2"),
    (FULL, "class_dim", -3, ValueError, "expected class_dim to name one of the 2 dimensions of student, got -3"),
    (FULL, "class_dim", 1.0, ValueError, "expected class_dim to name one of the 2 dimensions of student, got 1.0"),
    (("fused_sort_kd_topk",), "tail", "zero", ValueError, "expected tail to be one of 'renormalize', 'uniform', got 'zero'"),
]  # fmt: skip  # noqa: E501


@pytest.mark.parametrize(
    ("name", "argument", "value", "error", "words"),
    [(name, *case[1:]) for case in WRONG_OPTIONS for name in case[0]],
    ids=[f"{name}-{case[4]}" for case in WRONG_OPTIONS for name in case[0]],
)
def test_options(name, argument, value, error, words):
    with pytest.raises(error, match=re.escape(f"{name}: {words}")):
        FUNCTIONS[name](**arguments(name), **{argument: value})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_classes(name):
    call = arguments(name)
    logits = "teacher" if name == "sort_logits" else "student"
    call |= {key: call[key][:, :0] for key in ("student", "teacher") if key in call}
    expected = (
        "expected teacher_values of shape (4, 'k') with 0 < k <= 0, got (4, 3)"
        if name == "fused_sort_kd_topk"
        else f"expected {logits} with at least one class, got shape (4, 0)"
    )
    with pytest.raises(ValueError, match=re.escape(f"{name}: {expected}")):
        FUNCTIONS[name](**call)


@pytest.mark.parametrize("value", (C, C + 5, -1, -101, 2**40, -(2**63)))
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("backend", ("native", "reference"))
def test_label_outside(backend, name, value):
    """On the CPU an IndexError with the row and the value."""
    call = arguments(name)
    call["target"][2] = value
    words = f"expected target in [0, {C}) or ignore_index -100, got {value} in row 2"
    with pytest.raises(IndexError, match=re.escape(words)):
        FUNCTIONS[name](**call, backend=backend)


@pytest.mark.parametrize("value", (C, -1, -100, 2**40))
@pytest.mark.parametrize("backend", ("native", "reference"))
def test_top_k_index_outside(backend, value):
    """An index has no ignore_index: -100 is outside too."""
    call = arguments("fused_sort_kd_topk")
    call["teacher_indices"][1, 2] = value
    with pytest.raises(IndexError, match=re.escape(f"expected teacher_indices in [0, {C}), got {value}")):
        fused_sort_kd_topk(**call, backend=backend)


@pytest.mark.parametrize("backend", ("native", "reference"))
def test_label_outside_of_dense_logits(backend):
    """The row counts through all of the target, as `target.flatten()` does."""
    target = torch.zeros(2, 3, 4, dtype=torch.int64)
    target[1, 2, 0] = C
    with pytest.raises(IndexError, match=re.escape(f"got {C} in row 20")):
        fused_sort_kd(torch.randn(2, C, 3, 4), torch.randn(2, C, 3, 4), target, class_dim=1, backend=backend)


def test_an_error_leaves_nothing_behind():
    """The student of a refused in-place call keeps its logits."""
    call = arguments("fused_sort_kd")
    student = call["student"].requires_grad_() * 1
    before = student.detach().clone()
    call["target"][3] = C
    with pytest.raises(IndexError):
        fused_sort_kd(**call | {"student": student}, inplace=True)
    assert torch.equal(student, before)


@pytest.mark.parametrize("dtype", (torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int16), ids=str)
def test_other_dtypes_are_refused(dtype):
    call = arguments("fused_sort_kd")
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(TypeError, match=f"fused_sort_kd: expected student of dtype {LOGITS}, got {name}"):
        fused_sort_kd(**call | {"student": torch.zeros(N, C).to(dtype)})


@pytest.mark.parametrize("value", (4, 4.0, torch.tensor(4.0), torch.tensor(4.0, dtype=F64), torch.tensor(4.0, dtype=BF16), torch.full((N,), 4.0, dtype=F16)), ids=repr)  # fmt: skip  # noqa: E501
@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_temperatures_that_are_fine(backend, value):
    """Integers, and tensors of every float dtype, count in the arithmetic's dtype."""
    call = arguments("fused_sort_kd")
    got = fused_sort_kd(**call, temperature=value, backend=backend)
    assert got.dtype == F32
    torch.testing.assert_close(got, fused_sort_kd(**call, temperature=4.0, backend=backend))


def test_ops_guard_themselves():
    """Who calls the ops directly gets errors too, never a read outside of the memory."""
    student, teacher, target = cases.make_rows(N, C)
    op = torch.ops.sortkd_kernels.sort_logits.default
    for wrong in ((teacher, target[:3], 1, -100), (teacher, target.int(), 1, -100), (teacher.int(), target, 1, -100)):
        with pytest.raises((TypeError, ValueError), match="sortkd_kernels: expected"):
            op(*wrong)
    with pytest.raises(IndexError, match="expected target in"):
        op(teacher, target.clamp_min(0) + C, 1, -100)
    config = (4.0, 1, False, 1.0, 1.0, 1.0, 0.0, False, False, -1, 2, -100, False, False)
    values, indices = teacher.topk(K)
    for student_, teacher_, indices_, target_, temperature in (
        (student, teacher[:, :5], None, target, None),
        (student, teacher, None, target[:2], None),
        (student, teacher, None, target, torch.ones(3)),
        (student, values, indices[:, :2], target, None),
        (student, values[:3], indices[:3], target, None),
        (student.int(), teacher, None, target, None),
        (student, teacher.int(), None, target, None),
        (student, teacher, None, target.int(), None),
    ):
        with pytest.raises((TypeError, ValueError), match="sortkd_kernels: expected"):
            torch.ops.sortkd_kernels.sort_kd_loss.default(student_, teacher_, indices_, target_, temperature, *config)
        with pytest.raises((TypeError, ValueError), match="sortkd_kernels: expected"):
            sortkd_kernels.backends._C.sort_kd_loss(student_, teacher_, indices_, target_, temperature, *config)
