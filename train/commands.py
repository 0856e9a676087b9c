"""What each form of the command line does."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from . import demo
from .checkpoint import DamagedCheckpoint, read
from .compare import markdown_table
from .config import ConfigError, load_config, merge, published_pairs, validate
from .describe import describe
from .distributed import World, join
from .ending import MENDABLE, in_words
from .experiment import check_new, evaluate_checkpoint, train, train_together, where_to_go_on
from .plots import plot_groups
from .schema import Config
from .summary import group_runs, statistics_of


def execute(arguments: argparse.Namespace) -> None:
    """Run the command; an error that a user can mend ends it with its message alone."""
    configs: list[Config] = []
    with in_words(lambda: where_to_go_on(configs)):
        config = _config(arguments)
        if arguments.dry_run:
            print(yaml.safe_dump(config.model_dump(), sort_keys=False))
            print(describe(config))
            return
        if not arguments.eval and arguments.cfg is not None:
            values, seeds = config.model_dump(), arguments.seeds or [config.EXPERIMENT.SEED]
            configs += [validate(merge(values, {"EXPERIMENT": {"SEED": seed}})) for seed in seeds]
        if config.EXPERIMENT.THREADS:
            torch.set_num_threads(config.EXPERIMENT.THREADS)
        with join(config.EXPERIMENT.DEVICE) as world:
            _execute(arguments, config, configs, world)


def _execute(arguments: argparse.Namespace, config: Config, configs: Sequence[Config], world: World) -> None:
    if arguments.eval:
        numbers = evaluate_checkpoint(config, arguments.eval, world)
        if world.is_main:
            print(", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
    elif configs:
        _train_seeds(configs, world, resume=arguments.resume, together=arguments.together)
    else:
        demo.run_demo(arguments.overrides, world)


def _train_seeds(configs: Sequence[Config], world: World, *, resume: bool, together: bool) -> None:
    """A run for each seed, then their mean and standard deviation."""
    if not resume:
        for seeded in configs:  # all of them first: not the third after days with the first two
            check_new(seeded)
    if together:
        if len(configs) < 2:
            raise ConfigError(f"--together: expected two --seeds or more, got {len(configs)}")
        ends = train_together(configs, world, resume=resume)
        runs = [end for end in ends if not isinstance(end, Exception)]
        errors = [(c.EXPERIMENT.SEED, e) for c, e in zip(configs, ends, strict=True) if isinstance(e, Exception)]
        for _, error in errors:
            if not isinstance(error, MENDABLE):
                traceback.print_exception(error)
        if errors:
            done = f"\nfinished: {', '.join(str(run.folder) for run in runs)}" if runs else ""
            sys.exit("\n".join(f"seed {seed}: {type(end).__name__}: {end}" for seed, end in errors) + done)
    else:
        runs = [train(seeded, world, resume=resume) for seeded in configs]
    if not world.is_main:
        return
    groups, folder = group_runs(runs), runs[0].folder.parent
    if len(runs) > 1:
        facts = [statistics_of(group) for group in groups.values()]
        (folder / "summary.json").write_text(json.dumps(facts, indent=1) + "\n")
        plot_groups(groups, folder / "curves.png", folder.name)
    print(markdown_table(groups))
    print(f"runs: {folder}")


def _config(arguments: argparse.Namespace) -> Config:
    path, overrides = arguments.cfg, arguments.overrides
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise ConfigError(f"--seeds: expected each seed once, got {arguments.seeds}")
    if arguments.eval and not arguments.eval.is_file():
        found = "a folder" if arguments.eval.is_dir() else "no such file"
        raise ConfigError(f"--eval: expected the file of a checkpoint, got {arguments.eval}: {found}")
    if arguments.eval and path is None:
        start = _config_in(arguments.eval)
        try:
            return load_config(None, overrides, pair=arguments.pair, start=start)
        except ConfigError as error:
            raise ConfigError(f"{error}, in the configuration that {arguments.eval} holds") from None
    for option in ("seeds", "together", "pair", "resume"):
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
        config = read(checkpoint).get("config")
        found = "no configuration in it"
    except DamagedCheckpoint as error:
        config, found = None, str(error)
    if not isinstance(config, dict):
        raise ConfigError(
            f"--cfg: expected beside --eval for a file that no run of this trainer wrote, got {found}; give a "
            "configuration whose DISTILLER.STUDENT is the file's model, as `--cfg train/configs/cifar100/vanilla.yaml "
            "DISTILLER.STUDENT resnet56`"
        )
    return config
