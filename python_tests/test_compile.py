"""torch.compile without a graph break, dynamic batch sizes without recompiling, opcheck, export."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import BF16, F16, F32
from torch._dynamo.testing import CompileCounterWithBackend

from sortkd_kernels import SortKDLoss, fused_sort_dkd, fused_sort_kd, fused_sort_kd_topk, ops

pytestmark = pytest.mark.usefixtures("poisoned_memory", "fresh_compiler")
EVERY_BACKEND = pytest.mark.parametrize("backend", cases.BACKENDS)

OPTIONS = (
    {},
    {"reduction": "none", "ce_weight": 0.3, "return_parts": True},
    {"standardize": True, "inplace": True},
    {"correction": "swap", "temperature": 2.5},
)


def compare(compiled, eager, student, *arguments):
    """Loss and gradient of both; a compiled graph runs the same op, and only the reference may sum in another order."""
    results = []
    for function in (compiled, eager):
        leaf = student.clone().requires_grad_()
        out = function(leaf * 1.0, *arguments)
        loss = out.loss if isinstance(out, tuple) else out
        (loss * torch.linspace(1, 2, loss.numel()).view_as(loss)).sum().backward()
        results.append((*(out if isinstance(out, tuple) else (out,)), leaf.grad))
    eps = torch.finfo(student.dtype).eps
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=8 * eps, atol=eps)


# The dtype decides in which pass the gradient is made. The reference and the interpreter take seconds for what native
# does in a fifth of one, so they get two calls; None is what most users write.
DYNAMIC = [("native", dtype, options) for dtype in (F32, BF16, F16) for options in OPTIONS]
DYNAMIC += [(b, *case) for b in cases.BACKENDS if b != "native" for case in ((F32, OPTIONS[2]), (F16, OPTIONS[1]))]
DYNAMIC += [(None, F32, OPTIONS[0])]


@pytest.mark.parametrize(("backend", "dtype", "options"), DYNAMIC, ids=str)
def test_dynamic_batch_size(backend, dtype, options):
    """The second batch size makes the size dynamic; no further one compiles again."""
    counter = CompileCounterWithBackend("aot_eager")

    def loss(student, teacher, target):
        return fused_sort_kd(student, teacher, target, backend=backend, **options)

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for N in (4, 7, 9, 12, 30):
        student, teacher, target = cases.make_rows(N, 9, (dtype, dtype))
        compare(compiled, loss, student, teacher, target)
    assert counter.frame_count == 2


@EVERY_BACKEND
def test_dynamic_from_the_start(backend):
    counter = CompileCounterWithBackend("aot_eager")

    def loss(student, teacher, target):
        return fused_sort_dkd(student, teacher, target, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    compare(compiled, loss, *cases.make_rows(4, 9))
    graphs = counter.frame_count
    for N in (7, 5, 30):
        compare(compiled, loss, *cases.make_rows(N, 9))
    assert counter.frame_count == graphs


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
@EVERY_BACKEND
def test_dense(backend, memory_format):
    student, teacher = (torch.randn(2, 5, 4, 3).contiguous(memory_format=memory_format) for _ in "st")
    target = torch.randint(5, (2, 4, 3))

    def loss(student, teacher, target):
        return fused_sort_kd(student, teacher, target, class_dim=1, backend=backend)

    compare(torch.compile(loss, fullgraph=True, backend="aot_eager"), loss, student, teacher, target)


@pytest.mark.parametrize("dtype", (F32, F16), ids=str)
@EVERY_BACKEND
def test_learned_temperature(backend, dtype):
    """The temperature's gradient, and values that change from call to call without a new graph."""
    counter = CompileCounterWithBackend("aot_eager")
    student, teacher, target = cases.make_rows(12, 9, (dtype, dtype))

    def step(student, temperature):
        return fused_sort_kd(student, teacher, target, temperature=temperature * 2, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for value in (1.0, 1.5, 3.0):
        grads = []
        for function in (compiled, step):
            leaf, t = student.clone().requires_grad_(), torch.tensor(value, requires_grad=True)
            grads.append(torch.autograd.grad(function(leaf, t), (leaf, t)))
        torch.testing.assert_close(*grads, rtol=torch.finfo(dtype).eps * 4, atol=torch.finfo(dtype).eps)
    assert counter.frame_count == 1


@EVERY_BACKEND
def test_a_warm_up_factor_that_changes(backend):
    """A Python float that a schedule moves is not frozen into the graph."""
    student, teacher, target = cases.make_rows(12, 9)

    def loss(factor):
        return fused_sort_dkd(student, teacher, target, kd_weight=factor, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for factor in (0.05, 0.1, 0.35, 1.0):
        torch.testing.assert_close(compiled(factor), loss(factor), rtol=1e-6, atol=0)


def test_module_in_a_model():
    """A training step as users compile it, through inductor."""
    torch.manual_seed(0)
    model, loss = torch.nn.Linear(6, 9), SortKDLoss()
    images = torch.randn(12, 6)
    _, teacher, target = cases.make_rows(12, 9)

    def step(images):
        return loss(model(images), teacher, target)

    compiled = torch.compile(step, fullgraph=True)
    grads = [torch.autograd.grad(f(images), list(model.parameters())) for f in (compiled, step)]
    torch.testing.assert_close(*grads)


def test_top_k():
    student, teacher, target = cases.make_rows(12, 9)
    values, indices = teacher.topk(3)

    def loss(student, values, indices, target):
        return fused_sort_kd_topk(student, values, indices, target, tail="uniform", backend="native")

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    compare(compiled, loss, student, values.log_softmax(-1) - 0.1, indices, target)


def test_export():
    """torch.export keeps the op as one node."""
    student, teacher, target = cases.make_rows(12, 9)

    class Model(torch.nn.Module):
        def forward(self, student, teacher, target):
            return fused_sort_kd(student, teacher, target)

    program = torch.export.export(Model(), (student, teacher, target))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("sortkd_kernels" in name for name in names) == 1
    torch.testing.assert_close(program.module()(student, teacher, target), fused_sort_kd(student, teacher, target))


VARIED = [
    {},
    {"reduction": 0},
    {"beta": 8.0},
    {"standardize": True, "correction": 2},
    {"ce_weight": 0.1},
]


def opcheck(tensors, request=(None, True, False), **options):
    op = torch.ops.sortkd_kernels.sort_kd_forward.default
    torch.library.opcheck(op, (*tensors, *ops.LossConfig(**{"temperature": 4.0} | options), *request))


@pytest.mark.parametrize(
    ("dtype", "grad", "parts"), ((F32, False, True), (F32, True, False), (F16, True, True)), ids=str
)
@pytest.mark.parametrize("learned", (False, True))
@pytest.mark.parametrize("options", VARIED, ids=str)
def test_opcheck_forward(options, learned, dtype, grad, parts):
    student, teacher, target = cases.make_rows(6, 5, (dtype, dtype))
    tensors = student, teacher, None, target, torch.tensor(2.0) if learned else None
    opcheck(tensors, (None, grad, grad and learned), parts=parts, **options)


def test_opcheck_top_k_and_layouts():
    student, teacher, target = cases.make_rows(6, 5)
    values, indices = teacher.topk(2)
    for s, v, i, y in (
        (student, values, indices, target),
        (student.view(2, 3, 5), values.view(2, 3, 2), indices.view(2, 3, 2), target.view(2, 3)),
        (student[:0], values[:0], indices[:0], target[:0]),
    ):
        # The sum: opcheck takes the NaN of a mean over no rows for a difference.
        opcheck((s, v, i, y, None), reduction=1, parts=True)
    labels = torch.randint(5, (2, 4, 3))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        image = torch.randn(2, 5, 4, 3).contiguous(memory_format=memory_format).movedim(1, -1)
        for logits in (image, image[..., ::2, :].expand(2, 4, 2, 5)):  # a slice has a dense gradient
            opcheck((logits, torch.randn(logits.shape), None, labels[..., : logits.shape[2]], None))


@pytest.mark.parametrize("dtype", (F32, F16), ids=str)
def test_opcheck_sort_logits(dtype):
    _, teacher, target = cases.make_rows(6, 5, (dtype, dtype))
    for logits, labels in ((teacher, target), (teacher.T.contiguous().T, target), (teacher[:0], target[:0])):
        torch.library.opcheck(torch.ops.sortkd_kernels.sort_logits.default, (logits, labels, 1, -100))
