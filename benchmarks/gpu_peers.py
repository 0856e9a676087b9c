"""What is timed on a CUDA device only: a training step's loss replayed as a CUDA graph, and Liger's kernel."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace

import torch
from harness import Provider
from torch import Tensor
from torch.nn import functional as F
from workloads import TEMPERATURE

LIGER = "KD Liger"


def has_liger() -> bool:
    """Whether Liger's kernels are installed."""
    return importlib.util.find_spec("liger_kernel") is not None


def liger_kd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Plain KD with Liger's KL kernel, which takes probabilities: both softmaxes are PyTorch's."""
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    log_q, p = F.log_softmax(student / TEMPERATURE, dim=1), F.softmax(teacher / TEMPERATURE, dim=1)
    return LigerKLDIVLoss(reduction="batchmean")(log_q, p) * TEMPERATURE**2


def record(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """What replays ``work`` as one CUDA graph, and the result that each replay overwrites."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # a capture allows neither compiling a kernel nor allocating a library's workspace
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph.replay, result


def replayed(provider: Provider, name: str) -> Provider:
    """The same forward and backward pass recorded at its first call and replayed: its time without the host's."""
    recorded: list[tuple[Callable[[], None], Tensor, list[Tensor | None]]] = []

    def call() -> Tensor:
        if not recorded:
            replay, result = record(provider.run)
            recorded.append((replay, result, [leaf.grad for leaf in provider.leaves]))
        replay, result, grads = recorded[0]
        replay()
        for leaf, grad in zip(provider.leaves, grads, strict=True):
            leaf.grad = grad
        return result.detach()

    return replace(provider, name=name, call=call, leaves=())
