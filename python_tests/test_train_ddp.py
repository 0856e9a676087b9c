"""Two ranks of torchrun make the run that one process makes with the same global batch, to rounding."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from train_cases import (  # noqa: F401
    CONFIGS,
    CPU,
    ROOT,
    RUN,
    final_state,
    learning,
    one_thread_fixture,
    teacher_fixture,
    tiny,
    tiny_words,
)

from train import models
from train.assembly import make_loaders
from train.config import ConfigError, load_config
from train.distributed import World, join
from train.experiment import evaluate_checkpoint, train

# What torchrun starts: one run after another in the same two processes, which take seconds to start.
WORKER = f"""
import json, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "python_tests")!r}]
import test_train_ddp
test_train_ddp.train_all(json.loads(sys.argv[1]))
"""


def plain(num_classes):
    """Without BatchNorm, which takes its statistics from a rank's own rows."""
    body = [nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(32, num_classes))


def train_all(commands):
    """In a rank: a run for each of the lists of words, resumed where `--resume` is among them.

    Where `--refused` is among them it must be refused, with the same words on every rank: a rank that went on alone
    would wait for the others.
    """
    models._BUILDERS["digits"]["plain"] = plain
    torch.set_num_threads(1)
    with join("cpu") as world:
        for words in commands:
            overrides = [word for word in words if not word.startswith("--")]
            config = load_config(CONFIGS / "digits" / "kd.yaml", overrides)
            refused = pytest.raises(ConfigError, match="expected a new run folder")
            with refused if "--refused" in words else nullcontext():
                train(config, world, resume="--resume" in words, quiet=True)


def two_ranks(tmp_path, *commands):
    """Run the command lines, one after the other, in two processes."""
    (tmp_path / "worker.py").write_text(WORKER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(tmp_path / "worker.py"), json.dumps(commands)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path, teacher, monkeypatch):
    """With the learned temperature, parts of a batch, an average of the weights and a last batch that does not split
    evenly, and a resumed run in between."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    method = ["DISTILLER.STUDENT", "plain", "DISTILLER.LEARNED_TEMPERATURE", "true", "CTKD.EPOCHS", "2"]
    method += ["SOLVER.ACCUMULATION", "2", "SOLVER.EMA", "0.5", "SOLVER.CLIP_NORM", "1"]
    words = tiny_words(tmp_path, teacher, "EXPERIMENT.NAME", "two")
    with_batch_norm = tiny_words(tmp_path, teacher, "EXPERIMENT.NAME", "normalised")
    first, again = [*words, *method, "SOLVER.EPOCHS", "1"], [*words, *method]
    two_ranks(tmp_path, first, [*again, "--refused"], [*again, "--resume"], with_batch_norm)

    monkeypatch.setitem(models._BUILDERS["digits"], "plain", plain)
    one = train(tiny(tmp_path, teacher, "EXPERIMENT.NAME", "one", *method), CPU, quiet=True)
    two = tmp_path / "digits" / "two" / "seed_0"
    left, right = final_state(one.folder), final_state(two)
    # The sums of a gradient are taken in another order: float32 rounding, carried through twelve steps.
    for part in ("model", "averaged_from"):
        torch.testing.assert_close(dict(left[part]), dict(right[part]), rtol=1e-4, atol=1e-6)
    assert float(left["temperature"]["theta"]) != 1.0
    torch.testing.assert_close(left["temperature"]["theta"], right["temperature"]["theta"], rtol=1e-5, atol=0)
    for ours, theirs in zip(learning(left["history"]), learning(right["history"]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    # One process wrote the files.
    assert len((two / "metrics.csv").read_text().splitlines()) == 3
    assert len(right["generators"]) == 2

    # Each rank's BatchNorm saw its own rows; the ranks tested together what the checkpoint holds.
    folder = tmp_path / "digits" / "normalised" / "seed_0"
    alone = evaluate_checkpoint(tiny(tmp_path, teacher), folder / "checkpoints" / "epoch_0002.pth", CPU)
    assert {name: final_state(folder)["history"][-1][name] for name in alone} == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_an_error_is_shown_once_and_last(tmp_path):
    """By torchrun, after all that it says itself about its processes."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(RUN), "--cfg", str(CONFIGS / "digits" / "kd.yaml"), "SOLVER.LRR", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    message = "ConfigError: SOLVER.LRR: expected a known key, got 'SOLVER.LRR'; nearest: SOLVER.LR"
    assert done.returncode == 1 and (done.stdout + done.stderr).count(message) == 1, done.stderr
    after = done.stderr[done.stderr.index(message) + len(message) :]
    assert not after.strip().strip("="), after


def test_a_batch_that_does_not_split_is_refused(tmp_path, teacher):
    config = tiny(tmp_path, teacher, "SOLVER.BATCH_SIZE", "33")
    with pytest.raises(ConfigError, match=r"SOLVER\.BATCH_SIZE: expected a multiple of the 2 ranks, got 33"):
        make_loaders(config, World(torch.device("cpu"), rank=0, size=2))
