"""Pictures of runs: the curves of one, and the methods of each pair of models side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed or looked for
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy.ndimage import median_filter

from .compare import Facet, corrects, facets_of, paired_difference
from .naming import method_label, pair_label
from .summary import Run

Groups = Mapping[str, Sequence[Run]]


def plot_run(run: Run, path: Path) -> None:
    """The curves of one run. A panel that would say nothing, as the corrected rows of plain KD, is left out."""
    config, history = run.config, run.history
    columns = {name: np.array([row[name] for row in history]) for name in history[0]}
    distiller, epochs = config.DISTILLER, columns["epoch"]
    ce_weight = config.DKD.CE_WEIGHT if distiller.TYPE == "DKD" else config.KD.LOSS.CE_WEIGHT

    def lines(axes: Axes, ylabel: str, **series: NDArray[np.float64]) -> None:
        for name, values in series.items():
            axes.plot(epochs, values, label=name.replace("_", " "))
        _robust_limits(axes, list(series.values()))
        axes.set_ylabel(ylabel)
        if len(series) > 1:
            axes.legend()

    def parts(axes: Axes) -> None:
        ce = ce_weight * columns["train_ce"]
        loss = columns["train_loss"]
        axes.stackplot(epochs, ce, loss - ce, labels=["cross-entropy", "distillation"], alpha=0.6)
        axes.plot(epochs, loss, color="black", label="loss")
        _robust_limits(axes, [loss], zero=True)
        axes.set_ylabel("training loss, its weighted parts")
        axes.legend()

    def rate(axes: Axes) -> None:
        axes.step(epochs, columns["lr"], where="mid")
        axes.set_yscale("log")
        axes.set_ylabel("learning rate")

    panels: list[Callable[[Axes], None]] = [
        partial(lines, ylabel="top-1, %", training=columns["train_top1"], test=columns["test_top1"]),
        partial(lines, ylabel="cross-entropy", training=columns["train_ce"], test=columns["test_ce"]),
    ]
    if distiller.TYPE != "NONE":
        panels.insert(1, parts)
        if corrects([run]):
            panels.append(lambda axes: _share(axes, epochs, columns["corrected"]))
    if distiller.LEARNED_TEMPERATURE:
        panels.append(partial(lines, ylabel="learned temperature", temperature=columns["temperature"]))
    panels.append(rate)
    width = 3 if len(panels) > 4 else 2
    height = -(-len(panels) // width)
    figure, grid = plt.subplots(height, width, figsize=(5 * width, 3.5 * height), layout="constrained", squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        panel(axes)
        _epochs(axes)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    title = f"{method_label(config)}, {pair_label(config)}, seed {config.EXPERIMENT.SEED}"
    _save(figure, path, title if distiller.LEARNED_TEMPERATURE else f"{title}{_temperature(run)}")


def plot_groups(groups: Groups, path: Path, title: str) -> None:
    """A row of panels for each pair of models: test accuracy over epochs, its best and last value by seed, what the
    correction adds to each method, and the share of training rows that it changes.

    A method and its corrected forms have one colour and lie side by side; the teacher is a line, or a remark where it
    is beyond the students' axis.
    """
    facets = facets_of(groups)
    paired = any(facet.plain for facet in facets)
    shares = any(corrects(group) for group in groups.values())
    widths = [1.1, 1, *([0.7] if paired else []), *([0.8] if shares else [])]
    heights = [max(3.0, 1.2 + 0.32 * len(facet.groups)) for facet in facets]
    figure, grid = plt.subplots(
        len(facets), len(widths), figsize=(5 * sum(widths), sum(heights) + 0.8), layout="constrained", squeeze=False,
        width_ratios=widths, height_ratios=heights,
    )  # fmt: skip
    bases = {method: None for facet in facets for method in facet.methods.values()}
    colors = {method: f"C{number % 10}" for number, method in enumerate(bases)}
    handles: dict[str, Line2D] = {}
    for facet, row in zip(facets, grid, strict=True):
        color = {label: colors[facet.methods[label]] for label in facet.groups}
        curves, ends, *more = row
        handles |= _curves(curves, facet, color)
        curves.set_title(_literally(facet.pair), loc="left", fontweight="bold")
        places = _places(facet)
        _ends(ends, facet, color, places)
        if paired:
            _differences(more.pop(0), facet, color, places)
        if shares:
            _shares(more.pop(0), facet, color)
    columns = max(1, int(14 * sum(widths) // (4 + max(map(len, handles)))))
    figure.legend(handles.values(), map(_literally, handles), loc="outside lower center", ncols=columns)
    _save(figure, path, title)


def _curves(axes: Axes, facet: Facet, color: Mapping[str, str]) -> dict[str, Line2D]:
    """Test accuracy over epochs: means over the seeds, and the seeds' range; the lines by their labels."""
    shown, handles = [], {}
    for label, runs in facet.groups.items():
        values = _column(runs, "test_top1")
        epochs = [row["epoch"] for row in runs[0].history[: values.shape[1]]]
        style = "-" if corrects(runs) else "--"
        (handles[label],) = axes.plot(epochs, values.mean(0), style, color=color[label])
        axes.fill_between(epochs, values.min(0), values.max(0), color=color[label], alpha=0.15, linewidth=0)
        shown += [*values]
    _robust_limits(axes, shown)
    axes.set_ylabel("test top-1, %")
    _epochs(axes)
    if facet.teacher:
        _teacher(axes, facet, axes.get_ylim(), axes.axhline, "↑")
    return handles


def _ends(axes: Axes, facet: Facet, color: Mapping[str, str], places: Mapping[str, float]) -> None:
    """Every seed's accuracy in its best and in its last epoch, and their means; a line of its own for each group."""
    for label, runs in facet.groups.items():
        for offset, marker, values in ((-0.16, "^", [r.best for r in runs]), (0.16, "o", [r.last for r in runs])):
            place = places[label] + offset
            face = color[label] if corrects(runs) else "none"
            axes.plot(values, [place] * len(values), marker, color=color[label], markerfacecolor=face)
            axes.plot([np.mean(values)] * 2, [place - 0.16, place + 0.16], color="black")
    _name_rows(axes, places)
    for text, label in zip(axes.get_yticklabels(), places, strict=True):
        text.set_color(color[label])
    axes.set_xlabel("test top-1, %: best epoch (triangle), last (dot), means (bar)")
    axes.grid(alpha=0.3)
    if facet.teacher:
        _teacher(axes, facet, axes.get_xlim(), axes.axvline, "→")


def _differences(axes: Axes, facet: Facet, color: Mapping[str, str], places: Mapping[str, float]) -> None:
    """For each corrected group, last epoch: its seeds' differences from the plain method's, mean and interval."""
    if not facet.plain:
        axes.remove()
        return
    points = [0.0]
    for label, plain in facet.plain.items():
        difference = paired_difference(facet.groups[plain], facet.groups[label], "last")
        if difference is None:
            continue
        place = places[label]
        axes.plot(difference.values, [place] * len(difference.values), "o", color=color[label], alpha=0.6)
        axes.plot([difference.mean] * 2, [place - 0.3, place + 0.3], color="black")
        if difference.interval:
            axes.plot(difference.interval, [place + 0.3] * 2, "|-", color="black", linewidth=1)
        points += difference.values
    # Of two seeds the interval is some nine times as wide as they are apart: it may leave the axis, they may not.
    span = max(max(points) - min(points), 0.1)
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, min(points) - span), min(high, max(points) + span))
    axes.axvline(0, color="gray", linewidth=1)
    _name_rows(axes, places, names=False)
    axes.set_xlabel("corrected - plain, last epoch, points:\nseeds (dots), mean (bar), 95 % interval (line)")
    axes.grid(alpha=0.3)


def _shares(axes: Axes, facet: Facet, color: Mapping[str, str]) -> None:
    """The share of training rows that the correction changes, over epochs."""
    corrected = {label: runs for label, runs in facet.groups.items() if corrects(runs)}
    if not corrected:
        axes.remove()
        return
    for label, runs in corrected.items():
        values = _column(runs, "corrected").mean(0)
        _share(axes, [row["epoch"] for row in runs[0].history[: len(values)]], values, color=color[label])
    _epochs(axes)


def _share(axes: Axes, epochs: Sequence[float], values: NDArray[np.float64], **style: str) -> None:
    axes.plot(epochs, 100 * values, **style)
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1], 105 * values.max()))
    axes.set_ylabel("corrected training rows, %")


def _places(facet: Facet) -> dict[str, float]:
    """Where on the vertical axis each group lies: forms of one method together, a gap before the next method."""
    places: dict[str, float] = {}
    place, before = 0.0, None
    for label, method in facet.methods.items():
        place += 1.0 if method == before else 1.5
        places[label], before = place, method
    return places


def _name_rows(axes: Axes, places: Mapping[str, float], *, names: bool = True) -> None:
    axes.set_yticks(list(places.values()), [_literally(label) if names else "" for label in places])
    axes.set_ylim(max(places.values()) + 0.75, min(places.values()) - 0.75)


def _teacher(axes: Axes, facet: Facet, limits: tuple[float, float], line: Callable[..., object], arrow: str) -> None:
    """The teacher's last accuracy as a line, if the students' axis reaches it; its number either way."""
    accuracy = float(np.mean([run.last for run in facet.teacher]))
    if limits[0] <= accuracy <= limits[1]:
        line(accuracy, color="gray", linestyle=":")
        arrow = "(dotted)"
    axes.set_title(f"teacher {accuracy:.2f} {arrow}", loc="right", color="gray", fontsize="medium")


def _robust_limits(axes: Axes, series: Sequence[NDArray[np.float64]], *, zero: bool = False) -> None:
    """Limits that one spike does not decide: what a median of five epochs leaves, and whatever is near that.

    What lies further off than the curves are high is cut, and said so.
    """
    smooth = np.concatenate([median_filter(x, 5, mode="mirror") if len(x) >= 5 else x for x in series])
    every = np.concatenate(list(series))
    low, high = smooth.min(), smooth.max()
    span = max(high - low, 1e-3 * abs(high), 1e-9)
    near = every[(every >= low - span) & (every <= high + span)]
    bottom, top = min(low, near.min()), max(high, near.max())
    margin = 0.05 * max(top - bottom, span)
    axes.set_ylim(0 if zero else bottom - margin, top + margin)
    beyond = [f"{value:.4g}" for value in (every.min(), every.max()) if not bottom <= value <= top]
    if beyond:
        text = f"not shown: up to {' and '.join(beyond)}"
        axes.text(0.02, 0.02, text, transform=axes.transAxes, fontsize="small", color="gray")


def _column(runs: Sequence[Run], name: str) -> NDArray[np.float64]:
    """A column of the runs' numbers, ``[runs, epochs]``, as far as all of them came."""
    length = min(len(run.history) for run in runs)
    return np.array([[row[name] for row in run.history[:length]] for run in runs])


def _temperature(run: Run) -> str:
    config = run.config
    return "" if config.DISTILLER.TYPE == "NONE" else f", temperature {run.history[0]['temperature']:g}"


def _epochs(axes: Axes) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _literally(text: str) -> str:
    """A user's name as it is: between two `$` matplotlib would read a formula, and fail where it is none."""
    return text.replace("$", r"\$")


def _save(figure: plt.Figure, path: Path, title: str) -> None:
    figure.suptitle(_literally(title))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
