"""What bad input gets: an error of the right kind that names function and argument, what was expected and what came."""

from __future__ import annotations

import math
import re

import cases
import numpy as np
import pytest
import torch
from cases import BF16, F16, F32

import sortkd_kernels
from sortkd_kernels import fused_sort_dkd, fused_sort_kd, fused_sort_kd_topk, ops, sort_logits

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


TENSOR, FLOATS = "to be a torch.Tensor", f"of dtype {LOGITS}"
LABELS, ROWS = "of dtype int64 (class indices)", "of shape (4,) to match"
WITH_TEACHER, TOP_K, SORT = (*FULL, "sort_logits"), ("fused_sort_kd_topk",), ("sort_logits",)
VALUES = "of shape (4, 'k') with 0 < k <= 10"


def zeros(*shape, dtype=torch.int64, **options):
    return torch.zeros(*shape, dtype=dtype, **options)


# Functions, the argument that is wrong, its value, the error, what was expected, what came.
WRONG_TENSORS = [
    (LOSSES, "student", [1.0], TypeError, TENSOR, "list"),
    (LOSSES, "student", None, TypeError, TENSOR, "NoneType"),
    (LOSSES, "student", zeros(N, C), TypeError, FLOATS, "int64"),
    (LOSSES, "student", zeros(N, C, dtype=torch.complex64), TypeError, FLOATS, "complex64"),
    (LOSSES, "student", torch.tensor(1.0), ValueError, "of shape [..., C]", "a 0-d tensor"),
    (WITH_TEACHER, "teacher", "logits", TypeError, TENSOR, "str"),
    (WITH_TEACHER, "teacher", zeros(N, C, dtype=torch.bool), TypeError, FLOATS, "bool"),
    (FULL, "teacher", torch.randn(N, 7), ValueError, "of shape (4, 10) to match student", "(4, 7)"),
    (FULL, "teacher", torch.randn(N, C, 1), ValueError, "of shape (4, 10) to match student", "(4, 10, 1)"),
    (FULL, "teacher", torch.randn(N, C, device=META), ValueError, "on cpu like student", "meta"),
    (LOSSES, "target", [0, 1, 2, 3], TypeError, TENSOR, "list"),
    (LOSSES, "target", torch.zeros(N), TypeError, LABELS, "float32"),
    (LOSSES, "target", zeros(N, dtype=torch.int32), TypeError, LABELS, "int32"),
    (LOSSES, "target", zeros(N, C), ValueError, f"{ROWS} student (4, 10)", "(4, 10)"),
    (LOSSES, "target", zeros(5), ValueError, f"{ROWS} student (4, 10)", "(5,)"),
    (LOSSES, "target", zeros(N, device=META), ValueError, "on cpu like student", "meta"),
    (SORT, "teacher", torch.tensor(1.0), ValueError, "of shape [..., C]", "a 0-d tensor"),
    (SORT, "target", zeros(5), ValueError, f"{ROWS} teacher (4, 10)", "(5,)"),
    (SORT, "target", torch.zeros(N), TypeError, LABELS, "float32"),
    (TOP_K, "teacher_values", [[1.0]], TypeError, TENSOR, "list"),
    (TOP_K, "teacher_values", zeros(N, K), TypeError, FLOATS, "int64"),
    (TOP_K, "teacher_values", torch.randn(N, 11), ValueError, VALUES, "(4, 11)"),
    (TOP_K, "teacher_values", torch.randn(N, 0), ValueError, VALUES, "(4, 0)"),
    (TOP_K, "teacher_values", torch.randn(5, K), ValueError, VALUES, "(5, 3)"),
    (TOP_K, "teacher_indices", [[1]], TypeError, TENSOR, "list"),
    (TOP_K, "teacher_indices", zeros(N, K, dtype=torch.int16), TypeError, "of dtype int64 or int32", "int16"),
    (TOP_K, "teacher_indices", zeros(N, 2), ValueError, "of shape (4, 3) to match teacher_values", "(4, 2)"),
    (TOP_K, "teacher_indices", zeros(N, K, device=META), ValueError, "on cpu like student", "meta"),
]


def refused(table):
    """Each row of a table."""
    names = [f"{argument} {expected}, got {got}" for _, argument, _, _, expected, got in table]
    return pytest.mark.parametrize(("functions", "argument", "value", "error", "expected", "got"), table, ids=names)


@refused(WRONG_TENSORS)
def test_tensors(functions, argument, value, error, expected, got):
    for name in functions:
        with pytest.raises(error, match=re.escape(f"{name}: expected {argument} {expected}, got {got}")):
            FUNCTIONS[name](**arguments(name) | {argument: value})


def wrong_numbers(functions, argument):
    return [
        (functions, argument, math.nan, ValueError, "to be finite", "nan"),
        (functions, argument, math.inf, ValueError, "to be finite", "inf"),
        (functions, argument, -math.inf, ValueError, "to be finite", "-inf"),
        (functions, argument, "4", TypeError, "to be a number", "str"),
        (functions, argument, None, TypeError, "to be a number", "NoneType"),
        (functions, argument, True, TypeError, "to be a number", "bool"),
        (functions, argument, 0.5j, TypeError, "to be a number", "complex"),
    ]


EVERY = (*LOSSES, "sort_logits")
CORRECTION, REDUCTION = "to be one of 'none', 'sort', 'swap'", "to be one of 'none', 'sum', 'mean', 'batchmean'"
BACKEND, ROW_VALUES = "to be one of 'native', 'triton', 'reference' or None", "of shape () or (4,), one value a row"
DIMENSION = "to name one of the 2 dimensions of student"
WRONG_OPTIONS = [
    *wrong_numbers(LOSSES, "temperature"),
    *wrong_numbers(LOSSES, "kd_weight"),
    *wrong_numbers(LOSSES, "ce_weight"),
    *wrong_numbers(("fused_sort_dkd",), "alpha"),
    *wrong_numbers(("fused_sort_dkd",), "beta"),
    (LOSSES, "temperature", 0.0, ValueError, "to be positive", "0.0"),
    (LOSSES, "temperature", -4, ValueError, "to be positive", "-4"),
    (LOSSES, "temperature", torch.tensor(4), TypeError, "of a float dtype", "int64"),
    (LOSSES, "temperature", torch.ones(3), ValueError, ROW_VALUES, "(3,)"),
    (LOSSES, "temperature", torch.ones(1), ValueError, ROW_VALUES, "(1,)"),
    (LOSSES, "temperature", torch.ones(4, 1), ValueError, ROW_VALUES, "(4, 1)"),
    (LOSSES, "temperature", torch.ones((), device=META), ValueError, "on cpu like student", "meta"),
    (EVERY, "correction", "rotate", ValueError, CORRECTION, "'rotate'"),
    (EVERY, "correction", None, ValueError, CORRECTION, "None"),
    (EVERY, "correction", 1, ValueError, CORRECTION, "1"),
    (LOSSES, "reduction", "avg", ValueError, REDUCTION, "'avg'"),
    (LOSSES, "reduction", ["mean"], ValueError, REDUCTION, "['mean']"),
    (EVERY, "ignore_index", 1.0, TypeError, "to be an int", "float"),
    (EVERY, "ignore_index", None, TypeError, "to be an int", "NoneType"),
    (EVERY, "ignore_index", True, TypeError, "to be an int", "bool"),
    (EVERY, "backend", "cudnn", ValueError, BACKEND, "'cudnn'"),
    (EVERY, "backend", 3, ValueError, BACKEND, "3"),
    (FULL, "class_dim", 2, ValueError, DIMENSION, "2"),
    (FULL, "class_dim", -3, ValueError, DIMENSION, "-3"),
    (FULL, "class_dim", 1.0, ValueError, DIMENSION, "1.0"),
    (TOP_K, "tail", "zero", ValueError, "to be one of 'renormalize', 'uniform', 'bucket'", "'zero'"),
]


@refused(WRONG_OPTIONS)
def test_options(functions, argument, value, error, expected, got):
    for name in functions:
        with pytest.raises(error, match=re.escape(f"{name}: expected {argument} {expected}, got {got}")):
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


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("backend", ("native", "reference"))
def test_label_outside(backend, name):
    """On the CPU an IndexError with the row and the value."""
    for value in (C, C + 5, -1, -101, 2**40, -(2**63)):
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


FOUR = torch.tensor(4.0)


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_temperatures_that_are_fine(backend):
    """Integers, and tensors of every float dtype, count in the arithmetic's dtype."""
    call = arguments("fused_sort_kd")
    want = fused_sort_kd(**call, temperature=4.0, backend=backend)
    for value in (4, FOUR, FOUR.double(), FOUR.to(BF16), FOUR.to(F16).expand(N)):
        got = fused_sort_kd(**call, temperature=value, backend=backend)
        assert got.dtype == F32
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_numpys_scalars_are_numbers(backend):
    """A schedule or a data frame hands them over; each option counts as the plain number."""
    call = arguments("fused_sort_dkd")
    call["target"][1] = 7
    numbers = dict(temperature=2.5, alpha=0.5, beta=2.0, kd_weight=0.25, ce_weight=0.5)
    want = fused_sort_dkd(**call, **numbers, ignore_index=7, backend=backend)
    for kind in (np.float32, np.float64, np.float16):
        as_numpy = {name: kind(value) for name, value in numbers.items()}
        assert torch.equal(fused_sort_dkd(**call, **as_numpy, ignore_index=np.int64(7), backend=backend), want)


def test_ops_guard_themselves():
    """Who calls the ops directly gets errors too, never a read outside of the memory."""
    student, teacher, target = cases.make_rows(N, C)
    op = torch.ops.sortkd_kernels.sort_logits.default
    for wrong in ((teacher, target[:3], 1, -100), (teacher, target.int(), 1, -100), (teacher.int(), target, 1, -100)):
        with pytest.raises((TypeError, ValueError), match="sortkd_kernels: expected"):
            op(*wrong)
    with pytest.raises(IndexError, match="expected target in"):
        op(teacher, target.clamp_min(0) + C, 1, -100)
    config = ops.LossConfig()
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
            torch.ops.sortkd_kernels.sort_kd_forward.default(
                student_, teacher_, indices_, target_, temperature, *config, None, False, False
            )
        with pytest.raises((TypeError, ValueError), match="sortkd_kernels: expected"):
            sortkd_kernels.backends._C.eager_loss(
                student_, teacher_, indices_, target_, temperature, None, config, False
            )
