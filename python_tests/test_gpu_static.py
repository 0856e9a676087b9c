"""Facts of the compiled GPU kernels, read off their machine code without a GPU: no timing, and no prediction of one.

`benchmarks/gpu_static.py` reads; the limits are the table here.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import sortkd_kernels

ROOT = Path(sortkd_kernels.__file__).parent.parent
spec = importlib.util.spec_from_file_location("gpu_static", ROOT / "benchmarks" / "gpu_static.py")
sys.modules["gpu_static"] = gpu_static = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_static)

TARGETS = ("sm_80", "sm_90", "sm_100")
BUILT = sortkd_kernels.build_info().get("cuda") or ()
TRITON_STATE = sortkd_kernels.available_backends()["triton"]


class Limits(NamedTuple):
    """The most that a hot kernel may need on every target; 0: not limited yet.

    Attributes:
        kernel: a pattern that its mangled name has.
        itemsize: bytes of a logit.
        held: classes of a row of 1000 that a thread holds, 0 for a kernel that loops over the row.
        code: instructions of its code, which small batches fetch once: without what only diverged lanes reach. Of lanes
            560 are those of rotate.cuh, for rows with more than three classes a lane above their label.
        instructions, exponentials: of a thread for each class, with all that a launch executes once and what part of
            the correction has exponentials.
        vectors: the least 16-byte loads, and the stores at half as many.
        row: instructions for each class of one more row of rank 0, for a kernel that goes from row to row.
        warps: of a block that has the row.
    """

    kernel: str
    itemsize: int
    held: float
    registers: int
    code: int
    instructions: float
    exponentials: float
    vectors: int
    row: float = 0
    warps: int = 1


# KD, beside it cross-entropy at temperature 1 (Mode 0), and KD with cross-entropy at 2 and 4 (1): a warp a row (Kind 0), and a block or a cluster a row (1), whose threads
# hold 32 classes of rows of 32000. 128 registers leave 16 warps a processor; each has its next row on the way.
HELD = "sort_kd_heldI{}LNS0_4KindE{}ELi{}ELi{}ELNS0_4ModeE{}"
# The general mode (3): with z-scores, a cross-entropy of its own and the temperature's gradient, all at once, its moments twice.
BF16, F16 = "NS0_8BFloat16E", "NS0_4HalfE"
CUDA = (
    Limits(HELD.format("f", 0, 8, "n1", 3), 4, 1000 / 32, 168, 6720, 50, 3.2, 16, 72),
    Limits(HELD.format("f", 1, 8, "n1", 3), 4, 32, 168, 7600, 52, 3.1, 16, 78, 8),
    Limits(HELD.format("f", 0, 8, 5, 0), 4, 1000 / 32, 128, 2770, 33.3, 2.3, 16, 26.6),
    Limits(HELD.format("f", 0, 8, 5, 1), 4, 1000 / 32, 128, 3000, 39.4, 2.3, 16, 33.2),
    Limits(HELD.format("f", 1, 8, "n1", 0), 4, 32, 128, 2600, 31.8, 2.3, 16, 24.3, 8),
    Limits(HELD.format("f", 1, 8, "n1", 1), 4, 32, 128, 2830, 35.4, 2.3, 16, 30.6, 8),
    *(
        limits
        for dtype, more in ((BF16, 0), (F16, 1))  # halves have no blank: a comparison a class
        for limits in (
            Limits(HELD.format(dtype, 0, 4, 5, 0), 2, 1000 / 32, 128, 2770, 31.9 + more, 2.3, 8, 27.5 + more),
            Limits(HELD.format(dtype, 0, 4, 5, 1), 2, 1000 / 32, 128, 3000, 38.4 + more, 2.3, 8, 33.9 + more),
            Limits(HELD.format(dtype, 1, 4, "n1", 0), 2, 32, 128, 2610, 31.3 + more, 2.3, 8, 25.6 + more, 8),
            Limits(HELD.format(dtype, 1, 4, "n1", 1), 2, 32, 128, 2850, 36 + more, 2.3, 8, 31.6 + more, 8),
        )
    ),
)
# The classes of the row and its dtype, then as above.
TRITON = (
    (101, "float32", Limits("sort_kd_short_rows", 4, 0, 136, 2900, 0, 0, 0)),
    (1000, "float32", Limits("sort_kd_short_rows", 4, 1000 / 32, 136, 3600, 50, 2.5, 16)),
    (1000, "bfloat16", Limits("sort_kd_short_rows", 2, 1000 / 32, 136, 3900, 60, 2.5, 8)),
    (32000, "float32", Limits("sort_kd_long_rows", 4, 0, 128, 3600, 0, 0, 4)),
    (32000, "bfloat16", Limits("sort_kd_long_rows", 2, 0, 128, 3600, 0, 0, 2)),
)


def check(kernel, limits: Limits) -> None:
    found = {"registers": kernel.registers, "code": kernel.fetched}
    found |= kernel.per_class(limits.itemsize, limits.held)
    if limits.row:
        found["row"] = kernel.row(limits.warps) / limits.held
    over = {name: x for name, x in found.items() if getattr(limits, name) and x > getattr(limits, name)}
    assert not over, f"{kernel.name}: {over} beyond {limits}"
    # Fewer than one for each logit would mean that the way found is not that of a whole row.
    assert not limits.exponentials or found["exponentials"] >= 2
    wide = [x.opcode[:3] for x in kernel.code if x.wide == 16]
    assert wide.count("LDG") >= limits.vectors and wide.count("STG") >= limits.vectors / 2


@pytest.fixture(scope="module", params=TARGETS)
def cuda_kernels(request):
    if request.param not in BUILT:
        pytest.skip(f"the extension has no CUDA kernels for {request.param}; test_cuda_build.py says whether it should")
    return gpu_static.read(Path(sortkd_kernels.backends.extension().__file__), request.param)


def test_no_cuda_kernel_spills(cuda_kernels):
    spill = [k.name for k in cuda_kernels if k.local_accesses]
    # Of rows that a block holds, in the modes with most registers, a number or two in each of a row's passes; of columns,
    # of which a lane holds 32 classes of either side in 128 registers, one in forty.
    allowed = {r"sort_kd_held.*KindE1.*ModeE[23]": 24, r"sort_kd_rows.*StridedI.*KindE2": 64}
    few = [
        k.name for k in cuda_kernels for p, most in allowed.items() if re.search(p, k.name) and k.local_accesses <= most
    ]
    assert [name for name in spill if name not in few] == []


@pytest.mark.parametrize("limits", CUDA, ids=lambda x: x.kernel)
def test_cuda_kernels(cuda_kernels, limits):
    found = [k for k in cuda_kernels if re.search(limits.kernel, k.name)]
    assert found, f"no kernel is called {limits.kernel}"
    for kernel in found:
        check(kernel, limits)
        assert kernel.count("LDGSTS") >= limits.vectors, "logits on their way to shared memory"


def test_rows_that_are_read_twice_leave_room_for_warps(cuda_kernels):
    """Of two dtypes, or beside a top-k teacher: at 112 registers a processor has 18 warps to wait for memory."""
    found = [k for k in cuda_kernels if re.search("sort_kd_rowsI.*WholeVectorsI.*KindE1", k.name)]
    assert len(found) == 14
    for kernel in found:
        assert kernel.registers <= 112, kernel.name
        assert any(x.opcode.startswith("LDG") and x.wide for x in kernel.code), kernel.name


# In this process Triton interprets, so that another one compiles; rows enough for the kernels of large batches.
COMPILE = """
import sys, torch
from pathlib import Path
import triton_offline as offline
target, folder = sys.argv[1:]
cases = [offline.Case(C, getattr(torch, dtype)) for C in (1000, 32000) for dtype in ("float32", "bfloat16")]
# Of rows that begin anywhere and of dense logits what takes all rows: beside it there is only the sort of large ranks.
general = (("standardize", True),)
dense = [(150, torch.float32, ()), (150, torch.float32, general), (1000, torch.float32, ()), (150, torch.float64, ())]
first_alone = [offline.Case(101), *(offline.Case(*case, neighbours=True) for case in dense)]
for case in cases + first_alone:
    for i, launch in enumerate(offline.launches(case, target, rows=64)):
        if case in first_alone and i:
            break
        name = f"{case.C}-{str(case.dtype)[6:]}-{launch.kernel.__name__}-{i}-{len(case.options)}"
        name += f"-{launch.launch.options['num_warps']}.cubin"
        Path(folder, name).write_bytes(offline.compiled(launch, target).asm["cubin"])
"""
# Of a processor, and so of a program: a launch that wants more of them fails.
REGISTERS = 65536


@pytest.mark.slow
@pytest.mark.skipif(not TRITON_STATE.available, reason=TRITON_STATE.reason)
@pytest.mark.parametrize("target", TARGETS)
def test_triton_kernels(target, tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}
    command = [sys.executable, "-c", COMPILE, target, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = {path.name: gpu_static.read(path)[0] for path in tmp_path.iterdir()}
    for name, kernel in compiled.items():
        assert kernel.registers * 32 * int(Path(name).stem.rpartition("-")[2]) <= REGISTERS, name
        # Plain long rows take 16 values a lane, and lose less by what finds no register than eight at a time do: 492 us in
        # place of 540 at 4096x32000, 1634 of 2051 at 4096x128256 (bfloat16, an H200).
        spills = 130 if name.startswith("32000-") and "long_rows-0-0" in name else 0
        assert kernel.local_accesses <= spills, name
        # A lane that had several neighbouring rows would do the arithmetic of each one's end: 20,000 instructions.
        assert kernel.fetched <= 5500, name
    for C, dtype, limits in TRITON:
        # The first of its name: further ones take the rows that it has left.
        name = min(x for x in compiled if x.startswith(f"{C}-{dtype}-{limits.kernel}-"))
        kernel = compiled[name]
        check(kernel, limits)
        if limits.kernel == "sort_kd_long_rows":
            # The two passes over a row: two exponentials a class, and no lane asks another for a maximum.
            sums, gradient = (x for x in kernel.hot_loops if x.count("MUFU.EX2") == 32)
            assert not sums.count("SHFL") and len(sums.opcodes) <= 16 * 28
            assert not gradient.count("SHFL") and len(gradient.opcodes) <= 16 * 16
            assert kernel.count("LDGSTS"), "a tile on its way while the one before is computed"


LOOP = """
        /*0000*/                   LDG.E.64 R8, desc[UR4][R2.64] ;
        /*0010*/              @!P0 BRA 0x50 ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   MUFU.EX2 R4, R4 ;
        /*0040*/               @P1 BRA 0x20 ;
        /*0050*/               @P2 BRA 0x80 ;
        /*0060*/                   STL [R1], R4 ;
        /*0070*/                   IADD3 R1, R1, R2, RZ ;
        /*0080*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0;
"""


def test_reading_a_kernel():
    """By hand: the loop is three instructions for two classes of float; once, LDG, two branches, STG and EXIT, not the
    two instructions that the branch goes round."""
    kernel = gpu_static.Kernel("kernel", LOOP, 8, 0)
    assert kernel.local_accesses == 1 and len(kernel.code) == 11
    assert kernel.fetched == 10  # nothing leads to the branch behind the end
    assert [piece.opcodes for piece in kernel.hot_loops] == [("LDG.E.128", "MUFU.EX2", "BRA")]
    assert kernel.once.opcodes == ("LDG.E.64", "BRA", "BRA", "STG.E.128", "EXIT")
    assert kernel.per_class(4) == {"instructions": 1.5, "exponentials": 0.5}
    assert kernel.per_class(4, held=10) == {"instructions": 2.0, "exponentials": 0.5}


ROWS = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/               @P0 BRA 0x40 ;
        /*0020*/                   MUFU.RCP R5, R5 ;
        /*0030*/                   FMUL R6, R5, R6 ;
        /*0040*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0050*/               @P1 BRA 0x0 ;
        /*0060*/                   EXIT ;
"""


def test_a_call_that_returns():
    """What follows where the lanes of a warp wait for each other can be reached; behind a failed assertion nothing can."""
    calls = LOOP.replace("STL [R1], R4", "CALL.REL.NOINC 0x80").replace("@P2 BRA 0x80", "FADD R0, R0, R0")
    assert gpu_static.Kernel("kernel", calls, 8, 0).once.opcodes[-3:] == ("IADD3", "STG.E.128", "EXIT")
    assert gpu_static.Kernel("kernel", calls.replace(".REL", ".ABS"), 8, 0).fetched == 7


def test_one_more_row():
    """By hand: six instructions of the warp that has the reciprocal, four of each other; four where there is none."""
    kernel = gpu_static.Kernel("rows", ROWS, 8, 0)
    assert kernel.row() == 6 and kernel.row(warps=4) == (6 + 3 * 4) / 4
    assert gpu_static.Kernel("rows", ROWS.replace("MUFU.RCP", "FADD"), 8, 0).row() == 4
    assert gpu_static.Kernel("no rows", LOOP, 8, 0).row() == 0
