"""Which compiled CUDA kernel serves a call of the table, and how it is launched: `csrc/cuda/choices.h`, for many rows.

The table's call is KD with cross-entropy at temperature 4 on contiguous rows that begin at 16 bytes.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
VECTORS_HELD, MOST_THREADS, SMALL_BLOCK, SHARED_ENTRIES = 8, 512, 128, 2048
GROUP_BYTES, COUNTER_BYTES, ENTRY_BYTES = 4096, 16, 8  # shared memory: what warps exchange; a counter; a class in order


class Instance(NamedTuple):
    """A kernel and its launch.

    Attributes:
        kernel: its name.
        mangled: what its mangled name contains.
        lanes, rows: threads of a block and the rows that they hold.
        shared: dynamic shared memory, in bytes.
    """

    kernel: str
    mangled: str
    lanes: int
    rows: int
    shared: int


def instance(C: int, dtype: str) -> Instance | None:
    """The kernel that meets a row of C classes first; None where it loads single values, which has no wide path."""
    letters, size = {"fp32": ("f", 4), "bf16": ("NS0_8BFloat16E", 2)}[dtype]
    access, width = f"6PeeledI{letters}E", 16 // size
    held = VECTORS_HELD * width
    if C * size % 16 and C * size < 256:
        return None
    if MOST_THREADS * held >= C:
        group = _power_of_two_over(-(-C // held))
        lanes = group if group > 32 else SMALL_BLOCK
        return Instance("sort_kd_tile", f"12sort_kd_tileINS0_{access}ELb0", lanes, lanes // group,
                        GROUP_BYTES if group > 32 else 0)  # fmt: skip
    lanes = min(MOST_THREADS, max(64, _power_of_two_over(-(-C // (2 * width)))))
    return Instance("sort_kd_stream", f"14sort_kd_streamINS0_{access}ELb0", lanes, 1,
                    GROUP_BYTES + COUNTER_BYTES + SHARED_ENTRIES * ENTRY_BYTES)  # fmt: skip


def kernel_name(mangled: str) -> str:
    """The unmangled name of a kernel, and what its instance is for."""
    found = re.search(r"(\d+)(sort_kd_\w+)", mangled)
    if not found:
        return mangled
    rest = found[2][int(found[1]) :]
    types = {"f": "float", "d": "double", "NS0_8BFloat16E": "bfloat16", "NS0_4HalfE": "half"}
    words = re.findall(r"Peeled|Scattered", rest)
    words += [types[t] for t in re.findall(r"I(f|d|NS0_8BFloat16E|NS0_4HalfE)", rest)[:1]]
    words += ["general"] if "Lb1" in rest else []
    return " ".join([found[2][: int(found[1])], *words])


def fingerprint() -> str:
    """A hash of the CUDA sources without their comments and blanks."""
    digest = hashlib.sha256()
    for path in sorted([*CUDA.glob("*.cu*"), *CUDA.glob("*.h"), CUDA.parent / "row_math.h"]):
        digest.update(re.sub(r"//[^\n]*|\s+", "", path.read_text()).encode())
    return digest.hexdigest()[:16]


def _power_of_two_over(n: int) -> int:
    return 1 << (n - 1).bit_length()
