"""The loss from hidden states: logits are made a block of rows at a time, their gradient is multiplied back at once.

At 8192 tokens and 128,256 classes the two logit matrices are 8.4 GB in float32. Here at most one block of each side
exists, in float32 whatever the inputs are: rounded to bfloat16, a logit of 20 is off by 0.06, a probability by 6 %.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import autograd, backends, checks, ops, ranks, vocab_parallel
from .fused_sort_kd import SortKDOutput, _options, _row_scale

_FN = "fused_linear_sort_kd"
# What the logits of a block may take, both sides together: so many bytes, or this part of the call's float32 logit
# matrix where that is more. Fewer rows than these are not worth the reading of the weight for a matrix product.
_BLOCK_BYTES, _BLOCK_SHARE, _BLOCK_ROWS = 30 << 20, 36, 64
# A product of halves adds up in float32. PyTorch's returns that sum as it is on CUDA devices since version 2.8, in a
# compiled graph since 2.10; elsewhere so many bytes of float32 are made at once of a half-precision factor, on a CPU
# what its caches hold.
_CUDA_WIDENS = "dtype" in torch.ops.aten.mm.overloads() and torch.version.hip is None
_COMPILED_WIDENS = torch.__version__ >= (2, 10)
_CPU_WIDENED_BYTES, _GPU_WIDENED_BYTES = 1 << 20, 256 << 20


def fused_linear_sort_kd(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    teacher_values: Tensor | None = None,
    teacher_indices: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float | Tensor = 4.0,
    correction: str = "sort",
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    alpha: float = 1.0,
    beta: float | None = None,
    standardize: bool = False,
    tail: str = "renormalize",
    softcap: float | None = None,
    logit_scale: float | None = None,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    chunk_rows: int | str = "auto",
    inplace: bool = False,
    backend: str | None = None,
    return_parts: bool = False,
    process_group: Any = None,
) -> Tensor | SortKDOutput:
    r"""Sort-KD of the logits ``hidden @ weight.T + bias`` without ever holding them: a block of rows at a time.

    The teacher is given in one of three ways: by hidden states and the weight that makes logits of them; by whole
    logits; or by its top k as in :func:`fused_sort_kd_topk`. Gradients go to ``hidden``, ``weight``, ``bias``, and to
    ``temperature`` where it is a tensor with ``requires_grad``. Of vocabularies of different size the classes that both
    sides have, the first ones, take part; the rows of ``weight`` beyond them get a gradient of 0.

    The products are of the inputs' dtype, or autocast's; the logits are float32 whatever that is (float64 for doubles).
    Their gradient is rounded to that dtype for the products back, whose sum over the blocks is in the dtype that
    ``weight``'s gradient has: that of ``weight``, or its ``grad_dtype``. In bfloat16 each block rounds the sum once
    more; a float32 ``weight`` under autocast, or ``weight.grad_dtype = torch.float32``, keeps it exact.

    All gradients are made in the forward pass, which makes the logits once. With ``reduction="none"``, and for float16,
    whose small probabilities need the factor of a gradient scaler, they are made in the backward pass, from logits made
    again.

    Rows to ignore are dropped before the products. On a GPU the host waits for their number; under ``torch.compile``
    and while a graph is captured they stay in, and the kernel ignores them.

    A ``weight`` that is a DTensor, as FSDP2 shards it, is gathered once a call, and its gradient is the mean over the
    ranks.

    Args:
        hidden: the student's hidden states ``[..., H]``, float32, float64, bfloat16 or float16.
        weight: the student's output weight ``[C, H]``, of the same dtype save under autocast.
        target: labels ``[...]``, int64 in the classes that both sides have, or ``ignore_index``.
        teacher_hidden, teacher_weight: ``[..., H']`` and ``[C', H']``.
        teacher_logits: ``[..., C']``, used as they are, without ``softcap`` and ``logit_scale``.
        teacher_values, teacher_indices, tail: the teacher's top k, as in :func:`fused_sort_kd_topk`.
        bias, teacher_bias: ``[C]`` and ``[C']``.
        alpha, beta: the weights of DKD's terms, as in :func:`fused_sort_dkd`; KD where ``beta`` is None.
        logit_scale: multiplies the logits of both sides that are made here.
        softcap: then makes ``softcap * tanh(logits / softcap)`` of them, as Gemma does. It takes one more block.
        chunk_rows: the rows of a block, or ``"auto"``: as many as keep the logits of both sides within 30 MiB or 1/36
            of the call's float32 logit matrix, whichever is more, and at least 64.
        inplace: may write ``hidden``'s gradient over ``hidden``; do not read it afterwards.
        process_group: its ranks hold consecutive slices of the classes, as in :func:`fused_sort_kd`: of ``weight``,
            ``bias`` and the teacher, whose top k cannot be. Hidden states and labels are the same on all ranks, and
            ``hidden``'s gradient is the sum of what their classes give. DTensors are this rank's slices, not gathered;
            a block has 64 rows or 1/36 of all, whichever is more, both sides together.

    The other arguments are those of :func:`fused_sort_kd`. The ``"reference"`` backend makes the whole logits.

    Returns:
        As :func:`fused_sort_kd`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, two teachers or none; the message names it.
        IndexError: on the CPU, a label or an index outside the classes that both sides have.
        RuntimeError: the ``backend`` asked for is not available; the message has the reason.
    """
    over_ranks = process_group is not None
    if over_ranks:
        ranks.shards(_FN, hidden, None, target, process_group, -1)
    try:
        checks.check_one_teacher(
            _FN, teacher_hidden=teacher_hidden, teacher_weight=teacher_weight, teacher_logits=teacher_logits,
            teacher_values=teacher_values, teacher_indices=teacher_indices,
        )  # fmt: skip
        weight, bias, teacher_weight, teacher_bias = (
            _whole(x, over_ranks) for x in (weight, bias, teacher_weight, teacher_bias)
        )
        like = _check_tensors(
            hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, teacher_logits, teacher_values,
            teacher_indices, target, over_ranks,
        )  # fmt: skip
        learned = temperature if isinstance(temperature, Tensor) else None
        if learned is not None:
            checks.check_temperature_tensor(_FN, learned, like, target)
        checks.check_choice(_FN, "tail", tail, checks.TAILS)
        config = _options(_FN, temperature, correction, kd_weight, alpha, beta, ce_weight, standardize,
                          checks.TAILS.index(tail), reduction, ignore_index, return_parts)  # fmt: skip
        if teacher_values is None:
            config = config._replace(tail=0)
        elif config.tail == ops.BUCKET and (standardize or beta is not None):
            raise ValueError(f'{_FN}: expected neither beta nor standardize with tail="bucket", whose loss is KD')
        logit_scale = None if logit_scale is None else checks.as_float(_FN, "logit_scale", logit_scale)
        softcap = None if softcap is None else checks.as_positive(_FN, "softcap", softcap)
        head, asked_rows = _Head(like.shape[-1], logit_scale, softcap), checks.as_chunk_rows(_FN, chunk_rows)
        if over_ranks and backend is not None:
            raise ValueError(f"{_FN}: expected backend=None for classes over several ranks, got {backend!r}")
        name = "" if over_ranks else backends.choose(_FN, backend, hidden.device)
        none = hidden.detach()[:0]  # whose memory overlaps no other
        inplace = inplace and checks.allows_inplace(
            _FN, hidden, none if teacher_hidden is None else teacher_hidden, "hidden"
        )  # fmt: skip
        hidden = _factor("", hidden, weight, bias)
        if teacher_hidden is not None and teacher_weight is not None:
            teacher_hidden = _factor("teacher_", teacher_hidden, teacher_weight, teacher_bias)
            teacher_weight = teacher_weight.to(teacher_hidden.dtype)
        if teacher_logits is not None:
            teacher_logits = teacher_logits[..., : head.classes]
        values = teacher_logits if teacher_values is None else teacher_values
        of_teacher = values if teacher_hidden is None else teacher_hidden  # for the dtype of the arithmetic
        row_scale = of_rows = None
        if denominator is not None or row_weight is not None or config.tail == ops.BUCKET:
            row_scale, of_rows = _row_scale(_FN, like, of_teacher, target, config, denominator, row_weight)
    except (TypeError, ValueError):
        if over_ranks:
            ranks.refuse(process_group, hidden)
        raise

    labels = target.reshape(-1)
    kept = _rows_to_keep(labels, config.ignore_index)
    count = labels.shape[0] if kept is None else kept.shape[0]
    matrices = 1 + (teacher_hidden is not None) + (softcap is not None)
    # All ranks make the same blocks, however many classes each has.
    block = asked_rows or _block_rows(count, 0 if over_ranks else head.classes, matrices)
    if of_rows is None and checks.REDUCTIONS[config.reduction] == "mean" and block < count:
        row_scale, of_rows = _row_scale(_FN, like, of_teacher, target, config, None, None)
    of_blocks = of_rows or config  # the mean of one block is the kernel's own

    def rows(x: Any, vectors: bool = False) -> Any:
        """Row after row, vectors or values, without those that are dropped; one value for all rows as it is."""
        if x is None or not x.dim():
            return x
        x = x.reshape(labels.shape[0], *x.shape[-1:]) if vectors else x.reshape(-1)
        return x if kept is None else x[kept]

    others = _Others(
        rows(teacher_hidden, True), teacher_weight, teacher_bias, rows(values, True), rows(teacher_indices, True),
        rows(labels), rows(row_scale),
    )  # fmt: skip
    above = None
    if config.tail == ops.BUCKET:
        work = ops.arithmetic(hidden, others.values)
        of_k, above = ops.bucket_teacher(
            name, others.values, others.indices, others.target, head.classes, config, work
        )  # fmt: skip
        others = others._replace(values=of_k)
    hidden, learned = rows(hidden, True), rows(learned)
    if over_ranks:
        kernels = vocab_parallel.kernels(process_group)
        call = _Call(kernels, of_blocks, head, block, inplace and kept is None, _grad_dtype(weight), process_group)
        run = torch.compiler.disable(_loss) if torch.compiler.is_compiling() else _loss
        terms = run(hidden, weight, bias, learned, others, call)
    elif name == "reference" or (block >= count and hidden.dtype == ops.arithmetic(hidden)):
        # One block needs no loop of ours: autograd keeps no more than it.
        with torch.autocast(hidden.device.type, enabled=False):
            of_student, teacher = head.plain_logits(hidden, weight, bias), others.values
            if teacher is None:
                teacher = head.plain_logits(others.teacher_hidden, teacher_weight, teacher_bias)
        terms = ops.loss(
            name, of_student, teacher, others.indices, others.target, learned, others.row_scale, of_blocks, True
        )  # fmt: skip
    else:
        call = _Call(ops.KERNELS[name], of_blocks, head, block, inplace and kept is None, _grad_dtype(weight), None)
        terms = _loss(hidden, weight, bias, learned, others, call)
    loss, kd, ce, rank = terms
    if of_blocks.reduction == 0:
        loss = _at_rows(loss, kept, target)
    if not config.parts:
        return loss
    if of_blocks.reduction == 0:
        kd, ce = _at_rows(kd, kept, target), _at_rows(ce, kept, target)
    if above is not None:
        rank = above
    return SortKDOutput(loss, kd, ce, _at_rows(rank, kept, target))


def _check_tensors(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher_hidden: Tensor | None, teacher_weight: Tensor | None,
    teacher_bias: Tensor | None, teacher_logits: Tensor | None, teacher_values: Tensor | None,
    teacher_indices: Tensor | None, target: Tensor, over_ranks: bool,
) -> Tensor:  # fmt: skip
    """A tensor without memory of its own that has the logits' shape and device, and the student's dtype."""
    checks.check_linear(_FN, "", hidden, weight, bias)
    classes = of_teacher = weight.shape[0]
    if teacher_hidden is not None and teacher_weight is not None:
        checks.check_linear(_FN, "teacher_", teacher_hidden, teacher_weight, teacher_bias)
        of_teacher = teacher_weight.shape[0]
    elif teacher_bias is not None:
        raise ValueError(f"{_FN}: expected teacher_bias only beside teacher_hidden, whose logits it is a part of")
    if teacher_logits is not None:
        checks.check_logits(_FN, "teacher_logits", teacher_logits)
        checks.check_frozen(_FN, "teacher_logits", teacher_logits)
        of_teacher = teacher_logits.shape[-1]
    if over_ranks and (of_teacher != classes or teacher_values is not None):
        came = "its top k" if teacher_values is not None else f"{of_teacher} classes"
        raise ValueError(
            f"{_FN}: expected the same {classes} classes of the teacher as of weight, this rank's slice, got {came}"
        )
    like = hidden[..., :1].expand(*hidden.shape[:-1], min(classes, of_teacher))
    checks.check_target(_FN, "hidden @ weight.T", like, target)
    if teacher_values is not None and teacher_indices is not None:
        checks.check_top_k(_FN, like, teacher_values, teacher_indices)
    for argument, tensor in (("teacher_hidden", teacher_hidden), ("teacher_logits", teacher_logits)):
        if tensor is not None:
            checks.check_rows(_FN, argument, tensor, hidden)
    return like


class _Head(NamedTuple):
    """From hidden states to logits, of the classes that both sides have."""

    classes: int
    logit_scale: float | None
    softcap: float | None

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``[N, C]`` in float32, or float64 of doubles."""
        logits = _wide_product(hidden, weight[: self.classes])
        if bias is not None:
            logits += bias[: self.classes]
        if self.logit_scale is not None:
            logits *= self.logit_scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def plain_logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same in PyTorch's differentiable ops."""
        work = ops.arithmetic(hidden)
        if self.classes < weight.shape[0]:  # the gradient of a slice is another copy
            weight, bias = weight[: self.classes], None if bias is None else bias[: self.classes]
        factors = hidden.to(work), weight.to(hidden.dtype).to(work)
        logits = F.linear(*factors, None if bias is None else bias.to(work))
        if self.logit_scale is not None:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def through(self, grad: Tensor, logits: Tensor) -> Tensor:
        """From the gradient of ``logits`` to that of the product; written over ``grad``, and ``logits`` are lost."""
        if self.softcap is not None:
            grad *= logits.div_(self.softcap).square_().neg_().add_(1)
        if self.logit_scale is not None:
            grad *= self.logit_scale
        return grad


class _Others(NamedTuple):
    """The tensors of a call that no gradient goes to."""

    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    values: Any  # whole logits; or of the top k, k of them, or with the bucket as `ops.bucket_teacher` makes them
    indices: Any
    target: Tensor
    row_scale: Tensor | None

    def teacher(self, rows: slice, head: _Head) -> tuple[Tensor, Tensor | None]:
        """Logits of these rows; or values and indices."""
        if self.teacher_hidden is not None and self.teacher_weight is not None:
            return head.logits(self.teacher_hidden[rows], self.teacher_weight, self.teacher_bias), None
        return self.values[rows], None if self.indices is None else self.indices[rows]


class _Call(NamedTuple):
    """How a call is worked on: with what, and how many rows at a time."""

    kernels: autograd.Kernels
    config: ops.LossConfig
    head: _Head
    block: int
    inplace: bool
    grad_dtype: torch.dtype  # of the weight's gradient
    group: Any  # whose ranks hold the classes, or None


def _loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor | None, others: _Others, call: _Call
) -> autograd.Parts:
    inputs = hidden, weight, bias, temperature
    with torch.autocast(hidden.device.type, enabled=False):
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
            return _FusedLinear.apply(*inputs, others, call)
        return _walk(*inputs, others, call, None, (False,) * 4)[0]


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor | None, others: _Others,
        call: _Call,
    ) -> autograd.Parts:  # fmt: skip
        inputs, wanted = (hidden, weight, bias, temperature), ctx.needs_input_grad[:4]
        ctx.in_backward = call.config.reduction == 0 or hidden.dtype == torch.float16
        ctx.call = call
        parts, grads = _walk(*inputs, others, call, None, (False,) * 4 if ctx.in_backward else wanted)
        autograd.save(ctx, temperature, *((*inputs, *others) if ctx.in_backward else grads))
        ctx.mark_non_differentiable(*parts[1:])
        return parts

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        autograd.refuse_second_derivative()
        temperature, *saved = autograd.saved(ctx)
        keep = autograd.keeps_graph()
        if ctx.in_backward:
            others, call = _Others(*saved[4:]), ctx.call
            scale = grad_output if others.row_scale is None else grad_output * others.row_scale
            call = call._replace(config=call.config._replace(parts=False), inplace=call.inplace and not keep)
            others = others._replace(row_scale=None)
            hidden, weight, bias, _ = saved[:4]
            with torch.autocast(hidden.device.type, enabled=False):
                grads = _walk(hidden, weight, bias, temperature, others, call, scale, ctx.needs_input_grad[:4])[1]
        else:
            # Unless the graph is kept, nobody reads the buffers again.
            grads = [g if g is None else g * grad_output if keep else g.mul_(grad_output) for g in saved]
        if grads[3] is not None:
            grads[3] = autograd.of_temperature(grads[3], temperature)
        return *grads, None, None


def _walk(
    hidden: Tensor, weight: Tensor, bias: Any, temperature: Tensor | None, others: _Others, call: _Call,
    grad_output: Tensor | None, wanted: tuple[bool, ...],
) -> tuple[autograd.Parts, list[Any]]:  # fmt: skip
    """Loss and parts, block by block, and of the gradients by the first four arguments those that are ``wanted``.

    That by the temperature is a value a row. ``grad_output``: a scalar, or a value a row.
    """
    head, C, of_logits = call.head, call.head.classes, any(wanted[:3])
    grad_hidden = grad_weight = grad_bias = None
    if wanted[1]:
        grad_weight = torch.empty_like(weight, dtype=call.grad_dtype)
        grad_weight[C:] = 0
    hidden, weight = hidden.detach(), weight.detach().to(hidden.dtype)
    if wanted[0]:
        # Ranks add up memory: it must have one order on all of them.
        grad_hidden = hidden if call.inplace else torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if wanted[2]:
        grad_bias = hidden.new_zeros(weight.shape[0], dtype=ops.arithmetic(hidden))
    parts, by_temperature = [], []
    for first in range(0, max(1, hidden.shape[0]), call.block):  # no rows are a block too: their mean is a NaN
        rows = slice(first, first + call.block)
        logits = head.logits(hidden[rows], weight, bias)
        inputs = (
            logits, *others.teacher(rows, head), others.target[rows], _rows_of(temperature, rows),
            _rows_of(others.row_scale, rows),
        )  # fmt: skip
        *of_block, grad, of_temperature = autograd.forward(
            call.kernels, inputs, call.config, _rows_of(grad_output, rows), of_logits, wanted[3],
            inplace=of_logits and head.softcap is None,
        )  # fmt: skip
        del inputs  # the teacher's logits
        parts.append(of_block)
        by_temperature.append(of_temperature)
        if not of_logits:
            continue
        grad = head.through(grad, logits)
        del logits
        if grad_bias is not None:
            grad_bias[:C] += grad.sum(0)
        grad = grad.to(weight.dtype)
        if grad_weight is not None:
            _add_product(grad_weight[:C], grad.T, hidden[rows], first > 0)
        if grad_hidden is not None:
            grad_hidden[rows] = grad @ weight[:C]
        del grad  # before the next block's logits are made
    if grad_bias is not None:
        grad_bias = grad_bias.to(bias.dtype)
    if grad_hidden is not None and call.group is not None:
        torch.distributed.all_reduce(grad_hidden, group=call.group)
    of_rows = call.config.reduction == 0
    *reduced, ranks = zip(*parts, strict=True)
    loss, kd, ce = (torch.cat(x) if of_rows else torch.stack(x).sum(0) for x in reduced)
    grads = [grad_hidden, grad_weight, grad_bias, torch.cat(by_temperature) if wanted[3] else None]
    return (loss, kd, ce, torch.cat(ranks)), grads


def _wide_product(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows @ weight.T`` in float32, or float64 of doubles: never rounded to half precision."""
    work = ops.arithmetic(rows)
    if rows.dtype == work:
        return rows @ weight.T
    if _widens(rows, work):
        return torch.mm(rows, weight.T, out_dtype=work)
    # No product of halves returns the sums that it adds up here: widened, a slice of the weight after the other.
    wide, step = rows.to(work), _widened_rows(rows, work.itemsize * (weight.shape[1] + rows.shape[0]))
    product = rows.new_empty(rows.shape[0], weight.shape[0], dtype=work)
    for first in range(0, weight.shape[0], step):
        product[:, first : first + step] = wide @ weight[first : first + step].to(work).T
    return product


def _add_product(total: Tensor, a: Tensor, b: Tensor, added: bool) -> None:
    """``total += a @ b``, or ``total = a @ b`` where nothing is ``added`` to; the sum is in the dtype of ``total``."""
    widens = _widens(a, total.dtype)
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=int(added))
    elif widens and not torch.compiler.is_compiling():
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=int(added), out=total)
    else:
        step = total.shape[0] if widens else _widened_rows(total, total.itemsize * b.shape[1])
        for first in range(0, total.shape[0], step):
            rows, part = a[first : first + step], total[first : first + step]
            # Inductor has no sum with a product of another dtype.
            product = torch.mm(rows, b, out_dtype=total.dtype) if widens else rows @ b
            part.add_(product) if added else part.copy_(product)


def _widens(x: Tensor, work: torch.dtype) -> bool:
    """Whether PyTorch returns a product of ``x`` in ``work``."""
    usable = x.is_cuda and _CUDA_WIDENS and (_COMPILED_WIDENS or not torch.compiler.is_compiling())
    return usable and work == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)


def _widened_rows(x: Tensor, row_bytes: int) -> int:
    """Rows that are widened at once, on the device of ``x``."""
    return max(1, (_GPU_WIDENED_BYTES if x.is_cuda else _CPU_WIDENED_BYTES) // row_bytes)


def _grad_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of a weight's gradient: a parameter may take another than its own, since PyTorch 2.10."""
    if torch.compiler.is_compiling() or not weight.is_leaf:
        return weight.dtype
    return getattr(weight, "grad_dtype", None) or weight.dtype


def _block_rows(rows: int, classes: int, matrices: int) -> int:
    """Rows of a block of so many matrices, all blocks of about one size; 0 classes: by the number of rows alone."""
    most = max(_BLOCK_ROWS, rows // (_BLOCK_SHARE * matrices))
    if classes:
        most = max(most, _BLOCK_BYTES // (matrices * classes * 4))
    return max(1, -(-rows // max(1, -(-rows // most))))


def _rows_to_keep(target: Tensor, ignore_index: int) -> Tensor | None:
    """The places of the rows that count, ``[n]``; None where that is all, none, or not to be known in time."""
    if torch.compiler.is_compiling() or (target.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    kept = (target != ignore_index).nonzero().squeeze(-1)
    return kept if 0 < kept.shape[0] < target.shape[0] else None


def _at_rows(values: Tensor, kept: Tensor | None, target: Tensor) -> Tensor:
    """Values of the rows that were kept, and 0 in the others, in the target's shape."""
    if kept is not None:
        values = values.new_zeros(target.numel()).index_copy(0, kept, values)
    return values.reshape(target.shape)


def _rows_of(values: Tensor | None, rows: slice) -> Tensor | None:
    return values if values is None or not values.dim() else values[rows]


def _factor(prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Hidden states in the dtype of their product with the weight: that of both, or autocast's."""
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        return hidden.to(torch.get_autocast_dtype(hidden.device.type))
    checks.check_same_dtype(_FN, f"{prefix}hidden", hidden, f"{prefix}weight", weight)
    checks.check_same_dtype(_FN, f"{prefix}hidden", hidden, f"{prefix}bias", bias)
    return hidden


def _whole(weight: Any, over_ranks: bool) -> Any:
    """A DTensor's whole value, whose gradient goes back as the mean over the ranks, as FSDP and DDP take it.

    Where the ranks hold the classes, its own value: this rank's slice.
    """
    if not ranks.is_sharded(weight):
        return weight
    if over_ranks:
        return weight.to_local()
    from torch.distributed.tensor import Partial

    mesh = weight.device_mesh
    whole = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda grad: grad / mesh.size())
    return whole
