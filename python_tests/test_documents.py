"""README.md is run: its Python as it stands, in order, and its links are followed as far as they stay in the checkout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import sortkd_kernels

ROOT = Path(sortkd_kernels.__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = [
    (README[: m.start()].count("\n") + 1, m[1]) for m in re.finditer(r"^```python\n(.*?)^```", README, re.M | re.S)
]


def stand_ins() -> dict[str, object]:
    """What a reader has who comes with a training loop: models, data, an optimizer, a batch and its logits."""
    torch.manual_seed(0)
    model, teacher = nn.Linear(6, 9), nn.Linear(6, 9)
    images, labels = torch.randn(4, 6), torch.randint(9, (4,))
    values, indices = torch.randn(4, 9).topk(3)
    return {
        "model": model, "teacher": teacher, "student": model, "loader": [(images, labels)] * 2,
        "images": images, "labels": labels, "target": labels, "values": values, "indices": indices,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "student_logits": torch.randn(4, 9, requires_grad=True), "teacher_logits": torch.randn(4, 9),
    }  # fmt: skip


def test_python_of_the_readme(tmp_path, monkeypatch):
    assert BLOCKS
    monkeypatch.chdir(tmp_path)
    names = stand_ins()
    for line, code in BLOCKS:
        # The empty lines make a traceback name the README's own.
        exec(compile("\n" * line + code, "README.md", "exec"), names)


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(path):
    document = ROOT / path
    if not document.exists():
        pytest.skip(f"there is no {path}")
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", document.read_text())
    assert links
    assert [x for x in links if "://" not in x and not (document.parent / x).exists()] == []
