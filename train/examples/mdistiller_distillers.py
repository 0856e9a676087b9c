"""Sort-KD in mdistiller's distillers: three of their lines change, and its trainer, configurations and logs stay.

1. in `mdistiller/distillers/KD.py` and `DKD.py`, an import: `from sortkd_kernels import fused_sort_dkd, fused_sort_kd`
2. in `KD.forward_train`, in place of `kd_loss(logits_student, logits_teacher, self.temperature)`:
   `fused_sort_kd(logits_student, logits_teacher, target, temperature=self.temperature)`
3. in `DKD.forward_train`, in place of `dkd_loss(logits_student, logits_teacher, target, self.alpha, self.beta,
   self.temperature)`: `fused_sort_dkd(logits_student, logits_teacher, target, alpha=self.alpha, beta=self.beta,
   temperature=self.temperature)`

The loss then needs the labels, for they say which of the teacher's rows are wrong. `correction="none"` gives back the
numbers of before. Here a distiller of that interface, on made data: networks that return logits and features, and
`forward_train`, which returns the student's logits and a dictionary of weighted losses for the trainer to add up.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sortkd_kernels import fused_sort_kd

CLASSES, FEATURES, EPOCHS, BATCH = 20, 16, 8, 64


class Network(nn.Module):
    """A network as mdistiller's are: it returns logits and features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU())
        self.head = nn.Linear(width, CLASSES)

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.body(image)
        return self.head(features), {"pooled_feat": features}


class KD(nn.Module):
    """A distiller of mdistiller's interface."""

    def __init__(self, student: nn.Module, teacher: nn.Module, temperature: float, ce: float, kd: float) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.temperature, self.ce_loss_weight, self.kd_loss_weight = temperature, ce, kd

    def forward_train(self, image: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits_student, _ = self.student(image)
        with torch.no_grad():
            logits_teacher, _ = self.teacher(image)
        loss_ce = self.ce_loss_weight * F.cross_entropy(logits_student, target)
        # The line that changes.
        loss_kd = fused_sort_kd(logits_student, logits_teacher, target, temperature=self.temperature)
        return logits_student, {"loss_ce": loss_ce, "loss_kd": self.kd_loss_weight * loss_kd}


def check_the_line(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> None:
    """Without the correction the new line computes what the old one does."""
    new = fused_sort_kd(student, teacher, target, temperature=temperature, correction="none")
    old = F.kl_div(
        F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1), log_target=True,
        reduction="batchmean",
    )  # fmt: skip
    torch.testing.assert_close(new, temperature**2 * old)


def main() -> None:
    torch.manual_seed(0)
    target = torch.randint(CLASSES, (2048,))
    image = 0.7 * torch.randn(CLASSES, FEATURES)[target] + torch.randn(len(target), FEATURES)
    teacher = Network(256)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(teacher(image)[0], target).backward()
        optimizer.step()
    teacher.eval().requires_grad_(False)

    distiller = KD(Network(32), teacher, temperature=4.0, ce=0.1, kd=0.9)
    check_the_line(distiller.student(image)[0].detach(), teacher(image)[0], target, 4.0)
    optimizer = torch.optim.SGD(distiller.student.parameters(), lr=0.05, momentum=0.9)
    losses: list[float] = []
    for _ in range(EPOCHS):
        total = torch.zeros(())
        for rows in torch.randperm(len(image)).split(BATCH):
            _, parts = distiller.forward_train(image[rows], target[rows])
            loss = sum(parts.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(rows)
        losses.append(total.item() / len(image))
    if not losses[-1] < losses[0]:  # so written, NaN fails too
        raise RuntimeError(f"the loss did not fall: {losses}")
    print(f"mdistiller_distillers: loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
