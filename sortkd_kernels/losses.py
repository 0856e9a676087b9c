"""The losses as modules, which only keep their arguments, and the learned temperature of CTKD."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .fused_linear import fused_linear_sort_kd
from .fused_sort_kd import SortKDOutput, fused_sort_dkd, fused_sort_kd


class _Loss(nn.Module):
    function: Callable[..., Tensor | SortKDOutput]

    def __init__(self, **arguments: object) -> None:
        super().__init__()
        self.arguments = arguments

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())

    def _of(self, *tensors: Tensor, **overrides: object) -> Tensor | SortKDOutput:
        return type(self).function(*tensors, **(self.arguments | overrides))


class _LogitLoss(_Loss):
    def forward(self, student: Tensor, teacher: Tensor, target: Tensor, **overrides: object) -> Tensor | SortKDOutput:
        """The loss of logits ``student``, ``teacher`` ``[..., C]`` and labels ``target`` ``[...]``.

        Args:
            overrides: keyword arguments of the function for this call alone, such as a learned ``temperature`` or
                the ``kd_weight`` of a warm-up.
        """
        return self._of(student, teacher, target, **overrides)


class SortKDLoss(_LogitLoss):
    """:func:`fused_sort_kd` with its arguments kept.

    ``ce_weight`` and ``kd_weight`` are the field's for CIFAR-100, 0.1 and 0.9, where the function's are 0 and 1.

    Args:
        temperature, correction, ce_weight, kd_weight: as in :func:`fused_sort_kd`.
        arguments: its other keyword arguments.
    """

    function = staticmethod(fused_sort_kd)

    def __init__(
        self,
        temperature: float = 4.0,
        *,
        correction: str = "sort",
        ce_weight: float = 0.1,
        kd_weight: float = 0.9,
        **arguments: object,
    ) -> None:
        super().__init__(
            temperature=temperature, correction=correction, ce_weight=ce_weight, kd_weight=kd_weight, **arguments
        )


class SortDKDLoss(_LogitLoss):
    """:func:`fused_sort_dkd` with its arguments kept.

    ``ce_weight`` is the field's for CIFAR-100, 1, where the function's is 0.

    Args:
        temperature, alpha, beta, correction, ce_weight: as in :func:`fused_sort_dkd`.
        arguments: its other keyword arguments.
    """

    function = staticmethod(fused_sort_dkd)

    def __init__(
        self,
        temperature: float = 4.0,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        correction: str = "sort",
        ce_weight: float = 1.0,
        **arguments: object,
    ) -> None:
        super().__init__(
            temperature=temperature, alpha=alpha, beta=beta, correction=correction, ce_weight=ce_weight, **arguments
        )


class FusedLinearSortKDLoss(_Loss):
    """:func:`fused_linear_sort_kd` with its arguments kept.

    Args:
        temperature: as in :func:`fused_linear_sort_kd`.
        arguments: its other keyword arguments, with its defaults.
    """

    function = staticmethod(fused_linear_sort_kd)

    def __init__(self, temperature: float = 4.0, **arguments: object) -> None:
        super().__init__(temperature=temperature, **arguments)

    def forward(self, hidden: Tensor, weight: Tensor, target: Tensor, **overrides: object) -> Tensor | SortKDOutput:
        """The loss of hidden states ``[..., H]``, the output weight ``[C, H]`` and labels ``[...]``.

        Args:
            overrides: the teacher, and keyword arguments of the function for this call alone.
        """
        return self._of(hidden, weight, target, **overrides)


class LearnedTemperature(nn.Module):
    """CTKD's global temperature (arXiv 2211.16231): ``T = start + end * sigmoid(theta)``, trained against the student.

    The gradient that reaches ``theta`` is multiplied by ``lambda(epoch)``, which falls from 0 to -1 along a cosine over
    the first ``epochs`` epochs: the temperature learns to make the task harder, at first not at all. ``theta`` is an
    ordinary parameter: put it into the student's optimizer, and into the module that DDP wraps so that it is in step.

    Args:
        start, end: the range of the temperature, ``(start, start + end)``.
        epochs: the length of the schedule, 10 for CIFAR-100 and 5 for ImageNet.

    Example:
        ``learned = LearnedTemperature()``, then ``fused_sort_kd(student, teacher, target, temperature=learned())``
    """

    def __init__(self, start: float = 1.0, end: float = 20.0, epochs: int = 10) -> None:
        super().__init__()
        self.start, self.end, self.epochs = start, end, epochs
        self.theta = nn.Parameter(torch.ones(()))
        # A buffer, so that a checkpoint holds where the schedule stands and a compiled graph does not depend on it.
        self.register_buffer("reversal", torch.zeros(()))
        self.set_epoch(1)

    def set_epoch(self, epoch: int) -> None:
        """Call at the start of each epoch, counted from 1."""
        cosine = math.cos(min(epoch, self.epochs) * math.pi / self.epochs)
        self.reversal.fill_((cosine + 1) / 2 - 1)

    def forward(self) -> Tensor:
        """The temperature, 0-d float32 also under autocast, with the gradient reversed."""
        # Equal in value to theta, with reversal times its gradient.
        theta = self.theta * self.reversal + (self.theta * (1 - self.reversal)).detach()
        return self.start + self.end * theta.sigmoid()
