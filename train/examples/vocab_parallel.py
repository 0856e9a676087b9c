"""Sort-KD with the classes spread over processes, as tensor parallelism leaves the logits of a large vocabulary.

    torchrun --nproc-per-node 2 vocab_parallel.py

Each rank holds a slice of the rows of the output weight, of the student and of the teacher, and makes the logits of its
own classes. `process_group=` makes the loss that of all classes: ranks exchange some numbers for each row and the
teacher's values above the labels, never a row of logits. Slices may differ in width. On GPUs the group is NCCL's.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch import distributed as dist

from sortkd_kernels import fused_sort_kd

CLASSES, FEATURES, EPOCHS, BATCH = 201, 32, 8, 64


class ToSlices(torch.autograd.Function):
    """Before a layer that ranks hold slices of: each makes a part of the input's gradient, and the whole is the sum."""

    @staticmethod
    def forward(ctx: object, hidden: Tensor) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad


def whole(logits: Tensor, widths: list[int]) -> Tensor:
    """The logits of all classes, which training never makes: to check the loss once."""
    parts = [logits.new_empty(len(logits), max(widths)) for _ in widths]
    padded = nn.functional.pad(logits.detach(), (0, max(widths) - logits.shape[1]))
    dist.all_gather(parts, padded)
    return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], 1)


def main() -> None:
    gpus = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    # The same on every rank: data, a teacher that knows the classes' means, and the student's first layer.
    torch.manual_seed(0)
    means = 0.4 * torch.randn(CLASSES, FEATURES)
    y = torch.randint(CLASSES, (2048,))
    x = means[y] + torch.randn(len(y), FEATURES)
    trunk, head = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU()).to(device), nn.Linear(64, CLASSES)
    # A slice of the classes: of the teacher's weight and of the student's.
    widths = [len(part) for part in torch.arange(CLASSES).tensor_split(ranks)]
    own = slice(sum(widths[:rank]), sum(widths[: rank + 1]))
    teacher = means[own].to(device)
    weight, bias = (nn.Parameter(p.detach()[own].clone().to(device)) for p in (head.weight, head.bias))

    x, y = x.to(device), y.to(device)
    optimizer = torch.optim.AdamW([*trunk.parameters(), weight, bias], lr=5e-3)
    losses: list[float] = []
    for _ in range(EPOCHS):
        total = torch.zeros((), device=device)
        for rows in torch.randperm(len(x)).split(BATCH):
            rows = rows.to(device)
            student_logits = nn.functional.linear(ToSlices.apply(trunk(x[rows])), weight, bias)
            teacher_logits = x[rows] @ teacher.T
            options = {"temperature": 2.0, "ce_weight": 0.1, "kd_weight": 0.9}
            loss = fused_sort_kd(student_logits, teacher_logits, y[rows], process_group=dist.group.WORLD, **options)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(rows)
            if not losses:
                expected = fused_sort_kd(
                    whole(student_logits, widths), whole(teacher_logits, widths), y[rows], **options
                )
                torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)
        losses.append(total.item() / len(x))
    if not losses[-1] < losses[0]:  # so written, NaN fails too
        raise RuntimeError(f"the loss did not fall: {losses}")
    if rank == 0:
        print(f"vocab_parallel: loss {losses[0]:.3f} -> {losses[-1]:.3f}, {ranks} ranks of {widths} classes")
    dist.barrier()  # no rank leaves while another one still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
