"""Each example runs as its reader would run it and prints what it claims; the pages that show them are made."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sortkd_kernels
from sortkd_kernels import fused_sort_kd

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "train" / "examples"
FALL = r"loss (?:a token )?([\d.]+) -> ([\d.]+)"
# Each example, the library that it plugs into, and the rest of what it prints after the losses.
CLAIMS = {
    "plain_pytorch": ("torch", r", [\d.]+% of rows corrected"),
    "huggingface_trainer": ("transformers", ""),
    "lightning_module": ("lightning", r", \d+ tensors of the student saved"),
    "mdistiller_distillers": ("torch", ""),
    "timm_distillation": ("timm", ""),
    "topk_teacher": ("numpy", r", a file of 1/[\d.]+ of the logits, [1-9][\d.]*% of labels outside the 64"),
    "vocab_parallel": ("torch", r", 2 ranks of \[101, 100\] classes"),
}
# What starts an example that is more than one process.
LAUNCHERS = {"vocab_parallel": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")}


def need(library, extra="examples"):
    # Not importorskip: some of these take seconds to import, and the subprocess imports them anyway.
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"the {extra} extra is not installed: no {library}")


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(CLAIMS)
    shown = re.findall(r"literalinclude:: \.\./train/examples/(\w+)\.py", (ROOT / "docs" / "tutorials.rst").read_text())
    assert sorted(shown) == sorted(CLAIMS)


def test_the_pages_are_made_without_a_warning(tmp_path):
    """Every public name has its entry, every reference its target, and the mathematics is rendered."""
    need("sphinx", "docs")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "api.html").read_text()
    for name in sortkd_kernels.__all__:
        assert f'id="sortkd_kernels.{name}"' in api, f"{name} is not in docs/api.rst"
    assert '<div class="math notranslate nohighlight">' in (tmp_path / "mathematics.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", CLAIMS)
def test_example(name, tmp_path):
    library, rest = CLAIMS[name]
    need(library)
    # From a foreign folder, so that only what is installed or on the path is found; one thread and no network.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, *LAUNCHERS.get(name, ()), EXAMPLES / f"{name}.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    # torch's gloo now and then aborts a rank on its way out, on a busy machine: after the result, which is looked for here.
    assert done.returncode == 0 or "terminate called without an active exception" in done.stderr, done.stderr
    claim = re.fullmatch(f"{name}: {FALL}{rest}\n", done.stdout)
    assert claim, done.stdout
    before, after = map(float, claim.groups())
    # Far more than noise: a loss that only drifts downwards is no sign that the student learns.
    assert 0 < after < 0.8 * before
    assert not any(tmp_path.iterdir()), "an example leaves files in the folder where it was started"


@pytest.mark.parametrize("accumulation", [1, 4])
def test_trainer_accumulates_the_gradient_of_one_batch(accumulation, tmp_path):
    """One step of SGD over 16 rows of unequal length moves the weights by the gradient of the mean over all tokens."""
    need("transformers")
    spec = importlib.util.spec_from_file_location("huggingface_trainer", EXAMPLES / "huggingface_trainer.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    torch.manual_seed(0)
    data, student, teacher = example.made_data(16), example.tiny_llama(32), example.tiny_llama(64)
    start = {name: value.detach().clone() for name, value in student.named_parameters()}

    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    labels = batch.pop("labels")
    with torch.no_grad():
        expected_teacher = teacher(**batch).logits[:, :-1]
    # The plain way: logits sliced, the mean over everything, the reference formula.
    fused_sort_kd(
        student(**batch).logits[:, :-1], expected_teacher, labels[:, 1:], temperature=2.0, ce_weight=0.5, kd_weight=0.5,
        backend="reference",
    ).backward()  # fmt: skip
    expected = {name: value.grad for name, value in student.named_parameters()}
    student.zero_grad()

    arguments = example.TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=16 // accumulation, learning_rate=1.0, optim="sgd",
        gradient_accumulation_steps=accumulation, lr_scheduler_type="constant", max_grad_norm=0.0, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    example.SortKDTrainer(student, arguments, train_dataset=data, teacher=teacher).train()
    for name, value in student.named_parameters():
        # Weights of size 1e-1 in float32 resolve a step of 1e-3 to 1e-5 of itself; the sums' order differs as well.
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(start[name] - value, expected[name], rtol=1e-4, atol=1e-4 * scale + 1e-7, msg=name)
