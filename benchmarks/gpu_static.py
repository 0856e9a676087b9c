"""What the compiled form of the GPU kernels shows, on a machine without a GPU.

    TRITON_INTERPRET=0 python benchmarks/gpu_static.py

writes `benchmarks/results/gpu_static.csv` and `.md`. Registers, local memory, widths and counts are read off the
machine code (`sass.py`); the roofline (`cards.py`) is a model. Nothing here is a timing, and nothing ran on a GPU.
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from itertools import chain
from pathlib import Path

import cuda_instances
import static_report
import torch
import triton
from cards import CARDS, PIPES, Prediction, predict
from sass import read
from static_rows import BYTES, Row, nvidia_row

from sortkd_kernels import backends
from sortkd_kernels.backends.triton import offline
from sortkd_kernels.backends.triton.offline import Case
from sortkd_kernels.ops import LossConfig

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NVIDIA = ("sm_80", "sm_90", "sm_100")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = (100, 1000, 1024, 32000)

# Beyond the table: the launches that press hardest on the registers, none of which may spill.
F64, F16 = torch.float64, torch.float16
HARD = (
    Case(8192, temperature=2.5),  # the most classes on chip, and an exponential more
    Case(4096, every_sum=True, temperature=2.5),
    Case(2048, F64, every_sum=True, temperature=2.5),
    Case(10, F64, every_sum=True, temperature=2.5),  # short rows: a lane has the scalars of several
    Case(150, torch.bfloat16, dense=True, every_sum=True, temperature=2.5),
    Case(1001, F16, torch.float32, temperature=2.5),  # single loads
    Case(32000, torch.bfloat16, top_k=64, every_sum=True, temperature=2.5),
)


def triton_rows(case: Case, label: str, target: str, only: str | None = None) -> Iterator[Row]:
    """A row for each kernel that a case launches (the first launch of each kind); ``only`` one of them by name."""
    seen = set()
    for launch in offline.launches(case, target, LossConfig, rows=64):
        name = launch.kernel.__name__
        if (name, launch.left) in seen or (only and name != only):
            continue
        seen.add((name, launch.left))
        binary = offline.compiled(launch, target)
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16", F16: "fp16", F64: "fp64"}[case.dtype]
        if target.startswith("gfx"):
            facts = {key: int(re.search(rf"\.{key}:\s+(\d+)", binary.asm["amdgcn"])[1])
                     for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size",
                                 "group_segment_fixed_size")}  # fmt: skip
            local = facts["vgpr_spill_count"] + facts["private_segment_fixed_size"] // 4
            yield Row("triton", name, label, case.C, dtype, target, launch.left, 64 * launch.num_warps, launch.rows,
                      facts["vgpr_count"], local, facts["group_segment_fixed_size"])  # fmt: skip
            continue
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            (code,) = read(Path(file.name), CUOBJDUMP).values()
        labels = binary.asm["ptx"].count("ld.global.b64")
        yield nvidia_row(
            "triton", code, name, label, case.C, dtype, target, launch.left, launch.num_warps, launch.rows,
            binary.metadata.shared, labels,
        )  # fmt: skip


def cuda_rows(files: list[Path]) -> Iterator[Row]:
    """The kernels of the compiled extension (or of its objects), and the path of those that serve the table."""
    for target in ("sm_80", "sm_89", "sm_90", "sm_100"):
        kernels = {name: code for file in files for name, code in read(file, CUOBJDUMP, "-arch", target).items()}
        for C in SIZES:
            for dtype in DTYPES:
                chosen = cuda_instances.instance(C, dtype)
                if chosen and (target != "sm_89" or C == 1000):  # sm_89: for the model's consumer card
                    (code,) = (k for name, k in kernels.items() if chosen.mangled in name)
                    yield nvidia_row("cuda", code, chosen.kernel, "", C, dtype, target, False, chosen.lanes // 32,
                                     chosen.rows, chosen.shared, 1)  # fmt: skip
        for name, code in sorted(kernels.items()) if target in NVIDIA else ():
            yield Row("cuda", cuda_instances.kernel_name(name), "every call", 0, "", target, False, 0, 0,
                      code.registers, code.local_accesses, 0)  # fmt: skip


def all_triton_rows() -> Iterator[Row]:
    """Everything that Triton compiles."""
    for C in SIZES:
        for dtype in DTYPES.values():
            for target in (*NVIDIA, "gfx942"):
                yield from triton_rows(Case(C, dtype), "", target)
    for dtype in DTYPES.values():
        yield from triton_rows(Case(1000, dtype), "", "sm_89", "sort_kd_tile")  # for the model's consumer card
    for case in HARD:
        for target in NVIDIA:
            for row in triton_rows(case, _label(case), target):
                if row.kernel in ("sort_kd_tile", "sort_kd_stream") or case.dtype == F64:  # the others are in the table
                    yield row


def _label(case: Case) -> str:
    words = {"every sum": case.every_sum, "dense": case.dense, f"top {case.top_k}": case.top_k,
             "swap": case.correction == 2, f"T {case.temperature:g}": True}  # fmt: skip
    return ", ".join(word for word, present in words.items() if present)


def fingerprint() -> str:
    """A hash of what the Triton kernels compute and of how they are launched: comments and docstrings do not count."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "sortkd_kernels" / "backends" / "triton").glob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if (
                isinstance(body, list)
                and body
                and isinstance(body[0], ast.Expr)
                and isinstance(body[0].value, ast.Constant)
            ):
                body[0] = ast.Pass()
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def write(rows: list[Row], output: Path) -> None:
    """The CSV, whose first line says what it was made from, and the tables."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / "gpu_static.csv").open("w", newline="") as file:
        file.write(f"# sources {fingerprint()} {cuda_instances.fingerprint()}, triton {triton.__version__}\n")
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(r) for r in rows)
    (output / "gpu_static.md").write_text(static_report.markdown(rows, promises(rows), list(predictions(rows))))


def load(path: Path) -> tuple[str, list[Row]]:
    """The first line of a CSV, and its rows."""
    head, *lines = path.read_text().splitlines()
    kinds = {f.name: str(f.type).removesuffix(" | None") for f in fields(Row)}
    convert = {"int": int, "float": float, "str": str, "bool": lambda x: x == "True"}
    rows = [
        Row(**{k: convert[kinds[k]](v) if v or kinds[k] == "str" else None for k, v in r.items()})
        for r in csv.DictReader(lines)
    ]
    return head, rows


def predictions(rows: list[Row]) -> Iterator[tuple[str, Row, Prediction]]:
    """The model for each card and each kernel of the table that is compiled for it."""
    for name, card in CARDS.items():
        for r in rows:
            if r.target == card.target and r.instructions is not None:
                lanes = {"issue": r.instructions * r.C}
                lanes |= {pipe: getattr(r, pipe.replace(" ", "_").replace("-", "_")) * r.C for pipe in PIPES}
                yield name, r, predict(card, r.bytes_ratio * 3 * r.C * BYTES[r.dtype], lanes)


def promises(rows: list[Row]) -> list[tuple[str, list[str]]]:
    """What must hold, each with the rows (in words) where it does not."""

    def where(found: Iterable[Row]) -> list[str]:
        return [f"{r.backend} {r.kernel} {r.target} {r.C} {r.dtype} {r.case}".strip() for r in found]

    paths = [r for r in rows if r.reads is not None]
    wide = [r for r in paths if r.C * BYTES[r.dtype] % 16 == 0]
    return [
        ("no kernel touches local memory: nothing spills", where(r for r in rows if r.local)),
        (
            "logits and gradient move 16 bytes a lane where C e is a multiple of 16",
            where(r for r in wide if (r.load_bytes, r.store_bytes) != (16, 16)),
        ),
        (
            "rows that a kernel holds on chip move at most 1.05 of the least bytes, 3 C e",
            where(r for r in paths if r.on_chip and r.bytes_ratio > 1.05),
        ),
        (
            "at C = 1000 memory is the limit on each card of the model",
            [
                f"{name}: {r.dtype}, {p.binds}"
                for name, r, p in predictions(rows)
                if r.C == 1000 and p.binds != "memory"
            ],
        ),
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", type=Path, nargs="+", help="object files in place of the installed extension")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of gpu_static.csv and .md")
    args = parser.parse_args()
    rows = []
    for row in chain(cuda_rows(args.cuda or [Path(backends.extension().__file__)]), all_triton_rows()):
        rows.append(row)
        print(
            f"{row.target} {row.kernel} C={row.C} {row.dtype} {row.case}: {row.registers} registers, {row.local} local"
        )
    write(rows, args.output)


if __name__ == "__main__":
    main()
