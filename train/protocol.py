"""The field's comparison: teachers, then students by every method with and without the correction, seed by seed.

Recipes are those of `train/configs/cifar100`; a protocol is their schedule in proportion to its number of epochs.
"""

from __future__ import annotations

import _thread
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from .config import ConfigError, load_config, nearest
from .distributed import World, join
from .ending import MENDABLE
from .experiment import checkpoints_of, train, train_together
from .naming import CORRECTED, method_label, pair_label, run_folder
from .report import write_report
from .schema import Config
from .summary import Run, read_run

EPOCHS = {"short": 60, "full": 240}
PAIRS = (
    "resnet56:resnet20", "resnet110:resnet32", "resnet32x4:resnet8x4", "wrn_40_2:wrn_16_2", "wrn_40_2:wrn_40_1",
    "vgg13:vgg8",
)  # fmt: skip
METHODS = ("CE", "KD", "Sort-KD", "DKD", "Sort-DKD", "CTKD", "Sort-CTKD", "LSKD", "Sort-LSKD")
_CONFIGS = Path(__file__).parent / "configs" / "cifar100"
_FILES = {
    "CE": "vanilla", "KD": "kd", "DKD": "dkd", "CTKD": "ctkd", "LSKD": "lskd", "CTKD+LSKD": "ctkd_lskd",
    "LSKD+DKD": "lskd_dkd",
}  # fmt: skip
_TEACHER_SEED = 1  # one teacher for all seeds of its students, and for those that are asked for later


def make_plan(
    protocol: str, pairs: Sequence[str], methods: Sequence[str], seeds: Sequence[int], overrides: Sequence[str]
) -> list[Config]:
    """The runs of a protocol: a seed of everything before the next, so that what there is can be compared early."""
    models = [_models(pair) for pair in pairs]
    recipes = [_recipe(method) for method in methods]
    runs: dict[Path, Config] = {}
    for seed in seeds:
        for teacher, student in models:
            trained = _config(protocol, "CE", "none", (teacher, teacher), _TEACHER_SEED, overrides)
            weights = checkpoints_of(trained).path(trained.SOLVER.EPOCHS)
            if any(method != "CE" for _, method in recipes):
                runs.setdefault(run_folder(trained), trained)
            for correction, method in recipes:
                # CE has no teacher: for all pairs of a student it is one run.
                pair = (student if method == "CE" else teacher, student)
                config = _config(
                    protocol, method, correction, pair, seed, [*overrides, "TEACHER.WEIGHTS", str(weights)]
                )
                runs.setdefault(run_folder(config), config)
    return list(runs.values())


def reproduce(plan: Sequence[Config], minutes: float | None, together: int = 1) -> bool:
    """Make the runs that are not finished yet, for as long as `minutes` last, and report those that are.

    As many as `together` share the process, a step of each in turn.

    A run that fails is told and passed over, and with a teacher its students. Returns whether all are finished.
    """
    experiment, folder = plan[0].EXPERIMENT, run_folder(plan[0]).parents[1]
    if experiment.THREADS:
        torch.set_num_threads(experiment.THREADS)
    with join(experiment.DEVICE) as world:
        if world.size > 1:
            raise ConfigError(f"reproduce: expected to be started as one process, got {world.size} ranks")
        with _time_limit(minutes):
            for some in _left(plan, together):
                _make(some, world)
    finished = [run for config in plan if (run := _finished(config))]
    if finished:
        title = f"{experiment.PROJECT}, {plan[0].SOLVER.EPOCHS} epochs"
        print(f"\n{write_report(finished, folder, title)}")
    print(f"{len(finished)} of {len(plan)} runs are finished; they and the report are in {folder}")
    return len(finished) == len(plan)


def _left(plan: Sequence[Config], together: int) -> Iterator[dict[str, Config]]:
    """The runs that are not finished by what they are called, as many at a time as go together.

    A student comes after its teacher, or not at all where that has failed.
    """
    some: dict[str, Config] = {}
    for number, config in enumerate(plan, 1):
        label = f"[{number}/{len(plan)}] {method_label(config)}, {pair_label(config)}, seed {config.EXPERIMENT.SEED}"
        if _finished(config):
            print(f"{label}: finished before")
            continue
        if some and (len(some) == together or not _has_teacher(config)):
            yield some
            some = {}
        if _has_teacher(config):
            some[label] = config
        else:
            print(f"{label}: passed over, its teacher is not there", file=sys.stderr)
    if some:
        yield some


def _has_teacher(config: Config) -> bool:
    return config.DISTILLER.TYPE == "NONE" or Path(config.TEACHER.WEIGHTS).exists()


def _make(runs: dict[str, Config], world: World) -> None:
    for label, config in runs.items():
        print(f"{label}: {run_folder(config)}")
    ends: list[Run | Exception]
    if len(runs) > 1:
        ends = train_together(list(runs.values()), world, resume=None)
    else:
        try:
            ends = [train(config, world, resume=None) for config in runs.values()]
        except MENDABLE as error:
            ends = [error]
    for label, end in zip(runs, ends, strict=True):
        if isinstance(end, Exception):
            if not isinstance(end, MENDABLE):
                traceback.print_exception(end)
            print(f"{label}: {type(end).__name__}: {end}", file=sys.stderr)


def _finished(config: Config) -> Run | None:
    """The run of this very configuration, if it is finished."""
    folder = run_folder(config)
    # It comes once the last epoch is done.
    if not (folder / "summary.json").exists():
        return None
    run = read_run(folder)
    return run if run.config == config and len(run.history) == config.SOLVER.EPOCHS else None


@contextmanager
def _time_limit(minutes: float | None) -> Iterator[None]:
    """Leave the block once the minutes are over, wherever it is: a run goes on after its last finished epoch."""
    if minutes is None:
        yield
        return
    over = threading.Event()

    def end() -> None:
        over.set()
        _thread.interrupt_main()  # as Ctrl-C does

    timer = threading.Timer(60 * minutes, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except BaseException:  # libraries make an error of their own of what interrupts them
        if not over.is_set():
            raise
        print(f"stopped: {minutes:g} minutes are over", file=sys.stderr)
    finally:
        timer.cancel()


def _config(
    protocol: str, method: str, correction: str, pair: tuple[str, str], seed: int, overrides: Sequence[str]
) -> Config:
    """The configuration of one run: the recipe of its file, its schedule in proportion, the overrides over both."""
    path = _CONFIGS / f"{_FILES[method]}.yaml"
    if method == "CE":  # without a teacher, whose keys are refused there or would tell runs apart that are the same
        pairs = [overrides[i : i + 2] for i in range(0, len(overrides), 2)]
        overrides = [word for words in pairs if not words[0].startswith("TEACHER.") for word in words]
    published = load_config(path, pair=pair)
    words = ["SOLVER.EPOCHS", str(EPOCHS[protocol]), "EXPERIMENT.PROJECT", f"cifar100_{protocol}", *overrides]
    epochs = load_config(path, words, pair=pair).SOLVER.EPOCHS

    def scaled(epoch: int) -> int:
        return round(epoch * epochs / published.SOLVER.EPOCHS)

    schedule = {
        "SOLVER.LR_DECAY_STAGES": str([scaled(stage) for stage in published.SOLVER.LR_DECAY_STAGES]),
        "DKD.WARMUP": str(scaled(published.DKD.WARMUP)),
        "CTKD.EPOCHS": str(max(1, scaled(published.CTKD.EPOCHS))),
    }
    models = pair[1:] if method == "CE" else pair
    name = "_".join([f"{CORRECTED[correction]}{method}".lower(), *models]).replace("/", "-")
    own = {"DISTILLER.CORRECTION": correction, "EXPERIMENT.NAME": name, "EXPERIMENT.SEED": str(seed)}
    words = [*_words(schedule), *words, *_words(own)]
    return load_config(path, words, pair=pair)


def _words(values: dict[str, str]) -> list[str]:
    return [word for item in values.items() for word in item]


def _models(pair: str) -> tuple[str, str]:
    teacher, colon, student = pair.partition(":")
    if not (teacher and colon and student):
        raise ConfigError(f"--pairs: expected TEACHER:STUDENT, as resnet56:resnet20, got {pair!r}")
    return teacher, student


def _recipe(method: str) -> tuple[str, str]:
    """The correction and the plain method of a label such as Sort-DKD."""
    known = {f"{prefix}{name}": (correction, name) for name in _FILES for correction, prefix in CORRECTED.items()}
    if method not in known or method.endswith("-CE"):
        raise ConfigError(
            f"--methods: expected labels as {', '.join(METHODS)}, got {method!r}{nearest(method, list(known))}"
        )
    return known[method]
