"""The user's contract, written once: what every public function accepts, and the words for what it does not.

Messages name the function, what was expected and what came. The checks read shapes, dtypes and devices only, never a
value of a tensor, so they neither synchronise a GPU nor break a graph under ``torch.compile``. Label ranges are values:
the CPU kernels check them (``IndexError``), the GPU kernels assert on the device.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable

import torch
from torch import Tensor

CORRECTIONS = ("none", "sort", "swap")
REDUCTIONS = ("none", "sum", "mean")
TAILS = ("renormalize", "uniform", "bucket")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_logits(fn: str, argument: str, logits: Tensor) -> None:
    """A float tensor with at least one dimension."""
    if isinstance(logits, Tensor) and logits.dtype in FLOAT_DTYPES and logits.dim():
        return
    if not isinstance(logits, Tensor):
        raise TypeError(f"{fn}: expected {argument} to be a torch.Tensor, got {type(logits).__name__}")
    if logits.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{fn}: expected {argument} of dtype float32, float64, bfloat16 or float16, got {_dtype(logits)}"
        )
    raise ValueError(f"{fn}: expected {argument} of shape [..., C], got a 0-d tensor")


def check_target(
    fn: str, argument: str, logits: Tensor, target: Tensor, class_dim: int = -1, a_slice: bool = False
) -> None:
    """Labels, int64, one for each row of ``logits``, on the same device; a slice of the classes may be empty."""
    if not isinstance(target, Tensor):
        raise TypeError(f"{fn}: expected target to be a torch.Tensor, got {type(target).__name__}")
    if target.dtype != torch.int64:
        raise TypeError(f"{fn}: expected target of dtype int64 (class indices), got {_dtype(target)}")
    if not isinstance(class_dim, int) or not -logits.dim() <= class_dim < logits.dim():
        raise ValueError(
            f"{fn}: expected class_dim to name one of the {logits.dim()} dimensions of {argument}, got {class_dim!r}"
        )
    shape = logits.shape
    rows = shape[:-1] if class_dim == -1 else shape[: class_dim % len(shape)] + shape[class_dim % len(shape) + 1 :]
    if shape[class_dim] == 0 and not a_slice:
        raise ValueError(f"{fn}: expected {argument} with at least one class, got shape {tuple(shape)}")
    if target.shape != rows:
        raise ValueError(
            f"{fn}: expected target of shape {tuple(rows)} to match {argument} {tuple(shape)}, "
            f"got {tuple(target.shape)}"
        )
    check_device(fn, argument, logits, "target", target)


def check_teacher(fn: str, student: Tensor, teacher: Tensor) -> None:
    """Logits of the student's shape and device (the dtypes may differ) that no gradient is asked for."""
    check_logits(fn, "teacher", teacher)
    if teacher.shape != student.shape:
        raise ValueError(
            f"{fn}: expected teacher of shape {tuple(student.shape)} to match student, got {tuple(teacher.shape)}"
        )
    check_frozen(fn, "teacher", teacher)
    check_device(fn, "student", student, "teacher", teacher)


_TO_THE_TEACHER = (
    "no gradient flows to the teacher; run the teacher under torch.no_grad() or pass its logits .detach()ed"
)


def check_frozen(fn: str, argument: str, tensor: Tensor, reason: str = _TO_THE_TEACHER) -> None:
    """A tensor that no gradient is asked for: one that asks is a mistake in the caller's code."""
    if tensor.requires_grad:
        raise ValueError(f"{fn}: expected {argument} without requires_grad, since {reason}")


def check_device(fn: str, first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Two tensors on one device."""
    if a.device != b.device:
        raise ValueError(f"{fn}: expected {second} on {a.device} like {first}, got {b.device}")


def check_top_k(fn: str, student: Tensor, values: Tensor, indices: Tensor) -> None:
    """A teacher's top k: values and classes ``[..., k]`` beside a student ``[..., C]`` with ``k <= C``."""
    check_logits(fn, "teacher_values", values)
    if not isinstance(indices, Tensor):
        raise TypeError(f"{fn}: expected teacher_indices to be a torch.Tensor, got {type(indices).__name__}")
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{fn}: expected teacher_indices of dtype int64 or int32, got {_dtype(indices)}")
    rows, classes = student.shape[:-1], student.shape[-1]
    if values.shape[:-1] != rows or not 0 < values.shape[-1] <= classes:
        raise ValueError(
            f"{fn}: expected teacher_values of shape {(*rows, 'k')} with 0 < k <= {classes}, got {tuple(values.shape)}"
        )
    if indices.shape != values.shape:
        raise ValueError(
            f"{fn}: expected teacher_indices of shape {tuple(values.shape)} to match teacher_values, "
            f"got {tuple(indices.shape)}"
        )
    check_frozen(fn, "teacher_values", values)
    check_device(fn, "student", student, "teacher_values", values)
    check_device(fn, "student", student, "teacher_indices", indices)


TEACHERS = (("teacher_hidden", "teacher_weight"), ("teacher_logits",), ("teacher_values", "teacher_indices"))


def check_one_teacher(fn: str, **tensors: Tensor | None) -> None:
    """One of the ways to give a teacher, and that wholly: one of ``TEACHERS``."""
    given = tuple(name for name, tensor in tensors.items() if tensor is not None)
    if given not in TEACHERS:
        raise ValueError(
            f"{fn}: expected one teacher, by {', or by '.join(map(' and '.join, TEACHERS))}, "
            f"got {' and '.join(given) or 'none of them'}"
        )


def check_linear(fn: str, prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Hidden states ``[..., H]``, a weight ``[C, H]`` and perhaps a bias ``[C]``.

    ``prefix``: that of the arguments' names, ``"teacher_"`` for a teacher's, which no gradient flows to.
    """
    check_logits(fn, f"{prefix}hidden", hidden)
    check_logits(fn, f"{prefix}weight", weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or not weight.shape[0]:
        raise ValueError(
            f"{fn}: expected {prefix}weight of shape (C, {hidden.shape[-1]}) with C > 0 to match {prefix}hidden "
            f"{tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    check_device(fn, f"{prefix}hidden", hidden, f"{prefix}weight", weight)
    if bias is not None:
        check_logits(fn, f"{prefix}bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{fn}: expected {prefix}bias of shape ({weight.shape[0]},) to match {prefix}weight "
                f"{tuple(weight.shape)}, got {tuple(bias.shape)}"
            )
        check_device(fn, f"{prefix}hidden", hidden, f"{prefix}bias", bias)
    if prefix:
        for argument, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
            if tensor is not None:
                check_frozen(fn, prefix + argument, tensor)


def check_same_dtype(fn: str, first: str, a: Tensor, second: str, b: Tensor | None) -> None:
    """Two factors of a matrix product, or nothing as the second."""
    if b is not None and a.dtype != b.dtype:
        raise TypeError(f"{fn}: expected {second} of dtype {_dtype(a)} like {first}, got {_dtype(b)}")


def check_rows(fn: str, argument: str, tensor: Tensor, hidden: Tensor) -> None:
    """As many rows as the student's hidden states, on their device."""
    if tensor.shape[:-1] != hidden.shape[:-1]:
        last = tuple(tensor.shape[-1:])
        raise ValueError(
            f"{fn}: expected {argument} of shape {tuple(hidden.shape[:-1]) + last} to match hidden "
            f"{tuple(hidden.shape)}, got {tuple(tensor.shape)}"
        )
    check_device(fn, "hidden", hidden, argument, tensor)


def as_chunk_rows(fn: str, chunk_rows: int | str) -> int | None:
    """A positive number of rows, or None for ``"auto"``."""
    if chunk_rows == "auto":
        return None
    if isinstance(chunk_rows, str) or as_int(fn, "chunk_rows", chunk_rows) <= 0:
        raise ValueError(f'{fn}: expected chunk_rows to be "auto" or a positive number of rows, got {chunk_rows!r}')
    return int(chunk_rows)


def as_positive(fn: str, argument: str, value: float) -> float:
    """A positive finite number."""
    number = as_float(fn, argument, value)
    if number <= 0:
        raise ValueError(f"{fn}: expected {argument} to be positive, got {value}")
    return number


def check_temperature_tensor(fn: str, temperature: Tensor, student: Tensor, target: Tensor) -> None:
    """A float tensor, 0-d or one value for each row; its values are not read."""
    if temperature.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{fn}: expected temperature of a float dtype, got {_dtype(temperature)}")
    if temperature.dim() != 0 and temperature.shape != target.shape:
        raise ValueError(
            f"{fn}: expected temperature of shape () or {tuple(target.shape)}, one value a row, "
            f"got {tuple(temperature.shape)}"
        )
    check_device(fn, "student", student, "temperature", temperature)


def check_row_weight(fn: str, row_weight: Tensor, student: Tensor, target: Tensor) -> None:
    """One float for each row, without a gradient of its own; its values are not read."""
    if not isinstance(row_weight, Tensor) or row_weight.dtype not in FLOAT_DTYPES:
        kind = _dtype(row_weight) if isinstance(row_weight, Tensor) else type(row_weight).__name__
        raise TypeError(f"{fn}: expected row_weight to be a tensor of a float dtype, got {kind}")
    if row_weight.shape != target.shape:
        raise ValueError(
            f"{fn}: expected row_weight of shape {tuple(target.shape)}, one value a row, got {tuple(row_weight.shape)}"
        )
    check_frozen(fn, "row_weight", row_weight, "no gradient flows to the weights of the rows; pass them .detach()ed")
    check_device(fn, "student", student, "row_weight", row_weight)


def check_denominator(fn: str, denominator: float | Tensor, student: Tensor, reduction: str) -> None:
    """A positive number, or a 0-d tensor whose value is not read, beside ``reduction="sum"``."""
    if reduction != "sum":
        raise ValueError(
            f'{fn}: expected reduction="sum" with a denominator, got reduction={reduction!r}, which has its own'
        )
    if not isinstance(denominator, Tensor):
        if as_float(fn, "denominator", denominator) <= 0:
            raise ValueError(f"{fn}: expected denominator to be positive, got {denominator}")
        return
    if denominator.dim():
        raise ValueError(f"{fn}: expected denominator to be a number or a 0-d tensor, got {tuple(denominator.shape)}")
    check_frozen(fn, "denominator", denominator, "no gradient flows to it; pass it .detach()ed")
    if denominator.device.type != "cpu":  # that of a CPU scalar goes anywhere, as in PyTorch's own arithmetic
        check_device(fn, "student", student, "denominator", denominator)


def as_float(fn: str, argument: str, value: float) -> float:
    """A finite real number, NumPy's scalars among them, as a float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{fn}: expected {argument} to be a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{fn}: expected {argument} to be finite, got {value}")
    return float(value)


def check_choice(fn: str, argument: str, value: str, choices: Iterable[str]) -> None:
    """One of a few names."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{fn}: expected {argument} to be one of {', '.join(map(repr, choices))}, got {value!r}")


def as_int(fn: str, argument: str, value: int) -> int:
    """An integer, NumPy's scalars among them, as an int."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{fn}: expected {argument} to be an int, got {type(value).__name__}")
    return int(value)


def allows_inplace(fn: str, student: Tensor, teacher: Tensor, argument: str = "student") -> bool:
    """Whether the gradient may be written over ``student``.

    It is not where there is none, in a trace, and where the teacher is the very same elements.

    The ``argument`` is the student's logits, or its hidden states, whose gradient is as large.

    Raises:
        ValueError: values that somebody still needs would be lost: those of a parameter, of memory between the rows, or
            of a teacher that shares some of the student's memory.
    """
    if not student.requires_grad or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    values = "logits" if argument == "student" else "hidden states"
    if not student.is_contiguous():
        raise ValueError(
            f"{fn}: expected a contiguous {argument} with inplace=True, since the gradient is written over it, "
            f"got strides {list(student.stride())}"
        )
    if student.is_leaf:
        raise ValueError(
            f"{fn}: expected {values} that a model computed with inplace=True, got a leaf tensor that requires "
            "grad, whose values would be lost; pass inplace=False"
        )
    base = student._base
    if base is not None and base.is_leaf and base.requires_grad:
        raise ValueError(
            f"{fn}: expected {values} that a model computed with inplace=True, got a view of a leaf tensor that "
            "requires grad, whose values would be lost; pass inplace=False"
        )
    if not student.numel() or not teacher.numel():
        return True
    (begin, end), (first, past) = _span(student), _span(teacher)
    same = teacher.dtype == student.dtype and teacher.shape == student.shape and teacher.is_contiguous()
    apart = past <= begin or end <= first
    if not apart and not (same and begin == first):
        raise ValueError(
            f"{fn}: expected a teacher with memory of its own, or of the student's very elements, with inplace=True, "
            f"since the gradient is written over the {argument}; got one that overlaps it in part; pass inplace=False"
        )
    return apart


def _span(t: Tensor) -> tuple[int, int]:
    """The addresses of the first byte of a tensor and of the first behind it."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
