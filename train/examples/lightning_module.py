"""Sort-DKD in a LightningModule, on made images: the teacher stays in eval mode and out of the checkpoint.

The module keeps the teacher in a tuple, which `nn.Module` does not look into. So the teacher is in no `state_dict`, no
optimizer and no DDP broadcast of BatchNorm buffers, `train()` does not reach it, and the student still loads with
`strict=True`. The price: nobody else moves it to the device, or casts it under a `*-true` precision.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sortkd_kernels import SortDKDLoss

CLASSES, EPOCHS, WARMUP = 10, 10, 3


class Distilled(L.LightningModule):
    """A student that learns from a frozen teacher; DKD's weight grows over the first epochs, as its recipe has it."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student = student
        self._teacher = (teacher.eval().requires_grad_(False),)
        self.criterion = SortDKDLoss()

    def on_fit_start(self) -> None:
        self._teacher[0].to(self.device)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        with torch.no_grad():
            teacher_logits = self._teacher[0](images)
        kd_weight = min((self.current_epoch + 1) / WARMUP, 1.0)
        return self.criterion(self.student(images), teacher_logits, labels, kd_weight=kd_weight)

    def validation_step(self, batch: list[Tensor]) -> None:
        images, labels = batch
        self.log("val_loss", F.cross_entropy(self.student(images), labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), lr=0.02, momentum=0.9)


def convnet(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(16 * width, CLASSES),
    )  # fmt: skip


def train_teacher(images: Tensor, labels: Tensor) -> nn.Module:
    teacher = convnet(32)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(teacher(images), labels).backward()
        optimizer.step()
    return teacher


def main() -> None:
    torch.manual_seed(0)
    labels = torch.arange(CLASSES).repeat(40)
    images = 0.3 * torch.randn(CLASSES, 3, 16, 16)[labels] + torch.randn(len(labels), 3, 16, 16)
    data = TensorDataset(images, labels)
    student, teacher = convnet(8), train_teacher(images, labels)
    model, validation = Distilled(student, teacher), DataLoader(data, batch_size=200)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=EPOCHS, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    before = trainer.validate(model, validation, verbose=False)[0]["val_loss"]
    trainer.fit(model, DataLoader(data, batch_size=40, shuffle=True), validation)
    after = trainer.validate(model, validation, verbose=False)[0]["val_loss"]
    with tempfile.TemporaryDirectory() as folder:
        trainer.save_checkpoint(path := Path(folder) / "student.ckpt")
        saved = torch.load(path, weights_only=True)["state_dict"]
        # Strict: it raises if a tensor is missing or left over.
        Distilled.load_from_checkpoint(path, student=convnet(8), teacher=teacher, weights_only=True)
    if not after < before:  # so written, NaN fails too
        raise RuntimeError(f"the validation loss did not fall: {before} -> {after}")
    if teacher.training or any(not name.startswith("student.") for name in saved):
        raise RuntimeError(f"the teacher trains or is in the checkpoint: {sorted(saved)}")
    print(f"lightning_module: loss {before:.3f} -> {after:.3f}, {len(saved)} tensors of the student saved")


if __name__ == "__main__":
    main()
