"""Where a training step's time goes, and what the teacher cache saves.

Two pairs of the field at batch 64, on CIFAR-100's shapes. Every step runs each phase once: data, the teacher live and
from the cache, the student's forward pass, the loss with its gradient on the logits (the paper's eager chain and the
fused op, in turn first), the student's backward pass, the optimizer. Totals are sums of the phases' medians. Then the
trainer's whole step and a plain loop's, in turn: what the trainer costs beside the arithmetic. Writes
`bench_step.csv`, `.md` and `.png` to `benchmarks/results/`; `--quick` takes one pair and three steps, and writes to
`runs/bench_quick/`.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import harness
import torch
from harness import Spread, duration, table
from peers import paper_kd
from torch import Tensor, nn
from torch.nn import functional as F

# `train` is part of the checkout and never installed; an installed sortkd_kernels goes before the checkout's.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import sortkd_kernels as sk
from train.config import load_config
from train.data import ArrayData, ArrayLoader, Batch, BatchPlan, Loaders
from train.data.sources import CIFAR_MEAN, CIFAR_STD
from train.distillers import Distiller
from train.distributed import World
from train.logs import Progress
from train.loop import Trainer
from train.models import build_model
from train.teacher import CachedTeacher, CacheKey, FrozenTeacher
from train.teacher.cache import write_cache
from train.together import Turn

ROOT = Path(__file__).resolve().parents[1]
RESULTS, QUICK_RESULTS = ROOT / "benchmarks" / "results", ROOT / "runs" / "bench_quick"
PAIRS = (("resnet32x4", "resnet8x4"), ("resnet56", "resnet20"))
BATCH, CLASSES, SAMPLES, VIEWS = 64, 100, 50_000, 4
CE_WEIGHT, KD_WEIGHT = 0.1, 0.9
ACCURACY, MAX_RANK = 0.8, 8  # the labels are made so that the teacher is right this often, and off by a few otherwise
WARM_UP = 2
AT_ONCE = 48  # batches of a sample of the data phase: the loader augments a few of them at a time

EAGER, FUSED = "loss, paper eager", "loss, fused"
LIVE, CACHED = "teacher, live", "teacher, cached"
COMMON = ("data", "student forward", "student backward", "optimizer")
PLAIN, TRAINER, OFF = "whole step, plain loop", "whole step, trainer", "whole step, trainer, graph off"
TARGET = 1.05  # the trainer's step over the plain loop's
PHASES = ("data", LIVE, CACHED, "student forward", EAGER, FUSED, "student backward", "optimizer")
# What a step is made of, by the choice of loss and teacher.
STEPS = {
    "paper eager, live teacher": (EAGER, LIVE),
    "fused, live teacher": (FUSED, LIVE),
    "fused, cached teacher": (FUSED, CACHED),
}
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One phase of one pair: a line of the CSV; a whole step has no quartiles, being a sum of medians."""

    pair: str
    phase: str
    median_us: float
    q1_us: float | None
    q3_us: float | None
    runs: int
    share_of_fused_live_step: float | None
    problem: str = ""


class Stopwatch:
    """Wall-clock times by phase, the device waited for on both sides."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, defaultdict(list)

    def time(self, phase: str, call: Callable[[], T]) -> T:
        """`call`'s result; its duration is kept under `phase`."""
        self._wait()
        start = time.perf_counter()
        result = call()
        self._wait()
        self.seconds[phase].append(time.perf_counter() - start)
        return result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def eager(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """The paper's chain with the cross-entropy, as its code writes them."""
    return KD_WEIGHT * paper_kd(student, teacher, target) + CE_WEIGHT * F.cross_entropy(student, target)


def fused(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """The same by this package."""
    return sk.fused_sort_kd(student, teacher, target, ce_weight=CE_WEIGHT, kd_weight=KD_WEIGHT)


def with_gradient(loss: Callable[..., Tensor], student: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    """A loss and its gradient on the student's logits, cut off from the network: what there is to compare."""
    leaf = student.detach().requires_grad_()
    value = loss(leaf, *others)
    value.backward()
    return value.detach(), leaf.grad


def settle(model: nn.Module, images: Tensor) -> nn.Module:
    """Give an untrained network the BatchNorm statistics of `images`, so that its logits are of a usual size."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    return model


def labels_for(teacher: Tensor, generator: torch.Generator) -> Tensor:
    """Labels that this teacher gets right in `ACCURACY` of the rows, and ranks up to `MAX_RANK` in the others."""
    rank = torch.randint(1, MAX_RANK + 1, (len(teacher),), generator=generator)
    rank[torch.rand(len(teacher), generator=generator) < ACCURACY] = 0
    best = teacher.topk(MAX_RANK + 1).indices
    return best.gather(1, rank.to(teacher.device).unsqueeze(1)).squeeze(1)


def cache_of_noise(folder: Path, batch: Batch) -> CachedTeacher:
    """A cache of full size without the hour that filling it takes; what it gives back is checked."""
    key = CacheKey("noise", "Noise", "noise", {}, 0, VIEWS, SAMPLES, CLASSES, "None")
    logits = torch.randn(VIEWS * SAMPLES, CLASSES, generator=torch.Generator().manual_seed(0))
    path = key.path(folder)
    write_cache(path, key, logits.split(10_000))
    cached = CachedTeacher(path, key)
    torch.testing.assert_close(cached.rows(batch.view, batch.index), logits[batch.view * SAMPLES + batch.index].half())
    return cached


def measure(names: tuple[str, str], loader: ArrayLoader, folder: Path, steps: int) -> dict[str, Spread]:
    """Every phase of `steps` training steps of a pair."""
    device = loader.device
    batches = iter(loader)
    batch = next(batches)
    torch.manual_seed(0)
    student = build_model(names[1], CLASSES).to(device, memory_format=torch.channels_last)
    teacher = FrozenTeacher(settle(build_model(names[0], CLASSES).to(device), batch.images))
    cached = cache_of_noise(folder, batch)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(0)
    watch = Stopwatch(device)
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            watch.seconds.clear()
        batch = next(batches)
        t = watch.time(LIVE, lambda: teacher.logits(batch.images))  # noqa: B023 (called at once)
        watch.time(CACHED, lambda: cached.rows(batch.view, batch.index).to(device).float())  # noqa: B023
        s = watch.time("student forward", lambda: student(batch.images))  # noqa: B023
        target = labels_for(t, generator)
        losses = {EAGER: eager, FUSED: fused}
        found = {
            name: watch.time(name, lambda: with_gradient(losses[name], s, t, target))  # noqa: B023
            for name in sorted(losses, reverse=bool(step % 2))
        }
        for a, b in zip(found[EAGER], found[FUSED], strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)  # float32, two orders of summation
        optimizer.zero_grad()
        watch.time("student backward", lambda: s.backward(found[FUSED][1]))  # noqa: B023
        watch.time("optimizer", optimizer.step)
    for _ in range(8):
        watch.time("data", lambda: [next(batches) for _ in range(AT_ONCE)])
    watch.seconds["data"] = [x / AT_ONCE for x in watch.seconds["data"]]
    return {phase: Spread.of(watch.seconds[phase]) for phase in PHASES}


def plain_loop(names: tuple[str, str], loader: ArrayLoader) -> Iterator[None]:
    """Training as a textbook writes it, without a metric or a check; pauses after every step."""
    student = build_model(names[1], CLASSES).to(loader.device, memory_format=torch.channels_last)
    teacher = FrozenTeacher(build_model(names[0], CLASSES).to(loader.device))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for batch in loader:
        optimizer.zero_grad()
        fused(student(batch.images), teacher.logits(batch.images), batch.labels).backward()
        optimizer.step()
        yield


def trainer_loop(names: tuple[str, str], loader: ArrayLoader, *overrides: str) -> Iterator[bool]:
    """The same by the trainer, with all that it does in an epoch; says after every step whether it is captured by now.

    The trainer is built in the first step's turn, on the stream that its steps run on.
    """
    config = load_config(ROOT / "train" / "configs" / "cifar100" / "kd.yaml", overrides, pair=names)
    teacher = FrozenTeacher(build_model(names[0], CLASSES).to(loader.device))
    distiller = Distiller(build_model(names[1], CLASSES), config)
    loaders = Loaders(loader, loader, CLASSES, (3, 32, 32))
    trainer = Trainer(config, loaders, distiller, teacher, World(loader.device))
    for _ in trainer.train_epoch(1, Progress("", len(loader), 1, 0, shown=False), None):
        yield bool(trainer._train_step._graphs)


def whole_steps(
    names: tuple[str, str], new_loader: Callable[[], ArrayLoader], steps: int
) -> tuple[dict[str, Spread], dict[str, str]]:
    """A step of each loop in turn, `steps` times: a change of the machine's speed meets all of them; and what failed.

    Each loop has a stream of its own, as in training: the default stream cannot be captured.
    """
    loader = new_loader()
    loops = {PLAIN: plain_loop(names, loader), TRAINER: trainer_loop(names, new_loader())}
    on_gpu = loader.device.type == "cuda"
    if on_gpu:  # on a CPU nothing is captured
        loops[OFF] = trainer_loop(names, new_loader(), "SOLVER.GRAPH", "off")
    turns = {name: Turn(loader.device, slot) for slot, name in enumerate(loops)}
    watch, captured = Stopwatch(loader.device), {}
    for step in range(2 * WARM_UP + steps):  # a step is captured after three
        if step == 2 * WARM_UP:
            watch.seconds.clear()
        for name, loop in sorted(loops.items(), reverse=bool(step % 2)):
            with turns[name].taken():
                captured[name] = watch.time(name, lambda: next(loop))  # noqa: B023 (called at once)
    problems = {TRAINER: "not captured"} if on_gpu and not captured[TRAINER] else {}
    return {name: Spread.of(watch.seconds[name]) for name in loops}, problems


def rows_of(pair: str, times: dict[str, Spread], wholes: dict[str, Spread], problems: dict[str, str]) -> list[Row]:
    """The phases, then the steps as their sums, then the steps as they are run."""
    totals = {name: sum(times[x].median for x in (*COMMON, *parts)) for name, parts in STEPS.items()}
    whole = totals["fused, live teacher"]
    rows = [
        Row(pair, phase, *(1e6 * x for x in spread[:3]), spread.runs,
            spread.median / whole if phase in (*COMMON, FUSED, LIVE) else None)
        for phase, spread in times.items()
    ]  # fmt: skip
    runs = next(iter(times.values())).runs
    rows += [Row(pair, f"step: {name}", 1e6 * total, None, None, runs, None) for name, total in totals.items()]
    rows += [Row(pair, x, *(1e6 * t for t in s[:3]), s.runs, None, problems.get(x, "")) for x, s in wholes.items()]
    return rows


def markdown(rows: list[Row], facts: dict[str, str]) -> str:
    """A table for each pair, and what the fused loss and the cache save."""
    text = [
        "# Where a training step's time goes", "", *(f"- {k}: {v}" for k, v in facts.items()), "",
        f"Batch {BATCH}, float32, channels_last; medians. The loss is with its gradient on the logits; the share is of "
        "a step with the fused loss and the live teacher. Networks are untrained and images noise: neither changes "
        f"the arithmetic. Labels are such that the teacher is right on {ACCURACY:.0%} of the rows.",
    ]  # fmt: skip
    batches = -(-SAMPLES // BATCH)
    for pair in dict.fromkeys(r.pair for r in rows):
        mine = {r.phase: r for r in rows if r.pair == pair}
        lines = [
            [r.phase, duration(r.median_us), f"{duration(r.q1_us)} to {duration(r.q3_us)}" if r.q1_us else "",
             r.problem if r.share_of_fused_live_step is None else f"{r.share_of_fused_live_step:.2%}"]
            for r in mine.values()
        ]  # fmt: skip
        live, cached = (mine[x].median_us / 1e6 for x in (LIVE, CACHED))
        steps = [mine[f"step: {name}"].median_us / 1e6 for name in STEPS]
        cost, problem = mine[TRAINER].median_us / mine[PLAIN].median_us, mine[TRAINER].problem
        text += [
            "", f"## {pair}", "", *table(["phase", "median", "quartiles", "share"], lines), "",
            f"- The fused op takes the loss from {duration(mine[EAGER].median_us)} to "
            f"{duration(mine[FUSED].median_us)} ({mine[EAGER].median_us / mine[FUSED].median_us:.1f} times less), the "
            f"step from {steps[0]:.3f} to {steps[1]:.3f} s.",
            f"- The cache saves {(live - cached) * batches:.0f} s of the teacher's {live * batches:.0f} s an epoch of "
            f"{SAMPLES:,} images: reading takes {cached * batches:.2f} s. An epoch is {steps[1] / steps[2]:.2f} times "
            f"shorter. Filling M views costs M of the teacher's epochs, once. {VIEWS} views take "
            f"{VIEWS * SAMPLES * CLASSES * 2 / 2**20:.0f} MiB.",
            f"- The trainer's step takes {cost:.3f} of a plain loop's, target at most {TARGET}: "
            f"{f'**{problem}**' if problem else 'pass' if cost <= TARGET else '**missed**'}.",
        ]  # fmt: skip
    return "\n".join([*text, ""])


def plot(rows: list[Row], facts: dict[str, str], path: Path) -> None:
    """A bar for each pair and kind of step, made of its phases."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    pairs = list(dict.fromkeys(r.pair for r in rows))
    figure, panels = plt.subplots(len(pairs), 1, figsize=(11, 1.2 + 2 * len(pairs)), squeeze=False)
    for pair, panel in zip(pairs, panels[:, 0], strict=True):
        ms = {r.phase: r.median_us / 1e3 for r in rows if r.pair == pair}
        left = [0.0] * len(STEPS)
        parts = {"data": ("data",) * 3, "teacher": [x[1] for x in STEPS.values()], "student forward": COMMON[1:2] * 3,
                 "loss and its gradient": [x[0] for x in STEPS.values()], "student backward": COMMON[2:3] * 3,
                 "optimizer": COMMON[3:] * 3}  # fmt: skip
        for label, phases in parts.items():
            widths = [ms[phase] for phase in phases]
            panel.barh(list(STEPS), widths, left=left, label=label)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        panel.bar_label(panel.containers[-1], [duration(1e3 * x) for x in left], padding=3)
        panel.set(title=f"{pair}, batch {BATCH}", xlabel="ms a step (sum of medians)", xlim=(0, 1.12 * max(left)))
        panel.invert_yaxis()
    panels[0, 0].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.text(0.5, 0.01, "; ".join(f"{k}: {v}" for k, v in facts.items()), ha="center", fontsize=6, color="0.4")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one pair, three steps; files go to runs/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, help="steps to time for each pair (20; quick: 3)")
    parser.add_argument("--output", type=Path, help="folder of bench_step.csv, .md and .png")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and device.index is None:  # random generators have a number
        device = torch.device("cuda", torch.cuda.current_device())
    output = args.output or (QUICK_RESULTS if args.quick else RESULTS)
    facts = harness.machine(device, sk.build_info())
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (SAMPLES, 32, 32, 3), dtype=torch.uint8, generator=generator)
    data = ArrayData(images, torch.zeros(SAMPLES, dtype=torch.long), CIFAR_MEAN, CIFAR_STD)
    plan = BatchPlan(SAMPLES, BATCH, shuffle=True, seed=0)

    def loader(views: int = 0) -> ArrayLoader:
        return ArrayLoader(data, plan, device=device, padding=4, flip=True, views=views)

    rows: list[Row] = []
    for names in PAIRS[1:] if args.quick else PAIRS:
        steps = args.steps or (3 if args.quick else 20)
        with tempfile.TemporaryDirectory() as folder:
            times = measure(names, loader(VIEWS), Path(folder), steps)
        rows += rows_of("->".join(names), times, *whole_steps(names, loader, steps))
        # After each pair: what stops later ones leaves these.
        harness.write_csv(output / "bench_step.csv", Row, rows)
        text = markdown(rows, facts)
        (output / "bench_step.md").write_text(text)
        if importlib.util.find_spec("matplotlib"):  # a GPU machine may have no more than torch
            plot(rows, facts, output / "bench_step.png")
    print(text)
    if problems := [f"{r.pair}, {r.phase}: {r.problem}" for r in rows if r.problem]:
        sys.exit(f"bench_step: {'; '.join(problems)}")


if __name__ == "__main__":
    main()
