"""The figures that `benchmarks/gpu_static.py` has read off compiled kernels: they hold, and they are these sources'.

No GPU is needed and nothing here is a GPU timing. The results are held to the sources by a hash of what the kernels
compute, and to the compiler by compiling the common case again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import sortkd_kernels

ROOT = Path(sortkd_kernels.__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
TARGETS = ("sm_80", "sm_90", "sm_100")

pytest.importorskip("triton", reason="the kernels are compiled by triton")


@pytest.fixture(scope="module")
def static():
    """The benchmark's module. It only reads here: in this process Triton interprets and compiles nothing."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import gpu_static

        yield gpu_static
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def results(static):
    return static.load(BENCHMARKS / "results" / "gpu_static.csv")


def test_results_are_of_these_sources(static, results):
    head, _ = results
    for fingerprint in (static.fingerprint(), static.cuda_instances.fingerprint()):
        assert fingerprint in head, "the kernels have changed: run benchmarks/gpu_static.py again"


def test_every_kernel_is_there(results):
    """Each kernel of the backend, for each target, size and dtype that it is launched for."""
    kernels = {"sort_kd_count", "sort_kd_tile", "sort_kd_stream", "sort_kd_reduce", "sort_kd_scale", "sort_kd_logits"}
    table = [r for r in results[1] if not r.case and r.backend == "triton"]
    for target in (*TARGETS, "gfx942"):
        for C in (100, 1000, 1024, 32000):
            for dtype in ("fp32", "bf16"):
                found = {r.kernel for r in table if (r.target, r.C, r.dtype) == (target, C, dtype)}
                assert found == (kernels - {"sort_kd_tile"} if C == 32000 else kernels)
                paths = [r for r in table if (r.target, r.C, r.dtype) == (target, C, dtype) and r.reads]
                assert len(paths) == (target != "gfx942")


def test_every_cuda_kernel_is_there(results):
    """Resources of each kernel for each target, and the path of those that serve the table by wide accesses."""
    cuda = [r for r in results[1] if r.backend == "cuda"]
    kernels = {"count", "tile", "stream", "sum", "reduce", "scale", "logits"}
    for target in TARGETS:
        names = {r.kernel.split()[0].removeprefix("sort_kd_") for r in cuda if r.target == target and r.case}
        assert names == kernels
        paths = {(r.C, r.dtype) for r in cuda if r.target == target and r.reads}
        # Rows of 200 bytes that begin anywhere are read class by class.
        assert paths == {(C, dtype) for C in (100, 1000, 1024, 32000) for dtype in ("fp32", "bf16")} - {(100, "bf16")}


def test_promises(static, results):
    """What the document promises holds for the recorded figures, without exception."""
    assert [(promise, bad) for promise, bad in static.promises(results[1]) if bad] == []


def test_promises_can_be_broken(static, results):
    """Each of them fails for a row that breaks it."""
    (row,) = (
        r for r in results[1]
        if (r.backend, r.kernel, r.C, r.dtype, r.target) == ("triton", "sort_kd_tile", 1000, "fp32", "sm_90")
    )  # fmt: skip
    assert not any(bad for _, bad in static.promises([row]))
    broken = (
        replace(row, local=1),
        replace(row, load_bytes=4),
        replace(row, bytes_ratio=1.06),
        replace(row, instructions=3 * row.instructions),
    )
    for i, one in enumerate(broken):
        assert [bool(bad) for _, bad in static.promises([one])] == [j == i for j in range(4)]


def test_document_is_of_the_results(static, results):
    rows = results[1]
    text = static.static_report.markdown(rows, static.promises(rows), list(static.predictions(rows)))
    assert (BENCHMARKS / "results" / "gpu_static.md").read_text() == text
    assert "A model, never a timing" in text


def test_common_case_compiled_again(static, results):
    """C = 1000 for sm_90: the promises hold of what this machine's compiler makes, and it is what was recorded."""
    script = (
        "import json, sys; from dataclasses import asdict; import gpu_static as g, torch\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    for row in g.triton_rows(g.Case(1000, dtype), '', 'sm_90', 'sort_kd_tile'): print(json.dumps(asdict(row)))\n"
        "tile = g.offline.launches(g.Case(1000), 'sm_90', g.LossConfig)[1]\n"
        "assert '__assertfail' in g.offline.compiled(tile, 'sm_90').asm['ptx']  # of a label outside the classes"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join((str(BENCHMARKS), str(ROOT)))}
    output = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr[-3000:]
    rows = [static.Row(**json.loads(line)) for line in output.stdout.splitlines()]
    assert [r.dtype for r in rows] == ["fp32", "bf16"]
    assert not [bad for _, bad in static.promises(rows) if bad]
    head, recorded = results
    if head.endswith(f"triton {static.triton.__version__}"):  # another compiler makes other code
        for row in rows:
            assert asdict(row) in [asdict(r) for r in recorded]


DIAMOND = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 BRA 0x60 ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   MUFU.EX2 R4, R4 ;
        /*0040*/               @P1 BRA 0x20 ;
        /*0050*/                   STL [R1], R4 ;
        /*0060*/               @P2 EXIT ;
        /*0070*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
"""


def test_path_of_a_row(static):
    """Through the loop that streams the row, once for each block; a branch round it is not taken; a guarded exit
    neither."""
    from sass import Code

    code = Code("kernel", DIAMOND, 8)
    assert code.local_accesses == 1
    way = code.way(row_bytes=1024, lanes=32)  # a block is 256 bytes of either side
    assert way.trips == 4
    assert (way.count("LDG"), way.count("MUFU"), way.count("BRA"), way.count("STG"), way.count("EXIT")) == (
        4,
        4,
        5,
        1,
        2,
    )


def test_occupancy():
    """Two cases worked by hand from the tables of the CUDA C++ Programming Guide."""
    sys.path.insert(0, str(BENCHMARKS))
    from cards import ARCHITECTURES

    sm_90 = ARCHITECTURES["sm_90"]
    assert sm_90.resident_warps(registers=128, num_warps=8, shared=0) == 16  # 4096 registers a warp: 16 of 65536
    assert sm_90.resident_warps(registers=32, num_warps=1, shared=0) == 32  # no more than 32 blocks
    assert sm_90.resident_warps(registers=32, num_warps=4, shared=50 << 10) == 16  # 51 KiB of 228 each
    assert ARCHITECTURES["sm_80"].resident_warps(registers=130, num_warps=4, shared=0) == 12  # 136 * 32 registers each
