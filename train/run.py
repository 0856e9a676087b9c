"""The trainer's command line; without arguments it runs the digits demo.

python train/run.py --cfg train/configs/cifar100/kd.yaml [KEY VALUE ...]
torchrun --nproc-per-node 4 train/run.py --cfg ... --seeds 1 2 3
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", type=Path, help="a YAML file of mdistiller's keys; see train/configs")
    parser.add_argument("--pair", nargs=2, metavar=("TEACHER", "STUDENT"), help="with that pair's published exceptions")
    parser.add_argument("--seeds", nargs="+", metavar="SEED", help="one run a seed, and a summary")
    parser.add_argument("--together", action="store_true", help="the --seeds at once in this process, for a GPU")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    parser.add_argument("--eval", type=Path, metavar="CHECKPOINT", help="test the weights in a file, and nothing else")
    parser.add_argument("--dry-run", action="store_true", help="print the configuration and the models' sizes")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="values over the file's")
    arguments = parser.parse_intermixed_args(argv)
    # `--seeds 1 2 3 KEY VALUE`: the first word that starts with a letter, as keys do, starts the overrides.
    words = arguments.seeds or []
    seeds = list(itertools.takewhile(lambda word: not word[:1].isalpha(), words))
    if wrong := [word for word in seeds or words[:1] if not word.isdecimal()]:
        parser.error(f"argument --seeds: expected whole numbers, got {wrong[0]!r}")
    arguments.seeds = [int(seed) for seed in seeds]
    arguments.overrides = [*words[len(seeds) :], *arguments.overrides]
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    arguments = parse(argv)
    # Imported here so that `--help` and a misspelt option answer at once.
    from train.commands import execute

    execute(arguments)


if __name__ == "__main__":
    # The checkout instead of this folder, whose `config` and `report` would hide other packages' names: so the command
    # works from anywhere, and nothing called `train` needs to be installed. At the end, because an installed
    # sortkd_kernels has its compiled extension, and the checkout's has one only where it was built in place.
    sys.path[:] = [*sys.path[1:], str(Path(__file__).resolve().parent.parent)]
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: no character may end a run
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # for users, whom lines of code don't help
    main()
