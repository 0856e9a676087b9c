"""Pictures of runs: the curves of one, and methods side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed or looked for
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

Row = Mapping[str, float]


def plot_run(history: Sequence[Row], path: Path, title: str) -> None:
    """The curves of one run: accuracy, loss and its parts, corrected rows, learning rate and temperature."""
    panels = [
        ("top-1, %", ["train_top1", "test_top1"]),
        ("loss", ["train_loss", "train_kd", "train_ce", "test_ce"]),
        ("corrected rows, %", ["corrected"]),
        ("schedule", ["lr", "temperature"]),
    ]
    figure, grid = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axes, (name, columns) in zip(grid.flat, panels, strict=True):
        for column in columns:
            scale = 100 if column == "corrected" else 1
            axes.plot(epochs, [scale * row[column] for row in history], label=column)
        _finish(axes, name)
        axes.legend()
    grid.flat[3].set_yscale("log")
    _save(figure, path, title)


def plot_groups(groups: Mapping[str, Sequence[Sequence[Row]]], path: Path, title: str) -> None:
    """Each group's test accuracy and share of corrected rows over epochs, and its seeds' best and last accuracy.

    The groups are numbered and named once, below the axes, which long names would leave no room.
    """
    columns = min(5, max(1, 170 // (8 + max(map(len, groups)))))  # of the width that names of this length take
    height = 4.5 + 0.25 * math.ceil(len(groups) / columns)
    figure, (accuracy, share, ends) = plt.subplots(1, 3, figsize=(15, height), layout="constrained")
    for number, (label, runs) in enumerate(groups.items(), 1):
        color, style = f"C{(number - 1) % 10}", ("-", "--", ":")[(number - 1) // 10 % 3]
        _band(accuracy, runs, "test_top1", color, style, label=_literally(f"{number}: {label}"))
        _band(share, runs, "corrected", color, style, scale=100)
        for offset, marker, pick in ((-0.1, "^", max), (0.1, "o", lambda values: values[-1])):
            points = [pick([row["test_top1"] for row in run]) for run in runs]
            ends.plot([number + offset] * len(points), points, marker, color=color, alpha=0.6)
            ends.plot([number + offset - 0.08, number + offset + 0.08], [np.mean(points)] * 2, color="black")
    _finish(accuracy, "test top-1, %")
    _finish(share, "corrected training rows, %")
    ends.set_xticks(range(1, len(groups) + 1))
    ends.set_xlabel("seeds' best epoch (triangle) and last epoch (dot), means (bar)")
    ends.set_ylabel("test top-1, %")
    ends.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=columns)
    _save(figure, path, title)


def _band(
    axes: Axes, runs: Sequence[Sequence[Row]], column: str, color: str, style: str, label: str = "", scale: float = 1
) -> None:
    """The mean over seeds, with the range of the seeds around it."""
    length = min(len(run) for run in runs)
    values = scale * np.array([[row[column] for row in run[:length]] for run in runs])
    epochs = [row["epoch"] for row in runs[0][:length]]
    axes.plot(epochs, values.mean(0), style, label=label, color=color)
    axes.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)


def _finish(axes: Axes, name: str) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(name)
    axes.grid(alpha=0.3)


def _literally(text: str) -> str:
    """A user's name as it is: between two `$` matplotlib would read a formula, and fail where it is none."""
    return text.replace("$", r"\$")


def _save(figure: plt.Figure, path: Path, title: str) -> None:
    figure.suptitle(_literally(title))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
