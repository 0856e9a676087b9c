"""One compiled kernel as a line of `gpu_static.csv`: its resources, and what the path of a row of rank 0 executes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from cards import ARCHITECTURES, PIPES
from sass import Code, Way

BYTES = {"fp32": 4, "bf16": 2}
ROW_TERMS = 20  # bytes of a row beside its logits: label 8, rank 4, both loss terms 8


@dataclass(frozen=True)
class Row:
    """One kernel for one target: a line of the CSV. What a target's machine code does not tell is empty.

    Attributes:
        case: what was called, beside C and dtype; "" is the table: KD with CE at temperature 4, mean, gradient.
        left: whether the kernel takes the rows that another one has left.
        lanes, rows: lanes of a block and the rows that they hold.
        local: instructions that touch local memory, spills included (gfx942: spilled registers).
        load_bytes, store_bytes: width of the accesses of the logits and of the gradient, a lane.
        reads, writes: how often the path of a row of rank 0 passes over it, both sides counted.
        instructions, special, ...: executed for a row of rank 0, for each of its N * C elements, lanes without one too.
    """

    backend: str
    kernel: str
    case: str
    C: int
    dtype: str
    target: str
    left: bool
    lanes: int
    rows: int
    registers: int
    local: int
    shared: int
    warps_per_sm: int | None = None
    load_bytes: int | None = None
    store_bytes: int | None = None
    reads: int | None = None
    writes: int | None = None
    bytes_ratio: float | None = None
    instructions: float | None = None
    special_function: float | None = None
    multiply_add: float | None = None
    integer_and_compare: float | None = None
    shuffle_and_shared_memory: float | None = None

    @property
    def row_loss(self) -> bool:
        """Whether this kernel is the first to touch a row of a loss, so that a row of rank 0 has a path through it."""
        return self.kernel in ("sort_kd_tile", "sort_kd_stream") and not self.left

    @property
    def on_chip(self) -> bool:
        """Whether the kernel holds whole rows, each logit being read once."""
        return self.reads == 2


def _row_facts(code: Code, row: Row, labels: int) -> Row:
    """The row with what the path of a row of rank 0 shows; ``labels`` are loads of 8 bytes that are no logits."""
    e = BYTES[row.dtype]
    way = code.way(row.C * e, row.lanes)
    lanes_per_element = row.lanes / row.rows / row.C
    load, loaded = _widest(way, "LDG", 2 * row.rows * row.C * e / row.lanes, labels)
    store, stored = _widest(way, "STG", row.rows * row.C * e / row.lanes, 0)
    reads, writes = (int(x * row.lanes / (row.rows * row.C * e)) for x in (loaded, stored))
    # Each element needs an exponential of either side: a path with fewer would not be that of a whole row.
    if way.count("MUFU.EX2") < 2 / lanes_per_element or not reads or not writes:
        raise ValueError(f"{row}: the path found is not that of a whole row: {way.opcodes}")
    issued = {"instructions": float(sum(way.opcodes.values()))}
    issued |= {pipe.replace(" ", "_").replace("-", "_"): float(way.count(*names)) for pipe, names in PIPES.items()}
    per_element = {name: round(n * lanes_per_element, 2) for name, n in issued.items()}
    ratio = ((reads + writes) * row.C * e + ROW_TERMS) / (3 * row.C * e)
    found = {"load_bytes": load, "store_bytes": store, "reads": reads, "writes": writes, "bytes_ratio": round(ratio, 4)}
    return Row(**asdict(row) | found | per_element)


def _widest(way: Way, prefix: str, needed: float, labels: int) -> tuple[int, int]:
    """Width of the accesses that move at least ``needed`` bytes a lane, and what they move."""
    for width, marks in ((16, (".128",)), (8, (".64",)), (4, ()), (2, (".U16",))):
        count = sum(
            n for opcode, n in way.opcodes.items()
            if opcode.startswith(prefix) and (any(m in opcode for m in marks) if marks else opcode == f"{prefix}.E")
        ) - (labels if width == 8 else 0)  # fmt: skip
        if count * width >= needed:
            return width, count * width
    return 0, 0


def nvidia_row(
    backend: str, code: Code, name: str, label: str, C: int, dtype: str, target: str, left: bool, num_warps: int,
    rows: int, shared: int, labels: int,
) -> Row:  # fmt: skip
    """The facts of one kernel's machine code, with its path where a row of rank 0 has one."""
    resident = ARCHITECTURES[target].resident_warps(code.registers, num_warps, shared)
    row = Row(backend, name, label, C, dtype, target, left, 32 * num_warps, rows, code.registers,
              code.local_accesses, shared, resident)  # fmt: skip
    return _row_facts(code, row, labels) if row.row_loss and not label else row
