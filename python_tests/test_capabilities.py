"""The kernels of every instruction set that this processor has: the core of the tests again, each in its own process.

ATen chooses the instruction set when it loads, and ours follows it, so a process can have but one.
"""

from __future__ import annotations

import os
import re
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
    "test_layouts.py",
    "test_precision.py",
)
ORDER = list(CAPABILITIES.values())


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_core(capability):
    wanted, widest = CAPABILITIES[capability], sortkd_kernels.build_info()["cpu_capability"]
    carried = sortkd_kernels.build_info()["cpu_capabilities"]
    if wanted not in carried or ORDER.index(wanted) > ORDER.index(widest):
        pytest.skip(f"this processor has {widest} at the most, this build carries {', '.join(carried)}")
    if wanted == widest:
        return  # the tests of this process
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "SORTKD_EXPECT_CAPABILITY": wanted}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-k", "native and not compiled", *CORE],
        cwd=HERE,
        env=environment,
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 1000
