"""What the benchmark adds on a CUDA device, as far as it can be run without one: bookkeeping, never a time.

The recording is replaced by one that computes again and copies into the memory of the first result, which is what a
graph's replay does. Whether a capture succeeds shows on a GPU only.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import sortkd_kernels

BENCHMARKS = Path(sortkd_kernels.__file__).parent.parent / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_peers
    import peers
    import workloads

    return gpu_peers, peers, workloads


def test_a_replayed_step_is_checked_like_any_other(modules, monkeypatch):
    """One recording; each replay leaves the loss and the gradients where the check looks for them."""
    gpu_peers, peers, workloads = modules
    records = []

    def record(work):
        result = work()
        grads = [leaf.grad for leaf in provider.leaves]
        records.append(1)

        def replay():
            for leaf, grad in zip(provider.leaves, grads, strict=True):
                leaf.grad = None
                result.detach().copy_(work().detach())
                grad.copy_(leaf.grad)

        return replay, result

    monkeypatch.setattr(gpu_peers, "record", record)
    x = workloads.make(6, 10)
    provider = peers.fused("native", x, "native")
    graph = gpu_peers.replayed(provider, "native graph")
    for _ in range(2):
        x.student.grad = None
        graph.check(graph.run())
    assert graph.name == "native graph" and len(records) == 1
    x.student.data.mul_(2)  # the truth is kept: a replay of other logits must fail the check
    with pytest.raises(AssertionError, match="native: loss is off"):
        graph.check(graph.run())


def test_liger_column_is_plain_kd(modules, monkeypatch):
    """What Liger's loss is given, with PyTorch's of the same signature in its place, is KD by the reference."""
    gpu_peers, peers, workloads = modules
    names = ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.kl_div")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[names[-1]].LigerKLDIVLoss = nn.KLDivLoss
    provider = peers.loss(gpu_peers.LIGER, workloads.make(6, 10), gpu_peers.liger_kd, {"correction": "none"})
    provider.check(provider.run())


def test_no_gpu_column_on_the_cpu(modules):
    _, peers, _ = modules
    names = [p.name for p in peers.shape_case(6, 10, torch.device("cpu"), quick=True)]
    assert names == ["roof", "native", "reference", "paper eager", "KD eager"]
