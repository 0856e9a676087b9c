"""The field's comparison on CIFAR-100: teachers, then students by each method with and without the correction.

python train/reproduce.py --protocol short --pairs resnet56:resnet20 --seeds 1 2 3 --minutes 600 [KEY VALUE ...]

The same command goes on where it stopped, be that by time, by Ctrl-C or by a kill, and skips what is finished. It ends
with a table and a picture of all finished runs, with status 0 once none is left and 1 before.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

# What is a word of each list; the first other one starts the overrides, whose keys have a dot.
_WORDS: dict[str, Callable[[str], bool]] = {
    "pairs": lambda word: ":" in word,
    "methods": lambda word: "." not in word,
    "seeds": str.isdigit,
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--protocol", choices=("short", "full"), default="short", help="full: 240 epochs; short: 60, in proportion"
    )
    parser.add_argument("--pairs", nargs="+", metavar="TEACHER:STUDENT", help="default: the six of like architecture")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="default: CE, and KD, DKD, CTKD, LSKD, each as it is and as Sort-",
    )
    parser.add_argument("--seeds", nargs="+", metavar="SEED", default=["1", "2", "3"], help="default: 1 2 3")
    parser.add_argument("--together", type=int, default=1, metavar="N", help="runs at a time, for a GPU (1)")
    parser.add_argument("--minutes", type=float, help="stop after as many; by default when all is done")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="values over the recipes', for every run")
    arguments = parser.parse_intermixed_args(argv)
    for name, is_word in _WORDS.items():
        words = getattr(arguments, name) or []
        own = list(itertools.takewhile(is_word, words))
        if words and not own:
            parser.error(f"argument --{name}: got {words[0]!r}")
        setattr(arguments, name, own)
        arguments.overrides = [*words[len(own) :], *arguments.overrides]
    arguments.seeds = [int(seed) for seed in arguments.seeds]
    if arguments.minutes is not None and not arguments.minutes > 0:
        parser.error(f"argument --minutes: expected more than 0, got {arguments.minutes:g}")
    if arguments.together < 1:
        parser.error(f"argument --together: expected 1 or more, got {arguments.together}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Make the runs that are left, and the report."""
    arguments = parse(argv)
    # Imported here so that `--help` and a misspelt option answer at once.
    from train.ending import in_words
    from train.protocol import METHODS, PAIRS, make_plan, reproduce

    pairs, methods = arguments.pairs or PAIRS, arguments.methods or METHODS
    with in_words(lambda: "the same command goes on"):
        plan = make_plan(arguments.protocol, pairs, methods, arguments.seeds, arguments.overrides)
        done = reproduce(plan, arguments.minutes, arguments.together)
    if not done:
        sys.exit("runs are left: the same command goes on with them")


if __name__ == "__main__":
    # As in run.py.
    sys.path[:] = [*sys.path[1:], str(Path(__file__).resolve().parent.parent)]
    sys.stdout.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    main()
