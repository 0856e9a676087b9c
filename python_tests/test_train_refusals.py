"""What the trainer refuses, in words that name the key, before it costs anyone a day; and what it leaves untouched."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from train_cases import CONFIGS, CPU, ROOT, one_thread_fixture, teacher_fixture, tiny, tiny_words  # noqa: F401

from train import report
from train.claim import claimed
from train.config import ConfigError, load_config
from train.experiment import train
from train.guard import NonFiniteLoss
from train.run import main
from train.summary import group_runs

KD = ["--cfg", str(CONFIGS / "digits" / "kd.yaml")]
VANILLA = ["--cfg", str(CONFIGS / "digits" / "vanilla.yaml")]

HOLDER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from train.claim import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pair", "a", "b"], r"--pair: expected --cfg beside it"),
        (["--resume"], r"--resume: expected --cfg beside it"),
        ([*KD, "--seeds", "1", "2", "1"], r"--seeds: expected each seed once, got \[1, 2, 1\]"),
        ([*VANILLA, "EXPERIMENT.DEVICE", "gpu"], r"EXPERIMENT\.DEVICE: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        ([*VANILLA, "EXPERIMENT.DEVICE", "cuda:99"], r"EXPERIMENT\.DEVICE: expected GPU 99 to be there"),
        ([*VANILLA, "EXPERIMENT.DEVICE", "cpu", "DATASET.DECODE", "cuda"], r"DATASET\.DECODE: expected cpu where .* is cpu"),
        ([*VANILLA, "DATASET.TYPE", "imagefolder", "DATASET.ROOT", "none"], r"DATASET\.ROOT: .*expected the folder train"),
        ([*VANILLA, "DISTILLER.STUDENT", "torchvision/resnet18"], r"DISTILLER\.STUDENT: expected a model of \(1, 8, 8\) .*3 channels"),
    ],
)  # fmt: skip
def test_commands(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main(words)
    assert not list(tmp_path.iterdir())


def test_a_model_with_other_logits(tmp_path, monkeypatch):
    from train import models

    monkeypatch.setitem(models._BUILDERS["digits"], "features", lambda classes: torch.nn.Conv2d(1, classes, 3))
    with pytest.raises(ConfigError, match=r"logits \(1, 10\), got one of \(1, 10, 6, 6\)"):
        train(tiny(tmp_path, "", "DISTILLER.STUDENT", "features", method="vanilla"), CPU)


def test_a_last_batch_of_one_image_is_known_before_the_run(tmp_path, monkeypatch):
    """1,297 images in batches of 16 leave one: too few for BatchNorm where an image is one value a channel."""
    from train import models

    layers = [torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 10)]
    monkeypatch.setitem(models._BUILDERS["digits"], "flat", lambda classes: torch.nn.Sequential(*layers))
    words = ["SOLVER.BATCH_SIZE", "16", "SOLVER.EPOCHS", "1"]
    with pytest.raises(
        ConfigError, match=r"SOLVER\.BATCH_SIZE: .* for flat, got 1297 training images in batches of 16 .*choose"
    ):
        train(tiny(tmp_path, "", *words, "DISTILLER.STUDENT", "flat", method="vanilla"), CPU)
    assert not list(tmp_path.iterdir())
    train(tiny(tmp_path, "", *words, method="vanilla"), CPU, quiet=True)  # 16 pixels of one image are enough


def test_folders_that_cannot_be_written(tmp_path, teacher):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"LOG\.PREFIX: expected a folder that can be written, got \S+/file/runs"):
        train(tiny(tmp_path / "file" / "runs", teacher), CPU)
    with pytest.raises(ConfigError, match=r"TEACHER\.CACHE_DIR: "):
        train(
            tiny(tmp_path, teacher, "TEACHER.CACHE_VIEWS", "1", "TEACHER.CACHE_DIR", str(tmp_path / "file" / "x")), CPU
        )


def test_seeds_that_are_there_are_refused_before_the_first_is_trained(tmp_path, teacher):
    words = tiny_words(tmp_path, teacher, "SOLVER.EPOCHS", "1", "EXPERIMENT.NAME", "run")
    main([*KD, *words, "EXPERIMENT.SEED", "2"])
    with pytest.raises(SystemExit, match=r"expected a new run folder, got \S+seed_2, which holds a run"):
        main([*KD, *words, "--seeds", "1", "2"])
    assert [path.name for path in (tmp_path / "digits" / "run").glob("seed_*")] == ["seed_2"]


def test_fewer_epochs_than_the_run_has(tmp_path, teacher):
    train(tiny(tmp_path, teacher), CPU, quiet=True)
    with pytest.raises(ConfigError, match=r"SOLVER\.EPOCHS: expected 2 or more, which the run has finished, got 1"):
        train(tiny(tmp_path, teacher, "SOLVER.EPOCHS", "1"), CPU, resume=True)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fcntl")
def test_one_process_a_run_folder(tmp_path, teacher):
    """Nobody else trains in it, not even to resume; killed, its holder is in nobody's way."""
    config = tiny(tmp_path, teacher, "EXPERIMENT.NAME", "run")
    folder = tmp_path / "digits" / "run" / "seed_0"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        for resume in (False, True):
            with pytest.raises(ConfigError, match=r"EXPERIMENT\.NAME: .* in which another process is training"):
                train(config, CPU, resume=resume, overwrite=not resume)
        holder.kill()
    assert train(config, CPU, quiet=True).folder == folder


def test_a_claim_leaves_no_trace_of_a_run_that_never_began(tmp_path):
    (tmp_path / "output").mkdir()
    with claimed(tmp_path / "output" / "project" / "run"):
        assert (tmp_path / "output" / "project" / "run").is_dir()
    assert [path.name for path in tmp_path.rglob("*")] == ["output"]  # which was there before


def test_weights_that_break_in_an_epochs_last_step(tmp_path, teacher):
    """One step an epoch, with a finite loss, whose update is the last: nothing broken is saved."""
    config = tiny(tmp_path, teacher, "SOLVER.LR", "1e38", "SOLVER.BATCH_SIZE", "2000")
    with pytest.raises(NonFiniteLoss, match=r"expected a finite test loss after epoch 1, got nan.*SOLVER\.LR"):
        train(config, CPU, quiet=True)
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize("kind", ["published", "an epoch but no configuration", "written by an old torch"])
def test_weights_alone_are_evaluated_with_a_configuration(kind, tmp_path, teacher, capsys):
    state, path = torch.load(teacher, weights_only=True), tmp_path / "weights.pth"
    state |= {"epoch": 240} if kind == "an epoch but no configuration" else {}
    torch.save(state, path, _use_new_zipfile_serialization=kind != "written by an old torch")
    with pytest.raises(SystemExit, match=r"--cfg: expected beside --eval .* DISTILLER\.STUDENT is the file's model"):
        main(["--eval", str(path)])
    main(["--cfg", str(CONFIGS / "digits" / "teacher.yaml"), "--eval", str(path)])
    assert "test_top1 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model"), r"--eval: load_weights: expected \S+ to hold a state dict"),
        (lambda state: state.update(model={"x": 3}), r"--eval: load_weights: expected \S+ to hold a state dict"),
        (lambda state: state.update(config=3), r"--cfg: expected beside --eval .* got no configuration in it"),
        (lambda state: state["config"].update(SOLVERR=3), r"SOLVERR: expected a known key.*in the configuration that \S+ holds"),
        (lambda state: state["config"].update(WHEN=3), r"WHEN: expected a valid list, got 3, in the configuration"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_lacks_what_evaluation_needs(change, message, tmp_path, teacher):
    config = load_config(CONFIGS / "digits" / "teacher.yaml").model_dump()
    state = {"epoch": 1, "config": config, **torch.load(teacher, weights_only=True)}
    change(state)
    torch.save(state, tmp_path / "changed.pth")
    with pytest.raises(SystemExit, match=message):
        main(["--eval", str(tmp_path / "changed.pth")])


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(SystemExit, match=r"--eval: expected the file of a checkpoint, got \S+: a folder"):
        main(["--eval", str(tmp_path)])


def test_wandb_without_an_account(tmp_path, teacher, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is optional")

    def refuse(**settings):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=r"LOG\.WANDB: No API key configured\. Or set WANDB_MODE=offline"):
        train(tiny(tmp_path, teacher, "LOG.WANDB", "true"), CPU, quiet=True)


def test_the_report_leaves_out_what_never_began_and_marks_what_is_unfinished(tmp_path, teacher):
    train(tiny(tmp_path, teacher, "SOLVER.EPOCHS", "1", "EXPERIMENT.NAME", "whole"), CPU, quiet=True)
    broken = tiny(tmp_path, teacher, "SOLVER.LR", "1e30", "EXPERIMENT.NAME", "broken")
    with pytest.raises(NonFiniteLoss):
        train(broken, CPU, quiet=True)
    unfinished = tmp_path / "digits" / "unfinished" / "seed_0"
    shutil.copytree(tmp_path / "digits" / "whole" / "seed_0", unfinished)
    text = (unfinished / "config.yaml").read_text()
    (unfinished / "config.yaml").write_text(text.replace("EPOCHS: 1\n", "EPOCHS: 240\n", 1))
    with pytest.warns(UserWarning, match=r"broken/seed_0: no finished epoch; left out"):
        report.main([str(tmp_path), "--out", str(tmp_path)])
    table = (tmp_path / "report.md").read_text()
    assert "broken" not in table and "| 1 | 1 of 240 |" in table and "| 1 | 1 |" in table
    with pytest.raises(SystemExit, match="expected a finished epoch in one of 1 runs"), pytest.warns(UserWarning):
        report.main([str(tmp_path / "digits" / "broken"), "--out", str(tmp_path)])


def test_groups_are_told_apart(tmp_path, teacher):
    """By as little as does it; two runs of one method, pair and name in two folders are still two."""
    configs = {
        "left": tiny(tmp_path / "left", teacher, "SOLVER.EPOCHS", "1", "EXPERIMENT.NAME", "run"),
        "right": tiny(tmp_path / "right", teacher, "SOLVER.EPOCHS", "1", "EXPERIMENT.NAME", "run"),
        "other": tiny(tmp_path / "left", teacher, "SOLVER.EPOCHS", "1", "DISTILLER.CORRECTION", "none"),
    }
    runs = {name: train(config, CPU, quiet=True) for name, config in configs.items()}
    labels = {
        name: next(label for label, group in group_runs(list(runs.values())).items() if run in group)
        for name, run in runs.items()
    }
    assert labels["other"] == "KD" and labels["left"] != labels["right"]
    assert labels["left"].startswith("Sort-KD, ") and labels["left"].endswith("left/digits/run")
    assert set(group_runs([runs["left"], runs["other"]])) == {"Sort-KD", "KD"}


def test_the_installed_package_comes_before_the_checkouts(tmp_path):
    """After `pip install .` the compiled extension is in site-packages, and not in the checkout that train/ is run from."""
    shutil.copytree(ROOT / "train", tmp_path / "train", ignore=shutil.ignore_patterns("results", "__pycache__"))
    (tmp_path / "sortkd_kernels").mkdir()
    (tmp_path / "sortkd_kernels" / "__init__.py").write_text("raise RuntimeError('not built')")
    site = tmp_path / "site"
    site.mkdir()
    (site / "sortkd_kernels").symlink_to(ROOT / "sortkd_kernels")
    command = [sys.executable, str(tmp_path / "train" / "run.py"), *KD, "--dry-run"]
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "student digits_student" in done.stdout, done.stderr
