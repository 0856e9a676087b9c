"""The benchmarks' bookkeeping on a GPU, rehearsed on the CPU: nothing here is a time.

Whether a capture succeeds shows on a GPU only.
"""

from __future__ import annotations

import csv
import importlib
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import sortkd_kernels
from train.data import ArrayData, ArrayLoader, BatchPlan

BENCHMARKS = Path(sortkd_kernels.__file__).parent.parent / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_loss
    import peers
    import workloads

    monkeypatch.setattr(gpu_loss, "SLICE_S", 0.0)
    monkeypatch.setattr(peers, "compiled", lambda chain: chain)  # ten seconds, and inductor's business
    return gpu_loss, peers, workloads


def test_rehearsal(modules, tmp_path):
    """Every case and column is written, each provider having been checked."""
    gpu_loss, peers, _ = modules
    assert gpu_loss.main(CPU, tmp_path, {"GPU": "none"}, quick=False, only="", budget_s=0.0) == 0
    rows = list(csv.DictReader((tmp_path / "bench_loss.csv").open()))
    assert {r["case"] for r in rows} == {*map(str, gpu_loss.DRY_CASES), "6x10 methods", "dense 2x5x4x3"}
    assert [r["problem"] for r in rows if r["problem"]] == []
    assert all(float(r["replay_us"]) > 0 and float(r["call_us"]) > 0 for r in rows)
    assert {gpu_loss.COPY, gpu_loss.CE, peers.KD, peers.KD_COMPILED, peers.PAPER} < {r["provider"] for r in rows}
    text = (tmp_path / "bench_loss.md").read_text()
    assert "6x10 float32, teacher random" in text and "| native |" in text and "What failed" not in text


def test_a_heavy_tail(modules):
    """As many ranks of each size as the report says, within four standard deviations of as many tosses."""
    _, _, workloads = modules
    x = workloads.make(2000, 3000, accuracy=0.6, heavy_tail=True)
    rank = (x.teacher > x.teacher.gather(1, x.target[:, None])).sum(1)
    assert (rank == 0).sum() == 1200
    for r in (2, 16, 256):
        share = r**-0.5
        assert abs((rank >= r).sum() - 800 * share) < 4 * (800 * share * (1 - share)) ** 0.5


def test_a_failing_provider_keeps_to_its_cell(modules, monkeypatch, tmp_path):
    """One that raises, one whose capture raises and one that is wrong say so; the others are timed."""
    gpu_loss, peers, workloads = modules
    x = workloads.make(6, 10)

    def raises(*_):
        raise RuntimeError("out of memory\nand more words")

    def record(step, repeats, device):
        if step.provider.name == "no graph":
            raise RuntimeError("operation failed due to a previous error during capture")
        return step, step().detach()

    step_of = gpu_loss.step_of
    monkeypatch.setattr(gpu_loss, "step_of", lambda p: (s := step_of(p), setattr(s, "provider", p))[0])
    monkeypatch.setattr(gpu_loss, "record", record)
    found = [
        peers.loss("raises", x, raises, {}),
        peers.fused("no graph", x, "native"),
        peers.loss("wrong", x, lambda s, t, y: (s * t).mean(), {}),
        peers.fused("native", x, "native"),
    ]
    rows = {r.provider: r for r in gpu_loss.run_case("case", found, CPU, 0.0)}
    assert rows["raises"].problem == "did not run: RuntimeError: out of memory"
    assert rows["wrong"].problem.startswith("did not run: AssertionError: wrong: loss is off by")
    assert rows["wrong"].call_us is None and rows["raises"].replay_us is None
    assert rows["no graph"].problem.endswith("previous error during capture")
    assert rows["no graph"].call_us > 0 and rows["no graph"].replay_us is None
    assert rows["native"].problem == "" and rows["native"].replay_us > 0


@pytest.mark.parametrize("lost", (False, True))
def test_a_failing_case_leaves_the_others(modules, monkeypatch, tmp_path, lost):
    """Where it raises, the next one follows; where it ends the device, what was written before stays."""
    gpu_loss, _, _ = modules
    one, other = gpu_loss.DRY_CASES[:2]
    monkeypatch.setattr(gpu_loss, "DRY_CASES", (one, other, one._replace(rows=7)))
    providers = gpu_loss.providers

    def failing(case, device):
        if case is other:
            if lost:
                monkeypatch.setattr(gpu_loss, "mark", raises)
            raises()
        return providers(case, device)

    def raises(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more words")

    monkeypatch.setattr(gpu_loss, "providers", failing)
    assert gpu_loss.main(CPU, tmp_path, {}, quick=False, only="float", budget_s=0.0) == 1 + lost
    rows = list(csv.DictReader((tmp_path / "bench_loss.csv").open()))
    assert {r["case"] for r in rows} == {str(one), str(other)} | ({"7x10 float32"} if not lost else set())
    said = [r["problem"] for r in rows if r["case"] == str(other)]
    assert said[0] == "did not end: RuntimeError: CUDA error: an illegal memory access was encountered"
    assert [x.partition(":")[0] for x in said[1:]] == ["was the last, the device is lost"] * lost
    assert said[0] in (tmp_path / "bench_loss.md").read_text()


def test_memory_counts_a_gradient(modules, monkeypatch):
    """Also after a turn, which leaves the last one where it is; an allocator that holds gradients alone says so."""
    gpu_loss, peers, workloads = modules
    provider = peers.fused("native", workloads.make(6, 10), "native")
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: sum(x.grad.nbytes for x in provider.leaves if x.grad is not None))
    provider.run()
    assert gpu_loss.harness.peak_memory(provider, torch.device("cuda")) == 1.0


def test_whole_steps(modules):
    """Loops that take turns; a trainer's step that was not captured on a GPU has no verdict."""
    bench_step = importlib.import_module("bench_step")
    images = torch.zeros(12, 32, 32, 3, dtype=torch.uint8)
    data = ArrayData(images, torch.zeros(12, dtype=torch.long), bench_step.CIFAR_MEAN, bench_step.CIFAR_STD)
    plan = BatchPlan(12, 2, shuffle=True, seed=0)
    names = bench_step.PAIRS[1]
    wholes, problems = bench_step.whole_steps(
        names, lambda: ArrayLoader(data, plan, device=CPU, padding=4, flip=True), 2
    )
    assert {name: s.runs for name, s in wholes.items()} == {bench_step.PLAIN: 2, bench_step.TRAINER: 2} and not problems
    times = dict.fromkeys(bench_step.PHASES, wholes[bench_step.PLAIN])
    for problem in ("", "not captured"):
        text = bench_step.markdown(bench_step.rows_of("a->b", times, wholes, {bench_step.TRAINER: problem}), {})
        assert ("**not captured**" in text) == bool(problem)


def test_peers_have_leaves_of_their_own(modules):
    """A gradient of one provider is not another's, and what runs in place spoils no logits but its own."""
    _, peers, workloads = modules
    x = workloads.make(6, 10)
    before = x.student.detach().clone()
    one, other = peers.inplace("in place", x, "native"), peers.fused("native", x, "native")
    for _ in range(2):
        one.check(one.run())
        other.check(other.run())
    assert torch.equal(x.student, before) and x.student.grad is None
    assert one.leaves[0] is not other.leaves[0]


def test_liger_column_is_plain_kd(modules, monkeypatch):
    """What Liger's loss is given, with PyTorch's of the same signature in its place, is KD by the reference."""
    gpu_loss, peers, workloads = modules
    names = ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.kl_div")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[names[-1]].LigerKLDIVLoss = nn.KLDivLoss
    provider = peers.loss(gpu_loss.LIGER, workloads.make(6, 10), gpu_loss.liger_kd, {"correction": "none"})
    provider.check(provider.run())
