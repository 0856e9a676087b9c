"""The demo: few images, a teacher that has seen ten times as many; what do its logits, and their correction, give?

The setting, on scikit-learn's digits, was fixed on other seeds than the five that are reported:

* The teacher is the larger network, trained on all 1,297 training images; the 500 test images are nobody's to train on.
* The student is a small network with 128 of them, drawn anew for each seed.
* Both are trained on images under fresh noise, which stands in for the random crops of larger images: as there, the
  teacher errs on a part of the rows that it teaches, about a tenth, though it was trained on the same images.
* Within a seed every method has the same images, noise, initial weights and schedule; KD has the field's recipe for
  CIFAR-100.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .assembly import make_loaders
from .compare import markdown_table
from .config import load_config
from .data import ArrayLoader, BatchPlan, Inputs
from .data.plan import Part
from .data.seeds import generator
from .distributed import World
from .experiment import machine, train
from .plots import plot_groups
from .summary import Run, group_runs, statistics_of

_CONFIGS = Path(__file__).parent / "configs" / "digits"
TEACHER_CONFIG = _CONFIGS / "teacher.yaml"
_METHODS = {"CE": ("vanilla.yaml",), "KD": ("kd.yaml", "DISTILLER.CORRECTION", "none"), "Sort-KD": ("kd.yaml",)}
_SEEDS = (1, 2, 3, 4, 5)
_IMAGES = 128
_TIMES = 5  # an epoch shows each of them so often: in two batches alone a student would learn too little


class NoisyLoader(ArrayLoader):
    """`images` of a loader's images, drawn by its seed and shown `times` an epoch, each time under fresh noise."""

    def __init__(self, loader: ArrayLoader, images: int, times: int = 1) -> None:
        plan = loader.plan
        kept = torch.randperm(loader.samples, generator=generator("few images", plan.seed))[:images].repeat(times)
        data = replace(loader.data, images=loader.data.images[kept], labels=loader.labels[kept])
        fewer = BatchPlan(
            len(kept), plan.batch_size, shuffle=True, seed=plan.seed, rank=plan.rank, world_size=plan.world_size
        )
        super().__init__(data, fewer, device=loader.device)
        self._noise = torch.zeros(self.samples, *data.image_shape, device=self.device)

    def _load(self, parts: list[Part], epoch: int) -> Iterator[Part]:
        # As strong as the images themselves: normalised, they have a standard deviation of 1 as well.
        self._noise.copy_(torch.randn(self._noise.shape, generator=generator("noise", self.plan.seed, epoch)))
        return super()._load(parts, epoch)

    def read(self, count: int) -> Inputs:
        """The next `count` images of the pass with their noise."""
        at = self._place + torch.arange(count, device=self.device)
        inputs = super().read(count)
        return inputs._replace(images=inputs.images + self._noise.index_select(0, at))


def run_demo(overrides: Sequence[str], world: World) -> None:
    """Train the teacher, then the student by each method with five seeds; write the table, the plot and the JSON."""
    config = load_config(TEACHER_CONFIG, overrides)
    folder = Path(config.LOG.PREFIX) / config.EXPERIMENT.PROJECT
    loaders = make_loaders(config, world)
    images = loaders.train.samples
    loaders = loaders._replace(train=NoisyLoader(loaders.train, images))
    print(f"Digits demo: a teacher of {images:,} images, students of {_IMAGES}; results go to {folder}")
    teacher = train(config, world, overwrite=True, quiet=True, loaders=loaders)
    print(f"teacher: test top-1 {teacher.last:.2f}%")
    weights = teacher.folder / "checkpoints" / f"epoch_{len(teacher.history):04d}.pth"
    runs = []
    for name, (file, *method) in _METHODS.items():
        for seed in _SEEDS:
            keys = ["TEACHER.WEIGHTS", str(weights), "EXPERIMENT.NAME", name, "EXPERIMENT.SEED", str(seed)]
            student = load_config(_CONFIGS / file, [*method, *overrides, *keys])
            loaders = make_loaders(student, world)
            loaders = loaders._replace(train=NoisyLoader(loaders.train, _IMAGES, _TIMES))
            runs.append(train(student, world, overwrite=True, quiet=True, loaders=loaders))
    if not world.is_main:
        return
    groups = group_runs(runs)
    methods = [statistics_of(group) for group in groups.values()]
    facts = {"teacher_top1": teacher.last, **machine(world), "methods": methods}
    (folder / "results.json").write_text(json.dumps(facts, indent=1) + "\n")
    plot_groups(groups, folder / "curves.png", "Digits")
    corrected = 100 * statistics_of(groups["Sort-KD"])["corrected"]
    print(f"\n{markdown_table(groups)}\n")
    print(f"{_difference(groups, 'KD', 'CE')}; the teacher has {teacher.last:.2f}%")
    print(f"{_difference(groups, 'Sort-KD', 'KD')}; the teacher erred on {corrected:.1f}% of the rows")
    print(f"\ncurves: {folder / 'curves.png'}; numbers: {folder / 'results.json'}")


def _difference(groups: dict[str, list[Run]], method: str, other: str) -> str:
    """What `method` gains over `other` at the last epoch, compared seed by seed, in words."""
    gains = [run.last - its.last for run, its in zip(groups[method], groups[other], strict=True)]
    error = statistics.stdev(gains) / math.sqrt(len(gains))
    ahead = sum(gain > 0 for gain in gains)
    return (
        f"{method} against {other}: {statistics.fmean(gains):+.2f} ± {error:.2f} points (mean and standard error), "
        f"ahead on {ahead} of {len(gains)} seeds"
    )
