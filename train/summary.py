"""Finished runs read back, grouped by seed, and summed up."""

from __future__ import annotations

import csv
import os
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .config import validate
from .naming import method_label, pair_label
from .schema import Config
from .yaml_file import read_yaml

Row = dict[str, float]
_COLUMNS = ("epoch", "test_top1", "corrected", "mean_rank", "seconds")  # that tables and pictures are made of


@dataclass(frozen=True)
class Run:
    """What one run folder holds."""

    folder: Path
    config: Config
    history: list[Row]

    @property
    def best(self) -> float:
        """The highest test accuracy of any epoch: the field's number."""
        return max(row["test_top1"] for row in self.history)

    @property
    def last(self) -> float:
        """The test accuracy after the last epoch: the one that no choice of epoch has touched."""
        return self.history[-1]["test_top1"]


def read_run(folder: Path) -> Run:
    """A run from its folder; `ValueError` names the file that is not what a run writes."""
    try:
        path = folder / "metrics.csv"
        history = _history(path)
        path = folder / "config.yaml"
        return Run(folder, validate(read_yaml(path)), history)
    except (ValueError, csv.Error, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"report: expected the file of a run at {path}, got {reason}; mend it or remove it") from error


def _history(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if missing := [name for name in _COLUMNS if name not in (rows.fieldnames or _COLUMNS)]:
            raise ValueError(f"no column {', '.join(missing)}")
        history = []
        for number, row in enumerate(rows, 1):
            try:
                history.append({name: float(value) for name, value in row.items()})
            except (TypeError, ValueError):  # a cell too few or too many is None or a list
                raise ValueError(f"row {number} of {list(row.values())}") from None
    return history


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """Every run in or below `paths`, in their order."""
    runs: dict[Path, Run] = {}
    for path in paths:
        folders = sorted(file.parent for file in path.rglob("metrics.csv"))
        if not folders:
            raise FileNotFoundError(f"report: expected a run, or a folder of runs, at {path}, got no metrics.csv there")
        runs |= {folder.resolve(): read_run(folder) for folder in folders}
    for run in runs.values():
        if not run.history:
            warnings.warn(f"{run.folder}: no finished epoch; left out", stacklevel=2)
    finished = [run for run in runs.values() if run.history]
    if not finished:
        raise ValueError(f"report: expected a finished epoch in one of {len(runs)} runs, got none")
    return finished


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in the seed alone, under a label that tells the groups apart: as short as does that."""
    folders: dict[Path, list[Run]] = {}
    for run in runs:
        folders.setdefault(run.folder.resolve().parent, []).append(run)
    labels = {folder: method_label(group[0].config) for folder, group in folders.items()}
    pairs = {folder: pair_label(group[0].config) for folder, group in folders.items()}
    names = {folder: f"{folder.parent.name}/{folder.name}" for folder in folders}
    if len(set(names.values())) < len(names):
        names = {folder: os.path.relpath(folder) for folder in folders}
    for more in (pairs, names):
        for label in set(labels.values()):
            same = [folder for folder in folders if labels[folder] == label]
            if len({more[folder] for folder in same}) > 1:
                labels |= {folder: f"{label}, {more[folder]}" for folder in same}
    return {labels[folder]: group for folder, group in folders.items()}


def statistics_of(group: Sequence[Run]) -> dict[str, Any]:
    """Mean and sample standard deviation over the seeds of a group, and what else a table tells."""
    first = group[0]
    epochs = [row for run in group for row in run.history]
    return {
        "method": method_label(first.config),
        "pair": pair_label(first.config),
        "seeds": [run.config.EXPERIMENT.SEED for run in group],
        "epochs": min(len(run.history) for run in group),
        "planned_epochs": first.config.SOLVER.EPOCHS,
        "best": spread([run.best for run in group]),
        "last": spread([run.last for run in group]),
        "corrected": statistics.fmean(row["corrected"] for row in epochs),
        "mean_rank": statistics.fmean(row["mean_rank"] for row in epochs),
        "seconds_per_epoch": statistics.fmean(row["seconds"] for row in epochs),
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation and the values themselves."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "values": list(values)}
