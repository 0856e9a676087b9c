"""Groups of runs compared: the methods of a pair of models side by side, what the correction adds, the table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .config import flatten
from .naming import method_label, pair_label, plain_method
from .schema import Config
from .summary import Run, statistics_of

# Two runs that differ in these, in the correction and in nothing else differ by the correction.
_NO_MATTER = ("DISTILLER.CORRECTION", "EXPERIMENT.", "LOG.", "DATASET.ROOT", "DATASET.NUM_WORKERS", "TEACHER.CACHE_DIR")


@dataclass(frozen=True)
class Facet:
    """The groups of one pair of models.

    Attributes:
        pair: the models, as `naming.pair_label` writes them.
        groups: by label, the pair left out of it; forms of one method stand together, the plain one first.
        methods: for each label that of the plain method under it, be there runs of that or not.
        plain: for the label of a corrected group that of the group which differs from it in the correction alone.
        teacher: the runs that trained the pair's teacher, where they are among the groups.
    """

    pair: str
    groups: dict[str, Sequence[Run]]
    methods: dict[str, str]
    plain: dict[str, str]
    teacher: Sequence[Run]


def corrects(runs: Sequence[Run]) -> bool:
    """Whether the group's teacher is corrected."""
    distiller = runs[0].config.DISTILLER
    return distiller.TYPE != "NONE" and distiller.CORRECTION != "none"


def facets_of(groups: Mapping[str, Sequence[Run]]) -> list[Facet]:
    """The groups by pair. Runs without a teacher stand with every pair whose student they train."""
    by_pair: dict[tuple[str, str], list[str]] = {}
    alone: dict[str, list[str]] = {}
    for label, runs in groups.items():
        distiller = runs[0].config.DISTILLER
        if distiller.TYPE == "NONE":
            alone.setdefault(distiller.STUDENT, []).append(label)
        else:
            by_pair.setdefault((distiller.TEACHER, distiller.STUDENT), []).append(label)
    facets, shown = [], set()
    for (teacher, student), labels in by_pair.items():
        shown |= {teacher, student}
        teachers = [run for label in alone.get(teacher, []) for run in groups[label] if teacher != student]
        facets.append(_facet({label: groups[label] for label in [*alone.get(student, []), *labels]}, teachers))
    for student, labels in alone.items():
        if student not in shown:
            facets.append(_facet({label: groups[label] for label in labels}, []))
    return facets


def _facet(groups: Mapping[str, Sequence[Run]], teacher: Sequence[Run]) -> Facet:
    pair = pair_label(list(groups.values())[-1][0].config)  # the last: those of the student alone come first
    short = {label: label.replace(f", {pair_label(runs[0].config)}", "") for label, runs in groups.items()}
    if len(set(short.values())) < len(short):
        short = {label: label for label in groups}
    methods = {}
    for label, runs in groups.items():
        config = runs[0].config
        prefix = len(method_label(config)) - len(plain_method(config))
        methods[short[label]] = short[label][prefix:]
    order = list(methods.values())
    named = {short[label]: runs for label, runs in groups.items()}
    labels = sorted(named, key=lambda label: (order.index(methods[label]), corrects(named[label])))
    ordered = {label: named[label] for label in labels}
    return Facet(pair, ordered, {label: methods[label] for label in labels}, plain_of(ordered), teacher)


def plain_of(groups: Mapping[str, Sequence[Run]]) -> dict[str, str]:
    """For the label of each corrected group that of the group which differs from it in the correction alone."""
    plain = {}
    for label, runs in groups.items():
        if not corrects(runs):
            continue
        for other, others in groups.items():
            if not corrects(others) and _what_matters(others[0].config) == _what_matters(runs[0].config):
                plain.setdefault(label, other)
    return plain


def _what_matters(config: Config) -> dict[str, Any]:
    return {key: value for key, value in flatten(config.model_dump()).items() if not key.startswith(_NO_MATTER)}


@dataclass(frozen=True)
class Difference:
    """Corrected minus plain, in points, of the seeds that both have: values, mean and 95 % confidence interval."""

    values: list[float]
    mean: float
    interval: tuple[float, float] | None  # of a single value there is none

    def __str__(self) -> str:
        interval = "" if self.interval is None else f" [{self.interval[0]:+.2f}, {self.interval[1]:+.2f}]"
        return f"{self.mean:+.2f}{interval}"


def paired_difference(
    plain: Sequence[Run], corrected: Sequence[Run], number: Literal["best", "last"]
) -> Difference | None:
    """The differences seed by seed, of runs of as many epochs; None where no seed has both.

    The interval is Student's t over the differences: what the seeds have in common, order and augmentation, drops out.
    """
    others = {run.config.EXPERIMENT.SEED: run for run in plain}
    pairs = [(others[seed], run) for run in corrected if (seed := run.config.EXPERIMENT.SEED) in others]
    values = [getattr(b, number) - getattr(a, number) for a, b in pairs if len(a.history) == len(b.history)]
    if not values:
        return None
    mean, interval = statistics.fmean(values), None
    if len(values) > 1:
        from scipy.stats import t  # here: half a second of import

        half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
        interval = (mean - half, mean + half)
    return Difference(values, mean, interval)


def markdown_table(groups: Mapping[str, Sequence[Run]]) -> str:
    """The comparison as a markdown table, with a word below it on how to read it."""
    plain = plain_of(groups)
    header = ["", "models", "seeds", "epochs", "top-1 best", "top-1 last"]
    header += ["corrected - plain, best", "corrected - plain, last"] if plain else []
    header += ["corrected rows", "s per epoch"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    order = list(groups)
    for label in sorted(groups, key=lambda label: (order.index(plain.get(label, label)), label in plain)):
        group = groups[label]
        facts = statistics_of(group)
        planned = "" if facts["epochs"] == facts["planned_epochs"] else f" of {facts['planned_epochs']}"
        cells = [label.replace(f", {facts['pair']}", ""), facts["pair"], str(len(group)), f"{facts['epochs']}{planned}"]
        cells += [_plus_minus(facts["best"]), _plus_minus(facts["last"])]
        if plain:
            both = (
                [paired_difference(groups[plain[label]], group, n) for n in ("best", "last")] if label in plain else []
            )
            cells += [str(difference or "") for difference in both] or ["", ""]
        cells += [f"{100 * facts['corrected']:.1f}%" if corrects(group) else "", f"{facts['seconds_per_epoch']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Test accuracy in percent, mean ± standard deviation over seeds."]
    if plain:
        lines.append(
            "Corrected - plain: in points, paired by seed, all else the same; the mean and, in brackets, its 95 % "
            "confidence interval (Student's t)."
        )
    return "\n".join(lines)


def _plus_minus(values: Mapping[str, Any]) -> str:
    return f"{values['mean']:.2f}" + ("" if values["std"] is None else f" ± {values['std']:.2f}")
