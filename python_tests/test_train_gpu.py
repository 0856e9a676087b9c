"""The trainer on a CUDA device, where there is one: captured steps are the eager ones, also resumed and several at once."""

import warnings

import pytest
import torch
from test_train_step import VARIANTS, dropping
from torch import nn
from train_cases import CPU, final_state, learning, one_thread_fixture, teacher_fixture, tiny  # noqa: F401

import sortkd_kernels
from train import models
from train.distributed import join
from train.experiment import train, train_together

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
native = sortkd_kernels.available_backends()["native"]
if not (native.available and "cuda" in native.devices):
    pytest.skip("Triton interprets in this process, and the extension has no CUDA kernels", allow_module_level=True)

# 17 epochs of 6 steps are a hundred; a partial batch is captured in its fourth.
EPOCHS = ["SOLVER.EPOCHS", "17", "SOLVER.LR_DECAY_STAGES", "[8, 14]"]


@pytest.fixture(name="world")
def world_fixture():
    with join("cuda") as world:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        yield world
        torch.backends.cudnn.deterministic = False


@pytest.fixture(name="replays")
def replays_fixture(monkeypatch):
    """How often a graph was replayed so far."""
    count, replay = [0], torch.cuda.CUDAGraph.replay

    def counted(graph):
        count[0] += 1
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return count


def assert_close(left, right):
    """The same run to rounding: at first of a step, and carried through a hundred steps of a network."""
    assert learning(left.history[:1])[0] == pytest.approx(learning(right.history[:1])[0], rel=1e-4)
    assert left.history[-1]["train_loss"] == pytest.approx(right.history[-1]["train_loss"], rel=2e-2)
    assert [row["lr"] for row in left.history] == [row["lr"] for row in right.history]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_captured_run_is_the_eager_one(variant, tmp_path, teacher, world, replays):
    words = [*EPOCHS, "TEACHER.CACHE_DIR", str(tmp_path / "cache"), *VARIANTS[variant]]
    eager = train(tiny(tmp_path / "off", teacher, *words, "SOLVER.GRAPH", "off"), world, quiet=True)
    assert not replays[0]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "SOLVER.GRAPH")
        captured = train(tiny(tmp_path / "auto", teacher, *words), world, quiet=True)
    assert replays[0] > 80
    assert_close(captured, eager)


def test_a_resumed_run_on_a_gpu(tmp_path, teacher, world):
    """Stopped on the GPU and resumed there; and resumed on the CPU, whose optimizer is not the fused one."""
    words = ["SOLVER.TYPE", "AdamW", "SOLVER.LR", "0.002", "SOLVER.LR_DECAY_STAGES", "[8, 14]"]
    whole = train(tiny(tmp_path / "whole", teacher, *words, "SOLVER.EPOCHS", "12"), world, quiet=True)
    for name, there in {"gpu": world, "cpu": CPU}.items():
        train(tiny(tmp_path / name, teacher, *words, "SOLVER.EPOCHS", "6"), world, quiet=True)
        config = tiny(tmp_path / name, teacher, *words, "SOLVER.EPOCHS", "12")
        assert_close(train(config, there, resume=True, quiet=True), whole)


def test_runs_at_once_are_the_runs_alone(tmp_path, teacher, world, replays, monkeypatch):
    """With dropout; and a second set of captures in a process in which the first set is gone."""
    monkeypatch.setitem(models._BUILDERS["digits"], "dropping", dropping)

    def configs(folder):
        words = ["DISTILLER.STUDENT", "dropping", *EPOCHS]
        return [tiny(folder, teacher, *words, "EXPERIMENT.SEED", str(seed)) for seed in (1, 2, 3)]

    alone = [train(config, world, quiet=True) for config in configs(tmp_path / "alone")]
    for name in ("first", "second"):
        before = replays[0]
        together = train_together(configs(tmp_path / name), world, quiet=True)
        assert replays[0] - before > 3 * 80
        for one, other in zip(alone, together, strict=True):
            assert_close(other, one)
            assert set(final_state(one.folder)) == set(final_state(other.folder))


class Asking(nn.Module):
    """A model that looks at a value on the host, which no capture allows, and draws random numbers."""

    def __init__(self, num_classes):
        super().__init__()
        self.body = dropping(num_classes)

    def forward(self, x):
        return self.body(x) * (1 if x.sum().item() > -1e9 else 0)


def test_a_model_that_cannot_be_captured(tmp_path, teacher, world, monkeypatch):
    monkeypatch.setitem(models._BUILDERS["digits"], "asking", Asking)
    words = ["DISTILLER.STUDENT", "asking", *EPOCHS]
    with pytest.warns(UserWarning, match="SOLVER.GRAPH: the training step cannot be captured as a CUDA graph"):
        run = train(tiny(tmp_path / "auto", teacher, *words), world, quiet=True)
    eager = train(tiny(tmp_path / "off", teacher, *words, "SOLVER.GRAPH", "off"), world, quiet=True)
    assert_close(run, eager)
