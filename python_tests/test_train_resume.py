"""A run that was stopped, killed or damaged goes on to the same weights as one that was left alone."""

import io
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from train_cases import (  # noqa: F401
    CONFIGS,
    CPU,
    RUN,
    assert_same_state,
    final_state,
    learning,
    one_thread_fixture,
    teacher_fixture,
    tiny,
    tiny_words,
)  # fmt: skip

from train import models
from train.assembly import build_trainer
from train.checkpoint import Checkpoints, DamagedCheckpoint, generator_states, set_generator_states, write
from train.config import ConfigError
from train.experiment import train
from train.naming import run_name
from train.run import main
from train.solver import build_optimizer

# The learned temperature and the fp16 scaler have state of their own to get lost.
STATEFUL = ["DISTILLER.LEARNED_TEMPERATURE", "true", "SOLVER.AMP", "fp16", "SOLVER.LR_DECAY_STAGES", "[2, 3]"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, teacher):
    config = tiny(tmp_path_factory.mktemp("undisturbed"), teacher, *STATEFUL, "SOLVER.EPOCHS", "4")
    return train(config, CPU, quiet=True)


def stopped(folder, teacher, epochs="2"):
    return train(tiny(folder, teacher, *STATEFUL, "SOLVER.EPOCHS", epochs), CPU, quiet=True)


def resumed(folder, teacher, *words):
    config = tiny(folder, teacher, *STATEFUL, "SOLVER.EPOCHS", "4", *words)
    torch.randn(3)  # whatever the process drew before must not matter
    return train(config, CPU, resume=True, quiet=True)


def assert_undisturbed(run, undisturbed):
    assert_same_state(final_state(run.folder), final_state(undisturbed.folder))
    assert learning(run.history) == learning(undisturbed.history)


def test_a_resumed_run_ends_the_same(tmp_path, teacher, undisturbed):
    stopped(tmp_path, teacher)
    run = resumed(tmp_path, teacher)
    assert_undisturbed(run, undisturbed)
    assert len((run.folder / "metrics.csv").read_text().splitlines()) == 5
    assert_undisturbed(resumed(tmp_path, teacher), undisturbed)  # nothing left to do


def test_dropout_goes_on_where_it_stopped(tmp_path, teacher, monkeypatch):
    def dropping(num_classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, num_classes))

    monkeypatch.setitem(models._BUILDERS["digits"], "dropping", dropping)
    words = ["DISTILLER.STUDENT", "dropping", "EXPERIMENT.NAME", "dropping"]
    whole = train(tiny(tmp_path / "whole", teacher, *words), CPU, quiet=True)
    train(tiny(tmp_path, teacher, *words, "SOLVER.EPOCHS", "1"), CPU, quiet=True)
    torch.randn(3)
    assert_undisturbed(train(tiny(tmp_path, teacher, *words), CPU, resume=True, quiet=True), whole)


def test_resuming_before_the_first_checkpoint_starts(tmp_path, teacher, undisturbed):
    with pytest.warns(UserWarning, match="no checkpoint .* starting from the beginning"):
        assert_undisturbed(resumed(tmp_path, teacher), undisturbed)


def cut(data):
    return data[: len(data) // 2]


def flip(data):
    """One bit of one weight, which nothing but a checksum can tell."""
    state = torch.load(io.BytesIO(data), weights_only=True)
    place = data.find(state["model"]["classifier.weight"].numpy().tobytes())
    assert place > 0
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize("damage", [cut, flip, lambda data: b""])
def test_a_damaged_newest_checkpoint_falls_back(damage, tmp_path, teacher, undisturbed):
    run = stopped(tmp_path, teacher, "3")
    newest = run.folder / "checkpoints" / "epoch_0003.pth"
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.warns(UserWarning, match=r"epoch_0003\.pth.*falling back"):
        assert_undisturbed(resumed(tmp_path, teacher), undisturbed)


def test_when_all_are_damaged_the_run_is_not_started_anew(tmp_path, teacher):
    run = stopped(tmp_path, teacher)
    for path in (run.folder / "checkpoints").glob("epoch_*.pth"):
        path.write_bytes(b"not a checkpoint")
    with pytest.warns(UserWarning), pytest.raises(DamagedCheckpoint, match="got 2 damaged"):
        resumed(tmp_path, teacher)


def test_another_configuration_is_refused(tmp_path, teacher):
    name = run_name(stopped(tmp_path, teacher).config)
    with pytest.raises(ConfigError, match=r"SOLVER\.LR 0\.05 instead of 0\.1"):
        resumed(tmp_path, teacher, "SOLVER.LR", "0.1", "EXPERIMENT.NAME", name)
    with pytest.raises(ConfigError, match="which holds a run; continue it with --resume"):
        stopped(tmp_path, teacher)


def test_the_teachers_content_counts_and_not_its_path(tmp_path, teacher, undisturbed):
    stopped(tmp_path, teacher)
    content = torch.load(teacher, weights_only=True)
    torch.save(content["model"], tmp_path / "moved.pth")  # in another file of another form
    next(iter(content["model"].values())).add_(1e-3)
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(
        ConfigError, match=r"TEACHER\.WEIGHTS: expected the teacher that the run had, .* got \S+other\.pth with"
    ):
        resumed(tmp_path, tmp_path / "other.pth")
    assert_undisturbed(resumed(tmp_path, tmp_path / "moved.pth"), undisturbed)


def test_a_checkpoint_that_lacks_what_a_run_needs(tmp_path, teacher):
    run = stopped(tmp_path, teacher)
    path = run.folder / "checkpoints" / "epoch_0002.pth"
    whole = torch.load(path, weights_only=True)
    damaged = [
        {key: value for key, value in whole.items() if key != left_out}
        for left_out in whole
        if left_out not in ("epoch", "best")
    ]
    damaged += [
        whole | {key: value}
        for key, value in {"config": 3, "generators": [{}], "model": {}, "history": 3, "epoch": "two"}.items()
    ]
    for state in damaged:
        write(path, state)
        with pytest.raises(
            ConfigError, match=r"--resume: expected the state of a run of this trainer in \S+epoch_0002\.pth, got one"
        ):
            resumed(tmp_path, teacher)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_says_where_it_goes_on(number, tmp_path, teacher):
    words = tiny_words(tmp_path, teacher, "SOLVER.EPOCHS", "2000", "EXPERIMENT.NAME", "stopped", "--seeds", "3", "4")
    folder = tmp_path / "digits" / "stopped" / "seed_3"
    command = [sys.executable, str(RUN), "--cfg", str(CONFIGS / "digits" / "kd.yaml"), *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while not (folder / "checkpoints" / "epoch_0002.pth").exists() and process.poll() is None:
            time.sleep(0.001)
        for _ in range(2):  # as batch systems do
            os.killpg(process.pid, number)
        said = process.stderr.read()
    assert process.returncode == 128 + number, said
    last = max(Checkpoints(folder / "checkpoints", 1).epochs())
    assert said.splitlines()[-1] == (
        f"stopped by {number.name}; the same command with --resume goes on after epoch {last} of {folder}"
    )
    assert "Traceback" not in said and not list(folder.rglob("*.tmp"))
    assert final_state(folder)["epoch"] == last


def test_which_checkpoints_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_every=3)
    for epoch in range(1, 9):
        checkpoints.save(epoch, {"epoch": epoch}, is_best=epoch == 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.pth", "epoch_0003.pth", "epoch_0006.pth", "epoch_0007.pth", "epoch_0008.pth",
    ]  # fmt: skip
    assert checkpoints.newest() == tmp_path / "epoch_0008.pth" and torch.load(checkpoints.best) == {"epoch": 4}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "best.pth"
    write(path, {"epoch": 1})

    def fail(state, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        write(path, {"epoch": 2})
    assert torch.load(path) == {"epoch": 1} and [p.name for p in tmp_path.iterdir()] == ["best.pth"]


def test_generator_states_come_back(tmp_path):
    numpy = pytest.importorskip("numpy")

    def draw():
        return torch.rand(3).tolist(), random.random(), numpy.random.standard_normal(3).tolist()

    draw()
    write(tmp_path / "state.pth", generator_states())
    first = draw()
    set_generator_states(torch.load(tmp_path / "state.pth", weights_only=True))
    assert draw() == first


def test_the_generator_of_one_gpu_comes_back_on_another(monkeypatch):
    """Stored on the second of two GPUs, put back where there is one; CPU generators stand for the GPUs'."""

    def gpus(count):
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        monkeypatch.setattr(torch.cuda, "default_generators", generators)
        return generators

    monkeypatch.setattr(torch.cuda.random, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda.random, "_lazy_call", lambda call, **options: call())
    used = gpus(2)[1]
    states = generator_states(torch.device("cuda", 1))
    old = states | {"cuda": [generator.get_state() for generator in torch.cuda.default_generators]}  # all of them
    first = torch.rand(3, generator=used)
    set_generator_states(old, torch.device("cuda", 1))
    assert torch.equal(torch.rand(3, generator=used), first)
    (left,) = gpus(1)
    set_generator_states(states, torch.device("cuda", 0))
    assert torch.equal(torch.rand(3, generator=left), first)
    set_generator_states(old, torch.device("cuda", 0))
    assert torch.equal(left.get_state(), old["cuda"][0])
    set_generator_states(states, CPU.device)


def test_a_run_of_a_cpu_goes_on_with_a_gpus_optimizer(tmp_path, teacher):
    """The device "meta" stands for a GPU, beside whose weights the fused optimizer needs its step counts."""
    config = tiny(tmp_path, teacher, "SOLVER.TYPE", "AdamW", "SOLVER.EPOCHS", "1")
    state = final_state(train(config, CPU, quiet=True).folder)
    solver = build_trainer(config, CPU).solver
    parameters = [nn.Parameter(parameter.to("meta")) for parameter in solver.parameters]
    solver.optimizer = build_optimizer(config, parameters, torch.device("cuda"), graphs=True)
    solver.load(state)
    (group,) = solver.optimizer.param_groups
    assert group["fused"] and group["capturable"]
    assert {solver.optimizer.state[parameter]["step"].device.type for parameter in parameters} == {"meta"}


@pytest.mark.slow
def test_killed_runs_end_in_the_same_weights(tmp_path, teacher):
    """kill -9 at seven random moments, the first in the middle of a write, then on to the end."""
    words = tiny_words(tmp_path, teacher, *STATEFUL, "SOLVER.EPOCHS", "20", "EXPERIMENT.NAME", "killed")
    command = ["--cfg", str(CONFIGS / "digits" / "kd.yaml"), "--resume", *words]
    folder = tmp_path / "digits" / "killed" / "seed_0" / "checkpoints"
    # Each run is a process of its own, forked from one that has imported the trainer: that takes seconds.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["train.commands", "sklearn.datasets"])
    moments = random.Random(0)
    for kill in range(7):
        reached = max(Checkpoints(folder, 1).epochs(), default=0)
        awaited = folder / ("best.pth.tmp" if kill == 0 else f"epoch_{reached + 1:04d}.pth")
        process = processes.Process(target=main, args=(command,))
        process.start()
        while process.is_alive() and not awaited.exists():
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, 0.2) if kill else 0)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it could be killed"
    done = subprocess.run([sys.executable, str(RUN), *command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    config = tiny(tmp_path / "undisturbed", teacher, *STATEFUL, "SOLVER.EPOCHS", "20")
    left, right = final_state(folder.parent), final_state(train(config, CPU, quiet=True).folder)
    assert_same_state(left, right)
    assert learning(left["history"]) == learning(right["history"])
