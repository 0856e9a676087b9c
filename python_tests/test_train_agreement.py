"""The trainer, step by step in float64, against the methods written down a second time, in plain PyTorch and SGD."""

import copy
import math
from collections import deque

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from train_cases import CONFIGS, CPU, one_thread_fixture  # noqa: F401

from train import loop
from train.assembly import make_loaders
from train.config import load_config
from train.distillers import Distiller, build_loss
from train.logs import Progress
from train.models import build_model
from train.teacher import FrozenTeacher

# The recipes of the field, on the digits: 6 steps an epoch, the last of 17 images; warm-up, learning rate and the
# temperature's schedule all change within the three epochs.
WORDS = [
    "DATASET.TYPE", "digits", "DATASET.NUM_WORKERS", "0", "SOLVER.BATCH_SIZE", "256", "SOLVER.EPOCHS", "3",
    "DISTILLER.TEACHER", "digits_teacher", "DISTILLER.STUDENT", "digits_student",
    "SOLVER.LR_DECAY_STAGES", "[1, 2]", "DKD.WARMUP", "2", "CTKD.EPOCHS", "2",
]  # fmt: skip
# Each method's file, and its loss: (kind, standardize, temperature or None where it is learned, CE's weight, the rest).
METHODS = {
    "CE": ("vanilla", None),
    "KD": ("kd", ("kd", False, 4, 0.1, 0.9)),
    "DKD": ("dkd", ("dkd", False, 4, 1, 1)),
    "CTKD": ("ctkd", ("kd", False, None, 0.1, 0.9)),
    "LSKD": ("lskd", ("kd", True, 2, 0.1, 9)),
    "LSKD+DKD": ("lskd_dkd", ("dkd", True, 2, 1, 9)),
    "CTKD+LSKD": ("ctkd_lskd", ("kd", True, None, 0.1, 9)),
}


class InFloat64(nn.Module):
    """A student that computes float64 logits of the loader's float32 images."""

    def __init__(self):
        super().__init__()
        self.network = build_model("digits_student", 10, dataset="digits").double()

    def forward(self, images):
        return self.network(images.double())


def trained(config, loaders, student, teacher, monkeypatch):
    """The losses of the trainer's steps; and the parameters after them."""
    losses = []

    def recording(config):
        loss = build_loss(config)

        def call(*arguments):
            out = loss(*arguments)
            losses.append(out.loss.item())
            return out

        return call

    monkeypatch.setattr(loop, "build_loss", recording)
    distiller = Distiller(student, config).double()
    trainer = loop.Trainer(config, loaders, distiller, teacher, CPU)
    progress = Progress("", len(loaders.train), 3, 0, shown=False)
    for epoch in (1, 2, 3):
        deque(trainer.train_epoch(epoch, progress, None), maxlen=0)  # which runs it, as steps or as a whole
    return losses, list(distiller.parameters())


def corrected(teacher, labels, how):
    """Row by row: the classes in order, the label moved or exchanged to the front, take the values in order."""
    rows = teacher.tolist()
    for row, label in zip(rows, labels.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda c: -row[c])
        values = [row[c] for c in order]
        if how == "sort":
            order.remove(label)
            order.insert(0, label)
        elif how == "swap":
            place = order.index(label)
            order[0], order[place] = order[place], order[0]
        for c, value in zip(order, values, strict=True):
            row[c] = value
    return torch.tensor(rows, dtype=torch.float64)


def kl(teacher, student):
    """Mean over rows of the divergence between two rows of logits."""
    p = teacher.softmax(1)
    return (p * (teacher.log_softmax(1) - student.log_softmax(1))).sum(1).mean()


def z_score(x):
    return (x - x.mean(1, keepdim=True)) / (1e-7 + x.std(1, keepdim=True))


def plain_loss(spec, student, teacher, labels, temperature, warm):
    ce = F.cross_entropy(student, labels)
    if spec is None:
        return ce
    kind, standardize, _, ce_weight, weight = spec
    if standardize:
        student, teacher = z_score(student), z_score(teacher)
    s, t = student / temperature, teacher / temperature
    if kind == "kd":
        return ce_weight * ce + weight * temperature**2 * kl(t, s)
    is_label = F.one_hot(labels, s.shape[1]).bool()
    pairs = [torch.stack([x[is_label], x[~is_label].view(len(x), -1).logsumexp(1)], 1) for x in (t, s)]
    others = [x[~is_label].view(len(x), -1) for x in (t, s)]
    return ce_weight * ce + weight * warm * temperature**2 * (kl(*pairs) + 8 * kl(*others))


def written_down(spec, correction, loaders, student, teacher):
    """The same training, from the formulas."""
    theta = torch.ones((), dtype=torch.float64, requires_grad=True)
    learned = spec is not None and spec[2] is None
    parameters = [*student.parameters(), *([theta] if learned else [])]
    momentum = [torch.zeros_like(p) for p in parameters]
    losses = []
    student.train()
    for epoch in (1, 2, 3):
        lr, warm = 0.05 * 0.1 ** (epoch - 1), min(epoch / 2, 1)
        reversal = (math.cos(min(epoch, 2) * math.pi / 2) + 1) / 2 - 1
        loaders.train.set_epoch(epoch)
        for batch in loaders.train:
            temperature = 1 + 20 * theta.sigmoid() if learned else spec and spec[2]
            t = spec and corrected(teacher.model(batch.images), batch.labels, correction)
            loss = plain_loss(spec, student(batch.images), t, batch.labels, temperature, warm)
            gradients = torch.autograd.grad(loss, parameters)
            losses.append(loss.item())
            with torch.no_grad():
                for p, gradient, m in zip(parameters, gradients, momentum, strict=True):
                    m.mul_(0.9).add_((reversal if p is theta else 1) * gradient + 5e-4 * p)
                    p -= lr * m
    return losses, parameters


@pytest.mark.parametrize(
    ("method", "correction"),
    [("CE", "none"), *((m, c) for m in METHODS if m != "CE" for c in ("sort", "swap", "none"))],
)
def test_every_step_is_the_formulas(method, correction, monkeypatch):
    file, spec = METHODS[method]
    config = load_config(CONFIGS / "cifar100" / f"{file}.yaml", [*WORDS, "DISTILLER.CORRECTION", correction])
    loaders = make_loaders(config, CPU)
    torch.manual_seed(0)
    student = InFloat64()
    # Untrained, so wrong on most images. Its float32 logits are what both start from.
    teacher = FrozenTeacher(build_model("digits_teacher", 10, dataset="digits")) if spec else None
    expected, parameters = written_down(spec, correction, loaders, copy.deepcopy(student), teacher)
    losses, trained_parameters = trained(config, loaders, student, teacher, monkeypatch)
    assert len(set(losses)) == 18
    # float64 rounds at 1e-16; 18 steps of a network with BatchNorm carry that to 1e-13.
    assert losses == pytest.approx(expected, rel=1e-12)
    for left, right in zip(trained_parameters, parameters, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


def test_cross_entropy_keeps_the_logits_precision():
    logits, labels = torch.randn(5, 10, dtype=torch.float64), torch.arange(5)
    loss = build_loss(load_config(CONFIGS / "cifar100" / "vanilla.yaml"))
    assert loss(logits, None, labels, 1.0, 1).loss == F.cross_entropy(logits, labels)
    assert loss(logits.bfloat16(), None, labels, 1.0, 1).loss == F.cross_entropy(logits.bfloat16().float(), labels)
