"""The gradient is made in the forward pass and rescaled in the backward one, for every gradient that reaches it, in any order."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import BF16, F16, F32, F64, IGNORE, Variant
from torch.utils.checkpoint import checkpoint

from sortkd_kernels import fused_sort_kd, fused_sort_kd_topk

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EVERY_BACKEND = pytest.mark.parametrize("backend", cases.BACKENDS)

GRADCHECKED = [
    Variant(f"{method}-{temperature}", {**options, "ce_weight": 0.3, "reduction": reduction}, decoupled, temperature)
    for method, options, decoupled in (
        ("kd", {}, False), ("swap", {"correction": "swap"}, False), ("dkd", {"alpha": 1.5}, True),
        ("lskd", {"standardize": True}, False), ("dkd-lskd", {"standardize": True}, True),
    )
    for temperature, reduction in ((2.5, "none"), ("scalar", "mean"), ("row", "none"))
]  # fmt: skip


TWO_CHECKED = [v for v in GRADCHECKED if v.name in ("kd-row", "dkd-lskd-scalar")]


@pytest.mark.parametrize(
    ("backend", "variant"),
    [(b, v) for b in cases.BACKENDS for v in (GRADCHECKED if b in cases.KERNELS else TWO_CHECKED)],
    ids=str,
)
def test_gradcheck(backend, variant):
    """Finite differences, with a gradient of the loss for each row; the smallest shape that has every kind of row."""
    student, teacher, target = cases.make_rows(6, 5, (F64, F64))
    temperature = variant.make_temperature(6, F64)
    learned = (temperature,) if isinstance(temperature, torch.Tensor) else ()

    def loss(student, *learned):
        return variant.function(
            student, teacher, target, temperature=learned[0] if learned else temperature, backend=backend,
            **variant.options,
        )  # fmt: skip

    torch.autograd.gradcheck(loss, (student.requires_grad_(), *learned), fast_mode=backend in cases.LOGITS_LIMIT)


@pytest.mark.parametrize("backend", [b for b in cases.BACKENDS if b not in cases.LOGITS_LIMIT])
def test_gradcheck_top_k_and_dense(backend):
    student, teacher, target = cases.make_rows(6, 5, (F64, F64))
    values, indices = teacher.topk(2)
    temperature = torch.tensor(2.0, dtype=F64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda s, t: fused_sort_kd_topk(s, values, indices, target, temperature=t, backend=backend),
        (student.requires_grad_(), temperature), fast_mode=True,
    )  # fmt: skip
    torch.autograd.gradcheck(
        lambda s: fused_sort_kd(s.T, teacher.T, target, class_dim=0, reduction="none", backend=backend),
        (student,), fast_mode=True,
    )  # fmt: skip


def make(dtype=F32, reduction="mean", backend=None, **options):
    """A leaf, and its loss."""
    rows = cases.make_rows(12, 9, (dtype, dtype))
    student = rows.student.requires_grad_()
    return student, fused_sort_kd(student, rows.teacher, rows.target, reduction=reduction, backend=backend, **options)


@pytest.mark.parametrize("backend", [b for b in cases.BACKENDS if b != "reference"])
def test_no_gradient_of_the_parts_is_made(backend):
    """They have none, and zeros in its place would be written by the device."""
    _, out = make(backend=backend, return_parts=True)
    one = torch.ones_like(out.loss)
    with torch.profiler.profile() as profile:
        out.loss.backward(one)
    assert "aten::zeros" not in {e.key for e in profile.key_averages()}


def expected_gradient(dtype, grad_output, **options):
    """In float64, through the reference, of the same rounded logits; then rounded to ``dtype``."""
    rows = cases.make_rows(12, 9, (dtype, dtype))
    student = rows.student.double().requires_grad_()
    loss = fused_sort_kd(student, rows.teacher.double(), rows.target, backend="reference", **options)
    (grad,) = torch.autograd.grad(loss, student, grad_output.double())
    return grad


# One rounding to the dtype, and for bfloat16 a second one by the rescaling; absolute: of what is subtracted, T / N = 0.4
# at most. Triton's interpreter truncates to bfloat16, hence its 2^-7.
CLOSE = {F32: dict(rtol=3e-6, atol=3e-7), F64: dict(rtol=1e-13, atol=1e-14), BF16: dict(rtol=2**-7, atol=1e-6)}
CLOSE[F16] = dict(rtol=2**-11 * 1.01, atol=2**-25)


@pytest.mark.parametrize("dtype", (F32, F64, BF16, F16), ids=str)
@EVERY_BACKEND
def test_grad_output_scalar(backend, dtype):
    for value in (1.0, 2.0, -0.37, 0.0, 1000.0):
        student, loss = make(dtype, "mean", backend)
        grad_output = torch.tensor(value, dtype=loss.dtype)
        loss.backward(grad_output)
        bounds = {**CLOSE[dtype], "atol": CLOSE[dtype]["atol"] * max(1, abs(value))}
        torch.testing.assert_close(student.grad.double(), expected_gradient(dtype, grad_output), **bounds)


@pytest.mark.parametrize("dtype", (F32, F64, BF16, F16), ids=str)
@EVERY_BACKEND
def test_grad_output_per_row(backend, dtype):
    """Different for each row, zero and negative among them, and handed over as an expanded tensor too."""
    student, loss = make(dtype, "none", backend)
    grad_output = torch.linspace(-2, 3, 12).round(decimals=1).to(loss.dtype)
    (grad,) = torch.autograd.grad(loss, student, grad_output, retain_graph=True)
    bounds = {**CLOSE[dtype], "atol": 40 * CLOSE[dtype]["atol"]}
    torch.testing.assert_close(grad.double(), expected_gradient(dtype, grad_output, reduction="none"), **bounds)
    expanded = torch.tensor(1.7, dtype=loss.dtype).expand(12)
    (grad,) = torch.autograd.grad(loss, student, expanded)
    torch.testing.assert_close(grad.double(), expected_gradient(dtype, expanded, reduction="none"), **bounds)


@pytest.mark.parametrize(("grad_output", "spoil"), ((1.0, True), (3.0, False), (3.0, True)))
@pytest.mark.parametrize(("dtype", "reduction"), ((F32, "mean"), (F32, "none"), (F16, "mean"), (BF16, "none")), ids=str)
@EVERY_BACKEND
def test_two_backward_calls(backend, dtype, reduction, grad_output, spoil):
    """The second equals the first, also where the user wrote over the first in between."""
    student, loss = make(dtype, reduction, backend)
    grad_output = torch.full_like(loss, grad_output)
    (first,) = torch.autograd.grad(loss, student, grad_output, retain_graph=True)
    kept = first.clone()
    if spoil:
        first.fill_(7)
    (second,) = torch.autograd.grad(loss, student, grad_output, retain_graph=True)
    assert torch.equal(second, kept)
    second.zero_()
    (last,) = torch.autograd.grad(loss, student, grad_output)
    assert torch.equal(last, kept)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, student, grad_output)


@pytest.mark.parametrize("dtype", (F32, F16), ids=str)
@EVERY_BACKEND
def test_gradients_accumulate(backend, dtype):
    student, loss = make(dtype, "mean", backend)
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    (2 * loss).backward()
    # Three times the gradient, each addend rounded to the dtype.
    torch.testing.assert_close(student.grad, 3 * once, rtol=3 * torch.finfo(dtype).eps, atol=0)


@EVERY_BACKEND
def test_gradient_scaler_keeps_small_probabilities(backend):
    """Probabilities of 1e-8 are 0 in float16; with 2^16 multiplied in before the rounding they are there."""
    student = torch.zeros(2, 40, dtype=F16)
    student[:, 3:] = -18.0  # exp(-18) = 1.5e-8, below half of float16's smallest number
    teacher, target = torch.zeros(2, 40, dtype=F16), torch.tensor([0, 1])
    teacher[:, 3:] = -40.0
    leaf = student.clone().requires_grad_()
    fused_sort_kd(leaf, teacher, target, temperature=1.0, reduction="sum", backend=backend).mul(65536.0).backward()
    grad = leaf.grad.double() / 65536
    true = student.double().softmax(-1)[:, 3:]
    assert true.max() < 2.0**-25
    torch.testing.assert_close(grad[:, 3:], true, rtol=2**-11, atol=2.0**-25 / 65536)


@EVERY_BACKEND
def test_gradient_scaler_and_temperature(backend):
    """The scale reaches a learned temperature once, not twice."""
    rows = cases.make_rows(12, 9, (F16, F16))
    temperature = torch.tensor(3.0, requires_grad=True)
    for scale in (1.0, 65536.0):
        loss = fused_sort_kd(
            rows.student.requires_grad_(), rows.teacher, rows.target, temperature=temperature, backend=backend
        )
        (loss * scale).backward()
    single, both = torch.tensor(3.0, requires_grad=True), temperature.grad
    fused_sort_kd(rows.student, rows.teacher, rows.target, temperature=single, backend=backend).backward()
    torch.testing.assert_close(both, single.grad * 65537)


@EVERY_BACKEND
def test_only_what_asks_gets_a_gradient(backend):
    """A frozen student with a learned temperature, the other way round, and neither."""
    student, teacher, target = cases.make_rows(12, 9)
    temperature = torch.tensor(3.0, requires_grad=True)
    leaf = student.clone().requires_grad_()
    both = fused_sort_kd(leaf, teacher, target, temperature=temperature, backend=backend)
    grad_student, grad_temperature = torch.autograd.grad(both, (leaf, temperature))
    alone = fused_sort_kd(student, teacher, target, temperature=temperature, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(alone, temperature)[0], grad_temperature)
    frozen = fused_sort_kd(leaf, teacher, target, temperature=temperature.detach(), backend=backend)
    torch.testing.assert_close(torch.autograd.grad(frozen, leaf)[0], grad_student)
    assert not fused_sort_kd(student, teacher, target, temperature=temperature.detach(), backend=backend).requires_grad


@EVERY_BACKEND
def test_no_grad_and_inference_mode(backend):
    student, loss = make(F32, "mean", backend)
    rows = cases.make_rows(12, 9)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            value = fused_sort_kd(student, rows.teacher, rows.target, backend=backend)
        assert not value.requires_grad
        torch.testing.assert_close(value, loss.detach(), rtol=1e-6, atol=0)
    with torch.inference_mode():
        teacher = rows.teacher.clone()  # what a frozen teacher's forward pass returns
    fused_sort_kd(student, teacher, rows.target, backend=backend).backward()
    (want,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(student.grad, want)


@pytest.mark.parametrize("dtype", (BF16, F16), ids=str)
@EVERY_BACKEND
def test_autocast_changes_nothing(backend, dtype):
    """float32 logits are worked on in float32, half ones as outside; the temperature's gradient is exact."""
    for logits in (F32, dtype):
        results = []
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                rows = cases.make_rows(12, 9, (logits, logits))
                results.append(cases.run(rows, cases.BY_NAME["scalar-T-ce"], backend))
        for outside, inside in zip(*(r[:6] for r in results), strict=True):
            assert outside.dtype == inside.dtype
            assert torch.equal(outside, inside)


@pytest.mark.parametrize("use_reentrant", (False, True))
@pytest.mark.parametrize("dtype", (F32, F16), ids=str)
@EVERY_BACKEND
def test_checkpoint(backend, dtype, use_reentrant):
    rows = cases.make_rows(12, 9, (dtype, dtype))
    student, loss = make(dtype, "mean", backend)
    loss.backward()
    leaf = rows.student.clone().requires_grad_()
    checkpoint(
        lambda s: fused_sort_kd(s * 1, rows.teacher, rows.target, backend=backend), leaf, use_reentrant=use_reentrant
    ).backward()
    assert torch.equal(leaf.grad, student.grad)


@EVERY_BACKEND
def test_saved_tensor_hooks(backend):
    """What is saved may be moved away and back: it is unpacked, not assumed."""
    student, loss = make(F32, "mean", backend)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone().numpy(), torch.from_numpy):
        other, offloaded = make(F32, "mean", backend)
    loss.mul(2).backward()
    offloaded.mul(2).backward()
    assert torch.equal(student.grad, other.grad)


@pytest.mark.parametrize("dtype", (F32, F16), ids=str)
@EVERY_BACKEND
def test_inputs_stay_as_they_are(backend, dtype):
    rows = cases.make_rows(12, 9, (dtype, dtype))
    rows.target[3] = IGNORE
    copies = [x.clone() for x in rows]
    result = cases.run(rows, cases.BY_NAME["row-T"], backend)
    assert result.grad.data_ptr() not in [x.data_ptr() for x in rows]
    for before, after in zip(copies, rows, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("backend", [b for b in cases.BACKENDS if b != "reference"])
def test_a_changed_input_is_noticed(backend):
    """float16 recomputes in the backward pass: logits that changed in between raise, and give no other gradient."""
    student, teacher, target = cases.make_rows(12, 9, (F16, F16))
    loss = fused_sort_kd(student.requires_grad_(), teacher, target, backend=backend)
    teacher.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", (F32, F64, BF16, F16), ids=str)
@pytest.mark.parametrize("top_k", (False, True))
@EVERY_BACKEND
def test_a_teacher_from_inference_mode(backend, top_k, dtype):
    """Autograd refuses to save such tensors, labels made there among them; float16 reads them in its backward pass."""
    rows = cases.make_rows(12, 9, (dtype, dtype))
    with torch.inference_mode():
        teacher, target = rows.teacher * 1, rows.target.clone()
        values, indices = teacher.topk(3)
    results = []
    for tensors in (
        (teacher, values, indices, target),
        [x.clone() for x in (rows.teacher, *rows.teacher.topk(3), rows.target)],
    ):
        leaf = rows.student.clone().requires_grad_()
        full, v, i, y = tensors
        loss = (
            fused_sort_kd_topk(leaf, v, i, y, backend=backend)
            if top_k
            else fused_sort_kd(leaf, full, y, backend=backend)
        )
        loss.backward()
        results.append(leaf.grad)
    assert torch.equal(*results)


class Elsewhere(torch.Tensor):
    """A tensor without memory, as a result that is still on its way from other ranks is: its values are another one's."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=values.device)

    def __init__(self, values):
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def values(x):
            return x.values if isinstance(x, Elsewhere) else x

        return func(*torch.utils._pytree.tree_map(values, args), **(kwargs or {}))


@pytest.mark.parametrize("dtype", (F32, F16), ids=str)
@EVERY_BACKEND
def test_tensors_whose_memory_is_not_their_own(backend, dtype):
    """A teacher or labels of a wrapper subclass, or negated lazily: never what lies at their address."""
    student, teacher, target = cases.make_rows(9, 12, (dtype, dtype))

    weight, upstream = torch.linspace(0.5, 2, 9), torch.tensor(-3.0)

    def step(teacher=teacher, target=target, weight=weight, upstream=upstream):
        leaf = student.clone().requires_grad_()
        loss = fused_sort_kd(leaf, teacher, target, row_weight=weight, reduction="sum", backend=backend)
        return loss.detach(), torch.autograd.grad(loss, leaf, upstream)[0]

    def negated(values):
        return torch._neg_view(-values)

    want = step()
    for others in (
        {"teacher": Elsewhere(teacher)}, {"target": Elsewhere(target)}, {"weight": Elsewhere(weight)},
        {"teacher": negated(teacher)}, {"weight": negated(weight)}, {"upstream": negated(upstream)},
    ):  # fmt: skip
        for got, value in zip(step(**others), want, strict=True):
            # Sums in another order, and their rounding to half.
            torch.testing.assert_close(got, value, rtol=2e-6 if dtype == F32 else 2**-9, atol=1e-9)
