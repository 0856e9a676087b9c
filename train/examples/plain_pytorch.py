"""Sort-KD in a plain PyTorch loop, on made data: the loss, and how often the teacher had to be corrected.

`return_parts=True` gives, from the same pass, the two terms of the loss and the label's rank in the teacher's order:
the teacher was right where it is 0, and is corrected elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sortkd_kernels import SortKDLoss

CLASSES, FEATURES, EPOCHS, BATCH = 20, 16, 8, 64


def made_data(rows: int) -> tuple[Tensor, Tensor]:
    """Gaussian classes that overlap, so that even a good teacher errs on some rows."""
    labels = torch.randint(CLASSES, (rows,))
    centers = 0.7 * torch.randn(CLASSES, FEATURES)
    return centers[labels] + torch.randn(rows, FEATURES), labels


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, CLASSES))


def train_teacher(x: Tensor, y: Tensor) -> nn.Module:
    """A wide network after a few steps of cross-entropy, frozen: in eval mode, and no gradient is ever asked of it."""
    teacher = mlp(256)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(teacher(x), y).backward()
        optimizer.step()
    return teacher.eval().requires_grad_(False)


def main() -> None:
    torch.manual_seed(0)
    x, y = made_data(2048)
    teacher, student, criterion = train_teacher(x, y), mlp(32), SortKDLoss(return_parts=True)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    losses: list[float] = []
    for _ in range(EPOCHS):
        # Sums stay tensors until the epoch ends: an .item() at every step would make a GPU wait.
        total, corrected = torch.zeros(()), torch.zeros(())
        for rows in torch.randperm(len(x)).split(BATCH):
            with torch.no_grad():
                teacher_logits = teacher(x[rows])
            out = criterion(student(x[rows]), teacher_logits, y[rows])
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            total += out.loss.detach() * len(rows)
            corrected += (out.rank > 0).sum()
        losses.append(total.item() / len(x))
    if not losses[-1] < losses[0]:  # so written, NaN fails too
        raise RuntimeError(f"the loss did not fall: {losses}")
    print(f"plain_pytorch: loss {losses[0]:.3f} -> {losses[-1]:.3f}, {corrected / len(x):.1%} of rows corrected")


if __name__ == "__main__":
    main()
