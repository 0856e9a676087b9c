"""GPUs as the model sees them: what limits how many warps an SM holds, and how fast its pipes and its memory are.

Limits of an architecture are from NVIDIA's CUDA C++ Programming Guide: the table of technical specifications per
compute capability (registers, warps, blocks, shared memory) and the table of arithmetic throughput (results a clock and
SM). Cards are from NVIDIA's own documents, named beside each; a clock is the one that gives the document's FP32 rate.
"""

from __future__ import annotations

from typing import NamedTuple

# Opcodes by the pipe that executes them. An IMAD that only moves or shifts runs beside the multiplications.
PIPES = {
    "special function": ("MUFU", "F2F", "I2F.", "F2I"),
    "multiply-add": ("FADD", "FMUL", "FFMA", "IMAD", "HFMA", "HADD", "HMUL"),
    "integer and compare": (
        "FSEL", "FSET", "FMNMX", "ISETP", "IADD", "VIADD", "LOP3", "PLOP3", "SEL", "SHF", "PRMT", "LEA", "F2FP", "I2FP",
        "IMNMX", "VIMNMX", "P2R", "R2P", "IABS", "POPC", "FLO", "VOTE",
    ),
    "shuffle and shared memory": ("SHFL", "LDS", "STS", "LDG", "STG"),
}  # fmt: skip


class Architecture(NamedTuple):
    """What an SM has; rates in lanes a clock, of which a warp's instruction takes 32.

    Attributes:
        warps, blocks, shared: the most that are resident; shared memory in bytes, of which each block takes 1024 more
            than it asks for.
        fma: rate of the multiply-add pipe. The others are alike on all: issue 128, compare 64, memory 32, special 16.
    """

    warps: int
    blocks: int
    shared: int
    fma: int

    def resident_warps(self, registers: int, num_warps: int, shared: int) -> int:
        """Warps on an SM for a kernel of ``num_warps`` warps a block: registers come in units of 256 for each warp."""
        by_registers = 65536 // (-(-registers * 32 // 256) * 256) // num_warps
        by_shared = self.shared // (shared + 1024)
        return num_warps * min(self.blocks, self.warps // num_warps, by_registers, by_shared)

    def rate(self, pipe: str) -> int:
        """Lanes a clock of a pipe, or of the four schedulers (``"issue"``)."""
        return {"issue": 128, "special function": 16, "multiply-add": self.fma, "integer and compare": 64}.get(pipe, 32)


ARCHITECTURES = {
    "sm_80": Architecture(64, 32, 164 << 10, 64),
    "sm_89": Architecture(48, 24, 100 << 10, 128),
    "sm_90": Architecture(64, 32, 228 << 10, 128),
    "sm_100": Architecture(64, 32, 228 << 10, 128),
}


class Card(NamedTuple):
    """A card: its architecture, SMs, memory bandwidth and clock, and where the figures stand."""

    target: str
    processors: int
    bytes_per_s: float
    hertz: float
    source: str


CARDS = {
    "H100 SXM": Card(
        "sm_90", 132, 3.35e12, 1.98e9,
        "NVIDIA H100 Tensor Core GPU datasheet: 3.35 TB/s, 67 TFLOPS FP32; 132 SMs of 128 lanes",
    ),
    "A100 SXM 80 GB": Card(
        "sm_80", 108, 2.039e12, 1.41e9,
        "NVIDIA A100 Tensor Core GPU datasheet: 2039 GB/s, 19.5 TFLOPS FP32; 108 SMs of 64 lanes",
    ),
    "RTX 4090": Card(
        "sm_89", 128, 1.008e12, 2.52e9,
        "NVIDIA Ada GPU Architecture whitepaper, appendix A: 1008 GB/s, 82.6 TFLOPS FP32; 128 SMs of 128 lanes",
    ),
}  # fmt: skip


class Prediction(NamedTuple):
    """What the model says of a kernel on a card; none of it is a timing.

    Attributes:
        binds: the limit with the longest time, ``"memory"`` or a pipe.
        most: the share of the peak bandwidth if the limits overlap perfectly.
        least: the same if memory waits for arithmetic and the other way round.
    """

    binds: str
    most: float
    least: float


def predict(card: Card, bytes_per_row: float, lanes_per_row: dict[str, float]) -> Prediction:
    """The roofline: each limit's clocks for one row on one SM, which has its share of the bandwidth.

    Args:
        lanes_per_row: by pipe, and in all (``"issue"``), the lane slots of the instructions executed for one row.
    """
    architecture = ARCHITECTURES[card.target]
    memory = bytes_per_row * card.hertz * card.processors / card.bytes_per_s
    clocks = {pipe: lanes / architecture.rate(pipe) for pipe, lanes in lanes_per_row.items()}
    slowest = max(clocks, key=clocks.__getitem__)
    binds = "memory" if memory >= clocks[slowest] else slowest
    return Prediction(binds, memory / max(memory, clocks[slowest]), memory / (memory + clocks[slowest]))
