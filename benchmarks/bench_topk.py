"""Teachers served as their top k, by what stands for the rest, timed beside the teacher served whole.

Loss and gradient together, float16 values and int32 indices: `benchmarks/results/bench_topk.md`. The gradient of each
provider's first rows is checked against the float64 reference before anything is timed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import harness
import torch
import workloads
from harness import Provider, duration, ratio, table
from torch import Tensor

import sortkd_kernels as sk

RESULTS = Path(__file__).resolve().parent / "results" / "bench_topk.md"
SHAPES = ((512, 32000), (128, 128256))
KS = (20, 64, 128)
TAILS = ("renormalize", "uniform", "bucket")
CHECKED_ROWS = 8


def provider(name: str, x: workloads.Inputs, call: sk.fused_sort_kd, *teacher: Tensor, **options: object) -> Provider:
    """One way to serve the teacher; ``call(student, *teacher, target, **options)`` is the loss."""

    def check(_: Tensor) -> None:
        leaf = x.student[:CHECKED_ROWS].detach().double().requires_grad_()
        rows = (t[:CHECKED_ROWS] for t in (*teacher, x.target))
        call(leaf, *rows, reduction="sum", backend="reference", **options).backward()
        found, truth = x.student.grad[:CHECKED_ROWS] * len(x.target), leaf.grad
        workloads.expect_close(name, found, truth, workloads.TOLERANCE[x.student.dtype])

    return Provider(name, lambda: call(x.student, *teacher, x.target, **options), (x.student,), check=check)


def case(rows: int, classes: int, dtype: torch.dtype, device: torch.device) -> list[Provider]:
    """The teacher whole, and for each k its three tails."""
    x = workloads.make(rows, classes, dtype=dtype, device=device)
    log_p = x.teacher.float().log_softmax(-1)
    providers = [provider("full", x, sk.fused_sort_kd, x.teacher)]
    for k in KS:
        values, indices = log_p.topk(k)
        served = values.half(), indices.int()
        providers += [provider(f"{tail} {k}", x, sk.fused_sort_kd_topk, *served, tail=tail) for tail in TAILS]
    return providers


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=10.0, metavar="S", help="seconds to time each case")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    device, lines = torch.device(args.device), []
    facts = harness.machine(device, sk.build_info())
    for rows, classes in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            providers = case(rows, classes, dtype, device)
            for p in providers:
                p.check(p.run())
                p.release()
            times = {name: x["both"] for name, x in harness.measure(providers, args.budget, device).items()}
            for k in KS:
                of_tails = [times[f"{tail} {k}"].median for tail in TAILS]
                medians = [duration(1e6 * t) for t in (times["full"].median, *of_tails)]
                spread = times[f"bucket {k}"]
                lines.append(
                    [f"{rows}x{classes}", str(dtype).removeprefix("torch."), str(k), *medians,
                     f"{50 * (spread.q3 - spread.q1) / spread.median:.0f}%", ratio(of_tails[2] / of_tails[0])]
                )  # fmt: skip
                print(*lines[-1], sep="   ", flush=True)
    heads = ["N x C", "student", "k", "full teacher", *TAILS, "+-", "bucket / renormalize"]
    text = ["# A teacher served as its top k", "", *(f"- {key}: {fact}" for key, fact in facts.items()), ""]
    text += ["Forward and backward together, medians; +- is half the distance of the quartiles of the bucket.", ""]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("\n".join([*text, *table(heads, lines), ""]))


if __name__ == "__main__":
    main()
