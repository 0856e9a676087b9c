"""The inputs of the benchmarks: logits like a trained student's and teacher's, and the truth about them in float64."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sortkd_kernels import reference

SHAPES = (
    (64, 100),  # CIFAR-100: the overhead of a call decides
    (256, 1000),  # ImageNet, a small batch
    (4096, 1000),  # compute and memory in balance
    (8192, 1000),  # the three tensors exceed the last-level cache
    (256, 21841),  # ImageNet-21k
    (512, 32000),  # language models
    (64, 128256),
    (32, 262144),
)
QUICK_SHAPES = ((64, 100), (4096, 1000))
BASE, GPU_BASE = (4096, 1000), (8192, 1000)
ACCURACIES = {"always right": 1.0, "95%": 0.95, "80%": 0.8, "50%": 0.5, "always wrong": 0.0, "random": None}
DENSE = (8, 150, 128, 128)
TOP_K, TOP_K_SHAPE = 64, (512, 32000)

TEMPERATURE = 4.0
SCALE = 2.0  # standard deviation of the logits of a network trained on CIFAR-100 or ImageNet, roughly
MAX_RANK = 8
CHUNK = 1 << 22  # elements of the truth computed at a time: its chain keeps a dozen float64 and int64 copies

# Loss and gradient against float64, relative, the gradient in the Frobenius norm. float32: sums of up to 2^18 terms
# in any order stay below 1e-5, and an unstable sort may exchange two tied classes. bfloat16: the gradient is rounded
# once, to 2^-9 of each element.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


@dataclass
class Inputs:
    """One batch. ``student`` is a leaf that requires grad; classes are the dimension ``class_dim``."""

    student: Tensor
    teacher: Tensor
    target: Tensor
    class_dim: int = -1
    _truth: dict[tuple[tuple[str, object], ...], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def with_own_leaf(self) -> Inputs:
        """The same batch in the same memory, with a student whose gradient is nobody else's.

        A CUDA graph needs it: autograd's node that accumulates into a leaf belongs to the stream on which it was made,
        and one left from an eager call would draw that stream into the capture and end it.
        """
        return replace(self, student=self.student.detach().requires_grad_())

    @property
    def nbytes(self) -> int:
        """The byte model of a loss with its gradient: each logit read once, each gradient written once."""
        return 2 * self.student.nbytes + self.teacher.nbytes

    def rows(self, logits: Tensor) -> Tensor:
        """``logits`` as ``[rows, C]``, detached."""
        moved = logits.detach().movedim(self.class_dim, -1)
        return moved.reshape(-1, moved.shape[-1])

    def truth(self, **math: object) -> tuple[Tensor, Tensor, Tensor]:
        """Mean loss, its gradient ``[rows, C]`` and the temperature's gradient in float64, computed once.

        Args:
            math: ``kd_weight`` (1), ``ce_weight`` (0) and keyword arguments of
                :func:`sortkd_kernels.reference.loss_rows`.
        """
        key = tuple(sorted(math.items()))
        if key not in self._truth:
            self._truth[key] = self._compute(**math)
        return self._truth[key]

    def _compute(
        self, kd_weight: float = 1.0, ce_weight: float = 0.0, temperature: float = TEMPERATURE, **math: object
    ) -> tuple[Tensor, Tensor, Tensor]:
        student, teacher, target = self.rows(self.student), self.rows(self.teacher), self.target.reshape(-1)
        n, classes = student.shape
        t = torch.tensor(temperature, dtype=torch.float64, device=student.device, requires_grad=True)
        grad = torch.empty(n, classes, dtype=torch.float64, device=student.device)
        loss = grad_t = torch.zeros_like(t, requires_grad=False)
        step = max(1, CHUNK // classes)
        for i in range(0, n, step):
            rows = slice(i, i + step)
            leaf = student[rows].double().requires_grad_()
            kd, ce, _ = reference.loss_rows(leaf, teacher[rows].double(), target[rows], temperature=t, **math)
            total = (kd_weight * kd + ce_weight * ce).sum() / n
            grad[rows], dt = torch.autograd.grad(total, (leaf, t))
            loss, grad_t = loss + total.detach(), grad_t + dt
        return loss, grad, grad_t

    def check(self, name: str, loss: Tensor, temperature: Tensor | None = None, **math: object) -> None:
        """Compare a provider's ``loss``, and the gradients that its backward pass left, with :meth:`truth`.

        Raises:
            AssertionError: the provider is wrong, with the error found and the one allowed.
        """
        true_loss, true_grad, true_dt = self.truth(**math)
        allowed = TOLERANCE[self.student.dtype]
        expect_close(f"{name}: loss", loss.detach(), true_loss, allowed)
        expect_close(f"{name}: gradient", self.rows(self.student.grad), true_grad, allowed)
        if temperature is not None:
            expect_close(f"{name}: temperature's gradient", temperature.grad, true_dt, allowed)


def expect_close(what: str, found: Tensor, truth: Tensor, allowed: float) -> None:
    """Raise ``AssertionError`` where the relative error exceeds ``allowed`` or is NaN."""
    error = ((found.double() - truth).norm() / truth.norm()).item()
    if not error <= allowed:
        raise AssertionError(f"{what} is off by {error:.2e} from the float64 reference, allowed {allowed:.0e}")


def make(
    rows: int,
    classes: int,
    *,
    accuracy: float | None = 0.8,
    heavy_tail: bool = False,
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Inputs:
    """A batch ``[rows, classes]``, the same for the same arguments on one kind of device.

    Args:
        accuracy: the share of rows where the teacher is right. In the others a few classes are above the label: one in
            half of them, two in a quarter, and so on. None is an untrained teacher: the label has any rank.
        heavy_tail: in 1 / sqrt(r) of the others r classes or more are above the label, as for the tokens that are hard
            for a language model: with an accuracy of 60%, more than 64 in 5% of all rows, and 2048 in 1%.
        dtype, teacher_dtype: of the student and the teacher, the teacher's being ``dtype`` by default.
    """
    g = torch.Generator(device).manual_seed(seed)
    student, teacher = (torch.randn(rows, classes, generator=g, device=device).mul_(SCALE) for _ in "st")
    target = torch.randint(classes, (rows,), generator=g, device=device)
    if heavy_tail:
        rank = torch.rand(rows, generator=g, device=device).pow(-2).clamp_(max=classes - 1).long()
        rank[torch.randperm(rows, generator=g, device=device) < round((accuracy or 0.0) * rows)] = 0
        for some in range(0, rows, step := max(1, CHUNK // classes)):
            order = teacher[some : some + step].argsort(dim=1, descending=True)
            target[some : some + step] = order.gather(1, rank[some : some + step, None])[:, 0]
    elif accuracy is not None:
        rank = torch.empty(rows, device=device).geometric_(0.5, generator=g)
        rank = rank.clamp(max=min(MAX_RANK, classes - 2)).long()
        right = torch.randperm(rows, generator=g, device=device) < round(accuracy * rows)
        _place_label(teacher, target, rank.masked_fill(right, 0))
    return Inputs(student.to(dtype).requires_grad_(), teacher.to(teacher_dtype or dtype), target)


def make_dense(shape: tuple[int, ...], device: torch.device | str = "cpu") -> Inputs:
    """A segmentation batch: logits of ``shape`` ``[N, C, H, W]``, contiguous, labels ``[N, H, W]``."""
    n, classes, *space = shape
    flat = make(n * torch.Size(space).numel(), classes, device=device)

    def dense(rows: Tensor) -> Tensor:
        return rows.detach().reshape(n, *space, classes).movedim(-1, 1).contiguous()

    target = flat.target.reshape(n, *space)
    return Inputs(dense(flat.student).requires_grad_(), dense(flat.teacher), target, class_dim=1)


def _place_label(teacher: Tensor, target: Tensor, rank: Tensor) -> None:
    """Give the label the logit that puts ``rank`` classes above it, in place."""
    label = target.unsqueeze(1)
    top = teacher.scatter(1, label, -torch.inf).topk(min(MAX_RANK, teacher.shape[1] - 2) + 1, dim=1).values
    bounds = torch.cat([top[:, :1] + SCALE, top], dim=1)
    between = (bounds[:, :-1] + bounds[:, 1:]) / 2
    teacher.scatter_(1, label, between.gather(1, rank.unsqueeze(1)))
