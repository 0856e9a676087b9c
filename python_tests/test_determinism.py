"""The same input gives the same bits: again, on one thread or two, in another batch, at another address."""

from __future__ import annotations

import time

import cases
import pytest
import torch
from cases import BF16, F16, F32, F64, VARIANTS
from torch.utils import deterministic

from sortkd_kernels import fused_sort_kd, sort_logits

# Enough rows that two threads share them, of every size class: many short rows, some middling, few long.
SHAPES = ((700, 100), (70, 1000), (6, 40001))
# How rows are shared depends on the shape; the order of sums on the method; the dtype on neither.
DTYPED = [*(((F32, F32), v) for v in cases.FEW_VARIANTS)]
DTYPED += [((d, d), v) for d in (BF16, F16, F64) for v in cases.TWO_VARIANTS]


def same(one, other):
    return all(a is b or torch.equal(a, b) for a, b in zip(one[:6], other[:6], strict=True))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtypes", "variant"), DTYPED, ids=cases.case_id)
def test_threads_and_repetition(threads, variant, shape, dtypes):
    rows = cases.make_rows(*shape, dtypes)
    threads(1)
    first = cases.run(rows, variant, "native")
    for count in (1, 2, 2, 3, 1):
        threads(count)
        assert same(cases.run(rows, variant, "native"), first)


def test_threads_of_sort_logits_and_dense(threads):
    _, teacher, target = cases.make_rows(700, 100)
    dense = [x.view(7, 10, 10, 100).movedim(-1, 1).contiguous() for x in cases.make_rows(700, 100)[:2]]
    results = []
    for count in (1, 2, 3):
        threads(count)
        student = dense[0].clone().requires_grad_()
        loss = fused_sort_kd(student, dense[1], target.view(7, 10, 10), class_dim=1)
        results.append((sort_logits(teacher, target), loss, torch.autograd.grad(loss, student)[0]))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_two_threads_share_the_rows(threads):
    """The extension is built with OpenMP: without it everything above would hold on one thread."""
    threads(2)
    student, teacher, target = cases.make_rows(4096, 1000)
    fused_sort_kd(student, teacher, target)
    time.sleep(0.3)  # a thread that waits for work spins for a while
    whole, own = time.process_time(), time.thread_time()
    for _ in range(10):
        fused_sort_kd(student, teacher, target)
    whole, own = time.process_time() - whole, time.thread_time() - own
    assert whole - own > 0.2 * whole


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "row" not in str(v.temperature)], ids=str)
def test_a_row_does_not_depend_on_its_neighbours(variant):
    """Alone, in a batch, in a tile's rest: the same bits."""
    temperature = variant.make_temperature(1)
    options = {k: v for k, v in variant.options.items() if k != "reduction"}

    def rows_of(student, teacher, target):
        leaf = student.clone().requires_grad_()
        loss = variant.function(leaf, teacher, target, temperature=temperature, reduction="none", **options)
        return loss, torch.autograd.grad(loss, leaf, torch.ones_like(loss))[0]

    rows = cases.make_rows(37, 100)
    whole = rows_of(*rows)
    for part in (slice(0, 1), slice(4, 5), slice(3, 37), slice(16, 33)):
        for one, all_rows in zip(rows_of(*(x[part] for x in rows)), whole, strict=True):
            assert torch.equal(one, all_rows[part])


@pytest.mark.parametrize(("backend", "variant"), cases.calls(cases.FEW_VARIANTS), ids=str)
def test_every_output_is_written(backend, variant):
    """With fresh memory full of NaN nothing changes: no output and no scratch is read before it is written."""
    rows = cases.make_rows(41, 9)
    results = []
    for fill in (False, True):
        torch.use_deterministic_algorithms(fill)
        try:
            assert not fill or (deterministic.fill_uninitialized_memory and torch.empty(100).isnan().all())
            results.append(cases.run(rows, variant, backend))
        finally:
            torch.use_deterministic_algorithms(False)
    assert same(*results)
