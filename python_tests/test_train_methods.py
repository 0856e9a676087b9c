"""Every method trains through the loop, with each switch doing what it says, bit for bit the same when repeated."""

import pytest
import torch
from torch.nn import functional as F
from train_cases import CPU, assert_same_state, final_state, learning, one_thread_fixture, teacher_fixture, tiny  # noqa: F401

from sortkd_kernels import SortKDOutput, fused_sort_kd
from train.assembly import build_trainer
from train.distillers import build_loss, kd_warm_up
from train.experiment import train
from train.guard import NonFiniteLoss
from train.logs import Progress
from train.meter import Meter
from train.together import finish

METHODS = {
    "CE": ["DISTILLER.TYPE", "NONE"],
    "KD": ["DISTILLER.CORRECTION", "none"],
    "Sort-KD": [],
    "Swap-KD": ["DISTILLER.CORRECTION", "swap"],
    "Sort-DKD": ["DISTILLER.TYPE", "DKD", "DKD.WARMUP", "4"],
    "Sort-CTKD": ["DISTILLER.LEARNED_TEMPERATURE", "true"],
    "Sort-LSKD": ["DISTILLER.STANDARDIZE", "true", "KD.TEMPERATURE", "2", "KD.LOSS.KD_WEIGHT", "9"],
    "Sort-LSKD+DKD": ["DISTILLER.TYPE", "DKD", "DISTILLER.STANDARDIZE", "true", "DKD.T", "2", "DKD.KD_WEIGHT", "9"],
    "cached Sort-KD": ["TEACHER.CACHE_VIEWS", "1"],
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_repeats_itself(method, tmp_path, teacher):
    words = [*METHODS[method], "TEACHER.CACHE_DIR", str(tmp_path / "cache")]
    runs = [train(tiny(tmp_path / name, teacher, *words), CPU, quiet=True) for name in ("once", "again")]
    assert_same_state(*(final_state(run.folder) for run in runs))
    assert learning(runs[0].history) == learning(runs[1].history)
    first, last = runs[0].history
    assert last["train_loss"] < first["train_loss"] and last["train_top1"] > first["train_top1"]
    for epoch, row in enumerate(runs[0].history, 1):
        config = runs[0].config
        weights = {"NONE": (1, 0), "KD": (config.KD.LOSS.CE_WEIGHT, config.KD.LOSS.KD_WEIGHT)}
        weights["DKD"] = (config.DKD.CE_WEIGHT, config.DKD.KD_WEIGHT * min(epoch / config.DKD.WARMUP, 1))
        ce, kd = weights[config.DISTILLER.TYPE]
        # The sums of the three columns are made in float64 from float32 losses.
        assert row["train_loss"] == pytest.approx(ce * row["train_ce"] + kd * row["train_kd"], rel=1e-5)
        # Plain KD corrects nothing, but its log still tells how far the teacher was off.
        assert (row["mean_rank"] > 0.02) == (method != "CE") and row["mean_rank"] >= row["corrected"]
        assert (row["corrected"] > 0.02) == (method not in ("CE", "KD"))


def test_another_seed_is_another_run(tmp_path, teacher):
    runs = [train(tiny(tmp_path, teacher, "EXPERIMENT.SEED", seed), CPU, quiet=True) for seed in "12"]
    weights = [final_state(run.folder)["model"]["features.0.weight"] for run in runs]
    assert not torch.equal(*weights)


def test_the_corrections_are_three(tmp_path, teacher):
    """The first batch's loss, the student still the same, tells the corrections apart."""
    losses = {}
    for correction in ("sort", "swap", "none"):
        trainer = build_trainer(tiny(tmp_path, teacher, "DISTILLER.CORRECTION", correction), CPU)
        batch = next(iter(trainer.loaders.train))
        logits, temperature = trainer.step.model(batch.images)
        losses[correction] = trainer.step.loss(
            logits, trainer.teacher.logits(batch.images), batch.labels, temperature, 1
        ).loss.item()
        expected = fused_sort_kd(
            logits,
            trainer.teacher.logits(batch.images),
            batch.labels,
            ce_weight=0.1,
            kd_weight=0.9,
            correction=correction,
        )
        assert losses[correction] == expected.item()
    assert len(set(losses.values())) == 3


def test_one_step_is_the_textbooks(tmp_path, teacher):
    """Plain KD's first step against PyTorch's own KL divergence and SGD."""
    trainer = build_trainer(tiny(tmp_path, teacher, "DISTILLER.CORRECTION", "none"), CPU)
    batch = next(iter(trainer.loaders.train))
    before = {name: p.detach().clone() for name, p in trainer.distiller.named_parameters()}
    logits, _ = trainer.step.model(batch.images)
    t = trainer.teacher.logits(batch.images)
    kl = F.kl_div(F.log_softmax(logits / 4, 1), F.log_softmax(t / 4, 1), reduction="batchmean", log_target=True) * 16
    loss = 0.1 * F.cross_entropy(logits, batch.labels) + 0.9 * kl
    gradients = torch.autograd.grad(loss, trainer.distiller.parameters())
    next(trainer.loaders.train.parts())
    trainer.step(len(batch.index), batch.share, 1.0)
    for (name, after), gradient in zip(trainer.distiller.named_parameters(), gradients, strict=True):
        expected = before[name] - 0.05 * (gradient + 5e-4 * before[name])
        torch.testing.assert_close(after.detach(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_the_learned_temperature_learns(amp, tmp_path, teacher):
    words = ["DISTILLER.LEARNED_TEMPERATURE", "true", "CTKD.EPOCHS", "2", "SOLVER.AMP", amp, "SOLVER.EPOCHS", "3"]
    run = train(tiny(tmp_path, teacher, *words), CPU, quiet=True)
    temperatures = [row["temperature"] for row in run.history]
    # From 1 + 20 sigmoid(1) = 15.62 downwards: the reversed gradient raises the loss, and lambda grows to -1.
    assert 15.62 > temperatures[0] > temperatures[1] > temperatures[2] > 1
    state = final_state(run.folder)
    assert float(state["temperature"]["theta"]) != 1.0 and float(state["temperature"]["reversal"]) == -1.0
    # Lower precision keeps 8 (bf16) or 11 (fp16) bits of the activations; three epochs carry that to the temperature.
    exact = train(tiny(tmp_path / "exact", teacher, *words, "SOLVER.AMP", "none"), CPU, quiet=True)
    assert temperatures[-1] == pytest.approx(exact.history[-1]["temperature"], rel=0.05)


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_amp_is_the_dtype_of_the_logits(amp, tmp_path, teacher):
    trainer = build_trainer(tiny(tmp_path, teacher, "SOLVER.AMP", amp), CPU)
    seen = []
    trainer.distiller.student.register_forward_hook(lambda module, images, logits: seen.append(logits.dtype))
    finish(trainer.train_epoch(1, Progress("", 6, 1, 0), None))
    assert set(seen) == {{"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]}
    assert trainer.solver.scaler.is_enabled() == (amp == "fp16")
    assert trainer.teacher.amp_dtype == trainer.amp  # TEACHER.AMP is `same`
    assert all(p.dtype == torch.float32 for p in trainer.distiller.parameters())


def test_a_cache_serves_other_seeds(tmp_path, teacher):
    words = ["TEACHER.CACHE_VIEWS", "1", "TEACHER.CACHE_DIR", str(tmp_path / "cache")]
    train(tiny(tmp_path, teacher, *words), CPU, quiet=True)
    (cache,) = (path for path in (tmp_path / "cache").iterdir() if path.suffix not in (".lock", ".json"))
    written = cache.stat().st_mtime_ns
    cached = train(tiny(tmp_path, teacher, *words, "EXPERIMENT.SEED", "5"), CPU, quiet=True)
    assert cache.stat().st_mtime_ns == written
    # The digits have no augmentation: the cache changes no more than the rounding of its half precision.
    plain = train(tiny(tmp_path / "plain", teacher, "EXPERIMENT.SEED", "5"), CPU, quiet=True)
    assert cached.history[0]["train_kd"] == pytest.approx(plain.history[0]["train_kd"], rel=1e-2)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, teacher):
    config = tiny(tmp_path, teacher, "SOLVER.LR", "1e30", "EXPERIMENT.NAME", "diverging")
    with pytest.raises(NonFiniteLoss) as caught:
        train(config, CPU, quiet=True)
    message = str(caught.value)
    for fact in (
        "epoch 1, step 2 of it, rank 0, lr 1e+30",
        "student (256, 10)",
        "teacher (256, 10)",
        "images of the batch: [",
    ):
        assert fact in message
    assert not list((tmp_path / "digits" / "diverging").rglob("*.pth"))  # no checkpoint of broken weights


def test_the_learning_rate_falls_after_its_stages(tmp_path, teacher):
    words = ["SOLVER.EPOCHS", "4", "SOLVER.LR_DECAY_STAGES", "[1, 3]", "SOLVER.LR_DECAY_RATE", "0.5"]
    run = train(tiny(tmp_path, teacher, *words), CPU, quiet=True)
    assert [row["lr"] for row in run.history] == pytest.approx([0.05, 0.025, 0.025, 0.0125])


def test_dkd_warms_up():
    config = tiny("", "", "DISTILLER.TYPE", "DKD", "DKD.WARMUP", "4", "DKD.BETA", "2")
    logits, t, labels = torch.randn(5, 10), torch.randn(5, 10), torch.arange(5)
    outs = {epoch: build_loss(config)(logits, t, labels, 4.0, kd_warm_up(config, epoch)) for epoch in (1, 4, 9)}
    parts = [(outs[epoch].loss - outs[epoch].ce).item() for epoch in (1, 4, 9)]
    assert parts == pytest.approx([parts[1] / 4, parts[1], parts[1]], rel=1e-5)


def test_the_meter_weighs_by_rows():
    meter = Meter(torch.device("cpu"))
    for rows, loss in ((3, 1.0), (1, 5.0)):
        logits = torch.eye(10)[:rows]  # the largest logit is the row's own number; ties go to the lower class
        rank = torch.tensor([0, 2, 1][:rows])
        meter.update(SortKDOutput(*torch.tensor([loss, loss, loss]), rank), logits, torch.tensor([0, 1, 9][:rows]))
    means = meter.means()
    expected = {"loss": 2.0, "top1": 75.0, "corrected": 0.5, "mean_rank": 0.75}
    assert {name: means[name] for name in expected} == pytest.approx(expected)


def test_of_equal_best_epochs_the_last_is_kept(tmp_path, teacher):
    trainer = build_trainer(tiny(tmp_path, teacher), CPU)
    trainer.history = [{"epoch": epoch, "test_top1": top1} for epoch, top1 in ((1, 40.0), (2, 50.0), (3, 50.0))]
    assert trainer.best["epoch"] == 3
