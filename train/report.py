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


def main(argv: Sequence[str] | None = None) -> None:
    """Write `report.md` and `report.png`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where report.md and .png go instead")
    arguments = parser.parse_args(argv)
    from train.plots import plot_groups
    from train.summary import find_runs, group_runs, histories, markdown_table

    try:
        groups = group_runs(find_runs(arguments.runs))
    except (OSError, ValueError) as error:
        sys.exit(f"{error}")
    out = arguments.out or Path(os.path.commonpath([path.resolve() for path in arguments.runs]))
    plot = out / "report.png"
    plot_groups(histories(groups), plot, "Comparison of runs")
    notes = "Test accuracy in percent, mean ± standard deviation over seeds."
    text = f"{markdown_table(groups)}\n\n{notes}\n\n![curves]({plot.name})\n"
    (out / "report.md").write_text(text, encoding="utf-8")
    print(f"{text}\nreport: {out / 'report.md'} and {plot.name} beside it")


if __name__ == "__main__":
    # As in run.py.
    sys.path[:] = [*sys.path[1:], str(Path(__file__).resolve().parent.parent)]
    sys.stdout.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    main()
