"""Offline distillation of a language model: the teacher runs once, its top-k log-probabilities are kept in a file.

A token takes k values in half precision and k classes in int32, 6 bytes each, in place of a whole row of logits. The
file is a NumPy array on disk, mapped into memory: the student's training reads the rows of a batch and nothing else.
`tail="bucket"` compares the k classes and one more with the mass that they leave, so that the loss is a divergence and
never negative. Labels outside the k are corrected as well: once corrected they are classes of their own.

The labels are the text's own next tokens. Where the text is the student's own (on-policy distillation) no label is to
be trusted: use `correction="none"` there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sortkd_kernels import fused_linear_sort_kd

VOCABULARY, LENGTH, K, EPOCHS, BATCH, IGNORE = 512, 16, 64, 6, 16, -100
TOKEN = np.dtype([("values", "<f2", K), ("classes", "<i4", K)])


class LanguageModel(nn.Module):
    """Hidden states ``[B, L, width]``; the head's weight makes logits of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(VOCABULARY, width), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(self.embedding(tokens))[0]


def made_text(rows: int) -> Tensor:
    """Arithmetic progressions modulo the vocabulary, one token in twenty any other: what no teacher foresees."""
    start, step = torch.randint(VOCABULARY, (rows, 1)), torch.randint(1, 4, (rows, 1))
    tokens = (start + step * torch.arange(LENGTH)) % VOCABULARY
    return torch.where(torch.rand(tokens.shape) < 0.05, torch.randint(VOCABULARY, tokens.shape), tokens)


def next_tokens(tokens: Tensor) -> Tensor:
    """The label of position i is token i + 1; the last has none."""
    return F.pad(tokens[:, 1:], (0, 1), value=IGNORE)


@torch.no_grad()
def store(teacher: LanguageModel, tokens: Tensor, path: Path) -> None:
    """Write what the teacher says of every token, ``[rows, L]`` records, a batch at a time."""
    records = np.lib.format.open_memmap(path, "w+", TOKEN, tuple(tokens.shape))
    for rows in torch.arange(len(tokens)).split(BATCH):
        values, classes = F.log_softmax(teacher.head(teacher(tokens[rows])).float(), -1).topk(K)
        records["values"][rows], records["classes"][rows] = values.half(), classes
    records.flush()


def batches(path: Path, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, values and classes of random rows; only these rows are read from the file."""
    records = np.load(path, mmap_mode="r")
    for rows in torch.randperm(len(tokens)).split(BATCH):
        batch = records[rows.numpy()]
        yield tokens[rows], *(torch.from_numpy(np.ascontiguousarray(batch[field])) for field in TOKEN.names)


def train_teacher(teacher: LanguageModel, tokens: Tensor) -> None:
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=5e-3)
    for _ in range(3):
        for rows in torch.randperm(len(tokens)).split(BATCH):
            logits = teacher.head(teacher(tokens[rows]))
            optimizer.zero_grad()
            F.cross_entropy(logits.flatten(0, 1), next_tokens(tokens[rows]).flatten(), ignore_index=IGNORE).backward()
            optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    tokens, teacher, student = made_text(512), LanguageModel(96), LanguageModel(48)
    train_teacher(teacher, tokens)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "teacher_top_k.npy"
        store(teacher.eval(), tokens, path)
        of_logits = 4 * VOCABULARY * tokens.numel() / path.stat().st_size
        for _ in range(EPOCHS):
            total, outside = torch.zeros(()), torch.zeros(())
            for inputs, values, classes in batches(path, tokens):
                target = next_tokens(inputs)
                loss = fused_linear_sort_kd(
                    student(inputs), student.head.weight, target, teacher_values=values, teacher_indices=classes,
                    tail="bucket", temperature=1.0, ce_weight=0.1, kd_weight=0.9, ignore_index=IGNORE,
                )  # fmt: skip
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(inputs)
                outside += ((classes != target.unsqueeze(-1)).all(-1) & (target != IGNORE)).sum()
            losses.append(total.item() / len(tokens))
    if not losses[-1] < losses[0]:  # so written, NaN fails too
        raise RuntimeError(f"the loss did not fall: {losses}")
    falls = f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"
    missing = outside.item() / (tokens.numel() - len(tokens))
    print(f"topk_teacher: {falls}, a file of 1/{of_logits:.1f} of the logits, {missing:.1%} of labels outside the {K}")


if __name__ == "__main__":
    main()
