"""The Triton backend as ops: the forward op that torch.compile keeps whole, and the autograd formula around it.

The formula is that of `csrc/autograd.cpp`: the gradient is made in the forward pass and rescaled in the backward one,
save for float16 students, whose small probabilities survive only with the scale multiplied in before the rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import triton as kernels

Parts = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("sortkd_kernels::sort_kd_forward_triton", mutates_args=())
def sort_kd_forward(
    student: Tensor, teacher: Tensor, teacher_indices: Tensor | None, target: Tensor,
    temperature_tensor: Tensor | None, temperature: float, correction: int, decoupled: bool, kd_weight: float,
    alpha: float, beta: float, ce_weight: float, standardize: bool, uniform_tail: bool, class_dim: int, reduction: int,
    ignore_index: int, parts: bool, upstream: Tensor | None, with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, its parts, rank, and the gradients of student and temperature, empty without ``with_grad``."""
    return kernels.loss_forward(
        student, teacher, teacher_indices, target, temperature_tensor, temperature, correction, decoupled, kd_weight,
        alpha, beta, ce_weight, standardize, uniform_tail, class_dim, reduction, ignore_index, parts, upstream,
        with_grad,
    )  # fmt: skip


@torch.library.custom_op("sortkd_kernels::sort_logits_triton", mutates_args=())
def sort_logits(teacher: Tensor, target: Tensor, correction: int, ignore_index: int) -> Tensor:
    """The corrected teacher alone."""
    return kernels.sort_logits(teacher, target, correction, ignore_index)


@sort_kd_forward.register_fake
def _(student, teacher, teacher_indices, target, temperature_tensor, *config):  # noqa: ANN001, ANN002, ANN202
    reduction, with_grad = config[10], config[-1]
    work = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    shape = target.shape if reduction == 0 else ()
    learned = with_grad and temperature_tensor is not None
    return (
        *(student.new_empty(shape, dtype=work) for _ in range(3)),
        student.new_empty(target.shape, dtype=torch.int32),
        kernels.layout.gradient_like(student, config[9]) if with_grad else student.new_empty(0),
        student.new_empty(target.shape if learned else 0, dtype=work),
    )


@sort_logits.register_fake
def _(teacher, target, correction, ignore_index):  # noqa: ANN001, ANN202
    return teacher.new_empty(teacher.shape)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, temperature_tensor: Tensor | None, tensors: tuple, config: tuple, inplace: bool
    ) -> Parts:
        teacher, teacher_indices, target = tensors
        ctx.config, ctx.inplace = config, inplace and ctx.needs_input_grad[0]
        ctx.in_backward = student.dtype == torch.float16 and ctx.needs_input_grad[0]
        with_grad = any(ctx.needs_input_grad[:2]) and not ctx.in_backward
        loss, kd, ce, rank, grad_student, grad_temperature = _forward(
            ctx.inplace and with_grad, student, teacher, teacher_indices, target, temperature_tensor, *config, None,
            with_grad,
        )  # fmt: skip
        if ctx.in_backward:
            ctx.save_for_backward(student, temperature_tensor, teacher, teacher_indices, target)
        else:
            ctx.save_for_backward(grad_student, grad_temperature, temperature_tensor)
        ctx.mark_non_differentiable(kd, ce, rank)
        return loss, kd, ce, rank

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        # once_differentiable would pass a gradient on that is silently constant where `upstream` is.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "sortkd_kernels: second derivatives of the fused losses are not implemented; "
                'backend="reference" has them (backward was called with create_graph=True)'
            )
        if ctx.in_backward:
            student, temperature_tensor, teacher, teacher_indices, target = ctx.saved_tensors
            # A kept graph reads the logits again.
            grad_student, rows = _forward(
                ctx.inplace and not torch._C._autograd._get_current_graph_task_keep_graph(),
                student, teacher, teacher_indices, target, temperature_tensor, *ctx.config, upstream, True,
            )[4:]  # fmt: skip
        else:
            grad_student, rows, temperature_tensor = ctx.saved_tensors
            if ctx.needs_input_grad[1]:
                rows = rows * upstream
            if ctx.needs_input_grad[0]:
                grad_student = _scaled(grad_student, upstream, class_dim=ctx.config[9])
        grad_temperature = None
        if ctx.needs_input_grad[1]:
            rows = rows if temperature_tensor.dim() else rows.sum()
            grad_temperature = rows.to(temperature_tensor.dtype)
        return grad_student if ctx.needs_input_grad[0] else None, grad_temperature, None, None, None


def _forward(inplace: bool, student: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The forward op; ``inplace`` past the dispatcher, whose ops may not return what they were given."""
    if not inplace:
        return sort_kd_forward(student, *arguments)
    # An op before this one may have saved these logits: it must see that they are gone.
    torch.autograd.graph.increment_version(student)
    return kernels.loss_forward(student.detach(), *arguments, inplace=True)


def _scaled(grad: Tensor, upstream: Tensor, class_dim: int) -> Tensor:
    if torch.compiler.is_compiling():
        factor = upstream.unsqueeze(class_dim % grad.dim()) if upstream.dim() else upstream
        return (grad * factor).to(grad.dtype)
    # Unless the graph is kept, nobody reads the buffer again.
    buffer = grad.clone() if torch._C._autograd._get_current_graph_task_keep_graph() else grad
    return kernels.scale_gradient(buffer, upstream, class_dim)


def _check_inplace(student: Tensor) -> None:
    """What `csrc/autograd.cpp` refuses, in its words."""
    if not student.is_contiguous():
        raise ValueError(
            "sortkd_kernels: expected a contiguous student with inplace=True, since the gradient is written over it, "
            f"got strides {list(student.stride())}"
        )
    if student.is_leaf:
        raise ValueError(
            "sortkd_kernels: expected logits that a model computed with inplace=True, got a leaf tensor that requires "
            "grad, whose values would be lost; pass inplace=False"
        )


def _is_plain(t: Tensor) -> bool:
    """A tensor with memory of its own, outside any trace, with no mode that wants to see the ops."""
    return type(t) is Tensor and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()


def loss(
    student: Tensor, teacher: Tensor, teacher_indices: Tensor | None, target: Tensor, temperature_tensor: Tensor | None,
    *config: Any,
) -> Parts:  # fmt: skip
    """A loss op of :mod:`sortkd_kernels.ops`; in a trace the permission to write in place is not used."""
    *config, inplace = config
    # Inside a Function a tensor asks for its gradient under torch.no_grad() too, and would get its memory.
    if not torch.is_grad_enabled():
        return sort_kd_forward(student, teacher, teacher_indices, target, temperature_tensor, *config, None, False)[:4]
    if inplace and student.requires_grad:
        _check_inplace(student)
    tensors = teacher, teacher_indices, target
    return _Loss.apply(student, temperature_tensor, tensors, tuple(config), inplace and _is_plain(student))
