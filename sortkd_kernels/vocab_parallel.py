"""The losses of logits whose classes are spread over the ranks of a process group, as tensor parallelism leaves them.

The formulas are those of `csrc/row_math.h`, derived in :mod:`sortkd_kernels.reference`. Each rank sums over its own
classes, a block of rows at a time; sums and maxima of rows are reduced over the group, and every rank computes the
losses from the reduced numbers by the same arithmetic, so that they are equal bit by bit. What crosses ranks is some
twenty numbers a row and, for the correction, the teacher's values above the label.

How much that is must be known on the host: a call waits for the device four times, and once more for each block of rows
in which the teacher puts a class of this rank above the label. All ranks of the group make the same calls in the same
order; that includes the backward pass of float16 students, whose gradient is made there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import autograd, checks, ops, ranks, reference
from .row_math import Coefficients, RowSums, gradient_coefficients, row_terms

# Bytes of the temporaries of a block of rows, at the least those of one row. On the CPU they stay in the caches; on a
# GPU each op has enough to do.
CPU_BLOCK_BYTES, GPU_BLOCK_BYTES = 8 << 20, 256 << 20
# Numbers held for each class of a rank: both sides, their exponentials, a product, its conversion to float64, a mask.
_NUMBERS_A_CLASS = 8
# Held for each value above the labels of some rows: itself, sent, received and in two orders; its row, its place there.
_BYTES_AN_ENTRY = 100


def kernels(group: Any) -> autograd.Kernels:
    """The backend that a process group is."""
    return autograd.Kernels(None, functools.partial(forward, group), _scale)


def forward(
    group: Any, student: Tensor, teacher: Tensor, teacher_indices: Tensor | None, target: Tensor,
    temperature: Tensor | None, config: ops.LossConfig, grad_output: Tensor | None, grad_student: bool,
    grad_temperature: bool, inplace: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``Kernels.forward`` of :mod:`.autograd` for one rank's slice of the classes.

    Every rank of the group calls it at the same time, also from within a loss that makes its logits a block of rows at
    a time. Its memory beyond the gradient: row tensors, and the temporaries of a block.

    Args:
        group: a process group that this rank is in; its ranks hold consecutive slices of the classes, in their order.
        student, teacher: logits ``[..., C_r]`` of this rank's classes, which may be none.
        teacher_indices: None.
        target: labels ``[...]`` among the classes of all ranks, the same on all of them.
        temperature, config, grad_output, grad_student, grad_temperature: as in ``SCHEMA`` of :mod:`.ops`.
        inplace: write the student's gradient over ``student``, which is then contiguous.

    Returns:
        ``loss, kd, ce, rank, grad_student, grad_temperature``, all but the student's gradient the same on all ranks.

    Raises:
        ValueError: options, dtypes, numbers of rows or labels that differ between the ranks; on all ranks.
        IndexError: a label beyond the classes of all ranks; on all ranks, and on any device.
    """
    moments = config.standardize or grad_temperature
    call = _Call(group, student, teacher, target, config, ranks.agree(group, student, teacher, target, config, moments))
    temperatures = target.new_full((1,), config.temperature, dtype=torch.float64)
    if temperature is not None:
        temperatures = temperature.detach().double().reshape(-1)
    row = _rows_of(call, temperatures.expand(call.rows))

    counted: Tensor | int = call.counts.sum() if checks.REDUCTIONS[config.reduction] == "mean" else 1
    scale = torch.ones_like(row.temperature) / counted
    if grad_output is not None:
        scale = scale * grad_output.double().reshape(-1)
    grad = student.new_empty(0)
    if grad_student:
        grad = student if inplace else torch.empty_like(student, memory_format=torch.contiguous_format)
    kd, ce, dtemperature = (torch.zeros_like(row.temperature) for _ in range(3))
    for blocks, lists in _rotated(call, row):
        rows = slice(blocks[0].start, blocks[-1].stop)
        sums = _sums(call, row, blocks, lists, moments)
        terms = row_terms(sums, row.temperature[rows], config, call.classes, moments)
        kd[rows], ce[rows], dtemperature[rows] = terms.kd, terms.ce, terms.grad_temperature
        if grad_student:
            coefficients = gradient_coefficients(
                terms, config, scale[rows], row.temperature[rows], row.inverse_student[rows], call.classes,
                row.label_student[rows], row.mean[rows], row.std[rows],
            )  # fmt: skip
            _write_gradient(call, row, blocks, lists, coefficients, grad.view(call.student.shape))

    ignored = ~call.counts
    kd, ce, dtemperature = (x.masked_fill(ignored, 0) for x in (kd, ce, dtemperature * scale * config.kd_weight))
    loss = config.kd_weight * kd + config.ce_weight * ce if config.ce_weight else config.kd_weight * kd  # 0 * inf
    whole, kd, ce = (
        (x.reshape(target.shape) if config.reduction == 0 else x.sum() / counted).to(call.work) for x in (loss, kd, ce)
    )
    none = loss.new_empty(0, dtype=call.work)
    return (
        whole,
        kd if config.parts else none,
        ce if config.parts else none,
        row.rank.reshape(target.shape) if config.parts else none.to(torch.int32),
        grad,
        dtemperature.to(call.work) if grad_temperature else none,
    )


# ---- What is known of the rows before their sums -------------------------------------------------------------------


class _Call:
    """The tensors of a call as rows, this rank's classes, and where the labels are."""

    def __init__(
        self, group: Any, student: Tensor, teacher: Tensor, target: Tensor, config: ops.LossConfig, widths: list[int]
    ) -> None:
        self.group, self.config, self.work = group, config, ops.arithmetic(student, teacher)
        self.widths, self.classes, self.place = widths, sum(widths), dist.get_rank(group)
        self.first, self.width, self.rows = sum(widths[: self.place]), student.shape[-1], target.numel()
        self.student = student.detach().reshape(self.rows, self.width)
        self.teacher = teacher.detach().reshape(self.rows, self.width)
        self.target = target.reshape(-1)
        self.counts = self.target != config.ignore_index
        self.label, self.has_label = self.local(self.target, self.counts)
        self.budget = CPU_BLOCK_BYTES if student.device.type == "cpu" else GPU_BLOCK_BYTES
        # The blocks are the same on all ranks, whatever the widths of their slices.
        a_row = _NUMBERS_A_CLASS * max(widths) * torch.finfo(self.work).bits // 8
        step = max(1, self.budget // a_row)
        self.blocks = [slice(n, min(n + step, self.rows)) for n in range(0, self.rows, step)]

    def local(self, classes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of ``classes`` in this rank's slice, 0 for those of other ranks, and which are its own."""
        columns = classes - self.first
        own = valid & (columns >= 0) & (columns < self.width)
        return torch.where(own, columns, 0), own

    def of_label(self, logits: Tensor) -> Tensor:
        """The label's logit, 0 where another rank has it."""
        if not self.width:
            return logits.new_zeros(self.rows, dtype=torch.float64)
        values = logits.gather(1, self.label.unsqueeze(1)).squeeze(1).double()
        return values.masked_fill(~self.has_label, 0)

    def copy(self, logits: Tensor, rows: slice) -> Tensor:
        """Some rows in the dtype of the arithmetic, to be written over."""
        return logits[rows].to(self.work, copy=True)

    def without_label(self, x: Tensor, rows: slice) -> Tensor:
        """Copied rows with the label's own logit taken out: -infinity adds nothing."""
        return _put(x, self.label[rows], self.has_label[rows], -torch.inf)

    def column(self, of_rows: Tensor, rows: slice) -> Tensor:
        """A row tensor beside a block."""
        return of_rows[rows].to(self.work).unsqueeze(1)


def _put(x: Tensor, columns: Tensor, where: Tensor, value: Tensor | float) -> Tensor:
    """Write a value to one column of each row where ``where`` holds; without looking at it, so that no device waits."""
    columns = columns.unsqueeze(1)
    return x.scatter_(1, columns, torch.where(where, value, x.gather(1, columns).squeeze(1)).to(x.dtype).unsqueeze(1))


class _Rows(NamedTuple):
    """Of every row, the same on all ranks: float64 ``[N]`` where nothing else is said.

    Attributes:
        temperature: its temperature.
        rank: the number of classes above the label, int32.
        above: that of each rank's classes alone, int32 ``[ranks, N]``.
        uncorrected: the teacher's logit of the label.
        label_student, label_teacher: the label's logits, the teacher's after the correction.
        reference_student, reference_teacher: the maxima of the other classes, which exponentials are relative to. The
            teacher's is that before the correction "sort" until :func:`_rotated` has come by.
        inverse_student, inverse_teacher: what logits are multiplied by.
        mean, std: the student's under standardization, else 0.
        swapped: under "swap" the column of the class that takes the label's logit, and where this rank has it.
    """

    temperature: Tensor
    rank: Tensor
    above: Tensor
    uncorrected: Tensor
    label_student: Tensor
    label_teacher: Tensor
    reference_student: Tensor
    reference_teacher: Tensor
    inverse_student: Tensor
    inverse_teacher: Tensor
    mean: Tensor
    std: Tensor
    swapped: tuple[Tensor, Tensor] | None


def _rows_of(call: _Call, temperature: Tensor) -> _Rows:
    config, correction = call.config, checks.CORRECTIONS[call.config.correction]
    labels = ranks.reduce(call.group, torch.stack([call.of_label(call.student), call.of_label(call.teacher)]))
    label_student, uncorrected = labels

    # Of the classes beside the label: the largest of each side, the teacher's first, and the largest beside that one.
    maxima = labels.new_full((3, call.rows), -torch.inf)
    top, above = torch.zeros_like(call.target), torch.zeros_like(call.target, dtype=torch.int32)
    # Of each side the mean, relative to the label's logit, and the squares around it: exactly 0 for constant rows.
    means, squares = labels.new_zeros(2, call.rows), labels.new_zeros(2, call.rows)
    for rows in call.blocks if call.width else ():
        s, t = call.copy(call.student, rows), call.copy(call.teacher, rows)
        if config.standardize:
            for side, x in enumerate((s, t)):
                relative = x - call.column(labels[side], rows)
                mean = relative.mean(1, keepdim=True)
                means[side, rows], squares[side, rows] = mean.squeeze(1), relative.sub_(mean).square_().sum(1)
        limit = call.column(uncorrected.masked_fill(~call.counts, torch.inf), rows)
        above[rows] = torch.count_nonzero(t > limit, 1).to(torch.int32)
        maxima[0, rows] = call.without_label(s, rows).amax(1).double()
        largest, top[rows] = call.without_label(t, rows).max(1)
        maxima[1, rows] = largest.double()
        if correction == "swap":
            maxima[2, rows] = t.scatter_(1, top[rows].unsqueeze(1), -torch.inf).amax(1).double()
    # What a reduction makes of a NaN depends on its library; the NaN comes back with the sums.
    maxima = maxima.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    counts = ranks.gather(call.group, above)
    rank = counts.sum(0, dtype=torch.int32)
    reference_student, largest = ranks.reduce(call.group, maxima[:2].clone(), "MAX")
    label_teacher, reference_teacher, swapped = uncorrected, largest, None
    if correction != "none":
        label_teacher = torch.where(rank > 0, largest, uncorrected)
    if correction == "swap":
        found = torch.where(maxima[1] == largest, top + call.first, call.classes)
        swapped = call.local(ranks.reduce(call.group, found, "MIN"), rank > 0)
        second = ranks.reduce(call.group, torch.where(swapped[1], maxima[2], maxima[1]), "MAX")
        # A NaN of the label is above nothing: rank is 0.
        reference_teacher = torch.where(rank > 0, torch.maximum(second, uncorrected), largest)

    inverse = torch.stack([1 / temperature, 1 / temperature])
    mean = std = torch.zeros_like(temperature)
    if config.standardize:
        n = call.classes
        of_all = ranks.reduce(call.group, means * call.width) / n
        total = ranks.reduce(call.group, squares + call.width * (means - of_all).square())
        # 0, or NaN for a row with one.
        stds = torch.where(total > 0, (total / max(1, n - 1)).sqrt(), total - total) if n > 1 else total - total
        inverse = inverse / (stds + reference.STANDARDIZE_EPS)
        mean, std = label_student + of_all[0], stds[0]
    return _Rows(
        temperature, rank, counts, uncorrected, label_student, label_teacher, _finite(reference_student),
        _finite(reference_teacher), inverse[0], inverse[1], mean, std, swapped,
    )  # fmt: skip


def _finite(maximum: Tensor) -> Tensor:
    """A maximum of -infinity has nothing to be relative to, and would turn -infinity into NaN."""
    return maximum.masked_fill(maximum == -torch.inf, 0)


# ---- The correction across slices ----------------------------------------------------------------------------------

# The classes of this rank above the labels of a block: rows within the block, columns, corrected values.
_Above = tuple[Tensor, Tensor, Tensor] | None


def _rotated(call: _Call, row: _Rows) -> Iterator[tuple[list[slice], list[_Above]]]:
    """Blocks of rows, and what their classes above the label take, in groups whose lists are within the budget."""
    blocks = call.blocks
    if not blocks:
        return
    if checks.CORRECTIONS[call.config.correction] != "sort":
        yield blocks, [None] * len(blocks)
        return
    ends = torch.tensor([block.stop - 1 for block in blocks], device=call.target.device)
    totals = row.above.cumsum(1)[:, ends].diff(dim=1, prepend=row.above.new_zeros(len(call.widths), 1))
    of_blocks = ranks.on_host(totals.t())  # for each block the ranks' numbers of entries
    limit = call.budget // _BYTES_AN_ENTRY
    for group, counts in _grouped(blocks, of_blocks, limit):
        total = sum(map(sum, counts))
        if total > limit:
            yield group, [_rotate_in_pieces(call, row, group[0], limit)]
        else:
            yield group, _rotate(call, row, group, counts) if total else [None] * len(group)


def _grouped(spans: list[slice], counts: list[list[int]], limit: int) -> Iterator[tuple[list[slice], list[list[int]]]]:
    """Neighbouring spans of rows whose numbers of entries stay within the limit together, at least one at a time."""
    begin = held = 0
    for end, count in enumerate(map(sum, counts)):
        if end > begin and held + count > limit:
            yield spans[begin:end], counts[begin:end]
            begin, held = end, 0
        held += count
    yield spans[begin:], counts[begin:]


def _rotate_in_pieces(call: _Call, row: _Rows, block: slice, limit: int) -> _Above:
    """The same for one block whose lists are beyond the limit: of an untrained teacher, half of all classes."""
    rows = [slice(n, n + 1) for n in range(block.start, block.stop)]
    found = []
    for group, counts in _grouped(rows, ranks.on_host(row.above[:, block].t()), limit):
        piece = slice(group[0].start, group[-1].stop)
        of_ranks = [sum(of_rows) for of_rows in zip(*counts, strict=True)]
        (one,) = _rotate(call, row, [piece], [of_ranks]) if any(of_ranks) else [None]
        if one is not None:
            found.append((one[0] + (piece.start - block.start), one[1], one[2]))
    if not found:
        return None
    rows_above, columns, values = (torch.cat(x) for x in zip(*found, strict=True))
    return rows_above, columns, values


def _rotate(call: _Call, row: _Rows, blocks: list[slice], counts: list[list[int]]) -> list[_Above]:
    """Each class above the label takes the next lower value among them and the label's own, the last of them that one.

    The host waits for the number of such classes of each block.

    In the gathered list, rank after rank, the classes of a row are in their global order, so that two stable sorts
    resolve ties by the lower class; the classes themselves need not be sent.
    """
    lists: list[_Above] = [None] * len(blocks)
    sent = row.uncorrected.new_empty(max(map(sum, zip(*counts, strict=True))), dtype=call.work)
    at = 0
    for i, block in enumerate(blocks):
        if not counts[i][call.place]:
            continue
        t = call.teacher[block].to(call.work)
        limit = call.column(row.uncorrected.masked_fill(~call.counts, torch.inf), block)
        rows, columns = (t > limit).nonzero(as_tuple=True)
        lists[i] = rows, columns, sent[at : at + len(rows)].copy_(t[rows, columns])
        at += len(rows)
    of_ranks = [sum(of_rows) for of_rows in zip(*counts, strict=True)]
    gathered = ranks.gather(call.group, sent)
    values = torch.cat([gathered[place, :count] for place, count in enumerate(of_ranks)])

    span = slice(blocks[0].start, blocks[-1].stop)
    per_row = row.above[:, span]
    rows = torch.arange(per_row.shape[1], device=values.device).repeat(len(of_ranks))
    rows = rows.repeat_interleave(per_row.reshape(-1), output_size=len(values))
    order = values.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    values, rows = values[order], rows[order]
    rank = row.rank[span].long()
    ends = rank.cumsum(0)
    taken = values.roll(-1)
    of_last = row.uncorrected[span].to(call.work)
    last = torch.arange(1, len(values) + 1, device=values.device) == ends[rows]
    taken = torch.where(last, of_last[rows], taken)
    # The largest of the others is now what the first of them has taken.
    first = taken[(ends - rank).clamp(max=len(values) - 1)].double()
    row.reference_teacher[span] = _finite(torch.where(rank > 0, first, row.reference_teacher[span]))

    back = torch.empty_like(taken)
    back[order] = taken
    own = back[sum(of_ranks[: call.place]) :]
    at = 0
    for i, one in enumerate(lists):
        if one is not None:
            count = counts[i][call.place]
            lists[i] = one[0], one[1], own[at : at + count].clone()
            at += count
    return lists


# ---- Sums, losses, gradient ----------------------------------------------------------------------------------------


def _exponents(call: _Call, row: _Rows, block: slice, above: _Above) -> tuple[Tensor, Tensor]:
    """Both sides of a block relative to the reference, without the label; the teacher corrected and scaled."""
    s = call.without_label(call.copy(call.student, block), block).sub_(call.column(row.reference_student, block))
    t = call.copy(call.teacher, block)
    if above is not None:
        t[above[0], above[1]] = above[2]
    if row.swapped is not None:
        _put(t, row.swapped[0][block], row.swapped[1][block], row.uncorrected[block])
    v = call.without_label(t, block).sub_(call.column(row.reference_teacher, block))
    return s, v.mul_(call.column(row.inverse_teacher, block))


def _sums(call: _Call, row: _Rows, blocks: list[slice], lists: list[_Above], moments: bool) -> RowSums:
    start, stop = blocks[0].start, blocks[-1].stop
    span = slice(start, stop)
    sums = row.temperature.new_zeros(7 if moments else 4, stop - start)
    # Sums of moments end in differences of nearly equal terms.
    dtype = torch.float64 if moments else call.work
    for block, above in zip(blocks, lists, strict=True) if call.width else ():
        at = slice(block.start - start, block.stop - start)
        s, v = _exponents(call, row, block, above)
        if call.config.with_ce:
            sums[3, at] = s.exp().sum(1, dtype=dtype)
        u = s.mul_(call.column(row.inverse_student, block))
        of_student, of_teacher = u.exp(), v.exp()
        if moments:
            sums[4, at] = _product_sum(of_student, u, dtype)
            sums[5, at] = _product_sum(of_teacher, v, dtype)
        gap = torch.sub(v, u, out=u)
        sums[0, at], sums[1, at] = of_student.sum(1, dtype=dtype), of_teacher.sum(1, dtype=dtype)
        sums[2, at] = _product_sum(of_teacher, gap, dtype)
        if moments:
            sums[6, at] = _product_sum(of_teacher, gap.mul_(v), dtype)
    ranks.reduce(call.group, sums)
    of_label = row.label_student[span] - row.reference_student[span]
    v_student = of_label * row.inverse_student[span]
    v_teacher = (row.label_teacher[span] - row.reference_teacher[span]) * row.inverse_teacher[span]
    # +infinity at the label: the softmax of the row is inf / inf.
    broken = (v_student == torch.inf) | (v_teacher == torch.inf)
    of_labels = (x.masked_fill(broken, torch.nan) for x in (v_student, v_teacher, of_label))
    more = sums[4:] if moments else torch.zeros_like(sums[:3])
    return RowSums(*sums[:4], *more, *of_labels)


def _product_sum(p: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``sum p x``; what has no probability takes no part."""
    return (p * x).masked_fill_(p == 0, 0).sum(1, dtype=dtype)


def _write_gradient(
    call: _Call, row: _Rows, blocks: list[slice], lists: list[_Above], c: Coefficients, grad: Tensor
) -> None:
    """Each logit of a block is read before the block's gradient is written, which may be to the same memory."""
    start = blocks[0].start
    for block, above in zip(blocks, lists, strict=True) if call.width else ():
        at = slice(block.start - start, block.stop - start)
        s, v = _exponents(call, row, block, above)
        g = v.exp_().mul_(call.column(c.on_teacher, at)).neg_()
        if call.config.standardize:
            g -= (s + call.column(row.reference_student - row.mean, block)).mul_(call.column(c.dstd, at))
        if call.config.ce_weight:
            g += s.exp().mul_(call.column(c.on_ce, at))
        g += s.mul_(call.column(row.inverse_student, block)).exp_().mul_(call.column(c.on_student, at))
        _put(g, call.label[block], call.has_label[block], c.at_label[at])
        grad[block] = g.masked_fill_(~call.counts[block].unsqueeze(1), 0)


def _scale(grad: Tensor, grad_output: Tensor) -> Tensor:
    """``Kernels.scale``: some rows at a time, since a product of half rows with float factors is made in float."""
    if grad.numel():
        rows = grad.view(-1, grad.shape[-1])
        count = max(1, len(rows) // 64)
        factors = grad_output.reshape(-1, 1).expand(len(rows), 1)
        for block, factor in zip(rows.split(count), factors.split(count), strict=True):
            block.mul_(factor)
    return grad
