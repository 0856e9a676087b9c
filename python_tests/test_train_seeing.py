"""What a run shows and leaves: files, TensorBoard, Weights & Biases, the report, and the command line's other forms."""

import csv
import json
import os
import re
import shutil
import statistics
import subprocess
import sys

import pytest
import torch
from torch import nn
from train_cases import (  # noqa: F401
    CONFIGS,
    CPU,
    ROOT,
    RUN,
    final_state,
    one_thread_fixture,
    teacher_fixture,
    tiny,
    tiny_words,
)  # fmt: skip

from train import report
from train.checkpoint import read
from train.config import load_config
from train.describe import count_macs, describe
from train.experiment import train
from train.logs import Progress
from train.models import build_model
from train.run import main

KD = ["--cfg", str(CONFIGS / "digits" / "kd.yaml")]
NAME = "sort-kd_digits_teacher_digits_student,SOLVER.BATCH_SIZE=256"  # of a tiny run


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_a_run_leaves_its_files(tmp_path, teacher):
    # A learning rate that a collapse follows: the best epoch is not the last.
    words = ["SOLVER.LR_DECAY_STAGES", "[1]", "SOLVER.LR_DECAY_RATE", "300"]
    run = train(tiny(tmp_path, teacher, *words), CPU, quiet=True)
    rows = rows_of(run.folder / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"lr", "temperature", "train_loss", "train_kd", "train_ce", "train_top1", "corrected", "mean_rank",
            "images_per_s", "seconds", "test_ce", "test_top1", "test_top5", "best_top1"} <= {*rows[0]}  # fmt: skip
    for row, kept in zip(rows, run.history, strict=True):
        assert {name: float(value) for name, value in row.items()} == pytest.approx(kept, rel=1e-5)
    assert load_config(run.folder / "config.yaml") == run.config
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["last"]["mean"] == run.last and summary["ranks"] == 1 and summary["method"] == "Sort-KD"
    assert is_png(run.folder / "curves.png")
    best = read(run.folder / "checkpoints" / "best.pth")
    accuracy = [row["test_top1"] for row in run.history]
    assert best["epoch"] == accuracy.index(max(accuracy)) + 1 and best["best"]["test_top1"] == max(accuracy) == run.best


def test_tensorboard_has_every_epoch_once_after_a_resume(tmp_path, teacher):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    train(tiny(tmp_path, teacher), CPU, quiet=True)
    run = train(tiny(tmp_path, teacher, "SOLVER.EPOCHS", "3"), CPU, resume=True, quiet=True)
    events = accumulator(str(run.folder))
    events.Reload()
    test = events.Scalars("epoch/test_top1")
    assert [event.step for event in test] == [6, 12, 18]
    assert [event.value for event in test] == pytest.approx([row["test_top1"] for row in run.history])
    assert [event.step for event in events.Scalars("step/loss")] == list(range(2, 19, 2))


def test_wandb_offline(tmp_path, teacher, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is optional")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = train(tiny(tmp_path, teacher, "LOG.WANDB", "true", "EXPERIMENT.TAG", "a,,b"), CPU, quiet=True)
    (page,) = run.folder.glob("wandb/offline-run-*/*.wandb")
    content = page.read_bytes()
    for written in (b"SOLVER.BATCH_SIZE", b"test_top1", b"best_top1", b"corrected"):
        assert written in content


def test_the_progress_bar_tells_what_counts(capsys):
    bar = Progress("Sort-KD seed 1", steps_per_epoch=2, epochs=1, done=0)
    numbers = {
        "loss": 1.25,
        "kd": 1.0,
        "ce": 3.5,
        "top1": 40.0,
        "images_per_s": 900.0,
        "corrected": 0.125,
        "mean_rank": 0.5,
    }
    bar.step(1, lambda: numbers)
    bar.close()
    shown = capsys.readouterr().err
    texts = ["Sort-KD seed 1 1/1", "loss 1.250 (kd 1.000, ce 3.500)", "top-1 40.0%", "900 images/s", "corrected 12.5%"]
    for text in [*texts, "rank 0.50"]:
        assert text in shown


@pytest.fixture(scope="module")
def seeds(tmp_path_factory, teacher):
    """A folder with three seeds of Sort-KD and one of plain KD."""
    folder = tmp_path_factory.mktemp("runs")
    main([*KD, "--seeds", "1", "2", "3", *tiny_words(folder, teacher)])
    main([*KD, *tiny_words(folder, teacher, "DISTILLER.CORRECTION", "none")])
    return folder / "digits"


def test_seeds_are_summed_up(seeds):
    folder = seeds / NAME
    (facts,) = json.loads((folder / "summary.json").read_text())
    accuracy = [[float(row["test_top1"]) for row in rows_of(folder / f"seed_{n}" / "metrics.csv")] for n in (1, 2, 3)]
    for name, values in {"best": [max(run) for run in accuracy], "last": [run[-1] for run in accuracy]}.items():
        assert facts[name]["values"] == pytest.approx(values)
        assert facts[name]["mean"] == pytest.approx(statistics.fmean(values))
        assert facts[name]["std"] == pytest.approx(statistics.stdev(values))
    assert facts["seeds"] == [1, 2, 3] and is_png(folder / "curves.png")


def test_the_report_compares_runs(seeds, tmp_path, capsys):
    report.main([str(seeds), "--out", str(tmp_path)])
    table = (tmp_path / "report.md").read_text()
    assert table.strip() in capsys.readouterr().out and is_png(tmp_path / "report.png")
    lines = {line.split(" | ")[0].strip("| "): line for line in table.splitlines() if line.startswith("| ")}
    (facts,) = json.loads((seeds / NAME / "summary.json").read_text())
    assert f"| 3 | 2 | {facts['best']['mean']:.2f} ± {facts['best']['std']:.2f} |" in lines["Sort-KD"]
    assert "| digits_teacher → digits_student | 1 | 2 |" in lines["KD"] and "±" not in lines["KD"]
    with pytest.raises(SystemExit, match=r"no metrics\.csv there"):
        report.main([str(tmp_path / "none")])


def test_the_report_is_a_command(seeds, tmp_path):
    """It writes beside the runs, says where, and stands a terminal that knows neither arrow nor plus-minus."""
    shutil.copytree(seeds, tmp_path / "runs")
    command = [sys.executable, str(ROOT / "train" / "report.py"), *sorted(map(str, (tmp_path / "runs").iterdir()))]
    environment = os.environ | {
        "PYTHONIOENCODING": "ascii",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "LC_ALL": "C",
    }
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(command, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "| Sort-KD |" in done.stdout, done.stderr
    assert f"report: {tmp_path / 'runs' / 'report.md'}" in done.stdout and is_png(tmp_path / "runs" / "report.png")
    assert " ± " in (tmp_path / "runs" / "report.md").read_text(encoding="utf-8")
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("metrics.csv", lambda text: text[:-20], r"row 2 of \["),
        ("metrics.csv", lambda text: text.replace("\n2,0.05", "\n2,fast"), r"row 2 of \[.*'fast'"),
        ("metrics.csv", lambda text: text + "1,2\n", r"row 3 of \["),
        ("metrics.csv", lambda text: text.replace("test_top1", "accuracy"), "no column test_top1"),
        ("metrics.csv", lambda text: "\0\0" + text, "no column epoch"),
        ("config.yaml", lambda text: text.replace("SOLVER:", "SOLVER: ["), "while parsing"),
        ("config.yaml", lambda text: text + "SOLVERR: {LR: 1}", "SOLVERR: expected a known key"),
    ],
)  # fmt: skip
def test_the_report_names_a_damaged_file(file, damage, reason, seeds, tmp_path):
    shutil.copytree(seeds / NAME, tmp_path / "runs")
    path = tmp_path / "runs" / "seed_2" / file
    path.write_text(damage(path.read_text()))
    with pytest.raises(SystemExit, match=rf"report: expected the file of a run at \S+/seed_2/{file}, got {reason}"):
        report.main([str(tmp_path / "runs")])


@pytest.mark.slow
def test_no_character_costs_a_run(tmp_path, teacher):
    """Files first, words after: in a terminal without the characters, and in pictures, which take `$` for a formula.

    And a log of both streams has each epoch's line on a line of its own.
    """
    words = tiny_words(tmp_path, teacher, "EXPERIMENT.NAME", "cost $5 _{ $6 日本")
    command = [sys.executable, str(RUN), *KD, *words, "--seeds", "1", "2"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    folder = tmp_path / "digits" / "cost $5 _{ $6 日本"
    assert json.loads((folder / "summary.json").read_text())[0]["seeds"] == [1, 2]
    assert is_png(folder / "curves.png") and is_png(folder / "seed_2" / "curves.png")
    assert r"digits_teacher \u2192 digits_student" in done.stdout and r"\xb1" in done.stdout
    lines = done.stdout.split("\n")
    assert [line.split(":")[0] for line in lines if line.startswith("epoch ")] == ["epoch 1", "epoch 2"] * 2
    assert "\r" not in done.stdout and not [line for line in lines if "epoch 1:" in line[1:] or "epoch 2:" in line[1:]]


def test_a_checkpoint_is_evaluated_as_it_was_trained(seeds, capsys):
    folder = seeds / NAME / "seed_1"
    state = final_state(folder)
    for words in ([], KD):  # its own configuration, or one given
        main([*words, "--eval", str(folder / "checkpoints" / "epoch_0002.pth")])
        shown = dict(re.findall(r"(test_\w+) ([\d.]+)", capsys.readouterr().out))
        assert {name: float(value) for name, value in shown.items()} == pytest.approx(
            {name: state["history"][-1][name] for name in ("test_ce", "test_top1", "test_top5")}, abs=1e-4
        )


def test_a_published_file_is_evaluated_with_its_configuration(teacher, capsys):
    main(["--cfg", str(CONFIGS / "digits" / "teacher.yaml"), "--eval", str(teacher)])
    assert "test_top1 " in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"--eval: .*digits|--eval: load_weights: expected .* entries of DigitsNet"):
        main([*KD, "--eval", str(teacher)])
    with pytest.raises(SystemExit, match=r"expected the file of a checkpoint, got nowhere\.pth"):
        main(["--eval", "nowhere.pth"])


def test_dry_run_counts_parameters_and_macs(capsys):
    main([*KD, "--dry-run", "SOLVER.LR", "0.07"])
    shown = capsys.readouterr().out
    assert "LR: 0.07" in shown
    parameters = sum(p.numel() for p in build_model("digits_student", 10, dataset="digits").parameters())
    assert f"student digits_student: {parameters:,} parameters" in shown and "teacher digits_teacher: " in shown
    # 8 x 8 outputs of 4 channels from 1 x 3 x 3, then 4 x 4 and 2 x 2 of 4 from 4 x 3 x 3, then 16 x 10.
    assert f"{64 * 4 * 9 + 16 * 4 * 36 + 4 * 4 * 36 + 160:,} multiply-accumulates a 1 x 8 x 8 image" in shown


def test_macs_of_known_layers():
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, groups=1), nn.Flatten(), nn.Linear(5 * 16, 7))
    assert count_macs(model, (3, 4, 4)) == 16 * 5 * 27 + 80 * 7
    # Table 8 of arXiv 1704.04861 gives MobileNetV1 569 million.
    text = describe(load_config(CONFIGS / "imagenet" / "vanilla.yaml", ["DISTILLER.STUDENT", "MobileNetV1"]))
    assert "4,231,976 parameters, 568,7" in text


def test_errors_end_the_command_with_their_message(tmp_path, teacher):
    cifar = ["--cfg", str(CONFIGS / "cifar100" / "kd.yaml")]
    with pytest.raises(SystemExit, match=r"SOLVER\.LRR.*nearest: SOLVER\.LR"):
        main([*cifar, "SOLVER.LRR", "1"])
    with pytest.raises(
        SystemExit, match=r"TEACHER\.WEIGHTS: .*none\.pth.*vanilla\.yaml DISTILLER\.STUDENT digits_teacher"
    ):
        main([*KD, *tiny_words(tmp_path, tmp_path / "none.pth")])
    with pytest.raises(SystemExit, match=r"--seeds: expected --cfg"):
        main(["--seeds", "1", "2"])
    with pytest.raises(SystemExit, match="NonFiniteLoss: expected a finite loss"):
        main([*KD, *tiny_words(tmp_path, teacher, "SOLVER.LR", "1e30")])


def test_no_dataset_means_words(tmp_path):
    folder = ["DATASET.TYPE", "imagefolder", "DATASET.ROOT", str(tmp_path / "none"), "LOG.PREFIX", str(tmp_path)]
    with pytest.raises(SystemExit, match="expected the folder train in"):
        main(["--cfg", str(CONFIGS / "cifar100" / "vanilla.yaml"), *folder])
    assert not list(tmp_path.iterdir())  # a run that never began leaves nothing


def test_an_image_folder_trains_with_cifar_models(tmp_path):
    pil = pytest.importorskip("PIL.Image", reason="torchvision brings it")
    generator = torch.Generator().manual_seed(0)
    for split, count in {"train": 12, "test": 4}.items():
        for label in range(3):
            (tmp_path / "data" / split / f"class{label}").mkdir(parents=True)
            for number in range(count):
                pixels = (
                    torch.randint(60, (32, 32, 3), generator=generator) + 90 * torch.eye(3, dtype=torch.int64)[label]
                )
                image = pil.fromarray(pixels.to(torch.uint8).numpy())
                image.save(tmp_path / "data" / split / f"class{label}" / f"{number}.png")
    words = ["DATASET.TYPE", "imagefolder", "DATASET.ROOT", str(tmp_path / "data"), "DATASET.NUM_WORKERS", "0"]
    words += [
        "SOLVER.BATCH_SIZE",
        "12",
        "SOLVER.EPOCHS",
        "3",
        "DISTILLER.STUDENT",
        "resnet8",
        "LOG.PREFIX",
        str(tmp_path),
    ]
    run = train(load_config(CONFIGS / "cifar100" / "vanilla.yaml", words), CPU, quiet=True)
    assert run.history[-1]["train_top1"] > 60  # of three classes that differ in their colour
    assert "resnet8: 77" in describe(run.config)  # parameters for three classes, counted from the folder
