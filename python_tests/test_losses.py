"""The modules: they hold their arguments, and the learned temperature keeps the schedule of its paper."""

from __future__ import annotations

import copy
import io
import math
import pickle

import cases
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from sortkd_kernels import LearnedTemperature, SortDKDLoss, SortKDLoss, SortKDOutput, fused_sort_dkd, fused_sort_kd

ROWS = cases.make_rows(12, 9)
ROWS.target.clamp_min_(0)


DEFAULTS = dict(temperature=4.0, ce_weight=0.1, kd_weight=0.9)
MODULES = [
    (SortKDLoss(), fused_sort_kd, DEFAULTS),
    (SortKDLoss(2.0, correction="swap"), fused_sort_kd, DEFAULTS | dict(temperature=2.0, correction="swap")),
    (SortKDLoss(ce_weight=0, standardize=True), fused_sort_kd, DEFAULTS | dict(ce_weight=0, standardize=True)),
    (SortKDLoss(reduction="none", ignore_index=3), fused_sort_kd, DEFAULTS | dict(reduction="none", ignore_index=3)),
    (SortDKDLoss(), fused_sort_dkd, dict(temperature=4.0, alpha=1.0, beta=8.0, ce_weight=1.0)),
    (
        SortDKDLoss(1.0, alpha=0.5, kd_weight=0.3),
        fused_sort_dkd,
        dict(temperature=1.0, alpha=0.5, kd_weight=0.3, ce_weight=1.0),
    ),
]


@pytest.mark.parametrize(("module", "function", "options"), MODULES, ids=[repr(m[0]) for m in MODULES])
def test_modules_are_their_functions(module, function, options):
    assert torch.equal(module(*ROWS), function(*ROWS, **options))
    assert not list(module.parameters()) and not module.state_dict()


def test_arguments_of_a_call_override_those_of_the_module():
    """A warm-up and a learned temperature change from call to call; the module does not."""
    loss = SortDKDLoss(beta=2.0)
    temperature = torch.tensor(3.0, requires_grad=True)
    assert torch.equal(
        loss(*ROWS, kd_weight=0.25, temperature=temperature),
        fused_sort_dkd(*ROWS, beta=2.0, ce_weight=1.0, kd_weight=0.25, temperature=temperature),
    )
    assert torch.equal(loss(*ROWS), fused_sort_dkd(*ROWS, beta=2.0, ce_weight=1.0))
    assert isinstance(loss(*ROWS, return_parts=True), SortKDOutput)


def test_modules_travel():
    """Printed, copied and pickled, as configuration and multi-process training do."""
    loss = SortKDLoss(3.0, correction="swap", class_dim=1)
    expected = "SortKDLoss(temperature=3.0, correction='swap', ce_weight=0.1, kd_weight=0.9, class_dim=1)"
    for other in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(other) == expected


def test_an_unknown_argument_is_named():
    with pytest.raises(TypeError, match="label_smoothing"):
        SortKDLoss(label_smoothing=0.1)(*ROWS)


def test_schedule_of_the_reversal():
    """lambda(e) = (cos(min(e, E) pi / E) + 1) / 2 - 1, e from 1: the figures of the paper's code."""
    temperature = LearnedTemperature()
    values = []
    for epoch in range(1, 13):
        temperature.set_epoch(epoch)
        values.append(temperature.reversal.item())
    assert [round(v, 4) for v in values[:3]] == [-0.0245, -0.0955, -0.2061]
    assert values == pytest.approx([(math.cos(min(e, 10) * math.pi / 10) + 1) / 2 - 1 for e in range(1, 13)], abs=1e-7)
    assert values[9:] == [-1.0, -1.0, -1.0]
    imagenet = LearnedTemperature(epochs=5)
    imagenet.set_epoch(5)
    assert imagenet.reversal.item() == -1.0


def test_the_temperature_starts_where_the_paper_does():
    """T = 1 + 20 sigmoid(1) = 15.62, whatever the reversal is."""
    temperature = LearnedTemperature()
    assert temperature.theta.item() == 1.0
    for epoch in (1, 4, 10):
        temperature.set_epoch(epoch)
        assert temperature().item() == pytest.approx(15.6212, abs=1e-4)
    assert LearnedTemperature(start=2.0, end=4.0)().item() == pytest.approx(2 + 4 / (1 + math.exp(-1)))


@pytest.mark.parametrize("epoch", (1, 3, 10))
@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_the_gradient_is_reversed(backend, epoch):
    """theta receives lambda dL/dT dT/dtheta: the temperature climbs where the student descends."""
    temperature = LearnedTemperature().double()
    temperature.set_epoch(epoch)
    rows = cases.make_rows(12, 9, (torch.float64, torch.float64))

    def loss(t):
        return fused_sort_kd(*rows, temperature=t, backend=backend)

    loss(temperature()).backward()
    t = temperature().detach()
    step = 1e-4
    derivative = (loss(t + step) - loss(t - step)) / (2 * step)
    sigmoid = torch.sigmoid(temperature.theta.detach())
    expected = temperature.reversal * derivative * 20 * sigmoid * (1 - sigmoid)
    assert temperature.reversal < 0
    # Differences of float64 numbers of about 10 over 2e-4, and the square of the step.
    torch.testing.assert_close(temperature.theta.grad, expected, rtol=1e-6, atol=1e-9)


def test_optimizer_moves_theta_uphill():
    temperature = LearnedTemperature()
    temperature.set_epoch(10)
    before = temperature().item()
    optimizer = torch.optim.SGD(temperature.parameters(), lr=0.05)
    student, teacher, target = ROWS
    slope = torch.tensor(before, requires_grad=True)
    fused_sort_kd(*ROWS, temperature=slope).backward()
    fused_sort_kd(student, teacher, target, temperature=temperature()).backward()
    optimizer.step()
    assert (temperature().item() - before) * slope.grad.item() > 0


def test_state_dict_holds_the_schedule():
    """A resumed run goes on where the schedule stood, without being told the epoch."""
    temperature = LearnedTemperature()
    temperature.set_epoch(7)
    with torch.no_grad():
        temperature.theta.fill_(-0.5)
    file = io.BytesIO()
    torch.save(temperature.state_dict(), file)
    file.seek(0)
    resumed = LearnedTemperature()
    resumed.load_state_dict(torch.load(file))
    assert resumed.reversal == temperature.reversal
    assert torch.equal(resumed(), temperature())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast_does_not_freeze_theta(dtype):
    """The temperature and its gradient stay in float32."""
    gradients = []
    for enabled in (False, True):
        temperature = LearnedTemperature()
        temperature.set_epoch(10)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            value = temperature()
            assert value.dtype == torch.float32 and value.dim() == 0
            loss = fused_sort_kd(*ROWS, temperature=value)
        loss.backward()
        gradients.append(temperature.theta.grad)
    assert torch.equal(*gradients)
    assert gradients[0] != 0


def test_compiled_with_a_schedule(fresh_compiler):
    """A new epoch is a new value of a buffer, not a new graph."""
    counter = CompileCounterWithBackend("aot_eager")
    temperature = LearnedTemperature()
    compiled = torch.compile(lambda: fused_sort_kd(*ROWS, temperature=temperature()), fullgraph=True, backend=counter)
    for epoch in (1, 2, 10):
        temperature.set_epoch(epoch)
        (got,) = torch.autograd.grad(compiled(), temperature.theta)
        (want,) = torch.autograd.grad(fused_sort_kd(*ROWS, temperature=temperature()), temperature.theta)
        torch.testing.assert_close(got, want)
    assert counter.frame_count == 1
