"""Logits whose classes are spread over processes: every number is that of the whole row, and the same on all ranks.

Processes take seconds to start. One launch for each number of them makes all that the tests of this file look at
(:func:`work`), and leaves what each rank came to in a file.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cases import (
    BF16,
    BY_NAME,
    F16,
    F32,
    F64,
    FEW_VARIANTS,
    IGNORE,
    VARIANTS,
    Result,
    Rows,
    Variant,
    arithmetic,
    dtype_id,
    grad_output_of,
    gradient_of,
    make_rows,
)
from test_memory import Peak
from tolerance import assert_matches, expect
from torch import distributed as dist

import sortkd_kernels
from sortkd_kernels import fused_sort_dkd, fused_sort_kd, vocab_parallel

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

# By the number of processes, the classes of each rank: 50 in all.
SLICES = {2: (20, 30), 4: (1, 7, 30, 12)}
WORLDS = [pytest.param(world, marks=pytest.mark.slow if world > 2 else ()) for world in SLICES]
EVERY_WORLD = pytest.mark.parametrize("world", WORLDS)
N, C = 24, 50
ONE_BLOCK, FEW_ROWS = vocab_parallel.CPU_BLOCK_BYTES, 4096  # the second: some rows a block, several exchanges of lists


# ---- The table of calls --------------------------------------------------------------------------------------------


class Call(NamedTuple):
    rows: Rows
    variant: Variant
    widths: tuple[int, ...]
    block_bytes: int = ONE_BLOCK


def special_rows(widths: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]) -> Rows:
    """A label at both ends of each slice, three times: with all that is above it in another slice; in ties that reach
    over all slices; with -inf for half of the classes, the label's sometimes."""
    generator = torch.Generator().manual_seed(5)
    starts = [sum(widths[:i]) for i in range(len(widths) + 1)]
    labels = [label for i, width in enumerate(widths) for label in (starts[i], starts[i] + width - 1)]
    student, teacher = torch.randn(2, 3 * len(labels), C, generator=generator, dtype=F64)
    target, classes = torch.tensor(labels * 3), torch.arange(C)
    for n, label in enumerate(target.tolist()):
        if n < len(labels):
            other = (n // 2 + 1) % len(widths)
            teacher[n].clamp_(max=2.0)
            teacher[n, label] = 2.5
            teacher[n, starts[other] : starts[other + 1]] += 6
        elif n < 2 * len(labels):
            teacher[n] = (classes % 3).double()
            teacher[n, label] = 1.0
        else:
            teacher[n, (classes + n) % 2 == 0] = -torch.inf
            teacher[n, label] = -torch.inf if n % 3 == 0 else -1.0
    return Rows(student.to(dtypes[0]), teacher.to(dtypes[1]), target)


def table(world: int) -> dict[str, Call]:
    widths = SLICES[world]
    calls = {f"{v}": Call(make_rows(N, C), v, widths) for v in VARIANTS}
    calls |= {f"{v} by few rows": Call(make_rows(N, C), v, widths, FEW_ROWS) for v in FEW_VARIANTS}
    # What depends on the dtypes is how values are read and rounded; float16's gradient is made in the backward pass.
    for pair in ((F64, F64), (BF16, BF16), (F16, F16), (F32, BF16), (F16, F64)):
        for name in ("T4-ce-rows", "lskd-row-T", "dkd-scalar-T"):
            calls[f"{name} {dtype_id(pair)}"] = Call(make_rows(N, C, pair), BY_NAME[name], widths)
    for pair in ((F32, F32), (BF16, BF16), (F64, F64)):
        for name in ("sort", "swap", "plain-kd", "T4-ce-rows", "dkd-row-T"):
            calls[f"special {name} {dtype_id(pair)}"] = Call(
                special_rows(widths, pair), BY_NAME[name], widths, FEW_ROWS
            )
    # Ranks without classes, slices of one class, no rows.
    for shape in ((1, *(0,) * (world - 2), 1), (0,) * (world - 1) + (1,), (2, 1) + (0,) * (world - 2)):
        for name in ("lskd", "dkd-swap-rows", "scalar-T-ce"):
            calls[f"{name} of {shape}"] = Call(make_rows(12, sum(shape)), BY_NAME[name], shape)
    calls["no rows"] = Call(make_rows(0, C), BY_NAME["T4-ce"], widths)
    return calls


def own_slice(widths: tuple[int, ...], rank: int, x: torch.Tensor) -> torch.Tensor:
    begin = sum(widths[:rank])
    return x[..., begin : begin + widths[rank]]


def run(call: Call, rank: int) -> Result:
    """`cases.run` of a rank's slice."""
    rows, variant = call.rows, call.variant
    student = own_slice(call.widths, rank, rows.student).clone().requires_grad_()
    teacher = own_slice(call.widths, rank, rows.teacher)
    temperature = variant.make_temperature(len(rows.target), arithmetic(rows.student.dtype, rows.teacher.dtype))
    out = variant.function(
        student, teacher, rows.target, temperature=temperature, return_parts=True, process_group=dist.group.WORLD,
        **variant.options,
    )  # fmt: skip
    out.loss.backward(grad_output_of(out.loss))
    return Result(*(t.detach() for t in out), student.grad, gradient_of(temperature))


# ---- What the ranks do ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def block_bytes(count: int):
    before, vocab_parallel.CPU_BLOCK_BYTES = vocab_parallel.CPU_BLOCK_BYTES, count
    yield
    vocab_parallel.CPU_BLOCK_BYTES = before


def do_table(rank, world):
    results = {}
    for name, call in table(world).items():
        with block_bytes(call.block_bytes):
            results[name] = run(call, rank)
    return results


def slices(rank, world, dtype=F32, rows=N, classes=C):
    student, teacher, target = make_rows(rows, classes, (dtype, dtype))
    widths = SLICES[world] if classes == C else (classes // world,) * world
    return own_slice(widths, rank, student).clone(), own_slice(widths, rank, teacher).clone(), target


# Keyword arguments and whether a learned temperature is asked for its gradient.
WEIGHTS = {
    "row_weight, mean": {"row_weight": torch.linspace(0, 2, N)},
    "row_weight, none": {"row_weight": torch.linspace(0, 2, N), "reduction": "none", "standardize": True},
    "denominator": {"reduction": "sum", "denominator": 7.0, "ce_weight": 0.3},
    "denominator, row_weight": {
        "reduction": "sum", "denominator": torch.tensor(5.0), "row_weight": torch.linspace(1, 2, N),
    },
}  # fmt: skip


def weigh(function, student, teacher, target, options):
    student = student.clone().requires_grad_()
    temperature = torch.tensor(3.0, dtype=arithmetic(student.dtype), requires_grad=True)
    out = function(student, teacher, target, temperature=temperature, return_parts=True, **options)
    out.loss.backward(grad_output_of(out.loss))
    return Result(*(t.detach() for t in out), student.grad, temperature.grad)


def do_weights(rank, world):
    """Row weights and denominators of both functions, in float32 and in float16."""
    return {
        (function.__name__, name, dtype): weigh(
            function, *slices(rank, world, dtype), options | {"process_group": dist.group.WORLD}
        )
        for function in (fused_sort_kd, fused_sort_dkd)
        for name, options in WEIGHTS.items()
        for dtype in (F32, F16)
    }


def do_graphs(rank, world):
    """Once, twice over a retained graph, over the logits themselves, and without a gradient."""
    found = {}
    for dtype in (F32, BF16, F16):
        student, teacher, target = slices(rank, world, dtype)
        for way in ("once", "twice", "inplace", "no_grad"):
            leaf = student.clone().requires_grad_()
            logits = leaf * 1
            with torch.set_grad_enabled(way != "no_grad"):
                loss = fused_sort_kd(
                    logits, teacher, target, ce_weight=0.5, inplace=way == "inplace", process_group=dist.group.WORLD
                )
            if way != "no_grad":
                for _ in range(2 if way == "twice" else 1):
                    (3 * loss).backward(retain_graph=way == "twice")
            found[dtype, way] = loss.detach(), leaf.grad, not torch.equal(logits.detach(), student)
    return found


BROKEN = {1: ("student", 0), 8: ("teacher", C - 1), 14: ("student", 25), 16: ("teacher", "label")}


def broken_rows() -> Rows:
    """A NaN in one class of some rows, and in each class of an ignored one."""
    rows = make_rows(N, C)
    for n, (side, place) in BROKEN.items():
        getattr(rows, side)[n, int(rows.target[n]) if place == "label" else place] = torch.nan
    for n in (rows.target == IGNORE).nonzero().flatten().tolist():
        rows.student[n] = rows.teacher[n] = torch.nan
    return rows


def do_nan(rank, world):
    names = ("rows", "T4-ce-rows", "dkd-swap-rows", "lskd-rows", "row-T-swap-rows")
    return {(n, r): run(Call(r(), BY_NAME[n], SLICES[world]), rank) for n in names for r in (broken_rows, clean_rows)}


def clean_rows() -> Rows:
    return make_rows(N, C)


LONG = 512, 2048  # rows, classes


def long_rows(teacher_is_right: bool) -> Rows:
    rows, classes = LONG
    student, teacher, target = make_rows(rows, classes)
    target = torch.where(target == IGNORE, 0, target)
    if teacher_is_right:
        teacher[torch.arange(rows), target] = teacher.amax(1) + 1
    return Rows(student, teacher, target)


WIDE, WIDE_BLOCK = (512, 2048), 1 << 19  # rows, classes of each rank: a block is an eighth of a slice
EXCHANGES = {"KD": {}, "LSKD": {"standardize": True, "ce_weight": 1.0}, "swap": {"correction": "swap"}}


def do_exchange(rank, world):
    """Bytes that this rank gives to collectives, right teacher or not, and the entries above the label of each rank."""
    sent = []
    names = [
        n for n in dir(dist) if n.startswith(("all_", "reduce", "broadcast", "gather", "scatter", "send", "isend"))
    ]
    originals = {n: getattr(dist, n) for n in names if callable(getattr(dist, n))}

    def counted(name):
        def call(*arguments, **options):
            given = arguments[1 if name in ("all_gather_into_tensor", "all_gather_single") else 0]
            sent.append((name, given.numel() * given.element_size()))
            return originals[name](*arguments, **options)

        return call

    found = {}
    widths = (LONG[1] // world,) * world
    for right in (True, False):
        student, teacher, target = long_rows(right)
        above = [
            (own_slice(widths, r, teacher) > teacher.gather(1, target[:, None])).sum().item() for r in range(world)
        ]
        for name, options in EXCHANGES.items():
            logits = own_slice(widths, rank, student).clone().requires_grad_()
            for n in originals:
                setattr(dist, n, counted(n))
            fused_sort_kd(
                logits, own_slice(widths, rank, teacher), target, process_group=dist.group.WORLD, **options
            ).backward()
            for n, original in originals.items():
                setattr(dist, n, original)
            found[name, right] = sent.copy(), above
            sent.clear()
    return found


def do_memory(rank, world):
    """What a call holds beyond its inputs, with a teacher that puts half of the classes above the label. Sorting their
    values takes four ranks half a minute on two cores."""
    if world > 2:
        return {}
    rows, width = WIDE
    generator = torch.Generator().manual_seed(rank)
    student, teacher = torch.randn(2, rows, width, generator=generator)
    target = torch.randint(width * world, (rows,), generator=torch.Generator().manual_seed(1))
    found = {}
    for grad, options in ((False, EXCHANGES["KD"]), (True, EXCHANGES["LSKD"])):
        leaf = student.clone().requires_grad_(grad)

        def call(leaf=leaf, options=options):
            return fused_sort_kd(leaf, teacher, target, process_group=dist.group.WORLD, **options)

        with block_bytes(WIDE_BLOCK):
            found[grad] = Peak(call).bytes
    return found


def do_one_rank(rank, world):
    """A group of one rank holds the whole rows; the other ranks are not in it."""
    group = dist.new_group([0])
    student, teacher, target = make_rows(N, C)
    try:
        return weigh(fused_sort_kd, student, teacher, target, {"process_group": group})
    except ValueError as error:
        return str(error)


def do_compiled(rank, world):
    """The same call eagerly, under torch.compile and under a mode that sees every op."""
    from torch.distributed.tensor.debug import CommDebugMode

    student, teacher, target = slices(rank, world)

    def call(x):
        return fused_sort_kd(x.mul(2), teacher, target, process_group=dist.group.WORLD).mul(3)

    losses, grads = [], []
    for function, mode in ((call, None), (torch.compile(call, backend="eager"), None), (call, CommDebugMode())):
        leaf = student.clone().requires_grad_()
        with mode or contextlib.nullcontext():
            losses.append(function(leaf))
            losses[-1].backward()
        grads.append(leaf.grad)
    torch.compiler.reset()
    try:
        torch.compile(call, backend="eager", fullgraph=True)(student)
        words = ""
    except Exception as error:
        words = str(error)
    torch.compiler.reset()
    return [loss.detach() for loss in losses], grads, words, mode.get_total_counts()


def do_dtensor(rank, world):
    """DTensor's own chunks of 50 and of 5 classes (none for the last of four ranks), and what it refuses."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for classes in (C, 5):
        rows = make_rows(N, classes)
        student, teacher = (distribute_tensor(x, mesh, [Shard(1)]) for x in rows[:2])
        student.requires_grad_()
        target = rows.target if classes == C else distribute_tensor(rows.target, mesh, [Replicate()])
        loss = fused_sort_kd(student, teacher, target, ce_weight=0.5)
        loss.backward()
        grad = student.grad
        found[classes] = loss.detach(), type(grad) is DTensor and grad.placements, grad.to_local(), grad.full_tensor()
    # On two dimensions of a mesh, of which one holds copies.
    both = init_device_mesh("cpu", (world // 2, 2))
    rows = make_rows(N, C)
    student, teacher = (distribute_tensor(x, both, [Replicate(), Shard(1)]) for x in rows[:2])
    found["copies"] = fused_sort_kd(student, teacher, rows.target, ce_weight=0.5)

    whole, split = (
        distribute_tensor(rows.student, mesh, [Replicate()]),
        distribute_tensor(rows.student, mesh, [Shard(1)]),
    )
    by_rows = distribute_tensor(rows.student, mesh, [Shard(0)])
    partial = DTensor.from_local(rows.student, mesh, [Partial()])
    wrong = {
        "whole": (whole, whole, {}),
        "by rows": (by_rows, by_rows, {}),
        "partial": (partial, split, {}),
        "teacher": (split, rows.teacher, {}),
        "teacher's placement": (split, whole, {}),
        "both": (split, split, {"process_group": dist.group.WORLD}),
        "class_dim": (split, split, {"class_dim": 0}),
    }
    for name, (student, teacher, options) in wrong.items():
        found[name] = refusal(lambda s=student, t=teacher, o=options: fused_sort_kd(s, t, rows.target, **o))
    return found


def refusal(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


# What is wrong, on which rank (None: on all), the error there, and that of the other ranks.
OTHERS = "ValueError", "rank 1 of process_group has refused its arguments; its own error says why"
WRONG = {
    "teacher's width": (1, ("ValueError", "expected teacher of shape"), OTHERS),
    "student's type": (1, ("TypeError", "expected student to be a torch.Tensor, got list"), OTHERS),
    "teacher with a gradient": (1, ("ValueError", "expected teacher without requires_grad"), OTHERS),
    "weight's shape": (1, ("ValueError", "expected row_weight of shape"), OTHERS),
    "rows": (1, ("ValueError", f"expected the same number of rows on all ranks of process_group, got {N}, {N - 1}"), None),
    "dtype": (1, ("ValueError", "expected the same student dtype on all ranks of process_group, got float32, bfloat16"), None),
    "labels": (1, ("ValueError", "expected the same target, label by label, on all ranks of process_group"), None),
    "temperature": (1, ("ValueError", "expected the same temperature on all ranks of process_group, got 4, 2"), None),
    "correction": (1, ("ValueError", "expected the same correction on all ranks of process_group, got sort, swap"), None),
    "learned": (1, ("ValueError", "expected the same gradient asked of the temperature on all ranks"), None),
    "label": (None, ("IndexError", "expected target in [0, 50), the classes of all ranks, or ignore_index -100, got 50"), None),
    "negative label": (None, ("IndexError", "or ignore_index -100, got -7"), None),
    "class_dim": (None, ("ValueError", "fused_sort_kd: expected class_dim=-1 for classes over several ranks, got 0"), None),
    "backend": (None, ("ValueError", "expected backend=None for classes over several ranks, got 'native'"), None),
    "group": (None, ("TypeError", "expected process_group to be a torch.distributed.ProcessGroup, got str"), None),
    "no class": (None, ("ValueError", "expected at least one class on the ranks of process_group together, got 0"), None),
}  # fmt: skip


def wrong_call(name, student, teacher, target):
    """The arguments of a call with that mistake."""
    call = {"student": student, "teacher": teacher, "target": target, "process_group": dist.group.WORLD}
    changed = {
        "teacher's width": lambda: {"teacher": torch.randn(N, C)},
        "student's type": lambda: {"student": student.tolist()},
        "teacher with a gradient": lambda: {"teacher": teacher.requires_grad_()},
        "weight's shape": lambda: {"row_weight": torch.ones(3)},
        "rows": lambda: {"student": student[1:], "teacher": teacher[1:], "target": target[1:]},
        "dtype": lambda: {"student": student.bfloat16()},
        "labels": lambda: {"target": target.roll(1)},
        "temperature": lambda: {"temperature": 2.0},
        "correction": lambda: {"correction": "swap"},
        "learned": lambda: {"temperature": torch.tensor(4.0, requires_grad=True)},
        "label": lambda: {"target": target.clone().index_fill_(0, torch.tensor(3), C)},
        "negative label": lambda: {"target": target.clone().index_fill_(0, torch.tensor(3), -7)},
        "class_dim": lambda: {"target": torch.zeros(student.shape[1], dtype=torch.int64), "class_dim": 0},
        "backend": lambda: {"backend": "native"},
        "group": lambda: {"process_group": "world"},
        "no class": lambda: {"student": student[:, :0], "teacher": teacher[:, :0], "target": target.fill_(IGNORE)},
    }
    return call | changed[name]()


def do_refusals(rank, world):
    """After each mistake a right call: the ranks are still in step."""
    found = {}
    for name, (place, _, _) in WRONG.items():
        rows = slices(rank, world)
        right = dict(zip(("student", "teacher", "target"), rows, strict=True)) | {"process_group": dist.group.WORLD}
        arguments = wrong_call(name, *rows) if place in (None, rank) else right
        found[name] = refusal(lambda arguments=arguments: fused_sort_kd(**arguments))
        fused_sort_kd(*slices(rank, world), process_group=dist.group.WORLD)
    return found


WORK = {name.removeprefix("do_"): f for name, f in list(globals().items()) if name.startswith("do_")}


def work(rank: int, world: int, folder: str) -> None:
    """In a rank: everything, one after the other."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    if Path(sortkd_kernels.__file__).parents[1] != HERE.parent:
        raise RuntimeError(f"tests of {HERE} run on {sortkd_kernels.__file__}")
    torch.save({name: function(rank, world) for name, function in WORK.items()}, f"{folder}/rank_{rank}.pt")
    dist.destroy_process_group()


# ---- What came of it -----------------------------------------------------------------------------------------------

WORKER = f"""
import sys
sys.path[:0] = [{str(HERE.parent)!r}, {str(HERE)!r}]
import test_vocab_parallel
test_vocab_parallel.work(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
"""


@pytest.fixture(scope="session")
def reports(tmp_path_factory):
    """For a number of processes, what each rank's :func:`work` found; launched by the first worker that asks."""
    # The folder that the workers of pytest-xdist share.
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    loaded = {}

    def load(world):
        if world not in loaded:
            folder = base / f"vocab_parallel_{world}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                launch(world, folder)
            deadline = time.monotonic() + 600
            while not (folder / "ended").exists() and time.monotonic() < deadline:
                time.sleep(0.5)
            assert (folder / "ended").read_text() == "", (folder / "ended").read_text()[-5000:]
            loaded[world] = [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(world)]
        return loaded[world]

    return load


def launch(world, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, "-c", WORKER, str(rank), str(world), str(folder)] for rank in range(world)]
    ranks = []
    for i, command in enumerate(commands):
        with open(folder / f"errors_{i}.txt", "w") as errors:
            ranks.append(subprocess.Popen(command, cwd=folder, env=environment, stderr=errors))
    codes = []
    try:
        codes = [rank.wait(timeout=500) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
        errors = [(folder / f"errors_{i}.txt").read_text() for i in range(world)]
        (folder / "ended").write_text("" if codes == [0] * world else f"exit codes {codes}\n" + "\n".join(errors))


def same_bits(values):
    """The one value that all ranks have."""
    first = values[0]
    if first is None:
        assert all(value is None for value in values)
        return None
    for value in values[1:]:
        assert (value.dtype, value.shape) == (first.dtype, first.shape)
        assert torch.equal(value.reshape(-1).view(torch.uint8), first.reshape(-1).view(torch.uint8))
    return first


def joined(results: list[Result]) -> Result:
    """A result of the whole rows: the slices of the gradient together, everything else the same on all ranks."""
    common = {name: same_bits([getattr(r, name) for r in results]) for name in ("loss", "kd", "ce", "rank")}
    temperature = same_bits([r.grad_temperature for r in results])
    return Result(**common, grad=torch.cat([r.grad for r in results], -1), grad_temperature=temperature)


@EVERY_WORLD
def test_the_whole_rows_numbers(reports, world):
    """Within the kernels' own tolerance (tolerance.py), and bit by bit the same on all ranks."""
    wrong = []
    for name, call in table(world).items():
        try:
            assert_matches(
                joined([report["table"][name] for report in reports(world)]), expect(call.rows, call.variant)
            )
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong, "\n\n".join(wrong)


@EVERY_WORLD
def test_weights_and_denominators(reports, world):
    for key in reports(world)[0]["weights"]:
        function, name, dtype = key
        got = joined([report["weights"][key] for report in reports(world)])
        rows = make_rows(N, C, (dtype, dtype))
        options = {n: x.double() if isinstance(x, torch.Tensor) else x for n, x in WEIGHTS[name].items()}
        want = weigh(
            getattr(sortkd_kernels, function), rows.student.double(), rows.teacher.double(), rows.target,
            options | {"backend": "reference"},
        )  # fmt: skip
        # Float32 arithmetic on numbers of size 1 to 100, of which the gradients are differences; float16 resolves 2^-11
        # of a gradient and 6e-8 at the least.
        close = {"rtol": 2e-3, "atol": 2e-5} if dtype == F16 else {"rtol": 1e-5, "atol": 2e-6}
        for part in ("loss", "kd", "ce", "rank", "grad", "grad_temperature"):
            torch.testing.assert_close(
                getattr(got, part).double(), getattr(want, part).double(), msg=lambda m, words=f"{key} {part}": f"{words}: {m}",
                **(close if part == "grad" else {"rtol": 1e-5, "atol": 1e-5}),
            )  # fmt: skip


@EVERY_WORLD
@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
def test_graphs(reports, world, dtype):
    for report in reports(world):
        loss, grad, overwritten = report["graphs"][dtype, "once"]
        assert not overwritten
        for way in ("twice", "inplace", "no_grad"):
            other, again, over = report["graphs"][dtype, way]
            assert torch.equal(other, loss)
            if way == "twice":
                # The sum of two equal gradients: one bit more in the exponent, save in float16 below its normal range.
                assert torch.equal(again, 2 * grad) and not over
            elif way == "inplace":
                assert torch.equal(again, grad) and over
            else:
                assert again is None and not over


@EVERY_WORLD
def test_nan(reports, world):
    """A NaN in any slice is its row's on all ranks and no other's; ignored rows may hold anything."""
    names = {name for name, _ in reports(world)[0]["nan"]}
    for name in names:
        clean, broken = (
            joined([report["nan"][name, rows] for report in reports(world)]) for rows in (clean_rows, broken_rows)
        )
        lost = torch.zeros(N, dtype=torch.bool)
        lost[list(BROKEN)] = True
        ignored = clean_rows().target == IGNORE
        assert not (ignored & lost).any()
        assert broken.loss[lost].isnan().all() and broken.grad[lost].isnan().all()
        for part in ("loss", "kd", "ce", "rank", "grad"):
            assert torch.equal(getattr(broken, part)[~lost], getattr(clean, part)[~lost]), (name, part)
        assert not broken.grad[ignored].any() and not broken.loss[ignored].any()
        if broken.grad_temperature is not None:
            assert broken.grad_temperature[lost].isnan().all()
            assert torch.equal(broken.grad_temperature[~lost], clean.grad_temperature[~lost])


@EVERY_WORLD
def test_what_is_exchanged(reports, world):
    """Less than 160 bytes a row, which has 2048 classes, and four bytes for each class above the label."""
    rows = LONG[0]
    for report in reports(world):
        for (name, right), (sent, above) in report["exchange"].items():
            assert sent and {n for n, _ in sent} <= {"all_reduce", "all_gather_into_tensor", "all_gather_single"}
            # What is gathered beside the counts of each row (4 bytes) and the facts (some hundred bytes) are the lists.
            lists = [count for n, count in sent if n != "all_reduce" and count not in (4 * rows, sent[0][1])]
            # Lists are as long as the longest rank's, in each of their exchanges.
            longest = 0 if right or name == "swap" else 4 * max(above)
            assert sum(lists) <= 1.1 * longest
            assert (sum(lists) > 0) == (longest > 0)
            assert sum(count for _, count in sent) - sum(lists) <= 160 * rows, (name, right, sent)


def test_memory(reports):
    """Beyond the gradient some numbers a row and a few blocks, of which a slice has eight: the temporaries of one, the
    values above its labels, and those of all ranks being sorted, of a row at the least."""
    rows, width = WIDE
    for report in reports(2):
        for grad, peak in report["memory"].items():
            gradient = 4 * rows * width if grad else 0
            # Half a hundred numbers a row, of 8 bytes.
            assert gradient <= peak <= gradient + 3 * WIDE_BLOCK + 400 * rows, (grad, (peak - gradient) / WIDE_BLOCK)


@EVERY_WORLD
def test_a_group_of_one_rank(reports, world):
    first, *others = [report["one_rank"] for report in reports(world)]
    student, teacher, target = make_rows(N, C)
    want = weigh(fused_sort_kd, student, teacher, target, {})
    for got, expected in zip(first, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)  # two float32 sums of the same terms
    for rank, words in enumerate(others, 1):
        assert words == f"fused_sort_kd: expected this rank to be in process_group, got rank {rank} outside of it"


@EVERY_WORLD
def test_compiled(reports, world):
    """A graph break, and the words of one where there must be none."""
    for report in reports(world):
        losses, grads, words, collectives = report["compiled"]
        same_bits(losses), same_bits(grads)
        assert collectives > 0
        assert "torch.compiler.disable" in words


@EVERY_WORLD
def test_dtensor(reports, world):
    from torch.distributed.tensor import Replicate, Shard

    for classes in (C, 5):
        rows = make_rows(N, classes)
        student = rows.student.requires_grad_()
        want = fused_sort_kd(student, rows.teacher, rows.target, ce_weight=0.5)
        want.backward()
        own = student.grad.chunk(world, 1)
        for rank, report in enumerate(reports(world)):
            loss, placements, local, full = report["dtensor"][classes]
            same_bits([loss, reports(world)[0]["dtensor"][classes][0]])
            # torch 2.6 accumulates some gradients of DTensors as whole ones, with the same values.
            whole = torch.__version__.startswith("2.6.") and placements == (Replicate(),)
            assert whole or placements == (Shard(1),)
            # Two float32 sums of the same terms.
            torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=0)
            torch.testing.assert_close(full, student.grad, rtol=1e-5, atol=1e-6)
            mine = own[rank] if rank < len(own) else student.grad[:, :0]
            mine = student.grad if whole else mine
            torch.testing.assert_close(local, mine, rtol=1e-5, atol=1e-6)
            if classes == C:
                torch.testing.assert_close(report["dtensor"]["copies"], want.detach(), rtol=1e-5, atol=0)


REFUSED_DTENSORS = {
    "whole": "expected student to be sharded over its classes, Shard(1), by one dimension of its mesh and replicated",
    "by rows": "got (Shard(dim=0),); redistribute it, or pass local tensors and process_group",
    "partial": "got (Partial(sum),); redistribute it",
    "teacher": "expected teacher to be a DTensor of shape (24, 50) sharded like student, (Shard(dim=1),), got Tensor",
    "teacher's placement": "got (24, 50) (Replicate(),)",
    "both": "expected process_group=None beside a DTensor, whose mesh has the group; got both",
    "class_dim": "expected class_dim=-1 with a DTensor, got 0",
}


@EVERY_WORLD
@pytest.mark.parametrize("name", REFUSED_DTENSORS)
def test_dtensors_refused(reports, world, name):
    for report in reports(world):
        kind, words = report["dtensor"][name]
        assert kind == "ValueError" and REFUSED_DTENSORS[name] in words


@EVERY_WORLD
@pytest.mark.parametrize("name", WRONG)
def test_bad_input(reports, world, name):
    """An error on every rank, and no rank that waits for another."""
    place, there, elsewhere = WRONG[name]
    for rank, report in enumerate(reports(world)):
        kind, words = report["refusals"][name]
        expected = elsewhere if elsewhere and rank != place else there
        assert kind == expected[0], words
        assert re.search(re.escape(expected[1]), words), words
