"""The step over fixed memory is the plain loop, bit for bit; runs that take turns are the runs alone, bit for bit."""

import copy
import math
import multiprocessing
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F
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

from sortkd_kernels import fused_sort_dkd, fused_sort_kd
from train import models
from train.assembly import build_trainer
from train.config import ConfigError, load_config
from train.data import evaluation_batch
from train.distributed import World
from train.experiment import train, train_together
from train.graphs import Graphed
from train.guard import NonFiniteLoss
from train.run import main
from train.solver import build_optimizer

VARIANTS = {
    "KD": [],
    "CE": ["DISTILLER.TYPE", "NONE"],
    "DKD in its warm-up": ["DISTILLER.TYPE", "DKD", "DKD.WARMUP", "3"],
    "CTKD": ["DISTILLER.LEARNED_TEMPERATURE", "true", "CTKD.EPOCHS", "2"],
    "LSKD": ["DISTILLER.STANDARDIZE", "true"],
    "cached teacher": ["TEACHER.CACHE_VIEWS", "2"],
    "bf16": ["SOLVER.AMP", "bf16"],
    "fp16": ["SOLVER.AMP", "fp16"],
    "fp16, clipped": ["SOLVER.AMP", "fp16", "SOLVER.CLIP_NORM", "0.1"],
    "clipped": ["SOLVER.CLIP_NORM", "0.1"],
    "accumulated": ["SOLVER.ACCUMULATION", "3"],
    "averaged": ["SOLVER.EMA", "0.9"],
    "Nesterov, cosine": ["SOLVER.NESTEROV", "true", "SOLVER.SCHEDULE", "cosine", "SOLVER.LR_MIN", "0.001"],
    "AdamW, warm-up": ["SOLVER.TYPE", "AdamW", "SOLVER.LR", "0.002", "SOLVER.WARMUP", "1"],
}
EPOCHS = 3


class Plain:
    """The loop as a textbook has it: batches from the loader, PyTorch's functions, nothing kept between two steps."""

    def __init__(self, trainer, config):
        self.config, self.teacher = config, trainer.teacher
        self.student, self.temperature = trainer.distiller.student, trainer.distiller.temperature
        solver = config.SOLVER
        parameters = list(trainer.distiller.parameters())
        if solver.TYPE == "AdamW":
            self.optimizer = torch.optim.AdamW(parameters, solver.LR, weight_decay=solver.WEIGHT_DECAY)
        else:
            self.optimizer = torch.optim.SGD(
                parameters, solver.LR, momentum=0.9, weight_decay=solver.WEIGHT_DECAY, nesterov=solver.NESTEROV
            )
        self.parameters = parameters
        self.scaler = torch.amp.GradScaler("cpu", enabled=solver.AMP == "fp16")
        self.amp = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[solver.AMP]
        self.average = copy.deepcopy(self.student)

    def loss(self, logits, teacher, labels, epoch):
        config, distiller = self.config, self.config.DISTILLER
        temperature = 4.0 if self.temperature is None else self.temperature()
        if distiller.TYPE == "NONE":
            return F.cross_entropy(logits, labels)
        options = {"temperature": temperature, "correction": distiller.CORRECTION, "standardize": distiller.STANDARDIZE}
        if distiller.TYPE == "DKD":
            kd_weight = min(epoch / config.DKD.WARMUP, 1)
            return fused_sort_dkd(logits, teacher, labels, ce_weight=1, beta=8, kd_weight=kd_weight, **options)
        return fused_sort_kd(logits, teacher, labels, ce_weight=0.1, kd_weight=0.9, **options)

    def teacher_logits(self, batch):
        if self.teacher is None:
            return None
        if batch.view is not None:
            return self.teacher.rows(batch.view, batch.index).float()
        with torch.no_grad(), torch.autocast("cpu", self.amp, self.amp is not None):
            return self.teacher.model(batch.images).float()

    def epoch(self, loader, epoch, lr):
        loader.set_epoch(epoch)
        if self.temperature is not None:
            self.temperature.set_epoch(epoch)
        self.student.train()
        self.optimizer.param_groups[0]["lr"] = lr
        losses = []
        for batch in loader:
            teacher = self.teacher_logits(batch)
            self.optimizer.zero_grad()
            total, rows = 0.0, len(batch.labels)
            # The last batch of 17 fits into one of the three parts.
            size = math.ceil(rows / self.config.SOLVER.ACCUMULATION) if rows == 256 else rows
            for start in range(0, rows, size):
                part = slice(start, start + size)
                images, labels = batch.images[part], batch.labels[part]
                with torch.autocast("cpu", self.amp, self.amp is not None):
                    logits = self.student(images)
                loss = self.loss(logits, None if teacher is None else teacher[part], labels, epoch)
                self.scaler.scale(loss * (len(labels) / rows)).backward()
                total += loss.item() * len(labels)
            if self.config.SOLVER.CLIP_NORM:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.parameters, self.config.SOLVER.CLIP_NORM)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            losses.append(total)
            with torch.no_grad():
                for own, new in zip(
                    self.average.state_dict().values(), self.student.state_dict().values(), strict=True
                ):
                    own.copy_(own.lerp(new, 1 - self.config.SOLVER.EMA) if own.is_floating_point() else new)
        return sum(losses) / loader.samples

    @torch.no_grad()
    def test(self, loader):
        student = self.average if self.config.SOLVER.EMA else self.student
        student.eval()
        right, seen = 0, 0
        for batch in loader:
            with torch.autocast("cpu", self.amp, self.amp is not None):
                right += (student(batch.images).topk(1).indices[:, 0] == batch.labels).sum().item()
            seen += len(batch.labels)
        return 100 * right / seen


def learning_rates(config):
    """By the formulas."""
    solver, rates = config.SOLVER, []
    for epoch in range(EPOCHS):
        if epoch < solver.WARMUP:
            rates.append(solver.LR * (epoch + 1) / (solver.WARMUP + 1))
        elif solver.SCHEDULE == "cosine":
            turn = math.pi * (epoch - solver.WARMUP) / (solver.EPOCHS - solver.WARMUP)
            rates.append(solver.LR_MIN + (solver.LR - solver.LR_MIN) * (1 + math.cos(turn)) / 2)
        else:
            rates.append(solver.LR * solver.LR_DECAY_RATE ** sum(epoch >= stage for stage in solver.LR_DECAY_STAGES))
    return rates


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_trainer_is_the_plain_loop(variant, tmp_path, teacher):
    words = [
        "SOLVER.EPOCHS",
        str(EPOCHS),
        "SOLVER.LR_DECAY_STAGES",
        "[2]",
        "TEACHER.CACHE_DIR",
        str(tmp_path / "cache"),
    ]
    config = tiny(tmp_path, teacher, *words, *VARIANTS[variant])
    # Stopped after two epochs (a cosine's length is the run's, so that one goes through), then resumed.
    if config.SOLVER.SCHEDULE == "step":
        train(tiny(tmp_path, teacher, *words, *VARIANTS[variant], "SOLVER.EPOCHS", "2"), CPU, quiet=True)
        run = train(config, CPU, resume=True, quiet=True)
    else:
        run = train(config, CPU, quiet=True)
    trainer = build_trainer(config, CPU)
    plain, loaders = Plain(trainer, config), trainer.loaders
    rates = learning_rates(config)
    for epoch, (lr, row) in enumerate(zip(rates, run.history, strict=True), 1):
        assert row["lr"] == pytest.approx(lr, rel=1e-12)
        # The losses are float32, their sums float64.
        assert row["train_loss"] == pytest.approx(plain.epoch(loaders.train, epoch, row["lr"]), rel=1e-6)
        assert row["test_top1"] == plain.test(loaders.test)
    state = final_state(run.folder)
    tested = plain.average if config.SOLVER.EMA else plain.student
    torch.testing.assert_close(dict(state["model"]), dict(tested.state_dict()), rtol=0, atol=0)
    if config.SOLVER.EMA:
        torch.testing.assert_close(dict(state["averaged_from"]), dict(plain.student.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(state["optimizer"]["state"], plain.optimizer.state_dict()["state"], rtol=0, atol=0)
    if plain.temperature is not None:
        torch.testing.assert_close(state["temperature"]["theta"], plain.temperature.theta.detach(), rtol=0, atol=0)


def test_accumulation_is_the_whole_batch(tmp_path, teacher, monkeypatch):
    """Without BatchNorm, which sees the parts, parts change no more than the order of sums."""
    monkeypatch.setitem(
        models._BUILDERS["digits"], "linear", lambda classes: nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    )
    words = ["DISTILLER.STUDENT", "linear"]
    whole = train(tiny(tmp_path / "whole", teacher, *words), CPU, quiet=True)
    parts = train(tiny(tmp_path / "parts", teacher, *words, "SOLVER.ACCUMULATION", "5"), CPU, quiet=True)
    left, right = final_state(whole.folder)["model"], final_state(parts.folder)["model"]
    torch.testing.assert_close(dict(left), dict(right), rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(learning(whole.history), learning(parts.history), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_the_average_is_what_a_checkpoint_evaluates(tmp_path, teacher, capsys):
    run = train(tiny(tmp_path, teacher, "SOLVER.EMA", "0.9"), CPU, quiet=True)
    main(["--eval", str(run.folder / "checkpoints" / "epoch_0002.pth")])
    assert f"test_top1 {run.last:.4f}" in capsys.readouterr().out


def test_compile_is_for_student_and_teacher(tmp_path, teacher, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append(self))
    trainer = build_trainer(tiny(tmp_path, teacher, "SOLVER.COMPILE", "true"), CPU)
    assert set(compiled) == {trainer.distiller.student, trainer.teacher.model}
    compiled.clear()
    build_trainer(tiny(tmp_path, teacher), CPU)
    assert not compiled


# -- capture, as far as a CPU shows it ---------------------------------------------------------------------------------


class Recorded:
    """Stands for torch.cuda's capture: what was captured is called again by a replay, or the capture fails."""

    def __init__(self, monkeypatch, fails=False):
        self.log, self.function, self.fails = [], None, fails
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "default_generators", [self])
        monkeypatch.setattr(torch.cuda, "graph", lambda *arguments, **options: self)

    def __enter__(self):
        self.log.append("capture")
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    def __exit__(self, *error):
        pass

    def clone_state(self):
        return "the generator's state before the capture"

    def graphsafe_set_state(self, state):
        self.log.append(state)

    def replay(self):
        self.log.append("replay")


def test_a_step_is_captured_once_for_each_choice_of_constants(monkeypatch):
    recorded, device = Recorded(monkeypatch), torch.device("cuda", 0)
    graphed = Graphed(lambda *constants: recorded.log.append(constants), device, enabled=True, name="step")
    for _ in range(5):
        graphed(64, 1.0)
    assert recorded.log == [(64, 1.0)] * 3 + ["capture", (64, 1.0), "replay", "replay"]
    recorded.log.clear()
    graphed(17, 1.0)  # another batch size, which comes once an epoch, begins eagerly
    graphed(64, 1.0)
    assert recorded.log == [(17, 1.0), "replay"]


def test_a_step_that_cannot_be_captured_runs_eagerly(monkeypatch):
    recorded, device = Recorded(monkeypatch, fails=True), torch.device("cuda", 0)
    graphed = Graphed(lambda *constants: recorded.log.append(constants), device, enabled=True, name="training step")
    with pytest.warns(
        UserWarning, match="SOLVER.GRAPH: the training step cannot be captured .* eagerly: operation not"
    ):
        for _ in range(5):
            graphed(64)
    assert recorded.log == [(64,)] * 3 + ["capture", recorded.clone_state()] + [(64,)] * 2


def test_a_step_that_fails_leaves_the_schedules_learning_rate(tmp_path, teacher, monkeypatch):
    """After a failed capture the run goes on eagerly."""
    solver = build_trainer(tiny(tmp_path, teacher), CPU).solver
    solver._lr_on_device = torch.zeros(())  # as on a GPU

    def fail(optimizer):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(solver.scaler, "step", fail)
    with pytest.raises(RuntimeError, match="not permitted"):
        solver.step()
    assert isinstance(solver.lr, float)


@pytest.mark.parametrize("nesterov", ["false", "true"])
def test_an_overflow_in_the_first_step_does_not_break_the_momentum(nesterov, tmp_path, teacher, poisoned_memory):
    config = tiny(tmp_path, teacher, "SOLVER.AMP", "fp16", "SOLVER.NESTEROV", nesterov)
    weights = {}
    for kind in ("cpu", "cuda"):  # a GPU's optimizer, the fused one, takes a CPU's parameters too
        weight = weights[kind] = nn.Parameter(torch.ones(5))
        optimizer = build_optimizer(config, [weight], torch.device(kind), graphs=False)
        assert bool(optimizer.param_groups[0]["fused"]) == (kind == "cuda")
        scaler = torch.amp.GradScaler("cpu")
        for gradient in (math.inf, 1.0, -2.0):
            optimizer.zero_grad()
            scaler.scale(weight.sum() * gradient).backward()
            scaler.step(optimizer)
            scaler.update()
    # The fused kernel rounds a product and a sum at once.
    torch.testing.assert_close(weights["cuda"], weights["cpu"])


def test_nothing_is_captured_on_a_cpu_or_when_switched_off(monkeypatch):
    recorded = Recorded(monkeypatch)
    for device, enabled in (("cpu", True), ("cuda:0", False)):
        graphed = Graphed(lambda: recorded.log.append("call"), torch.device(device), enabled=enabled, name="step")
        for _ in range(5):
            graphed()
    assert recorded.log == ["call"] * 10


def test_a_step_keeps_its_memory(tmp_path, teacher):
    """What a captured step would read and write stays where it is from one epoch to the next."""
    words = ["SOLVER.EMA", "0.9", "TEACHER.CACHE_VIEWS", "1", "TEACHER.CACHE_DIR", str(tmp_path / "cache")]
    trainer = build_trainer(tiny(tmp_path, teacher, "DISTILLER.LEARNED_TEMPERATURE", "true", *words), CPU)
    train_loader = trainer.loaders.train

    def places():
        held = [trainer.meter._sums, trainer.guard._parts, trainer.guard._student, trainer.guard._teacher]
        held += [train_loader._first, train_loader._labels, train_loader._place, train_loader._teacher]
        held += [*trainer.distiller.state_dict().values(), *trainer.tested.state_dict().values()]
        return [tensor.data_ptr() for tensor in held]

    def epoch(number):
        train_loader.set_epoch(number)
        trainer.distiller.set_epoch(number)
        trainer.meter.reset()
        trainer.guard.reset()
        for part in train_loader.parts():
            trainer.step(len(part.index), part.share, 1.0)

    epoch(1)
    before = places()
    momenta = [state["momentum_buffer"].data_ptr() for state in trainer.solver.optimizer.state.values()]
    epoch(2)
    assert places() == before
    assert [state["momentum_buffer"].data_ptr() for state in trainer.solver.optimizer.state.values()] == momenta


def test_no_step_reads_a_value_on_the_host(tmp_path, teacher, monkeypatch):
    """Nothing between two steps waits for the device: a tensor that was asked for its value would raise."""
    words = ["DISTILLER.LEARNED_TEMPERATURE", "true", "SOLVER.ACCUMULATION", "2", "SOLVER.CLIP_NORM", "1"]
    trainer = build_trainer(tiny(tmp_path, teacher, *words, "SOLVER.EMA", "0.9"), CPU)
    parts = trainer.loaders.train.parts()
    first = next(parts)
    trainer.step(len(first.index), 1.0, 1.0)

    def refuse(*arguments, **options):
        raise AssertionError("the step asked for a value")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    trainer.step(len(next(parts).index), 1.0, 1.0)


def test_tests_on_a_gpu_are_of_large_batches():
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert [evaluation_batch(64, cpu, small=small) for small in (True, False)] == [64, 64]
    assert [evaluation_batch(64, cuda, small=small) for small in (True, False)] == [1000, 256]
    assert evaluation_batch(5000, cuda, small=True) == 5000


# -- several runs at once ----------------------------------------------------------------------------------------------


def dropping(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, num_classes))


def test_runs_that_take_turns_are_the_runs_alone(tmp_path, teacher, monkeypatch):
    """With dropout, of which every run draws its own; stopped and resumed in between."""
    monkeypatch.setitem(models._BUILDERS["digits"], "dropping", dropping)

    def configs(folder, epochs):
        words = ["DISTILLER.STUDENT", "dropping", "DISTILLER.LEARNED_TEMPERATURE", "true", "SOLVER.EPOCHS", epochs]
        return [tiny(folder, teacher, *words, "EXPERIMENT.SEED", str(seed)) for seed in (1, 2, 3)]

    alone = [train(config, CPU, quiet=True) for config in configs(tmp_path / "alone", "3")]
    train_together(configs(tmp_path / "together", "2"), CPU, quiet=True)
    torch.randn(3)
    together = train_together(configs(tmp_path / "together", "3"), CPU, resume=True, quiet=True)
    for one, other in zip(alone, together, strict=True):
        assert_same_state(final_state(one.folder), final_state(other.folder))
        assert learning(one.history) == learning(other.history)
        files = [{path.name for path in run.folder.rglob("*") if "events" not in path.name} for run in (one, other)]
        assert files[0] == files[1]


@pytest.mark.slow
def test_killed_runs_that_take_turns_go_on(tmp_path, teacher):
    """kill -9 at two moments, with everything in play that a checkpoint holds."""
    solver = ["SOLVER.EPOCHS", "8", "SOLVER.EMA", "0.9", "SOLVER.SCHEDULE", "cosine", "SOLVER.WARMUP", "2"]
    words = [*solver, "SOLVER.TYPE", "AdamW", "SOLVER.AMP", "fp16", "SOLVER.LR", "0.002", "EXPERIMENT.NAME", "killed"]
    words = tiny_words(tmp_path, teacher, *words)
    command = ["--cfg", str(CONFIGS / "digits" / "kd.yaml"), "--seeds", "1", "2", "--together", "--resume", *words]
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["train.commands", "sklearn.datasets"])
    folder = tmp_path / "digits" / "killed"
    for epoch in (2, 5):
        process = processes.Process(target=main, args=(command,))
        process.start()
        while process.is_alive() and not (folder / "seed_1" / "checkpoints" / f"epoch_{epoch:04d}.pth").exists():
            time.sleep(0.0005)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the runs ended before they could be killed"
    configs = [load_config(CONFIGS / "digits" / "kd.yaml", [*words, "EXPERIMENT.SEED", seed]) for seed in "12"]
    for run, seed in zip(train_together(configs, CPU, resume=True, quiet=True), "12", strict=True):
        alone = [*words, "EXPERIMENT.SEED", seed, "LOG.PREFIX", str(tmp_path / "alone")]
        other = train(load_config(CONFIGS / "digits" / "kd.yaml", alone), CPU, quiet=True)
        left, right = final_state(run.folder), final_state(other.folder)
        assert_same_state(left, right)
        torch.testing.assert_close(dict(left["averaged_from"]), dict(right["averaged_from"]), rtol=0, atol=0)
        assert learning(run.history) == learning(other.history)


def test_a_run_that_fails_leaves_the_others_going(tmp_path, teacher):
    configs = [
        tiny(tmp_path, teacher, "EXPERIMENT.SEED", str(seed), "SOLVER.LR", lr)
        for seed, lr in ((1, "0.05"), (2, "1e30"), (3, "0.05"))
    ]
    with pytest.warns(
        UserWarning, match="run 2 of 3 ended with NonFiniteLoss: expected a finite loss.*the others go on"
    ):
        first, broken, last = train_together(configs, CPU, quiet=True)
    assert isinstance(broken, NonFiniteLoss) and "epoch 1, step 2" in str(broken)
    for run in (first, last):
        alone = train(tiny(tmp_path / "alone", teacher, "EXPERIMENT.SEED", run.folder.name[-1]), CPU, quiet=True)
        assert_same_state(final_state(run.folder), final_state(alone.folder))


def test_together_is_refused_in_words(tmp_path, teacher, monkeypatch):
    configs = [tiny(tmp_path, teacher, "EXPERIMENT.SEED", seed) for seed in "12"]
    with pytest.raises(ConfigError, match="--together: expected one process, got 2 ranks"):
        train_together(configs, World(torch.device("cpu"), 0, 2))
    command = ["--cfg", str(CONFIGS / "digits" / "kd.yaml"), "--together", *tiny_words(tmp_path, teacher)]
    for words in (command, [*command, "--seeds", "3"]):
        with pytest.raises(SystemExit, match="--together: expected two --seeds or more, got 1"):
            main(words)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_together_on_the_command_line(tmp_path, teacher):
    """One of three seeds has a folder that holds a run; after --resume all three are done."""
    words = tiny_words(tmp_path, teacher, "SOLVER.EPOCHS", "1", "EXPERIMENT.NAME", "run")
    command = [sys.executable, str(RUN), "--cfg", str(CONFIGS / "digits" / "kd.yaml")]

    def run(*options):
        return subprocess.run([*command, *words, *options], capture_output=True, text=True, cwd=tmp_path)

    assert run("EXPERIMENT.SEED", "2").returncode == 0
    refused = run("--seeds", "1", "2", "3", "--together")
    assert refused.returncode == 1 and "seed_2, which holds a run" in refused.stderr
    done = run("--seeds", "1", "2", "3", "--together", "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| Sort-KD | digits_teacher → digits_student | 3 | 1 |" in done.stdout
    broken = run("--seeds", "4", "5", "--together", "SOLVER.LR", "1e30", "SOLVER.EPOCHS", "2")
    assert broken.returncode == 1 and "seed 4" in broken.stderr and "seed 5" in broken.stderr


# -- the solver's switches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("SOLVER.NESTEROV true SOLVER.TYPE AdamW", r"SOLVER\.NESTEROV: expected SOLVER\.TYPE SGD"),
        ("SOLVER.NESTEROV true SOLVER.MOMENTUM 0", r"SOLVER\.NESTEROV: expected .* SOLVER\.MOMENTUM"),
        ("SOLVER.LR_MIN 0.1", r"SOLVER\.LR_MIN: expected SOLVER\.SCHEDULE cosine beside it, got step"),
        ("SOLVER.WARMUP 240", r"SOLVER\.WARMUP: expected fewer than the 240 SOLVER\.EPOCHS, got 240"),
        ("SOLVER.WARMUP 150", r"SOLVER\.LR_DECAY_STAGES: expected epochs after the 150 of SOLVER\.WARMUP"),
        ("SOLVER.EMA 1", r"SOLVER\.EMA: expected less than 1, got '1'"),
        ("SOLVER.GRAPH on", r"SOLVER\.GRAPH: expected 'auto' or 'off'"),
        ("SOLVER.ACCUMULATION 0", r"SOLVER\.ACCUMULATION: expected greater than 0"),
    ],
)
def test_switches_without_an_effect_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        load_config(CONFIGS / "cifar100" / "kd.yaml", words.split())


def test_what_a_resumed_run_may_not_change(tmp_path, teacher):
    words = ["SOLVER.SCHEDULE", "cosine"]
    train(tiny(tmp_path, teacher, *words), CPU, quiet=True)
    with pytest.raises(ConfigError, match=r"SOLVER\.EPOCHS 2 instead of 3"):
        train(tiny(tmp_path, teacher, *words, "SOLVER.EPOCHS", "3"), CPU, resume=True)
    train(tiny(tmp_path, teacher, *words, "SOLVER.GRAPH", "off"), CPU, resume=True, quiet=True)


def test_sync_bn_needs_gpus(tmp_path, teacher):
    config = tiny(tmp_path, teacher, "SOLVER.SYNC_BN", "true")
    with pytest.raises(ConfigError, match=r"SOLVER\.SYNC_BN: expected GPUs"):
        build_trainer(config, World(torch.device("cpu"), 0, 2))
