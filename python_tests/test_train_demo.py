"""The command without arguments: the digits demo, from any folder."""

import json
import statistics
import subprocess
import sys

import pytest
import torch
from train_cases import CONFIGS, CPU, RUN, one_thread_fixture  # noqa: F401

from train.assembly import make_loaders
from train.config import load_config
from train.demo import NoisyLoader


@pytest.mark.slow
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
    ce, kd, sort_kd = (method["last"]["values"] for method in facts["methods"])
    for name, ours, theirs in (("KD against CE", kd, ce), ("Sort-KD against KD", sort_kd, kd)):
        gains = [a - b for a, b in zip(ours, theirs, strict=True)]
        mean, error = statistics.fmean(gains), statistics.stdev(gains) / 5**0.5
        ahead = sum(gain > 0 for gain in gains)
        assert (
            f"\n{name}: {mean:+.2f} ± {error:.2f} points (mean and standard error), ahead on {ahead} of" in done.stdout
        )
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "images/s" in done.stderr and "corrected" in done.stderr


def test_a_student_sees_the_same_few_images_each_time_under_new_noise():
    loader = make_loaders(load_config(CONFIGS / "digits" / "kd.yaml", ["SOLVER.BATCH_SIZE", "50"]), CPU).train
    everything = torch.cat([batch.images for batch in loader])  # the seed's order
    labels = torch.cat([batch.labels for batch in loader])
    few = NoisyLoader(loader, 128, 5)
    seen = []
    for epoch in (1, 2, 1):
        few.set_epoch(epoch)
        seen.append(list(few))
        assert sum(len(batch.labels) for batch in seen[-1]) == 5 * 128
    for first, second, again in zip(*seen, strict=True):
        assert torch.equal(first.images, again.images) and torch.equal(first.index, again.index)
        assert not torch.equal(first.images, second.images)
    views = torch.cat([batch.images for batch in seen[0]]).flatten(1)
    images = torch.cat([batch.index for batch in seen[0]]) % 128
    means = torch.stack([views[images == image].mean(0) for image in range(128)])
    noise = torch.cat([views[images == image] - means[image] for image in range(128)])
    # Five draws about their mean, 40,960 values: a deviation of sqrt(4/5), to within 1 %.
    assert noise.std().item() == pytest.approx(0.8**0.5, rel=0.01)
    # The mean of the views of an image is nearest to the image itself, and the labels came with it.
    nearest = torch.cdist(means, everything.flatten(1)).argmin(1)
    assert len(nearest.unique()) == 128
    few_labels = torch.cat([batch.labels for batch in seen[0]])
    assert all((few_labels[images == image] == labels[nearest[image]]).all() for image in range(128))
