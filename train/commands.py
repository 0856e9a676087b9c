"""What each form of the command line does."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from . import demo
from .checkpoint import DamagedCheckpoint, read
from .config import ConfigError, load_config, merge, published_pairs, validate
from .describe import describe
from .distributed import World, join
from .experiment import check_new, evaluate_checkpoint, train
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
    except (ConfigError, DamagedCheckpoint, NonFiniteLoss, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command with --resume goes on after the last finished epoch")


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
    configs = [validate(merge(values, {"EXPERIMENT": {"SEED": seed}})) for seed in seeds]
    if not resume:
        for seeded in configs:  # all of them first: not the third after days with the first two
            check_new(seeded)
    runs = [train(seeded, world, resume=resume) for seeded in configs]
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
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise ConfigError(f"--seeds: expected each seed once, got {arguments.seeds}")
    if arguments.eval and not arguments.eval.is_file():
        raise ConfigError(f"--eval: expected the file of a checkpoint, got {arguments.eval}: no such file")
    if arguments.eval and path is None:
        return load_config(None, overrides, pair=arguments.pair, start=_config_in(arguments.eval))
    for option in ("seeds", "pair", "resume"):
        if getattr(arguments, option) and path is None:
            raise ConfigError(f"--{option}: expected --cfg beside it, got none; the demo has its own runs")
    config = load_config(path or demo.TEACHER_CONFIG, overrides, pair=arguments.pair)
    pair = f"{config.DISTILLER.TEACHER} -> {config.DISTILLER.STUDENT}"
    published = published_pairs(path) if path is not None else []
    if config.DISTILLER.TYPE != "NONE" and published and pair not in published:
        print(f"{pair}: no published recipe; the values of {path} are those of its other pairs", file=sys.stderr)
    return config


def _config_in(checkpoint: Path) -> dict[str, Any]:
    """The configuration that one of our checkpoints holds."""
    try:
        return read(checkpoint)["config"]
    except (DamagedCheckpoint, KeyError) as error:
        found = "none in it" if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            f"--cfg: expected beside --eval for a file that no run of this trainer wrote, got {found}; give a "
            "configuration whose DISTILLER.STUDENT is the file's model, as `--cfg train/configs/cifar100/vanilla.yaml "
            "DISTILLER.STUDENT resnet56`"
        ) from None
