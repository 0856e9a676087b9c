"""The loss on a GPU, every peer called eagerly and replayed as a CUDA graph: `bench_loss.py` on a CUDA device.

A replay is the time of the device alone. A call is wall-clock time, the host's included, calls following each other. A
provider that fails says so in its cell and in a note; the others go on.
"""

from __future__ import annotations

import gc
import importlib.util
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import harness
import peers
import torch
import workloads
from harness import Provider, Spread, mark, ratio, table
from torch import Tensor
from torch.nn import functional as F
from workloads import TEMPERATURE, Inputs

F32, BF16 = torch.float32, torch.bfloat16
COPY, CE, LIGER = "copy", "F.cross_entropy", "KD Liger"
OURS = ("native", "triton")
ALL = "all"  # the provider of a case that ended as a whole
SLICE_S = 0.02  # of one provider's turn
FEW_ELEMENTS, REPEATS = 1 << 24, 16  # a replay of no more work repeats it: its own launch takes 8 us of the host


class Case(NamedTuple):
    """A shape, and what a replay may take there at the most, native and Triton: in copies, or in microseconds."""

    rows: int
    classes: int
    dtype: torch.dtype
    limits: tuple[float, float] | None = None
    teacher: str = "80%"
    in_us: bool = False

    def __str__(self) -> str:
        name = f"{self.rows}x{self.classes} {str(self.dtype).removeprefix('torch.')}"
        return name if self.teacher == "80%" else f"{name}, teacher {self.teacher}"


TEACHERS = {
    "80%": {"accuracy": 0.8}, "right": {"accuracy": 1.0}, "random": {"accuracy": None},
    "hard tokens": {"accuracy": 0.6, "heavy_tail": True},
}  # fmt: skip
# What a run that is cut would miss least comes last.
CASES = (
    Case(64, 100, F32, (4, 8), in_us=True), Case(256, 1000, F32, (7, 10), in_us=True),
    Case(8192, 1000, F32, (1.35, 1.5)), Case(8192, 1000, BF16, (1.6, 2.2)),
    Case(4096, 32000, BF16, (1.25, 1.8)), Case(4096, 128256, BF16, (1.35, 2.0)),
    Case(65536, 100, F32, (1.4, 1.8)), Case(65536, 100, BF16, (2.0, 2.6)),
    Case(512, 32000, F32, (1.3, 1.8)), Case(65536, 1000, F32, (1.15, 1.25)),
    Case(1024, 262144, BF16, (1.5, 2.0)), Case(4096, 32000, BF16, None, "hard tokens"),
    Case(8192, 1000, F32, (4, 8), "random"), Case(4096, 32000, BF16, (15, 30), "random"),
    Case(64, 100, BF16), Case(8192, 1001, F32), Case(2048, 21841, F32),
    Case(4096, 50257, BF16), Case(8192, 1000, F32, None, "right"), Case(4096, 32000, BF16, None, "right"),
)  # fmt: skip
QUICK_CASES = tuple(c for c in CASES if str(c) in ("64x100 float32", "8192x1000 float32", "4096x32000 bfloat16"))
DRY_CASES = (
    Case(6, 10, F32, (1.0, 1.0)), Case(6, 24, BF16), Case(6, 10, F32, None, "random"),
    Case(6, 24, BF16, None, "hard tokens"),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One provider in one case: a line of the CSV. Times are microseconds; what was not measured is empty."""

    case: str
    provider: str
    replay_us: float | None = None
    replay_q1_us: float | None = None
    replay_q3_us: float | None = None
    replay_over_copy: float | None = None
    call_us: float | None = None
    extra_memory: float | None = None
    problem: str = ""


def liger_kd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Plain KD with Liger's KL kernel, which takes probabilities: both softmaxes are PyTorch's."""
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    log_q = F.log_softmax(student.float() / TEMPERATURE, dim=1)
    p = F.softmax(teacher.float() / TEMPERATURE, dim=1)
    return LigerKLDIVLoss(reduction="batchmean")(log_q, p) * TEMPERATURE**2


def providers(case: Case, device: torch.device) -> list[Provider]:
    """What is timed in a case: all peers, or where the teacher alone is another, what depends on it."""
    x = workloads.make(case.rows, case.classes, dtype=case.dtype, device=device, **TEACHERS[case.teacher])
    out = torch.empty_like(x.teacher)
    copy = peers.roof(x, COPY)
    copy.call = lambda: torch.add(x.student.detach(), x.teacher, out=out)
    found = [copy, *ours(x, device)]
    if case.teacher == "80%":
        plain = {"correction": "none"}
        found += [
            peers.loss(CE, x, peers.cross_entropy, {"kd_weight": 0.0, "ce_weight": 1.0}),
            peers.loss(peers.KD, x, peers.kd, plain),
            peers.loss(peers.KD_COMPILED, x, peers.compiled(peers.kd), plain),
            peers.loss(peers.PAPER, x, peers.paper_kd, {}),
        ]
        if importlib.util.find_spec("liger_kernel"):
            found.append(peers.loss(LIGER, x, liger_kd, plain))
            found[-1].captured = False  # it reads a value on the host
    return found


def ours(x: Inputs, device: torch.device) -> list[Provider]:
    """This package's backends on the device; the reference stands in for them on the CPU, where this is a rehearsal."""
    return [peers.fused(b, x, b) for b in (OURS if device.type == "cuda" else ("native", "reference"))]


def methods(device: torch.device, shape: tuple[int, int]) -> list[Provider]:
    """The other losses of the package beside KD, on one shape."""
    x = workloads.make(*shape, device=device)
    found = [peers.roof(x, COPY)]
    for b in [p.name for p in ours(x, device)]:
        found += [peers.fused(f"{b} {m}", x, b, m) for m in peers.METHODS]
        found.append(peers.inplace(f"{b} in place, and the copy to write over", x, b))
    return found


def dense(device: torch.device, shape: tuple[int, ...]) -> list[Provider]:
    """Segmentation, classes in dimension 1, beside a copy of as many bytes."""
    x = workloads.make_dense(shape, device)
    return [peers.roof(x, COPY), *(peers.fused(p.name, x, p.name, class_dim=1) for p in ours(x, device))]


def record(step: Callable[[], Tensor], repeats: int, device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """What replays ``repeats`` steps as one CUDA graph, and the result that each replay overwrites.

    The steps before the capture, on its own stream, compile and load what the capture may not. Their results are
    dropped, with autograd's nodes, which belong to a stream.
    """
    if device.type != "cuda":  # a rehearsal
        return lambda: [step() for _ in range(repeats)], step().detach()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for _ in range(repeats):
            result = step().detach()
    return graph.replay, result


@dataclass
class Timed:
    """A provider with its graph, if it could be recorded, and its samples in seconds a step."""

    provider: Provider
    replay: Callable[[], None] | None
    replays: list[float]
    calls: list[float]
    problem: str = ""


def step_of(p: Provider) -> Callable[[], Tensor]:
    """A call with its backward pass; in place also the copy that makes its logits, one more of the student's bytes."""

    def step() -> Tensor:
        p.release()
        if p.prepare:
            p.prepare()
        result = p.call()
        if p.leaves:
            result.backward()
        return result

    return step


def prepared(p: Provider, device: torch.device) -> Timed:
    """A provider that has been checked, eagerly and replayed; what failed has its reason."""
    timed = Timed(p, None, [], [])
    try:
        result = p.run()
        if p.check:
            p.check(result)
        del result
    except Exception as error:
        timed.problem = f"did not run: {_first_line(error)}"
        return timed
    try:
        if p.captured:
            timed.replay, result = record(step_of(p), _repeats(p), device)
            if p.check:
                timed.replay()
                p.check(result)
    except Exception as error:
        timed.replay, timed.problem = None, f"no graph: {_first_line(error)}"
    p.release()
    return timed


def _repeats(p: Provider) -> int:
    return REPEATS if p.elements <= FEW_ELEMENTS else 1


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def run_case(name: str, found: list[Provider], device: torch.device, budget_s: float) -> list[Row]:
    """Every provider checked, then timed in turns."""
    torch.compiler.reset()
    timed = [prepared(p, device) for p in found]
    usable = [t for t in timed if t.replay or not t.problem.startswith("did not run")]
    turns = [(t, replayed) for t in usable for replayed in (True, False) if t.replay or not replayed]
    deadline, rounds, shuffle = time.perf_counter() + budget_s, 0, random.Random(0).shuffle
    while rounds < 3 or time.perf_counter() < deadline:
        shuffle(turns)
        for t, replayed in turns:
            try:
                _turn(t, replayed, device)
            except Exception as error:
                t.problem = f"stopped: {_first_line(error)}"
        turns = [(t, replayed) for t, replayed in turns if not t.problem.startswith("stopped")]
        rounds += 1
    copy = next((Spread.of(t.replays).median for t in timed if t.provider.name == COPY and t.replays), None)
    rows = [_row(name, t, copy, device) for t in timed]
    for t in timed:
        t.provider.release()
    return rows


def _turn(t: Timed, replayed: bool, device: torch.device) -> None:
    samples, repeats = (t.replays, _repeats(t.provider)) if replayed else (t.calls, 1)
    work = t.replay if replayed else step_of(t.provider)
    work()
    calls = min(1000, 1 + int(SLICE_S / repeats / min(samples))) if samples else 1
    start = mark(device)
    for _ in range(calls):
        work()
    samples.append((mark(device) - start) / calls / repeats)


def _row(name: str, t: Timed, copy: float | None, device: torch.device) -> Row:
    spread = Spread.of(t.replays) if t.replays else None
    memory = None
    if t.calls and t.provider.name.startswith(OURS):
        try:
            memory = harness.peak_memory(t.provider, device)
        except Exception as error:
            t.problem = t.problem or f"memory not measured: {_first_line(error)}"
    return Row(
        name,
        t.provider.name,
        *([1e6 * x for x in spread[:3]] if spread else [None] * 3),
        spread.median / copy if spread and copy else None,
        1e6 * Spread.of(t.calls).median if t.calls else None,
        memory,
        t.problem,
    )


def markdown(rows: Sequence[Row], cases: Sequence[Case], facts: dict[str, str]) -> str:
    """Replays by shape against the limits, calls by shape, the other losses, what failed."""
    at = {(r.case, r.provider): r for r in rows}

    def cell(case: str, provider: str, what: str) -> str:
        row = at.get((case, provider))
        value = getattr(row, what) if row else None
        return f"{value:.3g}" if value is not None else "failed" if row and row.problem else ""

    def verdict(case: Case, provider: str, limit: float) -> str:
        row = at.get((str(case), provider))
        found = (row.replay_us if case.in_us else row.replay_over_copy) if row else None
        if found is None:
            return "not run"
        return f"{ratio(found)} of {limit:g}{' us' * case.in_us}{'' if found <= limit else ', **missed**'}"

    replays = (COPY, *OURS, CE, peers.KD_COMPILED, peers.KD, peers.PAPER)
    calls = (*OURS, CE, peers.KD_COMPILED, peers.KD, peers.PAPER, LIGER)
    text = [
        "# The loss on a GPU", "", *(f"- {k}: {v}" for k, v in facts.items()), "",
        "Forward and backward pass of one step, microseconds; medians, and ratios of medians. `copy` is "
        "`torch.add(s, t, out=o)`, the same bytes. Logits stay where the step before left them, in the level 2 cache "
        "if they fit. The teacher is right on 80% of the rows, always, or is random; with hard tokens on 60%, and "
        "in 1 / sqrt(r) of the others r classes or more are above the label. Each provider was checked against "
        "float64 before it was timed. The peers of KD and CE correct nothing.",
        "", "## Replayed as a CUDA graph", "",
        *table(["N x C", *replays], [[str(c), *(cell(str(c), p, "replay_us") for p in replays)] for c in cases]),
        "", "## Called eagerly", "",
        *table(["N x C", *calls], [[str(c), *(cell(str(c), p, "call_us") for p in calls)] for c in cases]),
        "", "## Targets: copies a replay, or microseconds", "",
        *table(
            ["N x C", *OURS],
            [[str(c), *(verdict(c, p, x) for p, x in zip(OURS, c.limits, strict=True))] for c in cases if c.limits],
        ),
        "", "## Other losses and layouts", "",
        *table(
            ["", "", "replay", "copies", "call", "memory, N C elements"],
            [
                [r.case, r.provider, *(cell(r.case, r.provider, x)
                                       for x in ("replay_us", "replay_over_copy", "call_us", "extra_memory"))]
                for r in rows if r.case not in map(str, cases)
            ],
        ),
    ]  # fmt: skip
    problems = [f"- {r.case}: {r.provider} {r.problem}" for r in rows if r.problem]
    return "\n".join([*text, *(["", "## What failed", "", *problems] if problems else []), ""])


def main(device: torch.device, output: Path, facts: dict[str, str], *, quick: bool, only: str, budget_s: float) -> int:
    """Time everything, write `bench_loss.csv` and `.md`; the number of cells of this package that failed.

    The files are written after every case, so that one that hangs leaves those before it. A case that raises has a row
    that says so, and the next one follows, unless the device is lost.
    """
    rehearsal = device.type != "cuda"
    cases = DRY_CASES if rehearsal else QUICK_CASES if quick else CASES
    builds: list[tuple[str, Callable[[], list[Provider]]]] = [(str(c), lambda c=c: providers(c, device)) for c in cases]
    shape, image = ((6, 10), (2, 5, 4, 3)) if rehearsal else (workloads.GPU_BASE, workloads.DENSE)
    # Before what a machine that has yet to compile may have no time for.
    builds[8:8] = [
        (f"{shape[0]}x{shape[1]} methods", lambda: methods(device, shape)),
        (f"dense {'x'.join(map(str, image))}", lambda: dense(device, image)),
    ]
    rows: list[Row] = []
    for name, build in (x for x in builds if re.search(only, x[0])):
        try:
            rows += run_case(name, build(), device, budget_s)
        except Exception as error:
            rows.append(Row(name, ALL, problem=f"did not end: {_first_line(error)}"))
        if lost := _device_error(device):
            rows.append(Row(name, ALL, problem=f"was the last, the device is lost: {lost}"))
        _write(rows, cases, output, facts)
        for r in (r for r in rows if r.case == name):
            times = [f"{x:.3g}" if x is not None else "-" for x in (r.replay_us, r.call_us)]
            print(f"{name:32} {r.provider:22} replay {times[0]:>8} us, call {times[1]:>8} us  {r.problem}", flush=True)
        if lost:
            break
        gc.collect()
        if not rehearsal:
            torch.cuda.empty_cache()
    return sum(bool(r.problem) and r.provider.startswith((*OURS, ALL)) for r in rows)


def _device_error(device: torch.device) -> str:
    """What every further call would meet after an error inside a kernel. A capture that failed leaves none."""
    try:
        mark(device)
    except Exception as error:
        return _first_line(error)
    return ""


def _write(rows: Sequence[Row], cases: Sequence[Case], output: Path, facts: dict[str, str]) -> None:
    harness.write_csv(output / "bench_loss.csv", Row, rows)
    (output / "bench_loss.md").write_text(markdown(rows, cases, facts))
