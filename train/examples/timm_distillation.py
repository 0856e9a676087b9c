"""Sort-KD as a timm distillation task, on made images.

`SortKDTask` takes what `timm.task.LogitDistillationTask` takes and returns what it returns: in timm's train script, one
name changes. The cross-entropy is part of the same pass over the logits, so a criterion that is not plain cross-entropy
is refused. The loss itself refuses mixup's soft labels: they name no class by which to correct the teacher.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.task import ClassificationTask, LogitDistillationTask, TrainingTask
from torch import Tensor, nn

from sortkd_kernels import fused_sort_kd

CLASSES, EPOCHS, BATCH = 10, 3, 32


class SortKDTask(LogitDistillationTask):
    """timm's logit distillation, from the corrected teacher."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        plain = type(self.criterion) is nn.CrossEntropyLoss and self.criterion.weight is None
        if not plain or self.criterion.label_smoothing:
            raise ValueError(f"SortKDTask: expected cross-entropy without weights or smoothing, got {self.criterion}")

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        student = self.trainable_module(input)
        with torch.no_grad():
            teacher = self.teacher(self.teacher.normalize_input(input, self.student_mean, self.student_std))
        # Not in place: timm's loop reads the student's logits again, from "output".
        parts = fused_sort_kd(
            student, teacher, target, temperature=self.temperature, kd_weight=self.distill_loss_weight,
            ce_weight=self.task_loss_weight, return_parts=True,
        )  # fmt: skip
        return {"loss": parts.loss, "output": student, "task_loss": parts.ce, "kd_loss": parts.kd}


def train(task: TrainingTask, images: Tensor, labels: Tensor, lr: float) -> list[float]:
    """A few epochs of any timm task; the mean loss of each."""
    task.train()
    optimizer = torch.optim.AdamW(task.get_trainable_module().parameters(), lr=lr)
    losses = []
    for _ in range(EPOCHS):
        total = torch.zeros(())
        for rows in torch.randperm(len(images)).split(BATCH):
            loss = task(images[rows], labels[rows])["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(rows)
        losses.append(total.item() / len(images))
    return losses


def main() -> None:
    torch.manual_seed(0)
    labels = torch.arange(CLASSES).repeat(20)
    images = torch.randn(CLASSES, 3, 32, 32)[labels] + torch.randn(len(labels), 3, 32, 32)
    teacher, student = (timm.create_model(name, num_classes=CLASSES) for name in ("test_resnet", "test_efficientnet"))
    train(ClassificationTask(teacher), images, labels, lr=1e-3)
    task = SortKDTask(student, teacher, task_loss_weight=0.1, distill_loss_weight=0.9, temperature=4.0)
    losses = train(task, images, labels, lr=1e-3)
    if not losses[-1] < losses[0]:  # so written, NaN fails too
        raise RuntimeError(f"the loss did not fall: {losses}")
    print(f"timm_distillation: loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
