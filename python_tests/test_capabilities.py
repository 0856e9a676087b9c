"""The kernels of every instruction set that this processor has: the core of the tests again, each in its own process.

ATen chooses the instruction set when it loads, and ours follows it, so a process can have but one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sortkd_kernels

HERE = Path(__file__).parent
# The variable's value, and what build_info() calls it.
CAPABILITIES = {"default": "baseline", "avx2": "avx2", "avx512": "avx512"}
CORE = (
    "test_equivalence.py",
    "test_sort_logits.py",
    "test_pinned_rules.py",
    "test_topk.py",
    "test_bucket.py",
    "test_layouts.py",
    "test_precision.py",
)
INFO = sortkd_kernels.build_info()
WIDTHS = list(CAPABILITIES.values())
# The widest is what the tests of this very process run on.
NARROWER = [
    name
    for name, ours in CAPABILITIES.items()
    if ours in INFO.get("cpu_capabilities", ()) and WIDTHS.index(ours) < WIDTHS.index(INFO["cpu_capability"])
]


@pytest.mark.slow
@pytest.mark.parametrize("capability", NARROWER)
def test_core(capability):
    environment = os.environ | {
        "ATEN_CPU_CAPABILITY": capability,
        "SORTKD_EXPECT_CAPABILITY": CAPABILITIES[capability],
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "native and not compiled", *CORE],
        cwd=HERE,
        env=environment,
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    # A misspelt filter would select nothing and pass.
    assert done.stdout.count(".") > 500
