"""Compare runs: `python train/report.py RUN...` prints a markdown table and draws the methods side by side.

A RUN is a run's folder or any folder above some; runs that differ in the seed alone make one row. `report.md` and
`report.png` go beside the runs, into the lowest folder above all of them.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.summary import Run


def main(argv: Sequence[str] | None = None) -> None:
    """Write `report.md` and `report.png`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where report.md and .png go instead")
    arguments = parser.parse_args(argv)
    from train.summary import find_runs

    try:
        runs = find_runs(arguments.runs)
    except (OSError, ValueError) as error:
        sys.exit(f"{error}")
    out = arguments.out or Path(os.path.commonpath([path.resolve() for path in arguments.runs]))
    print(write_report(runs, out, "Comparison of runs"))
    print(f"report: {out / 'report.md'} and report.png beside it")


def write_report(runs: Sequence[Run], folder: Path, title: str) -> str:
    """The runs' table, written to `report.md` in `folder` beside the picture `report.png`."""
    from train.compare import markdown_table
    from train.plots import plot_groups
    from train.summary import group_runs

    groups = group_runs(runs)
    plot_groups(groups, folder / "report.png", title)
    text = f"{markdown_table(groups)}\n\n![{title}](report.png)\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    # As in run.py.
    sys.path[:] = [*sys.path[1:], str(Path(__file__).resolve().parent.parent)]
    sys.stdout.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    main()
