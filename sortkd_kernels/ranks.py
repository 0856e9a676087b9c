"""The ranks that hold slices of a loss's classes: whose slice is which, what all must agree on, what they send."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks, ops


def is_sharded(student: Any) -> bool:
    """Whether these logits are a DTensor; importing nothing to find out."""
    return type(student) is not Tensor and hasattr(student, "device_mesh")


def shards(
    fn: str, student: Any, teacher: Any, target: Any, process_group: Any, class_dim: int
) -> tuple[Any, Tensor, Tensor, Tensor]:
    """``process_group`` and its slices as they are, or those of DTensors sharded over their classes.

    Raises:
        TypeError, ValueError: on every rank alike, before anything is sent.
    """
    if not is_sharded(student):
        # What new_group returns to a rank outside.
        if dist.is_available() and process_group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                f"{fn}: expected this rank to be in process_group, got rank {dist.get_rank()} outside of it"
            )
        if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                f"{fn}: expected process_group to be a torch.distributed.ProcessGroup, "
                f"got {type(process_group).__name__}"
            )
        return process_group, student, teacher, target
    if process_group is not None:
        raise ValueError(f"{fn}: expected process_group=None beside a DTensor, whose mesh has the group; got both")
    from torch.distributed.tensor import DTensor, Shard

    mesh, last = student.device_mesh, student.dim() - 1
    split = [i for i, placement in enumerate(student.placements) if not placement.is_replicate()]
    over_classes = [i for i in split if type(student.placements[i]) is Shard and student.placements[i].dim == last]
    if len(split) != 1 or over_classes != split:
        raise ValueError(
            f"{fn}: expected student to be sharded over its classes, Shard({last}), by one dimension of its mesh and "
            f"replicated by the others, got {student.placements}; redistribute it, or pass local tensors and "
            "process_group"
        )
    if class_dim not in (-1, last):
        raise ValueError(f"{fn}: expected class_dim=-1 with a DTensor, got {class_dim}")
    alike = isinstance(teacher, DTensor) and teacher.device_mesh == mesh
    if not alike or teacher.placements != student.placements or teacher.shape != student.shape:
        came = (
            f"{tuple(teacher.shape)} {teacher.placements}" if isinstance(teacher, DTensor) else type(teacher).__name__
        )
        raise ValueError(
            f"{fn}: expected teacher to be a DTensor of shape {tuple(student.shape)} sharded like student, "
            f"{student.placements}, got {came}"
        )
    if isinstance(target, DTensor):
        if not all(placement.is_replicate() for placement in target.placements):
            raise ValueError(f"{fn}: expected target to be replicated, got {target.placements}")
        target = target.to_local()
    if not (mesh.mesh.diff(dim=split[0]) > 0).all():
        # A group numbers its ranks in ascending order, and slices go by that number.
        raise ValueError(f"{fn}: expected a mesh whose ranks ascend along the classes, got {mesh}")
    return mesh.get_group(split[0]), student.to_local(), teacher.to_local(), target


# What `agree` compares, in this order.
_TARGET = "target, label by label,"
_FACTS = ["refusal", "number of classes", "number of rows", "student dtype", "teacher dtype", _TARGET]
_FACTS += ["least label", "greatest label", "gradient asked of the temperature", *ops.LossConfig._fields]
_NAMES: dict[str, tuple[Any, ...]] = {"correction": checks.CORRECTIONS, "reduction": checks.REDUCTIONS}
_NAMES |= {"student dtype": checks.FLOAT_DTYPES, "teacher dtype": checks.FLOAT_DTYPES}


def refuse(group: Any, student: Any) -> None:
    """Tell the other ranks, which wait in :func:`agree`, that this one has refused its arguments."""
    nccl = dist.get_backend(group) == "nccl"
    device = student.device if isinstance(student, Tensor) else torch.device("cuda" if nccl else "cpu")
    gather(group, torch.tensor([1.0] + [0.0] * (len(_FACTS) - 1), dtype=torch.float64, device=device))


def agree(
    group: Any, student: Tensor, teacher: Tensor, target: Tensor, config: ops.LossConfig, moments: bool
) -> list[int]:
    """The widths of the ranks' slices, after the checks that need all ranks and are alike on all of them."""
    rows, dtypes = target.numel(), [float(checks.FLOAT_DTYPES.index(x.dtype)) for x in (student, teacher)]
    labels = target.reshape(-1)
    # Which numbers they multiply matters little; in 52 bits float64 holds the sum.
    places = torch.arange(1, rows + 1, device=target.device) * 2654435761 % 2147483647
    counted = torch.where(labels == config.ignore_index, 0, labels)
    of_labels = [(labels * places).sum() & (1 << 52) - 1]
    of_labels += [counted.amin(), counted.amax()] if rows else [of_labels[0]] * 2
    options = [math.inf if x is None else float(x) for x in config]
    facts = torch.tensor([0.0, student.shape[-1], rows, *dtypes, 0, 0, 0, moments, *options], dtype=torch.float64)
    facts = facts.to(target.device)
    facts[5:8] = torch.stack(of_labels)
    of_ranks = on_host(gather(group, facts))

    refused = [place for place, one in enumerate(of_ranks) if one[0]]
    if refused:
        raise ValueError(
            f"sortkd_kernels: rank {refused[0]} of process_group has refused its arguments; its own error says why"
        )
    for i, name in enumerate(_FACTS):
        values = [one[i] for one in of_ranks]
        if name == "number of classes" or len(set(values)) == 1:
            continue
        words = [str(_NAMES[name][int(x)]).removeprefix("torch.") if name in _NAMES else f"{x:g}" for x in values]
        shown = "" if name == _TARGET else f", got {', '.join(words)} in the order of the ranks"
        raise ValueError(f"sortkd_kernels: expected the same {name} on all ranks of process_group{shown}")
    widths = [int(one[1]) for one in of_ranks]
    classes, least, greatest = sum(widths), int(of_ranks[0][6]), int(of_ranks[0][7])
    if not classes:
        raise ValueError("sortkd_kernels: expected at least one class on the ranks of process_group together, got 0")
    if least < 0 or greatest >= classes:
        raise IndexError(
            f"sortkd_kernels: expected target in [0, {classes}), the classes of all ranks, or ignore_index "
            f"{config.ignore_index}, got {least if least < 0 else greatest}"
        )
    return widths


def on_host(x: Tensor) -> Any:
    """How much is to be sent decides what the host does next: it waits."""
    return x.tolist()


def gather(group: Any, x: Tensor) -> Tensor:
    """``x`` of each rank, stacked."""
    ranks = dist.get_world_size(group)
    every = x.new_empty(ranks * x.numel())
    if x.numel():
        # torch 2.14 has the first name, and warns of the second.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(every, x.reshape(-1), group=group)
    return every.view(ranks, *x.shape)


def reduce(group: Any, x: Tensor, how: str = "SUM") -> Tensor:
    """``x`` reduced over the ranks, in place."""
    if x.numel():
        dist.all_reduce(x, getattr(dist.ReduceOp, how), group=group)
    return x
