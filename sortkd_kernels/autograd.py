"""Autograd around a forward op: for traces of any backend, and for the Triton kernels outside of them too.

The formula is that of `csrc/autograd.cpp`: the gradient is made in the forward pass and rescaled in the backward one,
save for float16 students, whose small probabilities survive only with the scale multiplied in before the rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Parts = tuple[Tensor, Tensor, Tensor, Tensor]


class Kernels(NamedTuple):
    """A backend as autograd needs it. Arguments and results of the forward pass: ``SCHEMA`` in :mod:`.ops`.

    Attributes:
        op: the forward pass through the dispatcher, the options one by one; or None, where it is PyTorch's ops.
        forward: the same past the dispatcher, with the options as one tuple and ``inplace`` at the end.
        scale: multiplies a gradient ``[..., C]`` in place by a scalar or by one value a row; or None.
    """

    op: Callable[..., tuple[Tensor, ...]] | None
    forward: Callable[..., tuple[Tensor, ...]]
    scale: Callable[[Tensor, Tensor], Tensor] | None = None


def loss(
    kernels: Kernels, student: Tensor, teacher: Tensor, teacher_indices: Tensor | None, target: Tensor,
    temperature: Tensor | None, row_scale: Tensor | None, config: Any, inplace: bool,
) -> Parts:  # fmt: skip
    """``(loss, kd, ce, rank)``, differentiable. In a trace the permission to write in place is not used."""
    inputs = student, teacher, teacher_indices, target, temperature, row_scale
    # Inside a Function a tensor asks for its gradient under torch.no_grad() too, and would get its memory.
    learned = temperature is not None and temperature.requires_grad
    if torch.is_grad_enabled() and (student.requires_grad or learned):
        others = teacher, teacher_indices, target, row_scale
        return _Loss.apply(student, temperature, kernels, others, config, inplace and _has_values(*inputs))
    return forward(kernels, inputs, config, None, False, False)[:4]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, temperature: Tensor | None, kernels: Kernels, others: tuple[Tensor | None, ...],
        config: Any, inplace: bool,
    ) -> Parts:  # fmt: skip
        ctx.set_materialize_grads(False)  # of kd, ce and rank: zeros that a device would be asked to write
        asked_student, asked_temperature = ctx.needs_input_grad[:2]
        ctx.kernels, ctx.config, ctx.inplace = kernels, config, inplace and asked_student
        ctx.in_backward = student.dtype == torch.float16 and asked_student
        now = asked_student and not ctx.in_backward
        inputs = student, *others[:3], temperature, others[3]
        *parts, grad_student, grad_temperature = forward(
            kernels, inputs, config, None, now, asked_temperature, ctx.inplace and now
        )
        save(ctx, grad_student, grad_temperature, temperature, *(inputs if ctx.in_backward else ()))
        ctx.mark_non_differentiable(*parts[1:])
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        if grad_output is None:
            return (None,) * 6
        grad_student, rows, temperature, *inputs = saved(ctx)
        if not ctx.needs_input_grad[0]:
            grad_student = None
        elif ctx.in_backward:
            # A kept graph reads the logits again.
            inplace = ctx.inplace and not keeps_graph()
            *inputs, row_scale = inputs
            scale = grad_output if row_scale is None else grad_output * row_scale
            grad_student = forward(ctx.kernels, (*inputs, None), ctx.config, scale, True, False, inplace)[4]
        else:
            grad_student = _scaled(ctx.kernels, grad_student, grad_output)
        grad_temperature = None
        if ctx.needs_input_grad[1]:
            grad_temperature = of_temperature(rows * grad_output.reshape(-1), temperature)
        return grad_student, grad_temperature, None, None, None, None


def of_temperature(rows: Tensor, temperature: Tensor) -> Tensor:
    """The gradient by a temperature, of one value or one a row, from a value for each row."""
    return (rows.view_as(temperature) if temperature.dim() else rows.sum()).to(temperature.dtype)


def reduced(rows: Tensor, row_scale: Tensor, config: Any) -> Tensor:
    """Row values times ``row_scale``, and their sum where there is a reduction."""
    return (rows * row_scale).sum() if config.reduction else rows * row_scale


def forward(
    kernels: Kernels, inputs: tuple[Any, ...], config: Any, grad_output: Tensor | None,
    grad_student: bool, grad_temperature: bool, inplace: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    *tensors, row_scale = inputs
    options = config
    if row_scale is not None:
        grad_output, options = row_scale, config._replace(reduction=0)
    if kernels.op is not None and not _has_values(*tensors, grad_output):
        results = kernels.op(*tensors, *options, grad_output, grad_student, grad_temperature)
    else:
        if inplace:
            # An op before this one may have saved these logits: it must see that they are gone.
            torch.autograd.graph.increment_version(tensors[0])
            tensors[0] = tensors[0].detach()
        results = kernels.forward(*tensors, options, grad_output, grad_student, grad_temperature, inplace)
    if row_scale is None:
        return results
    loss, kd, ce, *others = results
    if config.parts:
        kd, ce = reduced(kd, row_scale, config), reduced(ce, row_scale, config)
    return reduced(loss, row_scale, config), kd, ce, *others


def _scaled(kernels: Kernels, grad: Tensor, grad_output: Tensor) -> Tensor:
    if kernels.scale is None or not _has_values(grad, grad_output):
        return (grad * (grad_output.unsqueeze(-1) if grad_output.dim() else grad_output)).to(grad.dtype)
    # Unless the graph is kept, nobody reads the buffer again.
    return kernels.scale(grad.clone() if keeps_graph() else grad, grad_output)


def _has_values(*tensors: Tensor | None) -> bool:
    """Tensors that are what their memory holds, outside any trace, with no mode that wants to see the ops."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return all(t is None or (type(t) in (Tensor, torch.nn.Parameter) and not t.is_neg()) for t in tensors)


def keeps_graph() -> bool:
    """In a backward pass: whether another one may follow, as always in a trace."""
    return torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Keep tensors for the backward pass; autograd refuses to save those of ``torch.inference_mode()``."""
    ctx.unversioned = [t if t is not None and _has_values(t) and t.is_inference() else None for t in tensors]
    ctx.save_for_backward(*(t if own is None else None for t, own in zip(tensors, ctx.unversioned, strict=True)))


def saved(ctx: Any) -> list[Any]:
    """What :func:`save` has kept."""
    return [t if own is None else own for t, own in zip(ctx.saved_tensors, ctx.unversioned, strict=True)]


def refuse_second_derivative() -> None:
    """In a backward pass: once_differentiable would pass on a gradient that is silently constant."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "sortkd_kernels: second derivatives of the fused losses are not implemented; "
            'backend="reference" has them (backward was called with create_graph=True)'
        )
