"""pytest-benchmark cases: the fused loss beside the cross-entropy that every training step computes anyway."""

from __future__ import annotations

from typing import TYPE_CHECKING

import peers
import pytest
import torch
import workloads

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROVIDERS = {
    "fused_sort_kd": lambda x: peers.fused("fused_sort_kd", x, peers.backends(x)[0]),
    "fused_sort_kd + CE": lambda x: peers.fused("fused_sort_kd + CE", x, peers.backends(x)[0], "KD + CE"),
    "F.cross_entropy": lambda x: peers.loss(
        "F.cross_entropy", x, peers.cross_entropy, {"kd_weight": 0.0, "ce_weight": 1.0}
    ),
}


@pytest.mark.parametrize("shape", [(64, 100), (4096, 1000)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("name", PROVIDERS)
def test_loss_and_gradient(benchmark: BenchmarkFixture, name: str, shape: tuple[int, int]) -> None:
    """Forward and backward of one provider, checked against the reference before it is timed."""
    provider = PROVIDERS[name](workloads.make(*shape, device=DEVICE))
    provider.check(provider.run())

    def call() -> None:
        provider.run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"loss and gradient {shape[0]}x{shape[1]}"
    benchmark(call)
