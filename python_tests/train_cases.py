"""What the trainer's tests share: tiny runs on the digits, which need no files, and a teacher for them."""

from pathlib import Path

import pytest

for _library in ("pydantic", "sklearn", "tensorboard", "torchvision", "tqdm", "yaml"):
    pytest.importorskip(_library, reason="the train extra is not installed")

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from train.assembly import make_loaders  # noqa: E402
from train.checkpoint import read  # noqa: E402
from train.config import load_config  # noqa: E402
from train.distributed import World  # noqa: E402
from train.models import build_model  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "train" / "configs"
RUN = ROOT / "train" / "run.py"
CPU = World(torch.device("cpu"))

# Six steps an epoch, the last of 17 images; one thread, because two wait for each other on images this small.
TINY = ["EXPERIMENT.THREADS", "1", "SOLVER.BATCH_SIZE", "256", "SOLVER.EPOCHS", "2", "LOG.TENSORBOARD_FREQ", "2"]


# Fixtures have another name than their functions, which test files import: an argument would shadow the import.
@pytest.fixture(autouse=True, name="one_thread")
def one_thread_fixture():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", name="teacher")
def teacher_fixture(tmp_path_factory):
    """The file of a digits teacher that is wrong on part of the training images."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    loaders = make_loaders(load_config(CONFIGS / "digits" / "vanilla.yaml"), CPU)
    model = build_model("digits_teacher", 10, dataset="digits")
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for batch in loaders.train:
        optimizer.zero_grad()
        F.cross_entropy(model(batch.images), batch.labels).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save({"model": model.state_dict()}, path)
    return path


def tiny_words(folder, teacher, *overrides):
    """The overrides of a tiny run with files in `folder`."""
    return [*TINY, "LOG.PREFIX", str(folder), "TEACHER.WEIGHTS", str(teacher), *overrides]


def tiny(folder, teacher, *overrides, method="kd"):
    """The configuration of a tiny run with files in `folder`."""
    return load_config(CONFIGS / "digits" / f"{method}.yaml", tiny_words(folder, teacher, *overrides))


def final_state(folder):
    """What the newest checkpoint of a run folder holds."""
    return read(max((folder / "checkpoints").glob("epoch_*.pth")))


def assert_same_state(left, right):
    """Bit for bit the same weights, momentum and temperature, at the same place of the schedule."""
    for part in ("model", "temperature"):
        torch.testing.assert_close(dict(left[part]), dict(right[part]), rtol=0, atol=0)
    torch.testing.assert_close(left["optimizer"]["state"], right["optimizer"]["state"], rtol=0, atol=0)
    for part in ("epoch", "schedule", "scaler"):
        assert left[part] == right[part]


def learning(history):
    """The rows of a history without what depends on the clock."""
    return [{name: row[name] for name in row if name not in ("seconds", "images_per_s")} for row in history]
