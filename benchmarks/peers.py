"""What is timed beside what: the peers as a competent PyTorch user writes them, the providers, and their cases.

The chains follow the methods' definitions: two full sorts for the correction (an argsort with the label in front, a
sort of the values, a scatter), then softmax, log-softmax and ``kl_div``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import workloads
from harness import Provider
from torch import Tensor
from torch.nn import functional as F
from workloads import TEMPERATURE, Inputs, expect_close, make

import sortkd_kernels
from sortkd_kernels import reference

PAPER, PAPER_COMPILED = "paper eager", "paper compiled"
KD, KD_COMPILED = "KD eager", "KD compiled"
ROOF = "roof"
Chain = Callable[..., Tensor]


def paper_op(teacher: Tensor, target: Tensor) -> Tensor:
    """The paper's correction of the teacher, classes in dimension 1."""
    label_first = teacher.scatter(1, target.unsqueeze(1), torch.inf).argsort(dim=1, descending=True)
    values = teacher.sort(dim=1, descending=True).values
    return torch.empty_like(teacher).scatter_(1, label_first, values)


def kd(student: Tensor, teacher: Tensor, target: Tensor, temperature: float | Tensor = TEMPERATURE) -> Tensor:
    """Plain KD: ``T^2 KL(softmax(teacher / T) || softmax(student / T))``, mean over rows; classes in dimension 1."""
    # float32 for halves, as under autocast: a log-probability in bfloat16 is off by percents.
    log_q = F.log_softmax(student.float() / temperature, dim=1)
    p = F.softmax(teacher.float() / temperature, dim=1)
    return F.kl_div(log_q, p, reduction="sum") / target.numel() * temperature**2


def paper_kd(student: Tensor, teacher: Tensor, target: Tensor, temperature: float | Tensor = TEMPERATURE) -> Tensor:
    """Sort-KD: the paper's op, then KD."""
    return kd(student, paper_op(teacher, target), target, temperature)


def paper_lskd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Sort-KD with logit standardization."""
    return kd(_zscore(student), _zscore(paper_op(teacher, target)), target)


def paper_dkd(student: Tensor, teacher: Tensor, target: Tensor, alpha: float = 1.0, beta: float = 8.0) -> Tensor:
    """The paper's op, then DKD: the binary pair of the label, and the other classes with the label masked out."""
    t, s = paper_op(teacher, target) / TEMPERATURE, student / TEMPERATURE
    label = target.unsqueeze(1)
    p_y, q_y = F.softmax(t, dim=1).gather(1, label), F.softmax(s, dim=1).gather(1, label)
    pair_p, pair_q = torch.cat([p_y, 1 - p_y], 1), torch.cat([q_y, 1 - q_y], 1)
    tckd = F.kl_div(pair_q.log(), pair_p, reduction="sum")
    # Not -inf, with which kl_div makes 0 * inf; e^-1000 is 0 as well.
    others_p = F.softmax(t.scatter(1, label, -1000.0), dim=1)
    others_q = F.log_softmax(s.scatter(1, label, -1000.0), dim=1)
    nckd = F.kl_div(others_q, others_p, reduction="sum")
    return (alpha * tckd + beta * nckd) * TEMPERATURE**2 / target.numel()


def paper_kd_ce(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Sort-KD and the cross-entropy on the label: the whole loss of a training step."""
    return paper_kd(student, teacher, target) + F.cross_entropy(student, target)


def cross_entropy(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """The cross-entropy alone, without a teacher."""
    return F.cross_entropy(student, target)


def _zscore(logits: Tensor) -> Tensor:
    std, mean = torch.std_mean(logits, dim=1, keepdim=True)
    return (logits - mean) / (1e-7 + std)


@dataclass(frozen=True)
class Method:
    """A loss of this package: its function and arguments, the reference's arguments, and its eager chain."""

    function: str
    arguments: dict[str, object]
    math: dict[str, object]
    chain: Chain
    learned: bool = False


METHODS = {
    "KD": Method("fused_sort_kd", {}, {}, paper_kd),
    "plain KD": Method("fused_sort_kd", {"correction": "none"}, {"correction": "none"}, kd),
    "KD + CE": Method("fused_sort_kd", {"ce_weight": 1.0}, {"ce_weight": 1.0}, paper_kd_ce),
    "DKD": Method("fused_sort_dkd", {"alpha": 1.0, "beta": 8.0}, {"beta": 8.0}, paper_dkd),
    "LSKD": Method("fused_sort_kd", {"standardize": True}, {"standardized": True}, paper_lskd),
    "learned T": Method("fused_sort_kd", {}, {}, paper_kd, learned=True),
}


def backends(inputs: Inputs, reference_limit: int = 1_000_000) -> list[str]:
    """The backends to time on these inputs, the default one first; the reference where it takes but a moment."""
    device = inputs.student.device.type
    names = [
        name
        for name, state in sortkd_kernels.available_backends().items()
        # Triton on a CPU is its interpreter, an instrument of the tests.
        if state.available and device in state.devices and not (name == "triton" and device == "cpu")
    ]
    return [*names, "reference"] if inputs.student.numel() <= reference_limit or not names else names


def loss(
    name: str, inputs: Inputs, call: Chain, math: dict[str, object], *, learned: bool = False, chain: str = PAPER,
    **kwargs: object,
) -> Provider:  # fmt: skip
    """A provider of the loss ``call(student, teacher, target, **kwargs)``, checked against the reference's ``math``.

    Args:
        learned: pass the temperature as a tensor, and check its gradient too.
        chain: the name of the same work in eager PyTorch.
    """
    temperature, inputs = None, inputs.with_own_leaf()
    if learned:
        temperature = torch.tensor(TEMPERATURE, device=inputs.student.device, requires_grad=True)
        kwargs["temperature"] = temperature
    return Provider(
        name,
        lambda: call(inputs.student, inputs.teacher, inputs.target, **kwargs),
        leaves=(inputs.student,) if temperature is None else (inputs.student, temperature),
        nbytes=inputs.nbytes,
        elements=inputs.student.numel(),
        check=lambda result: inputs.check(name, result, temperature, **math),
        chain=chain,
    )


def fused(name: str, inputs: Inputs, backend: str, method: str = "KD", **kwargs: object) -> Provider:
    """A provider of one of this package's losses on one backend."""
    m = METHODS[method]
    call = getattr(sortkd_kernels, m.function)
    return loss(name, inputs, call, m.math, learned=m.learned, backend=backend, **m.arguments, **kwargs)


def compiled(chain: Chain) -> Chain:
    """``chain`` under ``torch.compile`` for the one shape that it meets."""
    return torch.compile(chain, dynamic=False, fullgraph=True)


def roof(inputs: Inputs, name: str = ROOF) -> Provider:
    """A copy: ``torch.add`` moves the same bytes into the same allocation, and computes nothing."""
    s, t = inputs.student.detach(), inputs.teacher
    return Provider(name, lambda: torch.add(s, t), nbytes=inputs.nbytes, elements=s.numel(), roof=name)


def inplace(name: str, inputs: Inputs, backend: str) -> Provider:
    """The fused op writing its gradient over logits that are computed before each call, untimed."""
    heads: list[Tensor] = []

    def call(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return sortkd_kernels.fused_sort_kd(heads.pop(), teacher, target, backend=backend, inplace=True)

    provider = loss(name, inputs, call, {})
    # As a model's last layer returns them.
    provider.prepare = lambda: heads.__setitem__(slice(None), [provider.leaves[0] + 0])
    return provider


def sort_only(name: str, inputs: Inputs, call: Chain) -> Provider:
    """A provider of the corrected teacher alone."""
    teacher, target = inputs.teacher, inputs.target
    truth = reference.sort_logits(teacher.double(), target)
    return Provider(
        name,
        lambda: call(teacher, target),
        nbytes=2 * teacher.nbytes,
        elements=teacher.numel(),
        check=lambda result: expect_close(name, result, truth, 1e-4),  # ties: an unstable sort may exchange two classes
    )


def cases(device: torch.device, quick: bool) -> Iterator[tuple[str, Callable[[], list[Provider]]]]:
    """Names of the cases and what builds their providers; built one at a time, since the large ones fill memory."""
    for n, c in workloads.QUICK_SHAPES if quick else workloads.SHAPES:
        yield f"{n}x{c}", lambda n=n, c=c: shape_case(n, c, device, quick)
    for name, accuracy in workloads.ACCURACIES.items():
        if not quick or name in ("always right", "random"):
            yield f"teacher {name}", lambda a=accuracy: accuracy_case(a, device)
    yield "sort_logits", lambda: sort_case(device)
    yield "dtypes", lambda: dtype_case(device)
    yield "methods", lambda: method_case(device, [m for m in METHODS if not quick or m not in ("plain KD", "KD + CE")])
    if not quick:
        yield "dense", lambda: dense_case(device)
        yield "top-k", lambda: top_k_case(device)


def shape_case(n: int, c: int, device: torch.device, quick: bool) -> list[Provider]:
    """All peers on one shape, teacher right on 80% of the rows."""
    x = make(n, c, device=device)
    plain = {"correction": "none"}
    providers = [
        roof(x),
        *(fused(b, x, b) for b in backends(x)),
        loss(PAPER, x, paper_kd, {}),
        loss(KD, x, kd, plain),
    ]
    if not quick or (n, c) == workloads.BASE:  # each compiles for ten seconds
        providers.append(loss(KD_COMPILED, x, compiled(kd), plain))
    if not quick:
        providers.append(loss(PAPER_COMPILED, x, compiled(paper_kd), {}))
        providers.append(inplace(f"{backends(x)[0]} inplace", x, backends(x)[0]))
    if (n, c) == (64, 100):
        providers.append(loss("cross_entropy", x, cross_entropy, {"kd_weight": 0.0, "ce_weight": 1.0}))
    return providers


def accuracy_case(accuracy: float | None, device: torch.device) -> list[Provider]:
    """The share of rows where the teacher is right decides how much there is to correct."""
    x = make(*workloads.BASE, accuracy=accuracy, device=device)
    chains = [loss(PAPER, x, paper_kd, {}), loss(KD, x, kd, {"correction": "none"})]
    return [roof(x), *(fused(b, x, b) for b in backends(x)), *chains]


def sort_case(device: torch.device) -> list[Provider]:
    """The pre-processing alone; its roof is a copy of the teacher."""
    x = make(*workloads.BASE, device=device)
    ours = [
        sort_only(b, x, lambda teacher, target, b=b: sortkd_kernels.sort_logits(teacher, target, backend=b))
        for b in backends(x)
    ]
    copy = sort_only(ROOF, x, lambda teacher, target: teacher.clone())
    copy.check = None
    return [copy, *ours, sort_only("paper op", x, paper_op)]


def dtype_case(device: torch.device) -> list[Provider]:
    """Half-precision inputs beside float32, each with its own roof; mixed ones have none, since ``add`` converts."""
    bf16, providers = torch.bfloat16, []
    for suffix, dtype, teacher_dtype in (("", None, None), (" bf16", bf16, bf16), (" teacher bf16", None, bf16)):
        x = make(
            *workloads.BASE, dtype=dtype or torch.float32, teacher_dtype=teacher_dtype or torch.float32, device=device
        )
        copy = [] if suffix == " teacher bf16" else [roof(x, ROOF + suffix)]
        providers += copy
        for backend in backends(x):
            ours = fused(backend + suffix, x, backend)
            ours.roof = ROOF + suffix if copy else ""
            providers.append(ours)
    return providers


def method_case(device: torch.device, methods: list[str]) -> list[Provider]:
    """Every loss of the package beside its chain in eager PyTorch."""
    x = make(*workloads.BASE, device=device)
    providers = [roof(x)]
    for name in methods:
        m = METHODS[name]
        providers.append(loss(f"{name} eager", x, m.chain, m.math, learned=m.learned))
        providers += [fused(f"{b} {name}", x, b, name, chain=f"{name} eager") for b in backends(x)]
    return providers


def dense_case(device: torch.device) -> list[Provider]:
    """Segmentation: classes in dimension 1."""
    x = workloads.make_dense(workloads.DENSE, device)
    ours = [fused(b, x, b, class_dim=1) for b in backends(x)]
    return [roof(x), *ours, loss(PAPER, x, paper_kd, {})]


def top_k_case(device: torch.device) -> list[Provider]:
    """The teacher served as its top k of each row, beside the full op on the same student."""
    x = make(*workloads.TOP_K_SHAPE, device=device)
    providers = [roof(x), *(fused(b, x, b) for b in backends(x))]
    for tail, teacher in (("renormalize", x.teacher), ("uniform", x.teacher.log_softmax(1))):
        values, indices = teacher.topk(workloads.TOP_K, dim=1)
        stands_for = reference.densify_top_k(values, indices, x.student.shape[1], tail == "uniform")
        dense = Inputs(x.student, stands_for, x.target)

        def call(
            student: Tensor, _: Tensor, target: Tensor, v: Tensor = values, i: Tensor = indices, **kw: object
        ) -> Tensor:
            return sortkd_kernels.fused_sort_kd_topk(student, v, i, target, **kw)

        for backend in backends(x):
            providers.append(loss(f"{backend} top-k {tail}", dense, call, {}, backend=backend, tail=tail, chain=""))
            providers[-1].nbytes = 2 * x.student.nbytes + values.nbytes + indices.nbytes
    return providers
