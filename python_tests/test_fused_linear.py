"""From hidden states: the loss and the gradients of the whole logits, whatever the blocks, and less memory."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch
from cases import BF16, F16, F32, F64, IGNORE
from test_memory import Peak
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sortkd_kernels import FusedLinearSortKDLoss, fused_linear_sort_kd, fused_sort_kd, fused_sort_kd_topk, reference

EVERY_BACKEND = pytest.mark.parametrize("backend", cases.BACKENDS)
# Of rows that share no block, of blocks with a rest, of all rows.
CHUNKS = (1, 5, "auto")
CALLS = (
    {},
    {"ce_weight": 0.3, "correction": "swap", "temperature": 1.0},
    {"reduction": "sum", "beta": 2.0, "alpha": 0.5, "correction": "none"},
    {"reduction": "none", "ce_weight": 0.2},
    {"standardize": True, "reduction": "sum", "denominator": 7.0},
    {"softcap": 3.0, "logit_scale": 0.7, "ce_weight": 0.1},
    {"row_weight": torch.linspace(0, 2, 12)},
)


class Inputs:
    """Hidden states and weights of both sides, rows of which some are ignored; what requires a gradient is fresh."""

    def __init__(self, N=12, H=6, C=9, teacher_classes=None, dtype=F64, spread=1.0) -> None:
        generator = torch.Generator().manual_seed(N * 131 + C)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)

        self.hidden, self.weight, self.bias = random(N, H) * spread, random(C, H), random(C)
        C = teacher_classes or C
        self.teacher = {"teacher_hidden": random(N, 4) * spread, "teacher_weight": random(C, 4)}
        self.target = torch.randint(min(C, self.weight.shape[0]), (N,), generator=generator)
        self.target[1::4] = IGNORE
        for x in (self.hidden, self.weight, self.bias):
            x.requires_grad_()

    @property
    def learning(self):
        return self.hidden, self.weight, self.bias

    def run(self, **options):
        """Loss and gradients; of rows their sum weighted unevenly."""
        loss = fused_linear_sort_kd(
            self.hidden, self.weight, self.target, bias=self.bias, **(self.teacher | options)
        )  # fmt: skip
        return loss, torch.autograd.grad((loss * cases.grad_output_of(loss)).sum(), self.learning)

    def truth(self, **options):
        """The same of whole logits in float64, by :mod:`reference` and PyTorch's autograd."""
        hidden, weight, bias = learning = [x.detach().double().requires_grad_() for x in self.learning]
        teacher = self.teacher["teacher_hidden"].double() @ self.teacher["teacher_weight"].double().T
        classes = min(len(weight), teacher.shape[-1])
        logits = [(hidden @ weight.T + bias)[:, :classes], teacher[:, :classes]]
        scale, cap = options.get("logit_scale", 1.0), options.get("softcap")
        student, teacher = (x * scale if cap is None else cap * torch.tanh(x * scale / cap) for x in logits)
        kd, ce, _ = reference.loss_rows(
            student, teacher, self.target, temperature=options.get("temperature", 4.0),
            correction=options.get("correction", "sort"), alpha=options.get("alpha", 1.0), beta=options.get("beta"),
            standardized=options.get("standardize", False),
        )  # fmt: skip
        loss = (kd + options.get("ce_weight", 0.0) * ce) * options.get("row_weight", torch.ones(()))
        if options.get("reduction", "mean") != "none":
            loss = loss.sum() / options.get("denominator", 1.0)
        if options.get("reduction", "mean") == "mean":
            loss = loss / (self.target != IGNORE).sum()
        return loss, torch.autograd.grad((loss * cases.grad_output_of(loss)).sum(), learning)


def assert_close(got, want, dtype=F64):
    # A sum of at most a hundred products, in another order: so many roundings of its largest term.
    eps = 200 * torch.finfo(dtype).eps
    for a, b in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=eps, atol=eps * b.abs().max().item())


@pytest.mark.parametrize(
    ("options", "chunk_rows"),
    [(options, rows) for options in CALLS for rows in (CHUNKS[::2] if not options else CHUNKS[1:])],
    ids=lambda x: "-".join(x) or "kd" if isinstance(x, dict) else str(x),
)
@EVERY_BACKEND
def test_loss_and_gradients_are_those_of_the_whole_logits(backend, options, chunk_rows, poisoned_memory):
    inputs = Inputs()
    assert_close(inputs.run(backend=backend, chunk_rows=chunk_rows, **options), inputs.truth(**options))


@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
@EVERY_BACKEND
def test_gradients_are_nearer_to_float64_than_those_of_logits_in_the_same_dtype(backend, dtype, simt):
    """Blocks of 32 rows against PyTorch's logits of the whole, rounded to the inputs' dtype, into the same loss."""
    if simt is not None:
        simt.guard(False)  # oneDNN's products of halves take memory from PyTorch's own allocator alone
    N, C = (6, 30) if backend == "triton" else (128, 300)
    inputs = Inputs(N, 32, C, dtype=dtype, spread=0.8)
    exact = inputs.truth()[1]
    blocks = inputs.run(backend=backend, chunk_rows=32)[1]
    student = F.linear(*inputs.learning)
    whole = torch.autograd.grad(
        fused_sort_kd(student, F.linear(*inputs.teacher.values()), inputs.target, backend=backend), inputs.learning
    )
    for name, a, b, x in zip(("hidden", "weight", "bias"), blocks, whole, exact, strict=True):
        # Both round; float32 logits of the same products differ by their order alone.
        assert (a - x).norm() <= (b - x).norm() * (1.5 if dtype == F32 else 1.0), name


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no Tensor.grad_dtype")
def test_a_wider_gradient_of_the_weight_adds_up_without_rounding():
    """Over 64 blocks, in the dtype that the parameter's gradient has."""
    inputs = Inputs(256, 32, 300, dtype=BF16, spread=0.8)
    exact = inputs.truth()[1][1]
    error = [(inputs.run(chunk_rows=4)[1][1] - exact).norm()]
    inputs.weight.grad_dtype = F32
    fused_linear_sort_kd(
        inputs.hidden, inputs.weight, inputs.target, bias=inputs.bias, chunk_rows=4, **inputs.teacher
    ).backward()
    error.append((inputs.weight.grad - exact).norm())
    assert inputs.weight.grad.dtype == F32
    assert error[1] < error[0] / 4  # 64 roundings add up to several times that of one product


@pytest.mark.parametrize("chunk_rows", (5,))
@pytest.mark.parametrize("served", ("logits", "renormalize", "uniform", "bucket"))
@EVERY_BACKEND
def test_a_teacher_as_it_is_served(backend, served, chunk_rows):
    """Whole logits, or a top k, as the functions on logits take them; `softcap` is not for these."""
    inputs = Inputs()
    teacher = inputs.teacher["teacher_hidden"] @ inputs.teacher["teacher_weight"].T
    student = 3 * torch.tanh(F.linear(*inputs.learning) / 3)
    if served == "logits":
        want = fused_sort_kd(student, teacher, inputs.target, ce_weight=0.2, backend="reference")
        given = {"teacher_logits": teacher}
    else:
        values, indices = teacher.log_softmax(-1).topk(4)
        given = {"teacher_values": values, "teacher_indices": indices, "tail": served}
        want = fused_sort_kd_topk(
            student, values, indices, inputs.target, tail=served, ce_weight=0.2, backend="reference"
        )
    options = given | {"teacher_hidden": None, "teacher_weight": None, "softcap": 3.0}
    got = inputs.run(backend=backend, chunk_rows=chunk_rows, ce_weight=0.2, **options)
    assert_close(got, (want, torch.autograd.grad(want, inputs.learning)))


@pytest.mark.parametrize(
    ("backend", "dtype"), [(backend, F64) for backend in cases.BACKENDS] + [("native", F16)], ids=str
)
def test_rows_to_ignore_may_hold_anything(backend, dtype, poisoned_memory):
    inputs = Inputs(dtype=dtype)
    want = inputs.run(backend=backend, chunk_rows=5)
    with torch.no_grad():
        inputs.hidden[1::4] = torch.nan
        inputs.teacher["teacher_hidden"][1::4] = torch.inf
    got = inputs.run(backend=backend, chunk_rows=5)
    for a, b in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert got[1][0][1::4].eq(0).all()


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("count", ("no rows", "none that counts"))
@EVERY_BACKEND
def test_nothing_to_count(backend, count, reduction):
    """As of logits: a mean of nothing is NaN; the gradients are 0."""
    inputs = Inputs(N=0 if count == "no rows" else 3)
    inputs.target.fill_(IGNORE)
    loss, grads = inputs.run(backend=backend, reduction=reduction)
    assert loss.isnan() if reduction == "mean" else loss.eq(0).all()
    assert reduction != "none" or loss.shape == inputs.target.shape
    if backend != "reference":  # 0 / 0 differentiated is a NaN there
        assert all(g.eq(0).all() for g in grads)


@pytest.mark.parametrize("sides", ((9, 7), (7, 9)), ids=str)
@EVERY_BACKEND
def test_classes_that_one_side_lacks_take_no_part(backend, sides):
    inputs = Inputs(C=sides[0], teacher_classes=sides[1])
    got = inputs.run(backend=backend, chunk_rows=5, ce_weight=0.2)
    assert_close(got, inputs.truth(ce_weight=0.2))
    assert got[1][1][7:].eq(0).all() and got[1][2][7:].eq(0).all()
    inputs.target[0] = 7
    # A kernel of the GPU asserts on the device.
    with pytest.raises((IndexError, RuntimeError), match=r"(expected target in|a label is outside) \[0, (7|C)\)"):
        inputs.run(backend=backend)


@pytest.mark.parametrize(("shape", "reduction"), (((), "mean"), ((12,), "mean"), ((12,), "none")), ids=str)
@EVERY_BACKEND
def test_a_learned_temperature(backend, shape, reduction):
    inputs = Inputs()
    grads = []
    for call in (
        lambda t: fused_linear_sort_kd(
            inputs.hidden, inputs.weight, inputs.target, temperature=t, reduction=reduction, chunk_rows=5,
            backend=backend, **inputs.teacher,
        ),
        lambda t: fused_sort_kd(
            inputs.hidden @ inputs.weight.T, torch.matmul(*(x.mT if x.shape[0] == 9 else x for x in
            inputs.teacher.values())), inputs.target, temperature=t, reduction=reduction, backend="reference",
        ),
    ):  # fmt: skip
        temperature = torch.linspace(2, 3, 12, dtype=F64)[: shape[0] if shape else 1].reshape(shape).requires_grad_()
        loss = call(temperature)
        grads.append(torch.autograd.grad((loss * cases.grad_output_of(loss)).sum(), (temperature, inputs.hidden)))
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)  # float64, other orders of its sums


@EVERY_BACKEND
def test_parts(backend):
    inputs = Inputs()
    options = {"ce_weight": 0.3, "return_parts": True, "backend": backend}
    got = fused_linear_sort_kd(inputs.hidden, inputs.weight, inputs.target, chunk_rows=5, **inputs.teacher, **options)
    teacher = inputs.teacher["teacher_hidden"] @ inputs.teacher["teacher_weight"].T
    want = fused_sort_kd(inputs.hidden @ inputs.weight.T, teacher, inputs.target, **options)
    torch.testing.assert_close(tuple(got), tuple(want), rtol=1e-10, atol=1e-12)  # as above
    assert not got.kd.requires_grad and got.rank.dtype == torch.int32


def test_micro_batches_with_one_denominator_are_the_batch():
    """Accumulated into one weight, a micro-batch of ignored rows among them."""
    inputs = Inputs()
    inputs.target[4:8] = IGNORE
    tokens = (inputs.target != IGNORE).sum()
    want = inputs.run()[1][1]
    for rows in torch.arange(12).split(4):
        fused_linear_sort_kd(
            inputs.hidden[rows], inputs.weight, inputs.target[rows], bias=inputs.bias, reduction="sum",
            denominator=tokens, teacher_hidden=inputs.teacher["teacher_hidden"][rows],
            teacher_weight=inputs.teacher["teacher_weight"],
        ).backward()  # fmt: skip
    torch.testing.assert_close(inputs.weight.grad, want, rtol=1e-10, atol=1e-12)  # as above


@pytest.mark.parametrize(("reduction", "chunk_rows"), (("mean", 5), ("none", "auto")))
@EVERY_BACKEND
def test_a_kept_graph(backend, reduction, chunk_rows):
    inputs = Inputs()
    loss = fused_linear_sort_kd(
        inputs.hidden, inputs.weight, inputs.target, reduction=reduction, chunk_rows=chunk_rows, backend=backend,
        **inputs.teacher,
    )  # fmt: skip
    first, second = (
        torch.autograd.grad(loss, inputs.learning[:2], torch.full_like(loss, x), retain_graph=True) for x in (1.0, 3.0)
    )
    torch.testing.assert_close(
        tuple(3 * g for g in first), second, rtol=1e-14, atol=1e-15
    )  # a rounding of numbers about 1
    if backend != "reference":
        with pytest.raises((RuntimeError, NotImplementedError), match="second derivatives of the fused losses"):
            torch.autograd.grad(loss.sum(), inputs.hidden, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_gradcheck(reduction):
    inputs = Inputs(N=5, H=3, C=4)
    temperature = torch.tensor(2.5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda h, w, b, t: fused_linear_sort_kd(
            h, w, inputs.target, bias=b, temperature=t, reduction=reduction, ce_weight=0.3, softcap=4.0, chunk_rows=2,
            **inputs.teacher,
        ),
        (*inputs.learning, temperature),
    )  # fmt: skip


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_in_place(reduction):
    """The gradient lies where the hidden states lay; who still needs them is told."""
    inputs = Inputs()
    inputs.target.clamp_(min=0)
    want = inputs.run(chunk_rows=5, reduction=reduction)[1]
    leaf = inputs.hidden
    inputs.hidden = hidden = leaf * 1
    loss, got = inputs.run(chunk_rows=5, reduction=reduction, inplace=True)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert got[0].data_ptr() == hidden.data_ptr()
    inputs.hidden = leaf
    with pytest.raises(ValueError, match="expected hidden states that a model computed with inplace=True, got a leaf"):
        inputs.run(inplace=True)
    inputs.hidden = torch.sigmoid(leaf)  # which needs its result to be differentiated
    loss = fused_linear_sort_kd(
        inputs.hidden, inputs.weight, inputs.target, chunk_rows=5, inplace=True, **inputs.teacher
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("options", ({}, {"reduction": "none", "return_parts": True}, {"chunk_rows": "auto"}), ids=str)
def test_compiled_as_one_graph(options, fresh_compiler):
    inputs = Inputs(dtype=F32)
    options = {"chunk_rows": 5, "softcap": 3.0} | options

    def call(hidden, weight, bias):
        result = fused_linear_sort_kd(hidden, weight, inputs.target, bias=bias, **inputs.teacher, **options)
        return result.loss if isinstance(result, tuple) else result

    results = []
    for f in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        loss = f(*inputs.learning)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), inputs.learning)))
    torch.testing.assert_close(*results)  # the compiled rows are not dropped, so other sums


# CUDA's products of halves in float32, with what they refuse and without the sum that Inductor lacks: in a process of its
# own, since every thread sees them.
WIDENED = """
import torch
from sortkd_kernels import fused_linear, fused_linear_sort_kd

def product(a, b, out_dtype):
    assert a.dtype == b.dtype and out_dtype == torch.float32 and a.dtype in (torch.half, torch.bfloat16)
    return a.float() @ b.float()

def product_into(a, b, out_dtype, *, out):
    return out.copy_(product(a, b, out_dtype))

def sum_into(total, a, b, out_dtype, *, beta=1, alpha=1, out):
    assert total.dtype == out_dtype
    return out.copy_(product(a, b, out_dtype) + (beta * total if beta else 0))

library = torch.library.Library("aten", "IMPL")
library.impl("mm.dtype", product, "CPU")
library.impl("mm.dtype_out", product_into, "CPU")
library.impl("addmm.dtype_out", sum_into, "CPU")
generator = torch.Generator().manual_seed(0)
hidden, weight, teacher = (torch.randn(size, generator=generator) for size in ((20, 16), (50, 16), (20, 50)))
target = torch.arange(20)

def run(function, dtype, autocast):
    inputs = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = function(*inputs, target, teacher_logits=teacher, chunk_rows=8)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]

for dtype, autocast in ((torch.bfloat16, None), (torch.half, None), (torch.float32, torch.bfloat16),
                        (torch.bfloat16, torch.half), (torch.float64, torch.bfloat16)):
    want = run(fused_linear_sort_kd, dtype, autocast)
    fused_linear._widens = lambda x, work: work == torch.float32 and x.dtype in (torch.half, torch.bfloat16)
    compiled = torch.compile(fused_linear_sort_kd, fullgraph=True, backend="aot_eager")
    for function in (fused_linear_sort_kd, compiled):
        got = run(function, dtype, autocast)
        for g, w in zip(got, want, strict=True):
            # Other sums of 16 or 20 products, and the half that they are rounded to: two steps of bfloat16.
            torch.testing.assert_close(g, w, rtol=2**-7, atol=2**-7 * w.abs().max().item())
    torch._dynamo.reset()
"""


@pytest.mark.slow
@pytest.mark.skipif("dtype" not in torch.ops.aten.mm.overloads(), reason="torch 2.8 is the first that has them")
def test_products_as_cuda_has_them():
    done = subprocess.run([sys.executable, "-c", WIDENED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_autocast_makes_the_products_half():
    """Parameters in float32 under bfloat16: the loss of bfloat16 inputs, a gradient that no block rounds."""
    inputs = Inputs(64, 32, 100, dtype=F32)
    halves = Inputs(64, 32, 100, dtype=BF16)
    with torch.autocast("cpu", BF16):
        loss, grads = inputs.run(chunk_rows=5)
        by_reference = inputs.run(backend="reference")
    # The same rounded factors; a float32 sum of 64 rows of some roundings each.
    torch.testing.assert_close(loss, by_reference[0], rtol=1e-5, atol=0)
    assert [g.dtype for g in grads] == [F32] * 3
    want = halves.run(chunk_rows=5)[0]
    # The bias alone is not rounded: half an ulp of bfloat16 of a logit, averaged over rows and classes.
    torch.testing.assert_close(loss, want, rtol=1e-2, atol=0)
    exact = halves.truth()[1]
    assert (grads[1] - exact[1]).norm() < (halves.run(chunk_rows=5)[1][1] - exact[1]).norm()


def test_float16_with_a_gradient_scaler():
    """Gradients that float16 does not hold before the scale is in."""
    inputs = Inputs(dtype=F16)
    exact = inputs.truth(reduction="sum", denominator=1e7)[1][1]
    loss = fused_linear_sort_kd(
        inputs.hidden,
        inputs.weight,
        inputs.target,
        bias=inputs.bias,
        reduction="sum",
        denominator=1e7,
        **inputs.teacher,
    )
    (grad,) = torch.autograd.grad(loss * 2.0**20, inputs.weight)
    # A product of 12 rounded numbers, rounded once more.
    torch.testing.assert_close(grad.double() / 2.0**20, exact, rtol=1e-2, atol=2e-3 * exact.abs().max().item())


def test_activation_checkpointing_and_tied_embeddings():
    """The output weight is the embedding too, and the body is computed again in the backward pass."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(9, 6, generator=generator, dtype=F64, requires_grad=True)
    tokens = torch.randint(9, (12,), generator=generator)
    inputs = Inputs()

    def loss(weight, again):
        body = torch.nn.functional.embedding(tokens, weight)
        hidden = checkpoint(torch.tanh, body, use_reentrant=False) if again else torch.tanh(body)
        return checkpoint(
            lambda h, w: fused_linear_sort_kd(h, w, inputs.target, chunk_rows=5, **inputs.teacher), hidden, weight,
            use_reentrant=False,
        ) if again else fused_sort_kd(
            hidden @ weight.T, inputs.teacher["teacher_hidden"] @ inputs.teacher["teacher_weight"].T, inputs.target
        )  # fmt: skip

    got, want = (torch.autograd.grad(loss(table, again), table)[0] for again in (True, False))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)  # as above


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_memory(dtype):
    """Beyond the gradients at most an eighth of one float32 logit matrix, and without a gradient no more either."""
    N, H, C = 2048, 8, 32000
    hidden, weight, teacher_hidden, teacher_weight = (
        torch.randn(*shape).to(dtype) for shape in ((N, H), (C, H), (N, H), (C, H))
    )
    target = torch.randint(C, (N,))
    learning = hidden.requires_grad_(), weight.requires_grad_()

    def call():
        loss = fused_linear_sort_kd(
            hidden, weight, target, teacher_hidden=teacher_hidden, teacher_weight=teacher_weight
        )  # fmt: skip
        return torch.autograd.grad(loss, learning) if torch.is_grad_enabled() else loss

    results = sum(x.nbytes for x in learning)
    assert Peak(call).bytes <= results + N * C * 4 / 8
    with torch.no_grad():
        assert Peak(call).bytes <= N * C * 4 / 8


def test_the_module_keeps_its_arguments():
    inputs = Inputs()
    loss = FusedLinearSortKDLoss(2.0, ce_weight=0.5, chunk_rows=5)
    got = loss(inputs.hidden, inputs.weight, inputs.target, kd_weight=0.3, **inputs.teacher)
    want = fused_linear_sort_kd(
        inputs.hidden, inputs.weight, inputs.target, temperature=2.0, ce_weight=0.5, kd_weight=0.3, **inputs.teacher
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert "ce_weight=0.5" in repr(loss)


def refused(words, error=ValueError, **changes):
    return pytest.param(changes, error, words, id=words[:40])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    (
        refused("got teacher_hidden and teacher_weight and teacher_logits", teacher_logits=torch.zeros(12, 9)),
        refused("got none of them", teacher_hidden=None, teacher_weight=None),
        refused("got teacher_hidden", teacher_weight=None),
        refused("got teacher_values", teacher_hidden=None, teacher_weight=None, teacher_values=torch.zeros(12, 2)),
        refused("expected weight of shape (C, 6) with C > 0 to match hidden (12, 6), got (9, 5)", weight=torch.zeros(9, 5)),
        refused("expected teacher_weight of shape (C, 4)", teacher_weight=torch.zeros(9, 6)),
        refused("expected bias of shape (9,) to match weight (9, 6), got (8,)", bias=torch.zeros(8)),
        refused("expected teacher_bias only beside teacher_hidden", teacher_hidden=None, teacher_weight=None,
                teacher_logits=torch.zeros(12, 9), teacher_bias=torch.zeros(9)),
        refused("expected teacher_hidden of shape (12, 4) to match hidden (12, 6), got (11, 4)",
                teacher_hidden=torch.zeros(11, 4)),
        refused("expected teacher_logits of shape (12, 9)", teacher_hidden=None, teacher_weight=None,
                teacher_logits=torch.zeros(3, 9)),
        refused("expected target of shape (12,)", target=torch.zeros(11, dtype=torch.int64)),
        refused("expected teacher_weight without requires_grad", teacher_weight=torch.zeros(9, 4, requires_grad=True)),
        refused("expected weight of dtype float32 like hidden, got bfloat16", TypeError, weight=torch.zeros(9, 6).bfloat16()),
        refused("expected softcap to be positive, got 0", softcap=0),
        refused("expected logit_scale to be a number, got str", TypeError, logit_scale="1"),
        refused('expected chunk_rows to be "auto" or a positive number of rows, got 0', chunk_rows=0),
        refused('expected chunk_rows to be "auto" or a positive number of rows, got \'all\'', chunk_rows="all"),
        refused("expected denominator to be positive, got 0", reduction="sum", denominator=0),
        refused("expected tail to be one of", tail="heavy"),
        refused("expected neither beta nor standardize", tail="bucket", beta=2.0, teacher_hidden=None, teacher_weight=None,
                teacher_values=torch.zeros(12, 2), teacher_indices=torch.zeros(12, 2, dtype=torch.int64)),
        refused("expected hidden to be a torch.Tensor, got list", TypeError, hidden=[1.0]),
    ),
)  # fmt: skip
def test_bad_input(changes, error, words):
    inputs = Inputs(dtype=F32)
    given = {"hidden": inputs.hidden, "weight": inputs.weight, "target": inputs.target, **inputs.teacher} | changes
    with pytest.raises(error, match=f"fused_linear_sort_kd: .*{re.escape(words)}"):
        fused_linear_sort_kd(**given)


# In two processes: DDP and FSDP2 against one process with all rows, with a head of its own, which FSDP2 has sharded and
# which no module's forward pass has gathered; then the classes over the ranks against one process with all classes.
WORKER = """
import sys, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from sortkd_kernels import fused_linear_sort_kd
torch.set_num_threads(1)
rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=2)
torch.manual_seed(0)
hidden, teacher, weight = torch.randn(8, 6), torch.randn(8, 9), torch.randn(9, 6)
target = torch.randint(9, (8,))
own = slice(4 * rank, 4 * rank + 4)

def loss(h, w, rows):
    return fused_linear_sort_kd(h, w, target[rows], teacher_logits=teacher[rows], chunk_rows=3)

want = weight.clone().requires_grad_()
loss(hidden, want, slice(0, 8)).backward()  # of equal halves, the mean of their means

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(6, 9, bias=False)
        self.head.weight.data.copy_(weight)
    def forward(self, h, rows):
        return loss(h, self.head.weight, rows)

ddp = torch.nn.parallel.DistributedDataParallel(Model())
ddp(hidden[own], own).backward()
torch.testing.assert_close(ddp.module.head.weight.grad, want.grad)

mesh = init_device_mesh("cpu", (2,))
sharded = torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
gathered = []
original = DTensor.full_tensor
DTensor.full_tensor = lambda self, **kw: gathered.append(1) or original(self, **kw)
loss(hidden[own], sharded, own).backward()
DTensor.full_tensor = original
assert len(gathered) == 1 and isinstance(sharded.grad, DTensor)
torch.testing.assert_close(sharded.grad.full_tensor(), want.grad)

if sys.argv[3] == "fsdp":
    model = fully_shard(Model(), mesh=mesh)
    model(hidden[own], own).backward()
    torch.testing.assert_close(model.head.weight.grad.full_tensor(), want.grad)

target[3] = -100
teacher_hidden, teacher_weight = torch.randn(8, 5), torch.randn(9, 5)
own = slice(0, 5) if rank == 0 else slice(5, 9)
group = dist.group.WORLD
for options in ({}, {"reduction": "none", "ce_weight": 0.3}, {"softcap": 3.0, "beta": 2.0, "chunk_rows": 3}):
    options = {"chunk_rows": 3} | options
    results = []
    for classes, more in ((slice(0, 9), {}), (own, {"process_group": group})):
        h, w = hidden.clone().requires_grad_(), weight[classes].clone().requires_grad_()
        value = fused_linear_sort_kd(
            h, w, target, teacher_hidden=teacher_hidden, teacher_weight=teacher_weight[classes], **options, **more
        )
        grads = torch.autograd.grad((value * torch.arange(1.0, 1 + value.numel()).view(value.shape)).sum(), (h, w))
        results.append((value, grads[0], grads[1]))
    (value, of_hidden, of_weight), sliced = results
    torch.testing.assert_close(sliced, (value, of_hidden, of_weight[own]))

even = distribute_tensor(weight[:8], mesh, [Shard(0)])
head = torch.nn.Parameter(even)
loss = lambda w, t, **more: fused_linear_sort_kd(hidden, w, target.clamp(max=7), teacher_logits=t, **more)
loss(head, teacher[:, 4 * rank : 4 * rank + 4], process_group=group).backward()
want = weight[:8].clone().requires_grad_()
loss(want, teacher[:, :8]).backward()
torch.testing.assert_close(head.grad.full_tensor(), want.grad)

for wrong in ((0, 1), (1,)):  # on both ranks, on one alone: nobody is left waiting
    try:
        loss(weight[own], teacher[:, own][:, : 3 if rank in wrong else 9], process_group=group)
    except ValueError as error:
        mine = f"expected the same {5 - rank} classes of the teacher as of weight, this rank's slice, got 3 classes"
        assert (mine if rank in wrong else "rank 1 of process_group has refused its arguments") in str(error), error
    else:
        raise AssertionError("not refused")
print("equal")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ddp_and_fsdp(tmp_path):
    fsdp = hasattr(torch.cpu.current_stream(), "record_event")  # without, FSDP2 does not run on a CPU
    command, more = [sys.executable, "-c", WORKER], [str(tmp_path / "store"), "fsdp" if fsdp else "ddp"]
    root = Path(__file__).parents[1]
    ranks = [
        subprocess.Popen([*command, str(rank), *more], cwd=root, stdout=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    assert [rank.communicate(timeout=300)[0].strip() for rank in ranks] == ["equal", "equal"]
    if not fsdp:
        pytest.skip("all but FSDP2, which this torch does not run on a CPU, is equal")
