"""The command without arguments: the digits demo, from any folder."""

import json
import subprocess
import sys

import pytest
import torch
from train_cases import CONFIGS, CPU, RUN, one_thread_fixture  # noqa: F401

from train.assembly import make_loaders
from train.config import load_config
from train.demo import PoorTraining


def test_the_demo_runs_from_anywhere(tmp_path):
    command = [sys.executable, str(RUN), "LOG.PREFIX", "results", "SOLVER.EPOCHS", "1", "SOLVER.BATCH_SIZE", "256"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "results" / "digits"
    facts = json.loads((folder / "results.json").read_text())
    assert [method["method"] for method in facts["methods"]] == ["CE", "KD", "Sort-KD"]
    for method in facts["methods"]:
        assert method["seeds"] == [1, 2, 3, 4, 5] and len(method["last"]["values"]) == 5
        mean, deviation = method["last"]["mean"], method["last"]["std"]
        assert f"{mean:.2f} ± {deviation:.2f}" in done.stdout
        assert (method["corrected"] > 0.01) == (method["method"] == "Sort-KD")
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "images/s" in done.stderr and "corrected" in done.stderr


def test_poor_training_sees_few_images_and_wrong_labels():
    loaders = make_loaders(load_config(CONFIGS / "digits" / "teacher.yaml"), CPU)
    truth = loaders.train.labels
    poor = PoorTraining(loaders.train, 10, keep=0.3, noise=0.5, seed=0)
    epochs = []
    for epoch in (1, 2):
        poor.set_epoch(epoch)
        batches = list(poor)
        index = torch.cat([batch.index for batch in batches])
        labels = torch.cat([batch.labels for batch in batches])
        assert len(index) == poor.samples == len(index.unique()) and len(batches) == len(poor)
        # Half of the labels are drawn anew, a tenth of them rightly.
        assert (labels != truth[index]).float().mean().item() == pytest.approx(0.45, abs=0.08)
        epochs.append(dict(zip(index.tolist(), labels.tolist(), strict=True)))
    assert epochs[0] == epochs[1] and 0.25 < poor.samples / len(truth) < 0.35  # the same every epoch
