"""What each form of the command line does."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch
import yaml

from . import demo
from .checkpoint import DamagedCheckpoint, read
from .config import ConfigError, load_config, merge, published_pairs, validate
from .describe import describe
from .distributed import World, join
from .experiment import evaluate_checkpoint, train
from .guard import NonFiniteLoss
from .plots import plot_groups
from .schema import Config
from .summary import group_runs, histories, markdown_table, statistics_of


def execute(arguments: argparse.Namespace) -> None:
    """Run the command; an error that a user can mend ends it with its message alone."""
    try:
        config = _config(arguments)
        if arguments.dry_run:
            print(yaml.safe_dump(config.model_dump(), sort_keys=False))
            print(describe(config))
            return
        if config.EXPERIMENT.THREADS:
            torch.set_num_threads(config.EXPERIMENT.THREADS)
        with join(config.EXPERIMENT.DEVICE) as world:
            _execute(arguments, config, world)
    except (ConfigError, DamagedCheckpoint, FileNotFoundError, NonFiniteLoss) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _execute(arguments: argparse.Namespace, config: Config, world: World) -> None:
    if arguments.eval:
        numbers = evaluate_checkpoint(config, arguments.eval, world)
        if world.is_main:
            print(", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
    elif arguments.cfg is None:
        demo.run_demo(arguments.overrides, world)
    else:
        _train_seeds(config, arguments.seeds or [config.EXPERIMENT.SEED], world, resume=arguments.resume)


def _train_seeds(config: Config, seeds: Sequence[int], world: World, *, resume: bool) -> None:
    """A run for each seed, then their mean and standard deviation."""
    values = config.model_dump()
    runs = []
    for seed in seeds:
        seeded = validate(merge(values, {"EXPERIMENT": {"SEED": seed}}))
        runs.append(train(seeded, world, resume=resume))
    if not world.is_main:
        return
    groups, folder = group_runs(runs), runs[0].folder.parent
    print(markdown_table(groups))
    if len(runs) > 1:
        facts = [statistics_of(group) for group in groups.values()]
        (folder / "summary.json").write_text(json.dumps(facts, indent=1) + "\n")
        plot_groups(histories(groups), folder / "curves.png", folder.name)
    print(f"runs: {folder}")


def _config(arguments: argparse.Namespace) -> Config:
    path, overrides = arguments.cfg, arguments.overrides
    if arguments.seeds and path is None:
        raise ConfigError("--seeds: expected --cfg beside it, got none; the demo has its own seeds")
    if arguments.eval and not arguments.eval.is_file():
        raise FileNotFoundError(f"--eval: expected a checkpoint, got {arguments.eval}: no such file")
    if arguments.eval and path is None:
        # One of our checkpoints knows what it is of.
        start = read(arguments.eval).get("config")
        if start is None:
            raise ConfigError(f"--cfg: expected a configuration, because {arguments.eval} holds none, got none")
        return load_config(None, overrides, pair=arguments.pair, start=start)
    config = load_config(path or demo.TEACHER_CONFIG, overrides, pair=arguments.pair)
    pair = f"{config.DISTILLER.TEACHER} -> {config.DISTILLER.STUDENT}"
    published = published_pairs(path) if path is not None else []
    if config.DISTILLER.TYPE != "NONE" and published and pair not in published:
        print(f"{pair}: no published recipe; the values of {path} are those of its other pairs", file=sys.stderr)
    return config
