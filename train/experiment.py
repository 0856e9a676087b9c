"""One run from its configuration: trained, resumed or evaluated, and the files that it leaves."""

from __future__ import annotations

import json
import math
import platform
import shutil
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from .assembly import build_trainer, check_fits, check_images, make_loaders, make_model
from .checkpoint import Checkpoints, generator_states, read, set_generator_states
from .claim import LOCK, claimed
from .config import ConfigError, flatten
from .data import Loaders
from .distributed import World, gather, on_main
from .guard import NonFiniteLoss
from .logs import Progress, Row, RunLog
from .loop import Evaluation, Trainer
from .models import load_weights
from .naming import FREE, method_label, run_folder, teacher_weights
from .plots import plot_run
from .schema import Config
from .solver import AMP_DTYPES
from .summary import Run, statistics_of
from .together import Turn, finish, take_turns


def train(
    config: Config,
    world: World,
    *,
    resume: bool | None = False,
    overwrite: bool = False,
    quiet: bool = False,
    loaders: Loaders | None = None,
) -> Run:
    """Train to the last epoch, from the newest checkpoint with `resume`; the folder then holds the whole run.

    With `resume` None a run goes on where there is a checkpoint, and starts without a word where there is none;
    `overwrite` removes an earlier run in the same folder; `quiet` leaves out the line of each epoch; `loaders` takes
    the place of the configured data's.
    """
    steps = _steps(config, world, resume=resume, overwrite=overwrite, quiet=quiet, loaders=loaders)
    with Turn(world.device).taken():
        return finish(steps)


def train_together(
    configs: Sequence[Config], world: World, *, resume: bool | None = False, quiet: bool = False
) -> list[Run | Exception]:
    """`train` for each of several configurations at the same time in this process, a step of each in turn.

    Each run is what it would be alone. One that fails leaves the others going: its exception is in the place of its
    run.
    """
    if world.size > 1:
        raise ConfigError(f"--together: expected one process, got {world.size} ranks; without it they train in turn")
    if len({run_folder(config) for config in configs}) < len(configs):
        raise ConfigError("--together: expected runs with a folder each, got two for the same folder")
    runs = [_steps(config, world, resume=resume, quiet=quiet, line=line) for line, config in enumerate(configs)]
    return take_turns(runs, world.device)


def _steps(
    config: Config,
    world: World,
    *,
    resume: bool | None,
    quiet: bool,
    overwrite: bool = False,
    loaders: Loaders | None = None,
    line: int = 0,
) -> Generator[None, None, Run]:
    """`train`, which pauses after every step; its bar is on the terminal's `line`."""
    checkpoints = checkpoints_of(config)

    def start() -> Path | None:
        stack.enter_context(claimed(run_folder(config)))
        if resume or resume is None:
            newest = checkpoints.newest()
            if newest is None and resume:
                text = f"--resume: no checkpoint in {checkpoints.folder} yet; starting from the beginning"
                warnings.warn(text, stacklevel=2)
            return newest
        if overwrite:
            _clear(run_folder(config))
        check_new(config)
        return None

    with ExitStack() as stack:
        # One rank chooses for all: two that started from different epochs would wait for each other for ever.
        newest = on_main(start, world)
        state = None if newest is None else read(newest)
        if state is not None:
            with _checkpoint_in_words(newest):
                _check_same(config, state, world)
        trainer = build_trainer(config, world, loaders)
        if state is not None:
            with _checkpoint_in_words(newest):
                _go_on(trainer, state)
        run = yield from _train(trainer, checkpoints, quiet=quiet, line=line)
        gather(None, world)  # on every rank the files are there once this returns
    return run


def checkpoints_of(config: Config) -> Checkpoints:
    """The checkpoints in a run's folder."""
    return Checkpoints(run_folder(config) / "checkpoints", config.LOG.SAVE_CHECKPOINT_FREQ)


def check_new(config: Config) -> None:
    """Refuse to start a run where there is one."""
    if checkpoints_of(config).epochs():
        raise ConfigError(
            f"EXPERIMENT.NAME: expected a new run folder, got {run_folder(config)}, which holds a run; continue it "
            "with --resume, or choose another EXPERIMENT.NAME or EXPERIMENT.SEED, or delete the folder"
        )


def where_to_go_on(configs: Sequence[Config]) -> str:
    """What `--resume` would do for each of these runs that has begun and is not finished."""
    lines = []
    for config in configs:
        done, folder = max(checkpoints_of(config).epochs(), default=0), run_folder(config)
        if done:
            if done < config.SOLVER.EPOCHS:
                lines.append(f"the same command with --resume goes on after epoch {done} of {folder}")
        elif folder.is_dir():
            lines.append(f"no epoch of {folder} was finished: --resume starts it from the beginning")
    return "; ".join(lines) or "nothing was under way that could go on"


def _train(trainer: Trainer, checkpoints: Checkpoints, *, quiet: bool, line: int) -> Generator[None, None, Run]:
    """The epochs that are left, each logged and saved, and what a finished run leaves."""
    config, world, folder = trainer.config, trainer.world, run_folder(trainer.config)
    teacher = "" if trainer.teacher is None else trainer.teacher.weights_digest
    history, steps, epochs = trainer.history, len(trainer.loaders.train), config.SOLVER.EPOCHS
    label = f"{method_label(config)} seed {config.EXPERIMENT.SEED}"
    progress = Progress(label, steps, epochs, len(history), shown=world.is_main, line=line)
    log = RunLog(folder, config, history, len(history) * steps + 1) if world.is_main else None
    try:
        for epoch in range(len(history) + 1, epochs + 1):
            row = yield from trainer.train_epoch(epoch, progress, log)
            row |= yield from trainer.evaluate()
            _check_finite(row)
            history.append(row)
            row["best_top1"] = trainer.best["test_top1"]
            generators = gather(generator_states(world.device), world)
            if log is not None:
                state = trainer.state()
                state |= {"generators": generators, "config": config.model_dump(), "teacher": teacher}
                checkpoints.save(epoch, state, is_best=trainer.best is row)
                log.epoch(row, epoch * steps)
            progress.epoch(row, None if quiet else _line(row, trainer.best))
    finally:
        progress.close()
        if log is not None:
            log.close()
    run = Run(folder, config, history)
    if world.is_main:
        (folder / "summary.json").write_text(json.dumps({**statistics_of([run]), **machine(world)}, indent=1) + "\n")
        plot_run(run, folder / "curves.png")
    return run


def evaluate_checkpoint(config: Config, path: Path, world: World) -> Row:
    """The test numbers of a checkpoint's weights, ours or a published file's, as the configured student."""
    loaders = make_loaders(config, world)
    check_images(loaders.test, config, world)
    student = make_model("DISTILLER.STUDENT", config, loaders.num_classes, loaders.image_shape)
    check_fits("DISTILLER.STUDENT", student, loaders.num_classes, loaders.image_shape)
    try:
        load_weights(student, path)
    except ValueError as error:
        raise ConfigError(f"--eval: {error}") from error
    student.to(world.device, memory_format=torch.channels_last)
    return finish(Evaluation(student, loaders.test, world, AMP_DTYPES[config.SOLVER.AMP], graphs=False).steps())


def machine(world: World) -> dict[str, Any]:
    """Where a run ran."""
    on_gpu = world.device.type == "cuda"
    return {
        "machine": torch.cuda.get_device_name(world.device) if on_gpu else f"{platform.machine()} CPU",
        "ranks": world.size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _check_finite(row: Row) -> None:
    """Weights can break in an epoch's last step, after which no training loss is left to tell."""
    if not math.isfinite(row["test_ce"]):
        raise NonFiniteLoss(
            f"expected a finite test loss after epoch {row['epoch']}, got {row['test_ce']}; lr {row['lr']}, training "
            f"loss {row['train_loss']:.6g}; the checkpoints hold the epochs before; start again with a lower "
            "SOLVER.LR, or with SOLVER.AMP bf16 or none"
        )


@contextmanager
def _checkpoint_in_words(path: Path | None) -> Iterator[None]:
    """What a checkpoint lacks or has otherwise: what is raised depends on what is in the file."""
    try:
        yield
    except ConfigError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"--resume: expected the state of a run of this trainer in {path}, got one that does not fit "
            f"({type(error).__name__}: {error}); remove that file to go on from the checkpoint before it"
        ) from error


def _go_on(trainer: Trainer, state: dict[str, Any]) -> None:
    """Put the state of the run into its trainer, which must have the teacher that the run had."""
    if trainer.teacher is not None and trainer.teacher.weights_digest != state["teacher"]:
        raise ConfigError(
            f"TEACHER.WEIGHTS: expected the teacher that the run had, whose weights have the digest "
            f"{state['teacher']}, got {teacher_weights(trainer.config)} with {trainer.teacher.weights_digest}"
        )
    trainer.load(state)
    set_generator_states(state["generators"][trainer.world.rank], trainer.world.device)


def _check_same(config: Config, state: dict[str, Any], world: World) -> None:
    # A key that is younger than the checkpoint had its default.
    now, then = flatten(config.model_dump()), flatten(Config().model_dump()) | flatten(state["config"])
    free = [key for key in FREE if key != "SOLVER.EPOCHS" or config.SOLVER.SCHEDULE == "step"]  # a cosine's length
    changed = [key for key in now if now[key] != then[key] and not key.startswith(tuple(free))]
    if changed:
        differences = ", ".join(f"{key} {then[key]!r} instead of {now[key]!r}" for key in changed)
        raise ConfigError(f"--resume: expected the configuration of the run, got a checkpoint with {differences}")
    if len(state["generators"]) != world.size:
        raise ConfigError(f"--resume: expected {len(state['generators'])} ranks, as the run had, got {world.size}")
    if state["epoch"] > config.SOLVER.EPOCHS:
        raise ConfigError(
            f"SOLVER.EPOCHS: expected {state['epoch']} or more, which the run has finished, got {config.SOLVER.EPOCHS}"
        )


def _line(row: Row, best: Row) -> str:
    return (
        f"epoch {row['epoch']}: loss {row['train_loss']:.4f}, train {row['train_top1']:.2f}%, "
        f"test {row['test_top1']:.2f}% (best {best['test_top1']:.2f}%), corrected {100 * row['corrected']:.2f}%, "
        f"T {row['temperature']:.3g}, lr {row['lr']:.3g}, {row['images_per_s']:.0f} images/s"
    )
