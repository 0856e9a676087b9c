"""`python -m sortkd_kernels`: the report that a user pastes into an issue."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sortkd_kernels

ROOT = Path(sortkd_kernels.__file__).parent.parent


def test_the_report_of_this_machine(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    # As on a terminal that can print nothing but ASCII.
    environment |= {"PYTHONIOENCODING": "ascii", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "sortkd_kernels"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stdout
    assert f"sortkd_kernels {sortkd_kernels.__version__}\n" in text and f"torch {torch.__version__}" in text
    native = sortkd_kernels.available_backends()["native"].available
    assert f"default backend {'native' if native else 'reference'}" in text
    for fact, value in sortkd_kernels.build_info().items():
        assert f"{fact} {value}" in text
    for name in ("native", "triton", "reference"):
        assert re.search(rf"^  {name} +(not )?available: .+", text, re.MULTILINE)
    tested = re.findall(r"^  (\w+) +on cpu: ok, relative error ([\d.e-]+), first call \d+ ms$", text, re.MULTILINE)
    assert [name for name, _ in tested] == ["native", "reference"][not native :]
    # The backend computes in float32 what the expectation has in float64, so an error of 0 would mean that it did not.
    assert all(0 < float(error) < 1e-5 for _, error in tested)


@pytest.mark.parametrize(("fault", "finding"), [("wrong", "WRONG, relative error"), ("raises", "FAILED, RuntimeError")])
def test_a_broken_backend_is_a_finding(fault, finding, monkeypatch):
    module = importlib.import_module("sortkd_kernels.__main__")

    def broken(student, *arguments, **options):
        loss = sortkd_kernels.fused_sort_kd(student, *arguments, **options)
        if student.dtype == torch.float64:  # what the others are compared with
            return loss
        if fault == "raises":
            raise RuntimeError("no kernel image")
        return loss * 1.001

    monkeypatch.setattr(module, "fused_sort_kd", broken)
    text, passed = module.report()
    assert not passed and f"reference on cpu: {finding}" in text
