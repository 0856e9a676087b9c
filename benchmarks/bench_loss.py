"""The loss against its peers, timed: a CSV, tables and a plot in `benchmarks/results/`; `--quick` ends in a minute.

"both", the forward and the backward pass together, is the column that compares equal work: the fused op makes its
gradient in the forward pass, the others in the backward pass. On a CUDA device the cases and columns are those of
gpu_loss.py; `--rehearse` runs these on the CPU with tiny shapes, to no figure's use.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import gpu_loss
import harness
import peers
import torch
import workloads
from harness import PHASES, Provider, Spread, duration, ratio, table
from peers import KD, KD_COMPILED, PAPER, PAPER_COMPILED, ROOF
from workloads import BASE

import sortkd_kernels as sk

RESULTS = Path(__file__).resolve().parent / "results"
QUICK_RESULTS = Path(__file__).resolve().parents[1] / "runs" / "bench_quick"  # git ignores it
QUICK_S = 40.0  # no case begins later, so that a slow or busy machine ends in a minute too


@dataclass(frozen=True)
class Row:
    """One phase of one provider in one case: a line of the CSV. Ratios are of medians within the case."""

    case: str
    provider: str
    phase: str
    median_us: float
    q1_us: float
    q3_us: float
    runs: int
    gb_per_s: float | None
    this_over_roof: float | None
    chain_over_this: float | None
    paper_eager_over_this: float | None
    paper_compiled_over_this: float | None
    kd_eager_over_this: float | None
    kd_compiled_over_this: float | None
    extra_memory: float | None
    extra_memory_no_grad: float | None


@dataclass(frozen=True)
class Target:
    """A ratio of medians, ``over / under``, or where ``under`` is empty the field ``over`` of this package's row."""

    text: str
    case: str
    over: str
    under: str
    at_least: bool
    limit: float


def targets(ours: str) -> list[Target]:
    """The targets of the issues; ``ours`` is the default backend of the device."""
    roofs = {"8192x1000": 1.6, "512x32000": 1.4, "64x128256": 1.7, "32x262144": 1.7}
    return [
        Target("4096x1000 vs the paper's chain, eager", "4096x1000", PAPER, ours, True, 100),
        Target("4096x1000 vs plain KD, torch.compile", "4096x1000", KD_COMPILED, ours, True, 6),
        *(Target(f"{case} vs the copy roof", case, ours, ROOF, False, limit) for case, limit in roofs.items()),
        Target("4096x1000, random teacher, vs the paper's chain", "teacher random", PAPER, ours, True, 20),
        Target("64x100, call and backward, vs the paper's chain", "64x100", PAPER, ours, True, 12),
        Target("64x100, call and backward, vs F.cross_entropy alone", "64x100", "cross_entropy", ours, True, 1),
        Target("sort_logits 4096x1000 vs the paper's op", "sort_logits", "paper op", ours, True, 60),
        Target("4096x1000, bf16 inputs vs fp32", "dtypes", f"{ours} bf16", ours, False, 1),
        Target("memory beyond the inputs, N*C elements", "4096x1000", "extra_memory", "", False, 1.01),
        Target("the same under torch.no_grad()", "4096x1000", "extra_memory_no_grad", "", False, 0.01),
        Target("DKD vs its eager chain with the paper's op", "methods", "DKD eager", f"{ours} DKD", True, 40),
        Target("DKD vs this package's KD", "methods", f"{ours} DKD", f"{ours} KD", False, 1.4),
        Target("LSKD vs this package's KD", "methods", f"{ours} LSKD", f"{ours} KD", False, 1.5),
        Target("learned temperature vs this package's KD", "methods", f"{ours} learned T", f"{ours} KD", False, 1.5),
        Target("dense 8x150x128x128 vs the eager chain", "dense", PAPER, ours, True, 10),
        Target("top-k, k = 64, 512x32000, vs the full op", "top-k", f"{ours} top-k renormalize", ours, False, 1),
    ]


def run_case(
    name: str, build: Callable[[], list[Provider]], device: torch.device, budget_s: float, quick: bool
) -> tuple[list[Row], list[str]]:
    """Check every provider, then time them together; providers that cannot run here become notes."""
    torch.compiler.reset()
    usable, notes = [], []
    for p in build():
        try:
            result = p.run()
        except (RuntimeError, ValueError) as error:  # in words: no compiler, too many classes, out of memory
            notes.append(f"{name}: {p.name} did not run: {str(error).strip().splitlines()[0]}")
            continue
        if p.check:
            p.check(result)
        p.release()
        usable.append(p)
    times = harness.measure(usable, budget_s, device, 3 if quick else 5)
    rows = []
    for p in usable:
        memory = [None, None]
        if not quick or name[0].isdigit():
            memory = [harness.peak_memory(p, device), torch.no_grad()(harness.peak_memory)(p, device)]
        rows += [_row(name, p, phase, times, memory) for phase in PHASES if phase in times[p.name]]
    return rows, notes


def _row(case: str, p: Provider, phase: str, times: dict[str, dict[str, Spread]], memory: list[float | None]) -> Row:
    spread = times[p.name][phase]

    def over_this(other: str) -> float | None:
        found = times.get(other, {}).get(phase)
        return found.median / spread.median if found else None

    roof = times.get(p.roof, {}).get("both")
    return Row(
        case, p.name, phase, *(1e6 * x for x in spread[:3]), spread.runs,
        p.nbytes / spread.median / 1e9 if phase == "both" else None,
        spread.median / roof.median if roof else None,
        *(over_this(other) for other in (p.chain, PAPER, PAPER_COMPILED, KD, KD_COMPILED)), *memory,
    )  # fmt: skip


def judge(rows: Sequence[Row], ours: str) -> list[tuple[Target, float | None]]:
    """Each target with the value found, None where its case did not run."""
    both = {(r.case, r.provider): r for r in rows if r.phase == "both"}
    judged = []
    for t in targets(ours):
        if t.under:
            over, under = both.get((t.case, t.over)), both.get((t.case, t.under))
            value = over.median_us / under.median_us if over and under else None
        else:
            value = getattr(both[t.case, ours], t.over) if (t.case, ours) in both else None
        judged.append((t, value))
    return judged


def markdown(rows: Sequence[Row], notes: Sequence[str], facts: dict[str, str], ours: str) -> str:
    """The tables: by shape, the targets, then every case in full."""
    both = {(r.case, r.provider): r for r in rows if r.phase == "both"}
    present = list(dict.fromkeys(r.case for r in rows))
    columns = [PAPER, PAPER_COMPILED, KD, KD_COMPILED, ours, ROOF]
    text = ["# Loss and gradient against the peers", "", *(f"- {k}: {v}" for k, v in facts.items()), ""]
    text += [*(f"**Note: {n}.**\n" for n in notes)]
    text += [
        f"Forward and backward together, float32, teacher right on 80% of the rows; median of the calls. `{ROOF}` is "
        "`torch.add(student, teacher)` into a fresh tensor: the same bytes and allocation, no arithmetic. GB/s by "
        "the byte model 3 N C e. Every provider was checked against the float64 reference before it was timed. "
        f"+- is half the distance of the quartiles, here of {ours}.",
        "",
        *table(
            ["N x C", *columns, "+-", f"{ours} / roof", f"{PAPER} / {ours}", f"{KD_COMPILED} / {ours}", "GB/s"],
            [
                [case, *(_time(both.get((case, c))) for c in columns), _half_iqr(r), ratio(r.this_over_roof),
                 ratio(r.paper_eager_over_this), ratio(r.kd_compiled_over_this), f"{r.gb_per_s:.1f}"]
                for case in present if case[0].isdigit() and (r := both.get((case, ours)))
            ],
        ),
        "", "## Targets", "",
        *table(
            ["target", "limit", "measured", ""],
            [
                [t.text, f"{'at least' if t.at_least else 'at most'} {t.limit:g}", ratio(value),
                 "not run" if value is None else "pass" if _meets(value, t) else "**missed**"]
                for t, value in judge(rows, ours)
            ],
        ),
        "", "## Every case", "",
        "Extra memory: the most alive at once beyond the inputs, in units of N C elements, with gradient and under "
        "`torch.no_grad()`. +- is half the distance of the quartiles.",
    ]  # fmt: skip
    heads = ["", "forward", "backward", "both", "+-", "/ roof", "its eager chain / this", "GB/s", "memory", "no_grad"]
    for case in present:
        lines = []
        for r in (r for r in rows if r.case == case and r.phase == "both"):
            phase = {x.phase: x for x in rows if (x.case, x.provider) == (case, r.provider)}
            lines.append(
                [r.provider, *(_time(phase.get(x)) for x in PHASES), _half_iqr(r),
                 ratio(r.this_over_roof), ratio(r.chain_over_this), f"{r.gb_per_s:.1f}", ratio(r.extra_memory),
                 ratio(r.extra_memory_no_grad)]
            )  # fmt: skip
        text += ["", f"### {case}", "", *table(heads, lines)]
    return "\n".join([*text, ""])


def _meets(value: float, target: Target) -> bool:
    return value >= target.limit if target.at_least else value <= target.limit


def _half_iqr(row: Row) -> str:
    return f"{50 * (row.q3_us - row.q1_us) / row.median_us:.0f}%"


def _time(row: Row | None) -> str:
    return "" if row is None else duration(row.median_us)


def plot(rows: Sequence[Row], facts: dict[str, str], ours: str, path: Path) -> None:
    """Two panels: time by shape, and by the teacher's accuracy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    both = [r for r in rows if r.phase == "both"]
    styles = {PAPER: "C3o-", PAPER_COMPILED: "C3s--", KD: "C1o-", KD_COMPILED: "C1s--", ours: "C0o-", ROOF: "k.:"}
    figure, panels = plt.subplots(1, 2, figsize=(13, 5), width_ratios=(3, 2))
    shapes = [r for r in both if r.case[0].isdigit()]
    accuracies = [r for r in both if r.case.startswith("teacher ")]
    titles = ("by shape, teacher right on 80% of the rows", f"{BASE[0]}x{BASE[1]} by the teacher's accuracy")
    for panel, title, chosen in zip(panels, titles, (shapes, accuracies), strict=True):
        names = list(dict.fromkeys(r.case for r in chosen))
        for provider, style in styles.items():
            points = [r for r in chosen if r.provider == provider]
            x, y = [names.index(r.case) for r in points], [r.median_us / 1e3 for r in points]
            spread = [[r.median_us - r.q1_us for r in points], [r.q3_us - r.median_us for r in points]]
            if points:
                panel.errorbar(x, y, [[e / 1e3 for e in side] for side in spread], fmt=style, ms=4, label=provider)
        panel.set(yscale="log", title=title, ylabel="loss and gradient, ms (median, quartiles)")
        panel.set_xticks(range(len(names)), [n.removeprefix("teacher ") for n in names], rotation=20)
        panel.grid(axis="y", alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.text(0.5, 0.01, "; ".join(f"{k}: {v}" for k, v in facts.items()), ha="center", fontsize=7, color="0.4")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few cases, few calls, under a minute; files go to runs/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rehearse", action="store_true", help="run what a GPU would, on the CPU; files go to runs/")
    parser.add_argument("--only", default="", metavar="REGEX", help="only the cases whose name matches")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds to time each case (8; quick: 0.5; GPU: 0.6)")
    parser.add_argument("--output", type=Path, help="folder of bench_loss.csv, .md and .png")
    args = parser.parse_args()
    device, started = torch.device("cpu" if args.rehearse else args.device), time.perf_counter()
    output = args.output or (QUICK_RESULTS if args.quick or args.only or args.rehearse else RESULTS)
    facts = harness.machine(device, sk.build_info())
    print(*(f"{k}: {v}" for k, v in facts.items()), sep="\n")
    if args.rehearse or device.type == "cuda":
        budget = args.budget if args.budget is not None else 0.1 if args.rehearse else 0.6
        failed = gpu_loss.main(device, output, facts, quick=args.quick, only=args.only, budget_s=budget)
        print(f"{time.perf_counter() - started:.0f} s; written to {output}")
        sys.exit(f"bench_loss: {failed} of this package's providers failed" if failed else 0)
    budget = args.budget if args.budget is not None else 0.5 if args.quick else 8.0
    ours = peers.backends(workloads.make(8, 100, device=device))[0]
    rows, notes = [], [f"{warning}: these timings are noise"] if (warning := harness.busy()) else []
    for name, build in peers.cases(device, args.quick):
        if not re.search(args.only, name):
            continue
        if args.quick and time.perf_counter() - started > QUICK_S:
            notes.append(f"{name} was left out, the time of --quick being up")
            continue
        try:
            new_rows, new_notes = run_case(name, build, device, budget, args.quick)
        except AssertionError as error:
            sys.exit(f"bench_loss: {name}: {error}. Nothing is written.")
        rows += new_rows
        notes += new_notes
        for r in (r for r in new_rows if r.phase == "both"):
            print(f"{name:22} {r.provider:28} {_time(r):>10}   {ratio(r.this_over_roof):>6} x roof", flush=True)
        print(*new_notes, sep="\n", end="\n" if new_notes else "")
    harness.write_csv(output / "bench_loss.csv", Row, rows)
    text = markdown(rows, notes, facts, ours)
    (output / "bench_loss.md").write_text(text)
    plot(rows, facts, ours, output / "bench_loss.png")
    print(text[text.index("## Targets") : text.index("## Every case")])
    print(f"{time.perf_counter() - started:.0f} s; written to {output}")


if __name__ == "__main__":
    main()
