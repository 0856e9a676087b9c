"""Draws what each correction does to one teacher row: the picture in the README.

python benchmarks/plot_correction.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch

from sortkd_kernels import sort_logits

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CLASSES = ("cat", "dog", "fox", "wolf", "deer", "lynx")
LOGITS = (2.9, 4.8, 4.1, 3.4, 0.8, 1.9)
LABEL = 0


def main() -> None:
    """Three bar charts side by side, the moved classes outlined."""
    teacher = torch.tensor(LOGITS)
    _, axes = plt.subplots(1, 3, figsize=(9, 2.6), sharey=True, layout="constrained")
    titles = {"none": "teacher: wrong, cat is 4th", "sort": 'correction="sort"', "swap": 'correction="swap"'}
    for axis, (correction, title) in zip(axes, titles.items(), strict=True):
        values = sort_logits(teacher, torch.tensor(LABEL), correction=correction)
        bars = axis.bar(
            CLASSES, values, color=["tab:orange" if i == LABEL else "tab:blue" for i in range(len(CLASSES))]
        )
        axis.bar_label(bars, fmt="%.1f", fontsize=8)
        for bar, moved in zip(bars, values != teacher, strict=True):
            bar.set(edgecolor="black", linewidth=1.5 if moved else 0)
        axis.set_title(title, fontsize=10)
        axis.set_ylim(0, 5.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("logit")
    plt.savefig(Path(__file__).parent / "results" / "correction.png", dpi=110)


if __name__ == "__main__":
    main()
