"""Which backend a call uses, what is said where one is missing, and what importing the package does not do."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from simt import build

import sortkd_kernels
from sortkd_kernels import backends

PACKAGE = Path(sortkd_kernels.__file__).parent


# As where no compiler was found, and as where PyTorch brings no triton. (A copy of the package without the compiled file
# would not do: the finder of an editable install looks for it in the checkout.)
NO_EXTENSION = "import sys; sys.modules['sortkd_kernels._C'] = None\n"
NO_TRITON = "import sys; sys.modules['triton'] = None\n"


def python(code: str) -> subprocess.CompletedProcess:
    """Run ``code`` in a fresh interpreter, without Triton's own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment | {"PYTHONPATH": str(PACKAGE.parent)}, cwd=PACKAGE.parent,
        text=True, capture_output=True, timeout=300,
    )  # fmt: skip


def check_in(code: str) -> str:
    done = python(code)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


USE_EVERYTHING = """
import torch, sortkd_kernels as k
s, t, y = torch.randn(6, 9, requires_grad=True), torch.randn(6, 9), torch.arange(6)
losses = [
    k.fused_sort_kd(s, t, y, return_parts=True).loss,
    k.fused_sort_dkd(s, t, y, ce_weight=0.1, standardize=True),
    k.fused_sort_kd_topk(s * 1, *t.topk(3), y, inplace=True),
    k.SortKDLoss()(s, t, y, temperature=k.LearnedTemperature()()),
    k.SortDKDLoss()(s, t, y),
]
sum(losses).backward()
assert s.grad.isfinite().all() and all(loss > 0 for loss in losses)
assert k.sort_logits(t, y)[torch.arange(6), y].equal(t.amax(-1))
"""


def test_states():
    states = sortkd_kernels.available_backends()
    assert list(states) == ["native", "triton", "reference"]
    for state in states.values():
        assert isinstance(state, sortkd_kernels.BackendState)
        assert state.reason
        assert bool(state.devices) == state.available
    states.clear()
    assert sortkd_kernels.available_backends()


@pytest.mark.skipif(sys.platform != "linux", reason="the SIMT harness and triton are for Linux")
def test_every_backend_is_tested():
    """One that is missing would leave the tables of cases.py without a word. SORTKD_TEST_WITHOUT names what is not wanted."""
    missing = {name: state.reason for name, state in sortkd_kernels.available_backends().items() if not state.devices}
    missing |= {"simt": build.missing()} if build.missing() else {}
    unwanted = os.environ.get("SORTKD_TEST_WITHOUT", "").split(",")
    assert {name: reason for name, reason in missing.items() if name not in unwanted} == {}


def test_build_info():
    info = sortkd_kernels.build_info()
    assert info["cpu_capability"] in info["cpu_capabilities"]
    assert info["cpu_capabilities"][0] == "baseline"
    assert info["cuda"] is False or all(architecture.startswith("sm_") for architecture in info["cuda"])
    assert info["compiler"]
    # ATen's own choice of an instruction set, so ATEN_CPU_CAPABILITY overrides both.
    aten = {"DEFAULT": "baseline", "NO AVX": "baseline"}.get(
        name := torch.backends.cpu.get_cpu_capability(), name.lower()
    )
    assert info["cpu_capability"] == (aten if aten in info["cpu_capabilities"] else "baseline")


def test_the_default_on_a_cpu_is_native():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose("fn", None, torch.device("cpu")) == "native"


def test_a_named_backend_never_falls_back():
    """An error with the reason, on the device where it cannot run."""
    student = torch.randn(2, 3, device="meta")
    target = torch.zeros(2, dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError, match="fused_sort_kd: backend 'native' cannot run on meta: it runs on cpu"):
        sortkd_kernels.fused_sort_kd(student, student, target, backend="native")
    with pytest.raises(RuntimeError, match="sort_logits: backend 'native' cannot run on meta: it runs on cpu"):
        sortkd_kernels.sort_logits(student, target, backend="native")


def test_triton_on_a_cpu_says_what_it_needs():
    """Without the interpreter's variable it runs on cuda, and says so."""
    out = check_in(
        "import torch, sortkd_kernels as k\n"
        "t, y = torch.randn(2, 3), torch.zeros(2, dtype=torch.int64)\n"
        "for function, logits in ((k.fused_sort_kd, (t, t)), (k.sort_logits, (t,))):\n"
        "    try: function(*logits, y, backend='triton')\n"
        "    except RuntimeError as error: print(error)\n"
        "print(k.available_backends()['triton'].devices)\n"
        "k.fused_sort_kd(t, t, y)\n"
    ).splitlines()
    assert out == [
        "fused_sort_kd: backend 'triton' cannot run on cpu: it runs on cuda",
        "sort_logits: backend 'triton' cannot run on cpu: it runs on cuda",
        "('cuda',)",
    ]


def test_the_fallback_warns_once_for_a_device():
    """A device that no compiled backend serves: the reference, with one warning that says why."""
    backends._WARNED.clear()
    student = torch.randn(2, 3, device="meta")
    target = torch.zeros(2, dtype=torch.int64, device="meta")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            loss = sortkd_kernels.fused_sort_kd(student, student, target)
            sortkd_kernels.sort_logits(student, target)
    assert loss.device.type == "meta"
    messages = [str(w.message) for w in caught if "sortkd_kernels" in str(w.message)]
    assert messages == [
        f"sortkd_kernels: no compiled backend for meta (it runs on {', '.join(backends._STATES['native'].devices)}); "
        "using the PyTorch reference, which is correct and slow"
    ]


def test_without_the_extension():
    """Everything works on the reference, with one warning; `native` by name raises with the reason."""
    done = python(
        NO_EXTENSION + USE_EVERYTHING + "assert k.build_info() == {}\n"
        "state = k.available_backends()['native']\n"
        "assert not state.available and 'the compiled extension is not there' in state.reason, state\n"
        "try: k.fused_sort_kd(s, t, y, backend='native')\n"
        "except RuntimeError as error: print(error)\n"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    words = "fused_sort_kd: backend 'native' cannot run on cpu: the compiled extension is not there ("
    assert done.stdout.startswith(words)
    assert done.stderr.count("no compiled backend for cpu") == 1
    assert "using the PyTorch reference, which is correct and slow" in done.stderr


def test_without_the_extension_under_compile():
    check_in(
        NO_EXTENSION + "import torch, sortkd_kernels as k\n"
        "s, t, y = torch.randn(6, 9, requires_grad=True), torch.randn(6, 9), torch.arange(6)\n"
        "f = torch.compile(lambda s: k.fused_sort_kd(s, t, y, temperature=2.0), fullgraph=True, backend='aot_eager')\n"
        "torch.testing.assert_close(f(s), k.fused_sort_kd(s, t, y, temperature=2.0))\n"
    )


def test_without_triton():
    check_in(
        NO_TRITON + USE_EVERYTHING + "assert k.build_info()\n"
        "state = k.available_backends()['triton']\n"
        "assert not state.available and state.reason == 'triton is not installed', state\n"
        "try: k.fused_sort_kd(s, t, y, backend='triton')\n"
        "except RuntimeError as error: assert str(error).endswith('cannot run on cpu: triton is not installed')\n"
        "else: raise AssertionError\n"
    )


def test_with_a_triton_that_is_too_old(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # also where there is none
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.7.1+cu126"))
    state = backends._triton_state()
    assert not state.available and state.reason.endswith("or newer; this is torch 2.7.1+cu126")


def test_without_both():
    check_in(NO_EXTENSION + NO_TRITON + USE_EVERYTHING)


def test_importing_compiles_nothing_and_starts_no_device():
    check_in(
        "import sys, torch\n"
        "started, events = [], ('subprocess.Popen', 'os.exec')\n"
        "sys.addaudithook(lambda event, _: started.append(event) if event in events else None)\n"
        "import sortkd_kernels\n"
        "assert not started, started\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = {'triton', 'torch.utils.cpp_extension', 'torch._inductor'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )


def test_the_name_is_module_and_function():
    assert importlib.import_module("sortkd_kernels.fused_sort_kd").fused_sort_kd is sortkd_kernels.fused_sort_kd
    out = check_in(
        "import sortkd_kernels.fused_sort_kd\n"
        "from sortkd_kernels.fused_sort_kd import SortKDOutput\n"
        "assert callable(sortkd_kernels.fused_sort_kd)\n"
        "assert sortkd_kernels.SortKDOutput is SortKDOutput\n"
    )
    assert out == ""


def test_public_signatures():
    """The names and defaults that the documents promise."""

    def defaults(function):
        return {
            name: p.default for name, p in inspect.signature(function).parameters.items() if p.default is not p.empty
        }

    common = dict(correction="sort", ce_weight=0.0, kd_weight=1.0, reduction="mean", denominator=None, row_weight=None, ignore_index=-100, backend=None, return_parts=False)  # fmt: skip
    dense = common | dict(temperature=4.0, standardize=False, class_dim=-1, inplace=False, process_group=None)
    assert defaults(sortkd_kernels.fused_sort_kd) == dense
    assert defaults(sortkd_kernels.fused_sort_dkd) == dense | dict(alpha=1.0, beta=8.0)
    assert defaults(sortkd_kernels.fused_sort_kd_topk) == common | dict(
        temperature=4.0, tail="renormalize", inplace=False
    )
    assert defaults(sortkd_kernels.sort_logits) == dict(correction="sort", ignore_index=-100, backend=None)
    assert defaults(sortkd_kernels.SortKDLoss) == dict(temperature=4.0, correction="sort", ce_weight=0.1, kd_weight=0.9)
    assert sortkd_kernels.SortKDOutput._fields == ("loss", "kd", "ce", "rank")
    assert (PACKAGE / "py.typed").exists()
    assert sorted(sortkd_kernels.__all__) == sortkd_kernels.__all__
    for name in sortkd_kernels.__all__:
        assert getattr(sortkd_kernels, name).__doc__
