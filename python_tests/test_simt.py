"""The SIMT harness itself: it catches each planted fault by name, and lets the same kernel without the fault pass.

The CUDA kernels that it then runs are tested as the backend "simt" of cases.py, by all the tests of the op.
"""

from __future__ import annotations

import math

import pytest
import torch
from simt import build

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing())

N = 64
ORDERS = ("forward", "backward", "shuffled")
INPUT = [float(i * i % 31 - 9) for i in range(N)]
NEIGHBOURS = [INPUT[i ^ 1] for i in range(N)]

# Kernel of faults.cu, what the fault says, what the kernel computes without it.
CAUGHT = {
    "divergent_shuffle": (r"__shfl_xor_sync \(faults\.cu:\d+\) waits for lane 20, which has exited", NEIGHBOURS),
    "shuffle_at_two_places": (r"waits for lane 1, which waits at __shfl_xor_sync \(faults\.cu:\d+\)", NEIGHBOURS),
    "masks_differ": (r"which waits at .* with the mask", NEIGHBOURS),
    "caller_not_in_mask": ("called by a lane that is not in its mask 65535", [2.0**32] * N),
    "shuffle_from_outside_the_mask": (
        "reads lane 20, which is not in the mask 65535",
        [INPUT[i // 32 * 32 + 3] if i % 32 < 16 else INPUT[i] for i in range(N)],
    ),
    "exited_lane_in_mask": (r"__syncwarp \(faults\.cu:\d+\) waits for lane 5, which has exited", INPUT),
    "barrier_not_reached_by_all": (r"waits for (lane 8|thread \(40, 0, 0\)), which has exited", INPUT),
    "barrier_at_two_places": (r"waits for thread \(32, 0, 0\), which waits at __syncthreads \(faults\.cu", INPUT),
    "shuffle_while_others_are_at_a_barrier": ("waits for lane 16, which waits at __syncthreads", INPUT),
    "shared_read_past_the_end": (r"thread \(63, 0, 0\): access outside of shared memory, at byte 256 of 256", INPUT),
    "shared_write_past_the_end": (r"thread \(63, 0, 0\): access outside of shared memory, at byte 256 of 256", INPUT),
    "shared_write_before_the_start": ("written outside of its 256 bytes of shared memory", INPUT),
    "shared_read_far_away": (r"access outside of shared memory, at byte 4\d{5} of 256", INPUT),
    "global_read_past_the_end": (r"thread \(63, 0, 0\): access outside of global memory", INPUT),
    "global_write_past_the_end": (r"thread \(63, 0, 0\): access outside of global memory", INPUT),
    "global_write_before_the_start": ("a write before the start of a tensor", INPUT),
    "misaligned_load": (r"misaligned access to .*float4.*, 4 bytes past a multiple of 16 \(intrinsics\.h:\d+\)", INPUT),
    "misaligned_store": (r"misaligned access to .*float4.*, 8 bytes past a multiple of 16 \(faults\.cu:\d+\)", INPUT),
    "misaligned_copy": ("an asynchronous copy between addresses that are no multiples of 16", INPUT),
    "copy_under_way_at_the_end": ("ends with asynchronous copies under way", INPUT),
    "local_array_overrun": (r"index 4 outside of .*float \[4\].* \(faults\.cu:\d+\)", INPUT),
    "stack_overflow": ("stack overflow", INPUT),
    "shift_by_too_much": (r"thread \((31|63), 0, 0\): shift by 32", [2.0 ** (i % 32) for i in range(N)]),
    "division_by_zero": (r"thread \(0, 0, 0\): integer division by zero", [float(N // (i + 1)) for i in range(N)]),
    "failed_assertion": (r"thread \(33, 0, 0\): assertion !kPlanted \|\| i != 33 \(faults\.cu:\d+\)", INPUT),
    "trap": (r"thread \(33, 0, 0\): __trap", INPUT),
    "endless_loop": ("the launch does not end", INPUT),
    "endless_shuffling": ("the launch does not end", NEIGHBOURS),
}  # fmt: skip
# On one cluster of two blocks.
CLUSTER = {"blocks": 2, "threads": 32, "cluster": 2}
SWAPPED = INPUT[32:] + INPUT[:32]
IN_CLUSTERS = {
    "cluster_barrier_not_reached_by_all": (
        r"block \(0, 0, 0\).*cluster_barrier \(faults\.cu:\d+\) waits for thread \(0, 0, 0\) of block \(1, 0, 0\), which has "
        "exited"
    ),
    "block_that_has_ended": "shared memory of block [01], which has ended",
    "mbarrier_without_a_start": "an mbarrier that has not been initialised",
    "bytes_that_never_come": r"block \(0, 0, 0\).*mbarrier_wait \(faults\.cu:\d+\) waits for 4 bytes",
}
# These show as a result that differs: from order to order, or from the truth.
SHOWN = {
    "missing_barrier": INPUT[::-1],
    "missing_warp_barrier": NEIGHBOURS,
    "blocks_that_depend": [sum(INPUT[: i + 1]) for i in range(N)],
    "uninitialised_shared": INPUT[::-1],
    "copy_not_waited_for": INPUT,
}


@pytest.fixture(scope="module")
def faults():
    """The extension module, as it should be left: set to the forward order."""
    folder = build.HERE
    return build.load("simt_faults", (folder / "faults.cu", folder / "faults_module.cpp"))


@pytest.fixture(params=ORDERS)
def run(request, faults, monkeypatch):
    monkeypatch.setattr(faults.settings, "order", getattr(faults.Order, request.param))
    monkeypatch.setattr(faults.settings, "seconds", 0.2)

    def run(kernel, planted):
        # One thread of each block is enough where blocks are what is tested.
        shape = {"blocks": N, "threads": 1} if kernel == "blocks_that_depend" else {}
        if kernel in IN_CLUSTERS:
            shape = CLUSTER
        return faults.run(kernel, planted, INPUT, **shape)

    return run


@pytest.mark.parametrize("kernel", CAUGHT)
def test_caught(run, kernel):
    with pytest.raises(RuntimeError, match=CAUGHT[kernel][0]) as error:
        run(kernel, True)
    assert str(error.value).startswith(f"{kernel}: ")
    # The process goes on, and the next launch finds nothing of this one.
    assert run("copy", False) == INPUT


@pytest.mark.parametrize("kernel", IN_CLUSTERS)
def test_caught_in_clusters(run, kernel):
    with pytest.raises(RuntimeError, match=IN_CLUSTERS[kernel]) as error:
        run(kernel, True)
    assert str(error.value).startswith(f"{kernel}: ")
    assert run(kernel, False) == SWAPPED


def test_bytes_not_waited_for(faults, monkeypatch):
    """They come at once in the first order, and too late in the others."""
    monkeypatch.setattr(faults.settings, "order", faults.Order.shuffled)
    with pytest.raises(
        RuntimeError, match=r"block [01], which has ended|a cluster has ended before what its blocks have sent"
    ):
        faults.run("bytes_not_waited_for", True, INPUT, **CLUSTER)
    assert faults.run("bytes_not_waited_for", False, INPUT, **CLUSTER) == SWAPPED


@pytest.mark.parametrize("kernel", SHOWN)
def test_shown(faults, kernel, monkeypatch):
    """NaN equals nothing, and what depends on an order cannot be right in all three."""
    shape = {"blocks": N, "threads": 1} if kernel == "blocks_that_depend" else {}
    wrong = 0
    for order in ORDERS:
        monkeypatch.setattr(faults.settings, "order", getattr(faults.Order, order))
        wrong += faults.run(kernel, True, INPUT, **shape) != SHOWN[kernel]
    assert wrong


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"threads": 0}, "a launch of 0 threads a block"),
        ({"threads": 1025}, "a launch of 1025 threads a block"),
        ({"blocks": 0}, r"a launch of \(0, 1, 1\) blocks"),
        ({"blocks": 3, "cluster": 2}, r"a launch of \(3, 1, 1\) blocks of 64 threads in clusters of 2"),
        ({"shared_bytes": 48 * 1024 + 1}, "a launch with 49153 bytes of shared memory, where 49152 are granted"),
    ],
    ids=str,
)
def test_impossible_launches(faults, shape, reason):
    with pytest.raises(RuntimeError, match=f"copy: {reason}"):
        faults.run("copy", False, INPUT, **shape)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "half"), (torch.bfloat16, "bfloat16")], ids=str)
def test_number_formats(faults, dtype, name):
    """Every half to float; and to half every float that lies on, between and just beside two halves."""
    to_float, from_float = getattr(faults, f"{name}_to_float"), getattr(faults, f"float_to_{name}")
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    floats = torch.tensor([to_float(bits & 0xFFFF) for bits in halves.view(torch.int16).tolist()])
    assert torch.equal(floats.nan_to_num(nan=123456.0), halves.float().nan_to_num(nan=123456.0))
    assert torch.equal(floats.isnan(), halves.isnan())

    finite = floats[floats.isfinite()].sort().values
    middles = ((finite[1:].double() + finite[:-1].double()) / 2).float()
    beyond = torch.tensor([65519.0, 65520.0, 1e38, 3.4e38, math.inf, math.nan])
    values = torch.cat([finite, *(torch.nextafter(middles, middles + s) for s in (-1, 0, 1)), beyond, -beyond])
    rounded = torch.tensor([from_float(x) for x in values.tolist()], dtype=torch.int32).to(torch.int16).view(dtype)
    assert torch.equal(rounded.isnan(), values.isnan())
    number = ~values.isnan()
    # As bits: the zero's sign too.
    assert torch.equal(rounded[number].view(torch.int16), values[number].to(dtype).view(torch.int16))


@pytest.mark.parametrize("kernel", [*CAUGHT, *SHOWN])
def test_the_same_without_the_fault_passes(run, kernel):
    assert run(kernel, False) == (SHOWN[kernel] if kernel in SHOWN else CAUGHT[kernel][1])
