"""The demo: does an imperfect teacher help a small student more when it is corrected? On scikit-learn's digits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from .assembly import make_loaders
from .config import load_config
from .data import Batch, Loader
from .distributed import World
from .experiment import machine, train
from .plots import plot_groups
from .summary import group_runs, histories, markdown_table, statistics_of

_CONFIGS = Path(__file__).parent / "configs" / "digits"
TEACHER_CONFIG = _CONFIGS / "teacher.yaml"
_METHODS = {"CE": ("vanilla.yaml",), "KD": ("kd.yaml", "DISTILLER.CORRECTION", "none"), "Sort-KD": ("kd.yaml",)}
_SEEDS = (1, 2, 3, 4, 5)
_KEEP, _NOISE = 0.3, 0.2  # what the teacher sees: enough to be of use, too little to be right on every training image


class PoorTraining:
    """A training loader spoilt on purpose: few of the images, some of their labels replaced by random ones."""

    def __init__(self, loader: Loader, num_classes: int, *, keep: float, noise: float, seed: int) -> None:
        self._loader = loader
        generator = torch.Generator().manual_seed(seed)
        self._kept = torch.rand(loader.samples, generator=generator) < keep
        self._wrong = torch.rand(loader.samples, generator=generator) < noise
        self._label = torch.randint(num_classes, (loader.samples,), generator=generator)
        self.samples = int(self._kept.sum())

    def __len__(self) -> int:
        return len(self._loader)

    def set_epoch(self, epoch: int) -> None:
        """As the loader's."""
        self._loader.set_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            rows = self._kept[batch.index].nonzero().flatten()
            index = batch.index[rows]
            labels = torch.where(self._wrong[index], self._label[index], batch.labels.cpu()[rows])
            device = batch.labels.device
            yield batch._replace(images=batch.images[rows.to(device)], labels=labels.to(device), index=index)


def run_demo(overrides: Sequence[str], world: World) -> None:
    """Train the teacher, then the student by each method with five seeds; write the table, the plot and the JSON."""
    config = load_config(TEACHER_CONFIG, overrides)
    folder = Path(config.LOG.PREFIX) / config.EXPERIMENT.PROJECT
    print(f"Digits demo: 1,797 images of 8 x 8 pixels; results go to {folder}")
    loaders = make_loaders(config, world)
    poor = PoorTraining(loaders.train, loaders.num_classes, keep=_KEEP, noise=_NOISE, seed=0)
    teacher = train(config, world, overwrite=True, quiet=True, loaders=loaders._replace(train=poor))
    print(f"teacher, made imperfect on purpose ({poor.samples} images, {_NOISE:.0%} of them relabelled at random): "
          f"test top-1 {teacher.last:.2f}%")  # fmt: skip
    weights = teacher.folder / "checkpoints" / f"epoch_{len(teacher.history):04d}.pth"
    runs = []
    for name, (file, *method) in _METHODS.items():
        for seed in _SEEDS:
            keys = ["TEACHER.WEIGHTS", str(weights), "EXPERIMENT.NAME", name, "EXPERIMENT.SEED", str(seed)]
            student = load_config(_CONFIGS / file, [*method, *overrides, *keys])
            runs.append(train(student, world, overwrite=True, quiet=True))
    if not world.is_main:
        return
    groups = group_runs(runs)
    methods = [statistics_of(group) for group in groups.values()]
    facts = {"teacher_top1": teacher.last, **machine(world), "methods": methods}
    (folder / "results.json").write_text(json.dumps(facts, indent=1) + "\n")
    plot_groups(histories(groups), folder / "curves.png", "Digits")
    print(f"\n{markdown_table(groups)}\n\nmean ± standard deviation over {len(_SEEDS)} seeds, test accuracy in percent")
    print(f"curves: {folder / 'curves.png'}; numbers: {folder / 'results.json'}")
