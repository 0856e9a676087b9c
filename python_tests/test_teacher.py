"""The frozen teacher stays frozen; its cache holds what it would say, and nothing else is ever read from it."""

import os
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("torchvision", reason="the train extra is not installed")
from PIL import Image

from train.data import build_loaders
from train.teacher import CachedTeacher, FrozenTeacher, build_teacher, state_digest

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
# Half precision keeps 11 bits: a logit is off by at most 2^-11 of itself, or below 6e-5 by half a subnormal step.
HALF = {"rtol": 2**-11, "atol": 2**-25}


class Net(nn.Module):
    """A few weights, with BatchNorm, for 8 x 8 images of any number of channels; counts its calls."""

    def __init__(self, num_classes=3, seed=0, width=4):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.LazyConv2d(width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.LazyLinear(num_classes)
            )
            self.body(torch.zeros(2, 3, 8, 8))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.body(x)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("tree"), np.random.default_rng(0)
    for split, each in (("train", 7), ("test", 2)):
        for name in "abc":
            (root / split / name).mkdir(parents=True)
            for i in range(each):
                image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                image.save(root / split / name / f"{i}.png")
    return root


def loaders_of(tree, dataset="imagefolder", **changes):
    options = dict(batch_size=5, test_batch_size=5, num_workers=0, device=CPU, seed=3, views=2)
    return build_loaders(dataset, tree, **{**options, **changes})


def build(model, loaders, cache_dir, **changes):
    options = dict(weights_digest=state_digest(model), views=loaders.train.views, cache_dir=cache_dir)
    return build_teacher(model, loaders, **{**options, **changes})


def assert_cache_is_the_teacher(cached, model, loaders, epochs=3):
    live = FrozenTeacher(model)
    for epoch in range(epochs):
        loaders.train.set_epoch(epoch)
        for batch in loaders.train:
            logits = cached.rows(batch.view, batch.index).float()
            assert logits.dtype == torch.float32
            torch.testing.assert_close(logits, live.logits(batch.images), **HALF)
    # Served with the images, it says the same.
    loaders.train.use_cache(cached.rows, logits.shape[1])
    for part in loaders.train.parts():
        images, _, served = loaders.train.read(len(part.index))
        torch.testing.assert_close(served.float(), live.logits(images), **HALF)


@pytest.fixture(autouse=True)
def _no_warning():
    """A warning is a rejected cache: where one is due, the test says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # ours; torchvision deprecates its decoder
        yield


# -- run at every step -------------------------------------------------------------------------------------------------


def test_frozen_for_good(tree):
    model, loaders = Net(), loaders_of(tree)
    before = state_digest(model)
    teacher = build(model, loaders_of(tree, views=0), "unused")
    assert isinstance(teacher, FrozenTeacher)
    nn.Sequential(teacher).train()  # as a distiller that holds it would
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    for batch in loaders.train:
        teacher.logits(batch.images)
    assert state_digest(model) == before, "the running statistics moved"


def test_logits_serve_any_loss(tree):
    """Autograd may save them for a backward pass, which it would refuse for tensors made in inference mode."""
    batch = next(iter(loaders_of(tree).train))
    teacher = FrozenTeacher(Net()).logits(batch.images)
    assert not teacher.is_inference() and not teacher.requires_grad
    student = torch.zeros_like(teacher, requires_grad=True)
    F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean").backward()
    torch.testing.assert_close(student.grad * len(teacher), student.detach().softmax(1) - teacher.softmax(1))


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2**-7), (torch.float16, 2**-9)])
def test_amp(tree, dtype, tolerance):
    """Two layers, each rounded to `dtype`: within two of its steps of the largest logit."""
    batch = next(iter(loaders_of(tree).train))
    exact = FrozenTeacher(Net()).logits(batch.images)
    rough = FrozenTeacher(Net(), amp_dtype=dtype).logits(batch.images)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0, atol=2 * tolerance * exact.abs().max().item())


def test_switches(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    teachers = FrozenTeacher(Net(), compile=True), FrozenTeacher(Net(), channels_last=False)
    assert compiled == [teachers[0].model]
    assert teachers[0].model.body[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert teachers[1].model.body[0].weight.is_contiguous()


# -- cached ------------------------------------------------------------------------------------------------------------


def test_cache_says_what_the_teacher_says(tree, tmp_path):
    model, loaders = Net(), loaders_of(tree, views=3)
    cached = build(model, loaders, tmp_path)
    assert isinstance(cached, CachedTeacher)
    assert_cache_is_the_teacher(cached, model, loaders, epochs=4)
    assert cached.path.stat().st_size == 4096 + 3 * 21 * 3 * 2


def test_cache_of_streamed_images(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in "abc":
            (tmp_path / split / name).mkdir(parents=True)
            image = Image.fromarray(rng.integers(0, 256, (70, 90, 3), dtype=np.uint8))
            image.save(tmp_path / split / name / "0.jpg")
    model = nn.Sequential(nn.AvgPool2d(28), nn.Flatten(), nn.Linear(192, 3))
    loaders = loaders_of(tmp_path, "imagenet", batch_size=2)
    assert_cache_is_the_teacher(build(model, loaders, tmp_path / "cache"), model, loaders)


def test_cache_is_reused_by_ranks_and_runs(tree, tmp_path):
    first = build(Net(), loaders_of(tree), tmp_path)
    model = Net()
    # another run's seed, batch size and rank, on the same fixed views
    other = loaders_of(tree, seed=8, view_seed=3, batch_size=4, rank=1, world_size=2)
    second = build(model, other, tmp_path)
    assert model.calls == 0 and second.path == first.path
    assert_cache_is_the_teacher(second, model, other)


def test_one_of_many_builds(tree, tmp_path):
    models, loaders, built = [Net() for _ in range(4)], [loaders_of(tree) for _ in range(4)], []

    def run(i):
        built.append(build(models[i], loaders[i], tmp_path))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(built) == 4 and sorted(m.calls for m in models) == [0, 0, 0, 2]


STALE = {
    "weights_digest": dict(model=dict(seed=1)),
    "view_seed": dict(data=dict(view_seed=4)),
    "views": dict(data=dict(views=3)),
    "amp_dtype": dict(teacher=dict(amp_dtype=torch.bfloat16)),
    "augmentation": dict(data=dict(dataset="cifar100")),  # the same images, normalised by other numbers
}


@pytest.mark.parametrize("field", STALE)
def test_stale_cache_is_not_used(tree, tmp_path, field):
    old = build(Net(), loaders_of(tree), tmp_path)
    change = STALE[field]
    model, loaders = Net(**change.get("model", {})), loaders_of(tree, **change.get("data", {}))
    with pytest.warns(UserWarning, match=rf"not used: {old.path.name} \(.*{field}: expected .*, got "):
        new = build(model, loaders, tmp_path, **change.get("teacher", {}))
    assert new.path != old.path and model.calls
    if field != "amp_dtype":
        assert_cache_is_the_teacher(new, model, loaders)
    # Under this run's own name it is refused as well.
    new.path.write_bytes(old.path.read_bytes())
    with pytest.warns(UserWarning, match=f"is of another run: .*{field}: expected .*, got .*built again"):
        build(model, loaders, tmp_path, **change.get("teacher", {}))


def test_changed_images_are_noticed(tree, tmp_path):
    digest = loaders_of(tree).train.data_digest()
    other = loaders_of(tree)
    other.train.data.images[20, 7, 7, 2] ^= 1
    assert other.train.data_digest() != digest
    streamed = loaders_of(tree, "imagenet").train
    before, path = streamed.data_digest(), streamed.listing.path(4)
    content = path.read_bytes()
    path.write_bytes(content + b" ")
    assert streamed.data_digest() != before
    path.write_bytes(content)


DAMAGE = {
    "truncated": (lambda b: b[:-7], r"expected 4348 bytes, got 4341"),
    "longer": (lambda b: b + b"\0", r"expected 4348 bytes, got 4349"),
    "a bit flipped": (lambda b: b[:-50] + bytes([b[-50] ^ 1]) + b[-49:], "expected checksum"),
    "zeros for logits": (lambda b: b[:4096] + bytes(len(b) - 4096), "expected checksum"),
    "half a header": (lambda b: b[:100], "its header cannot be read"),
    "empty": (lambda b: b"", "is not a teacher cache"),
    "another file": (lambda b: b"PK" + b[2:], "is not a teacher cache"),
    "no key": (lambda b: b[:24] + b"{}".ljust(4072) + b[4096:], "its header cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_cache_is_built_again(tree, tmp_path, kind):
    loaders = loaders_of(tree)
    path = build(Net(), loaders, tmp_path).path
    damage, words = DAMAGE[kind]
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    model = Net()
    with pytest.warns(UserWarning, match=f"{words}.*Not used: it is built again"):
        cached = build(model, loaders, tmp_path)
    assert model.calls and path.read_bytes() == whole
    assert_cache_is_the_teacher(cached, model, loaders)


KILLED = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from test_teacher import Net, build, loaders_of
class Slow(Net):
    def forward(self, x):
        if self.calls:  # the first view is written, the second is not
            print("filling", flush=True)
            time.sleep(600)
        return super().forward(x)
model = Slow()
model.__class__.__name__ = "Net"
build(model, loaders_of({tree!r}), {cache!r})
"""


def test_killed_while_filling(tree, tmp_path):
    """kill -9 leaves no cache, no lock, and nothing that the next run stumbles over."""
    code = KILLED.format(root=str(ROOT), tests=str(Path(__file__).parent), tree=str(tree), cache=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        line = process.stdout.readline()
        assert line == b"filling\n", process.stderr.read().decode()
        os.kill(process.pid, signal.SIGKILL)
    assert not list(tmp_path.glob("*.logits"))
    assert list(tmp_path.glob("*.tmp")), "it was killed before it wrote anything"
    model, loaders = Net(), loaders_of(tree)
    cached = build(model, loaders, tmp_path)
    assert not list(tmp_path.glob("*.tmp"))
    assert_cache_is_the_teacher(cached, model, loaders)


# -- refusals, in words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["nan", "too large", "classes"])
def test_logits_that_cannot_be_cached(tree, tmp_path, fault):
    model = Net(num_classes=4 if fault == "classes" else 3)
    with torch.no_grad():
        model.body[-1].bias[0] += {"nan": torch.nan, "too large": 1e6, "classes": 0}[fault]
    words = "expected logits of 3 classes.*got .*4" if fault == "classes" else "finite logits that float16 holds"
    with pytest.raises(ValueError, match=words):
        build(model, loaders_of(tree), tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".lock"]


def test_views_must_agree(tree, tmp_path):
    with pytest.raises(ValueError, match="expected the loaders' number of views, 2, got 3"):
        build(Net(), loaders_of(tree), tmp_path, views=3)
    cached = build(Net(), loaders_of(tree), tmp_path)
    with pytest.raises(ValueError, match="expected a loader of fixed views, got one that augments afresh"):
        loaders_of(tree, views=0).train.use_cache(cached.rows, 3)


def test_full_disk(tree, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    with pytest.raises(OSError, match=r"2 views of 21 images, got 0\.0 GiB; use fewer views or another folder"):
        build(Net(), loaders_of(tree), tmp_path)
