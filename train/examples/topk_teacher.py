"""Sort-KD from a teacher served as its top-k log-probabilities, as inference servers and logged runs give them.

Each row of the teacher is `k` values and `k` class indices in place of all its logits. `tail="uniform"` takes the
values for log-probabilities at temperature 1 and spreads what they leave of the mass evenly over the other classes; a
label outside the `k` is then moved to the top like any other. Where a server gives logits, `tail="renormalize"` keeps
to the `k` classes alone. The answers may be half precision: the kernel computes in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sortkd_kernels import fused_sort_kd_topk

CLASSES, FEATURES, K, EPOCHS, BATCH = 200, 32, 8, 8, 64


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, CLASSES))


@torch.no_grad()
def serve(teacher: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a server answers: the `K` largest log-probabilities of each row, and their classes."""
    values, indices = F.log_softmax(teacher(x), -1).topk(K)
    return values.half(), indices


def main() -> None:
    torch.manual_seed(0)
    y = torch.randint(CLASSES, (2048,))
    x = 0.4 * torch.randn(CLASSES, FEATURES)[y] + torch.randn(len(y), FEATURES)
    teacher, student = mlp(128), mlp(32)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(teacher(x), y).backward()
        optimizer.step()
    values, indices = serve(teacher.eval(), x)  # once, before the student's training

    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    losses: list[float] = []
    for _ in range(EPOCHS):
        total = torch.zeros(())
        for rows in torch.randperm(len(x)).split(BATCH):
            loss = fused_sort_kd_topk(
                student(x[rows]), values[rows], indices[rows], y[rows], temperature=2.0, tail="uniform", ce_weight=0.1,
                kd_weight=0.9,
            )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(rows)
        losses.append(total.item() / len(x))
    if not losses[-1] < losses[0]:  # so written, NaN fails too
        raise RuntimeError(f"the loss did not fall: {losses}")
    sent = (values.nbytes + indices.nbytes) / (4 * len(x) * CLASSES)
    outside = 1 - (indices == y.unsqueeze(-1)).any(-1).float().mean()
    falls = f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"
    print(f"topk_teacher: {falls}, {sent:.1%} of the bytes, {outside:.1%} of labels outside")


if __name__ == "__main__":
    main()
