"""Where a run's numbers go: the progress bar, metrics.csv, TensorBoard and, if asked for, Weights & Biases."""

from __future__ import annotations

import csv
import hashlib
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from .config import ConfigError, flatten
from .schema import Config

Row = dict[str, float]


class _Lines:
    """A log file in place of a terminal: tqdm goes back to the start of its line, where each text is due its own."""

    def write(self, text: str) -> None:
        """A line of what tqdm would have shown; between several bars it moves the cursor as well."""
        if text := text.replace("\x1b[A", "").strip("\r\n "):
            sys.stderr.write(f"{text}\n")

    def flush(self) -> None:
        """As a file's."""
        sys.stderr.flush()


class Progress:
    """One bar for the whole run, so that its estimate is the run's; the numbers beside it refresh twice a second."""

    def __init__(
        self, label: str, steps_per_epoch: int, epochs: int, done: int, *, shown: bool = True, line: int = 0
    ) -> None:
        self._label, self._epochs = label, epochs
        # Without a terminal each refresh is a line in a log file: a few a minute are enough.
        self._interval = 0.5 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(
            total=steps_per_epoch * epochs, initial=steps_per_epoch * done, unit="step", disable=not shown,
            mininterval=self._interval, dynamic_ncols=True, smoothing=0.1, position=line,
            file=sys.stderr if sys.stderr.isatty() else _Lines(),
        )  # fmt: skip
        self._next = 0.0

    def step(self, epoch: int, numbers: Callable[[], Mapping[str, float]]) -> None:
        """Advance by a step; `numbers` waits for the device, so it is called only now and then.

        On a rank that shows nothing too: to read the numbers is to notice a loss that is not finite.
        """
        self._bar.update()
        if time.monotonic() >= self._next:
            shown = numbers()
            self._next = time.monotonic() + self._interval
            if not self._bar.disable:
                self._show(epoch, shown)

    def epoch(self, row: Row, line: str | None) -> None:
        """Show the finished epoch's numbers, and `line` above the bar."""
        if self._bar.disable:
            return
        if line:
            if sys.stderr.isatty():
                self._bar.write(line)
            else:
                print(line, flush=True)  # at once: in a log of both streams it would come later, and in pieces
        if time.monotonic() >= self._next or row["epoch"] == self._epochs:
            self._next = time.monotonic() + self._interval
            self._show(int(row["epoch"]), {name.removeprefix("train_"): value for name, value in row.items()})

    def _show(self, epoch: int, numbers: Mapping[str, float]) -> None:
        self._bar.set_description_str(f"{self._label} {epoch}/{self._epochs}", refresh=False)
        texts = [f"loss {numbers['loss']:.3f} (kd {numbers['kd']:.3f}, ce {numbers['ce']:.3f})"]
        texts += [f"top-1 {numbers['top1']:.1f}%", f"{numbers['images_per_s']:.0f} images/s"]
        texts += [f"corrected {100 * numbers['corrected']:.1f}%", f"rank {numbers['mean_rank']:.2f}"]
        if "test_top1" in numbers:
            texts.append(f"test {numbers['test_top1']:.2f}%")
        self._bar.set_postfix_str(", ".join(texts), refresh=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


class RunLog:
    """The files of a run, and its page at Weights & Biases."""

    def __init__(self, folder: Path, config: Config, history: list[Row], first_step: int) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(), sort_keys=False), encoding="utf-8")
        # A killed run may have logged past its checkpoint: the history in the checkpoint is what happened.
        self._csv = (folder / "metrics.csv").open("w", newline="")
        self._columns: csv.DictWriter[str] | None = None
        for row in history:
            self._write_row(row)
        self._tensorboard = SummaryWriter(str(folder), purge_step=first_step)
        self._wandb = _start_wandb(folder, config) if config.LOG.WANDB else None

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one training step."""
        for name, value in values.items():
            self._tensorboard.add_scalar(f"step/{name}", value, step)

    def epoch(self, row: Row, step: int) -> None:
        """Numbers of one epoch, which ended at training step `step`."""
        self._write_row(row)
        for name, value in row.items():
            self._tensorboard.add_scalar(f"epoch/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log(row, step=step)

    def close(self) -> None:
        """Flush everything."""
        self._csv.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write_row(self, row: Row) -> None:
        if self._columns is None:
            self._columns = csv.DictWriter(self._csv, list(row))
            self._columns.writeheader()
        self._columns.writerow({name: f"{value:.6g}" for name, value in row.items()})
        self._csv.flush()


def _start_wandb(folder: Path, config: Config) -> Any:
    try:
        import wandb  # optional, and slow to import
    except ImportError as error:
        raise ConfigError(f"LOG.WANDB: expected wandb, got '{error}'; pip install wandb") from error

    # The same folder is the same page, so that a resumed run goes on where it was.
    page = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    try:
        return wandb.init(
            project=config.EXPERIMENT.PROJECT, name="/".join(folder.parts[-2:]), id=page, resume="allow",
            dir=str(folder), config=flatten(config.model_dump()),
            tags=[tag[:64] for tag in config.EXPERIMENT.TAG.split(",") if tag],  # wandb takes 1 to 64 characters
        )  # fmt: skip
    except wandb.Error as error:
        raise ConfigError(f"LOG.WANDB: {error} Or set WANDB_MODE=offline, or leave LOG.WANDB false.") from error
