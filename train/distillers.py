"""The methods: a student, perhaps with a learned temperature, and the loss that each method takes from the fused op."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sortkd_kernels import LearnedTemperature, SortKDOutput, fused_sort_dkd, fused_sort_kd

from .schema import Config

# Of the student's logits, the teacher's (None without a teacher), the labels, the temperature and the warm-up.
Loss = Callable[[Tensor, Tensor | None, Tensor, float | Tensor, float], SortKDOutput]


class Distiller(nn.Module):
    """The trained half of a distillation: one module, so that DDP and the optimizer own the temperature as well."""

    def __init__(self, student: nn.Module, config: Config) -> None:
        super().__init__()
        self.student = student
        self.fixed = {"NONE": 1.0, "KD": config.KD.TEMPERATURE, "DKD": config.DKD.T}[config.DISTILLER.TYPE]
        self.temperature: LearnedTemperature | None = None
        if config.DISTILLER.LEARNED_TEMPERATURE:
            self.temperature = LearnedTemperature(config.CTKD.START, config.CTKD.END, config.CTKD.EPOCHS)

    def forward(self, images: Tensor) -> tuple[Tensor, float | Tensor]:
        """The student's logits, and the temperature to compare them with the teacher's at."""
        return self.student(images), self.fixed if self.temperature is None else self.temperature()

    def set_epoch(self, epoch: int) -> None:
        """Tell the learned temperature which epoch it is, counted from 1."""
        if self.temperature is not None:
            self.temperature.set_epoch(epoch)

    @torch.no_grad()
    def temperature_now(self) -> float:
        """The temperature as a number, for the log."""
        return self.fixed if self.temperature is None else self.temperature().item()


def kd_warm_up(config: Config, epoch: int) -> float:
    """The factor of DKD's terms in `epoch`, counted from 1; 1 for the other methods."""
    length = config.DKD.WARMUP if config.DISTILLER.TYPE == "DKD" else 0
    return min(epoch / length, 1.0) if length else 1.0


def build_loss(config: Config) -> Loss:
    """The loss of the configured method; the teacher is corrected before anything else in each."""
    switches = {"correction": config.DISTILLER.CORRECTION, "standardize": config.DISTILLER.STANDARDIZE}

    def cross_entropy(
        student: Tensor, teacher: Tensor | None, labels: Tensor, temperature: float | Tensor, warm_up: float
    ) -> SortKDOutput:
        wide = torch.promote_types(student.dtype, torch.float32)
        loss = F.cross_entropy(student.to(wide), labels)
        return SortKDOutput(loss, torch.zeros_like(loss), loss.detach(), torch.zeros_like(labels, dtype=torch.int32))

    def kd(
        student: Tensor, teacher: Tensor | None, labels: Tensor, temperature: float | Tensor, warm_up: float
    ) -> SortKDOutput:
        weights = {"ce_weight": config.KD.LOSS.CE_WEIGHT, "kd_weight": config.KD.LOSS.KD_WEIGHT}
        return fused_sort_kd(
            student, teacher, labels, temperature=temperature, **weights, **switches, return_parts=True
        )

    def dkd(
        student: Tensor, teacher: Tensor | None, labels: Tensor, temperature: float | Tensor, warm_up: float
    ) -> SortKDOutput:
        weights = {"alpha": config.DKD.ALPHA, "beta": config.DKD.BETA, "ce_weight": config.DKD.CE_WEIGHT}
        weights["kd_weight"] = warm_up * config.DKD.KD_WEIGHT
        return fused_sort_dkd(
            student, teacher, labels, temperature=temperature, **weights, **switches, return_parts=True
        )

    return {"NONE": cross_entropy, "KD": kd, "DKD": dkd}[config.DISTILLER.TYPE]
