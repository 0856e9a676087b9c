"""The loss from hidden states, timed: `fused_linear_sort_kd` beside whole logits; a table in `benchmarks/results/`.

It should take what its parts take: the matrix products, two for the logits and two back, and the fused loss on whole
logits. `--quick` takes a small shape and a few seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import harness
import peers
import torch
from harness import Provider, duration, ratio, table
from torch import Tensor

import sortkd_kernels as sk
from sortkd_kernels import reference

RESULTS = Path(__file__).resolve().parent / "results"
QUICK_RESULTS = Path(__file__).resolve().parents[1] / "runs" / "bench_quick"  # git ignores it
TEMPERATURE = 2.0
FUSED, WHOLE, EAGER, LIGER = "fused linear", "whole logits, fused loss", "whole logits, eager chain", "Liger"
PRODUCTS, LOSS = "products alone", "fused loss alone"
# Relative error of the loss and of the hidden states' gradient against float64. bfloat16 logits of 8 are off by 0.02.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass
class Inputs:
    """Hidden states and weights of both sides, logits of a deviation of 2, a teacher right on 80 % of the rows."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    target: Tensor

    @staticmethod
    def make(rows: int, classes: int, width: int, dtype: torch.dtype, device: torch.device) -> Inputs:
        g = torch.Generator(device).manual_seed(0)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=g, device=device).mul_(scale).to(dtype)

        hidden, teacher_hidden = random(rows, width), random(rows, width)
        weight, teacher_weight = (random(classes, width, scale=2 * width**-0.5) for _ in "st")
        target = torch.cat([(x @ teacher_weight.T).argmax(-1) for x in teacher_hidden.split(64)])
        wrong = torch.rand(rows, generator=g, device=device) > 0.8
        target[wrong] = torch.randint(classes, (rows,), generator=g, device=device)[wrong]
        return Inputs(hidden.requires_grad_(), weight.requires_grad_(), teacher_hidden, teacher_weight, target)

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight

    def teacher(self) -> Tensor:
        with torch.no_grad():
            return self.teacher_hidden @ self.teacher_weight.T

    def truth(self) -> list[Tensor]:
        """The mean loss and both gradients in float64, some rows at a time."""
        hidden, weight = (x.detach().double() for x in self.leaves)
        teacher_weight = self.teacher_weight.double()
        loss, grads = hidden.new_zeros(()), (torch.empty_like(hidden), torch.zeros_like(weight))
        for i in range(0, len(hidden), 64):
            rows = slice(i, i + 64)
            logits = (hidden[rows] @ weight.T).requires_grad_()
            teacher = self.teacher_hidden[rows].double() @ teacher_weight.T
            kd, _, _ = reference.loss_rows(logits, teacher, self.target[rows], temperature=TEMPERATURE)
            (grad,) = torch.autograd.grad(kd.sum() / len(hidden), logits)
            loss += kd.detach().sum() / len(hidden)
            grads[0][rows] = grad @ weight
            grads[1].addmm_(grad.T, hidden[rows])
        return [loss, *grads]


def liger(inputs: Inputs) -> Callable[[], Tensor]:
    """Its fused linear KL, of plain KD: without the correction and without T^2."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=TEMPERATURE)
    return lambda: loss(
        inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight, inputs.target
    )  # fmt: skip


def providers(inputs: Inputs) -> list[Provider]:
    """What is timed beside what; Liger's needs a GPU and its package."""
    whole = partial(sk.fused_sort_kd, temperature=TEMPERATURE)
    chain = partial(peers.paper_kd, temperature=TEMPERATURE)

    def fused() -> Tensor:
        return sk.fused_linear_sort_kd(
            inputs.hidden, inputs.weight, inputs.target, teacher_hidden=inputs.teacher_hidden,
            teacher_weight=inputs.teacher_weight, temperature=TEMPERATURE,
        )  # fmt: skip

    def of_logits(loss: Callable[..., Tensor]) -> Tensor:
        return loss(inputs.hidden @ inputs.weight.T, inputs.teacher(), inputs.target)

    def products() -> Tensor:
        with torch.no_grad():
            grad = inputs.hidden @ inputs.weight.T
            inputs.teacher()
            return (grad @ inputs.weight).sum() + (grad.T @ inputs.hidden).sum()

    calls = {FUSED: fused, WHOLE: partial(of_logits, whole), EAGER: partial(of_logits, chain)}
    if inputs.hidden.is_cuda:
        try:
            calls[LIGER] = liger(inputs)
        except ImportError as error:
            print(f"without Liger: {error}")
    logits = (inputs.hidden @ inputs.weight.T).detach().requires_grad_()
    alone = partial(whole, logits, inputs.teacher(), inputs.target)
    made = [Provider(name, call, inputs.leaves) for name, call in calls.items()]
    return [*made, Provider(PRODUCTS, products), Provider(LOSS, alone, (logits,))]


def run(rows: int, classes: int, width: int, dtype: torch.dtype, device: torch.device, budget_s: float) -> list[str]:
    """The lines of one shape's table."""
    inputs = Inputs.make(rows, classes, width, dtype, device)
    exact, errors, timed = inputs.truth(), {}, providers(inputs)
    for p in timed[:-2]:
        results = (p.run().detach(), *(x.grad for x in p.leaves))
        errors[p.name] = [((a - b).norm() / b.norm()).item() for a, b in zip(results, exact, strict=True)]
        p.release()
        if p.name != LIGER and not max(errors[p.name][:2]) <= TOLERANCE[dtype]:
            raise SystemExit(f"bench_linear: {p.name} is off by {errors[p.name]}, allowed {TOLERANCE[dtype]:g}")
    del exact
    times = {name: spreads["both"] for name, spreads in harness.measure(timed, budget_s, device, 3).items()}
    parts, matrix, lines = times[PRODUCTS].median + times[LOSS].median, rows * classes * 4, []
    for p in timed:
        t, line = times[p.name], [p.name]
        line += [duration(1e6 * t.median), f"{50 * (t.q3 - t.q1) / t.median:.0f}%", ratio(t.median / parts)]
        if p.name in errors:
            beyond = harness.peak_memory(p, device) * p.leaves[0].element_size() - sum(x.nbytes for x in p.leaves)
            line += [f"{beyond / 1e6:.0f} MB", f"{beyond / matrix:.3f}", *(f"{e:.1e}" for e in errors[p.name][1:])]
        lines.append(line + [""] * (8 - len(line)))
    heads = ["", "both", "+-", "/ its parts", "memory", "/ a logit matrix", "error, hidden", "error, weight"]
    return [f"## {rows} x {classes}, hidden {width}, {str(dtype).removeprefix('torch.')}", "", *table(heads, lines), ""]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shape, a few seconds; the file goes to runs/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds to time each shape (60; quick: 1)")
    args = parser.parse_args()
    device = torch.device(args.device)
    shape = (256, 4000, 128) if args.quick else (8192, 128256, 4096) if device.type == "cuda" else (2048, 32000, 512)
    dtypes = (torch.bfloat16,) if device.type == "cuda" else (torch.float32, torch.bfloat16)
    budget = args.budget if args.budget is not None else 1.0 if args.quick else 60.0
    text = ["# From hidden states to the gradients", ""]
    text += [f"- {k}: {v}" for k, v in harness.machine(device, sk.build_info()).items()]
    text += [
        "",
        "Forward and backward together, median of the calls; parts: the products alone and the fused loss alone. "
        "Memory: the most alive at once beyond inputs and gradients, also in float32 logit matrices. Errors of the "
        "gradients against float64, relative, in the Frobenius norm.",
        "",
    ]
    print(*text, sep="\n")
    for dtype in dtypes:
        lines = run(*shape, dtype, device, budget)
        print(*lines, sep="\n", flush=True)
        text += lines
    output = QUICK_RESULTS if args.quick else RESULTS
    output.mkdir(parents=True, exist_ok=True)
    (output / f"bench_linear{'_gpu' if device.type == 'cuda' else ''}.md").write_text("\n".join(text))
    print(f"written to {output}")


if __name__ == "__main__":
    main()
