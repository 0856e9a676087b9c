"""The data sets: where their images come from, that they arrive whole, and what is said when they are missing."""

import hashlib
import pickle
import shutil
from urllib.error import URLError

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision", reason="the train extra is not installed")
from PIL import Image
from test_data import CLOSE, build, epoch_of, make_tree, same, stacked
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms import functional as TF

from train.data.sources import CIFAR10_MEAN, CIFAR10_STD, CIFAR_MEAN, CIFAR_STD


@pytest.fixture(scope="module")
def small_tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("small"), [(32, 32)], each=9)


# -- data sets ---------------------------------------------------------------------------------------------------------


def test_small_tree_in_memory(small_tree):
    loaders = build("cifar100", small_tree)
    assert (loaders.num_classes, loaders.image_shape, loaders.train.samples) == (3, (3, 32, 32), 27)
    images, labels = stacked(epoch_of(loaders.test))
    assert torch.equal(labels, torch.arange(3).repeat_interleave(9))
    expected = TF.to_tensor(Image.open(small_tree / "test" / "bee" / "2.png"))
    torch.testing.assert_close(images[9 + 2], TF.normalize(expected, CIFAR_MEAN, CIFAR_STD), **CLOSE)
    assert loaders.test.data.images.dtype == torch.uint8
    own = build("imagefolder", small_tree)  # in memory too, normalised by its own statistics
    pixels = own.train.data.images.double() / 255
    torch.testing.assert_close(torch.tensor(own.train.data.mean).double(), pixels.mean((0, 1, 2)), rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor(own.train.data.std).double(), pixels.std((0, 1, 2)), rtol=0, atol=1e-4)


def test_imagefolder_of_large_images_is_streamed(tmp_path):
    assert build("imagefolder", make_tree(tmp_path, [(65, 30)])).image_shape == (3, 224, 224)


def test_imagenets_unlabelled_test_folder_is_not_used(tmp_path):
    root = make_tree(tmp_path, [(65, 30)], splits=("train", "val"))
    (root / "test").mkdir()
    assert build("imagenet", root).test.listing.root == root / "val"


@pytest.mark.parametrize("size", [32, 65], ids=["in memory", "streamed"])
def test_what_is_hidden_is_skipped(size, tmp_path):
    """In both halves alike, where it would make a class, and within the folder of a class."""
    root = make_tree(tmp_path / ".cache", [(size, size)])  # a hidden folder above is none of the tree's
    for split in ("train", "test"):
        shutil.copytree(root / split / "ant", root / split / ".ipynb_checkpoints")
        shutil.copytree(root / split / "ant", root / split / "bee" / ".ipynb_checkpoints")
        (root / split / "cat" / "._0.png").write_bytes(b"what another system keeps beside a file")
    with pytest.warns(UserWarning, match=r"hidden folders and files are skipped: \._0\.png, .*\.ipynb_checkpoints"):
        loaders = build("imagefolder", root)
    assert (loaders.num_classes, loaders.train.samples, loaders.test.samples) == (3, 15, 15)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_greys_are_brought_to_8_by_their_range(suffix, tmp_path):
    """PIL's own conversion makes all of them above 255 white."""
    root, levels = make_tree(tmp_path, [(16, 16)], each=1), np.arange(256, dtype=np.uint16).reshape(16, 16)
    for split in ("train", "test"):
        (root / split / "bee" / "0.png").unlink()
        Image.fromarray(257 * levels).save(root / split / "bee" / f"0.{suffix}")
    image = build("imagefolder", root).test.data.images[1]
    assert torch.equal(image, torch.from_numpy(levels.astype(np.uint8))[..., None].expand(-1, -1, 3))


def test_a_grey_of_unknown_range_is_refused(tmp_path):
    root = make_tree(tmp_path, [(16, 16)], each=1)
    Image.fromarray(np.full((16, 16), 0.5, np.float32)).save(root / "test" / "bee" / "0.tiff")
    with pytest.raises(
        ValueError, match=r"cannot read the image \S+0\.tiff: expected 8 or 16 bits a pixel, got PIL's mode F"
    ):
        build("imagefolder", root)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_cut_off_images_are_found_without_decoding_all(suffix, tmp_path, monkeypatch):
    root = make_tree(tmp_path, [(65, 70)], suffix=suffix)
    listing = build("imagefolder", root).test.listing
    path = root / "test" / "bee" / f"3.{suffix}"
    whole, decoded = path.read_bytes(), []
    read = listing.read
    monkeypatch.setattr(listing, "read", lambda index: decoded.append(index) or read(index))
    path.write_bytes(whole + b"trailing bytes that readers ignore")
    listing.check(range(len(listing)), threads=2)
    assert sorted(decoded) == ([8] if suffix != "bmp" else list(range(15)))  # no end tells a whole BMP
    for damaged in (whole[: len(whole) // 2], b"", b"not an image"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"cannot read the image {path}: "):
            listing.check(range(len(listing)), threads=2)
        listing.check([index for index in range(len(listing)) if index != 8], threads=2)  # another rank's part


def test_official_cifar100_files(tmp_path, monkeypatch):
    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(name, entry):
        (folder / name).write_bytes(pickle.dumps(entry))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    for split, count in (("train", 30), ("test", 10)):
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        entry = {"data": pixels, "fine_labels": list(range(count))}
        monkeypatch.setattr(CIFAR100, f"{split}_list", [write(split, entry)])
    name, digest = write("meta", {"fine_label_names": [f"c{i}" for i in range(100)]})
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"filename": name, "md5": digest})
    loaders = build("cifar100", tmp_path)
    assert (loaders.num_classes, loaders.train.samples, loaders.test.samples) == (100, 30, 10)
    raw = torch.from_numpy(pixels).view(10, 3, 32, 32) / 255
    torch.testing.assert_close(stacked(epoch_of(loaders.test))[0], TF.normalize(raw, CIFAR_MEAN, CIFAR_STD), **CLOSE)


def test_official_cifar10_files(tmp_path, monkeypatch):
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 3072), dtype=np.uint8)

    def write(name, entry):
        (folder / name).write_bytes(pickle.dumps(entry))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    batches = [write(f"data_batch_{i}", {"data": pixels, "labels": [i] * 10}) for i in range(3)]
    monkeypatch.setattr(CIFAR10, "train_list", batches)
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", {"data": pixels, "labels": list(range(10))})])
    name, digest = write("batches.meta", {"label_names": [f"c{i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"filename": name, "md5": digest})
    loaders = build("cifar10", tmp_path)
    assert (loaders.num_classes, loaders.train.samples, loaders.image_shape) == (10, 30, (3, 32, 32))
    raw = torch.from_numpy(pixels).view(10, 3, 32, 32) / 255
    images, labels = stacked(epoch_of(loaders.test))
    torch.testing.assert_close(images, TF.normalize(raw, CIFAR10_MEAN, CIFAR10_STD), **CLOSE)
    assert labels.tolist() == list(range(10)) and loaders.train.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10


def test_tiny_imagenet_as_it_comes(tmp_path):
    """Its val/ has all images in one folder and their classes in a file; arranged by class it is the same data."""
    arranged = make_tree(tmp_path / "arranged", [(64, 64)], splits=("train", "val"))
    root = tmp_path / "archive"
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for number, path in enumerate(sorted((arranged / "val").rglob("*.png"), reverse=True)):
        shutil.copy(path, root / "val" / "images" / f"val_{number:02d}.png")
        lines.append(f"val_{number:02d}.png\t{path.parent.name}\t0\t0\t63\t63")
    for path in (arranged / "train").rglob("*.png"):
        (root / "train" / path.parent.name / "images").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / "train" / path.parent.name / "images" / path.name)
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    ours, theirs = build("tiny_imagenet", root), build("tiny_imagenet", arranged)
    assert (ours.num_classes, ours.image_shape) == (3, (3, 64, 64)) and ours.train.padding == 8
    assert same(epoch_of(ours.train, 1), epoch_of(theirs.train, 1))
    images, labels = stacked(epoch_of(ours.test))
    expected = stacked(epoch_of(theirs.test))
    assert torch.equal(images, expected[0].flip(0)) and torch.equal(labels, expected[1].flip(0))
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines[1:]))
    with pytest.raises(ValueError, match=r"a class of train/ for each image in \S+, got none for val_00\.png"):
        build("tiny_imagenet", root)


def test_digits():
    pytest.importorskip("sklearn")
    loaders = build("digits", "unused", batch_size=100)
    assert (loaders.num_classes, loaders.image_shape) == (10, (1, 8, 8))
    assert (loaders.train.samples, loaders.test.samples) == (1297, 500)
    images, _ = stacked(epoch_of(loaders.train))
    assert abs(images.mean()) < 1e-3 and abs(images.std() - 1) < 1e-3
    other = build("digits", "unused", seed=8)  # the split is not the run's: no test image is trained on
    assert same(epoch_of(loaders.test), epoch_of(other.test))
    first = {b: i for i, b in enumerate(torch.cat([b.index for b in epoch_of(loaders.train, 0)]).tolist())}
    second = epoch_of(loaders.train, 1)[0]
    assert torch.equal(second.images, images[[first[i] for i in second.index.tolist()]])  # no augmentation


# -- refusals, in words ------------------------------------------------------------------------------------------------


def test_missing_data(tmp_path, monkeypatch):
    def offline(self):
        raise URLError("no network")

    monkeypatch.setattr(CIFAR100, "download", offline)
    with pytest.raises(FileNotFoundError, match=r"no network(.|\n)*curl -O \S*cifar-100-python.tar.gz(.|\n)*train/"):
        build("cifar100", tmp_path)
    for dataset, test in (("imagenet", "val"), ("imagefolder", "test")):
        with pytest.raises(FileNotFoundError, match=rf"{dataset}: expected the folder train in(.|\n)*/{test}/<class>"):
            build(dataset, tmp_path)
    make_tree(tmp_path, [(32, 32)], splits=("train",))
    with pytest.raises(FileNotFoundError, match="expected the folder test or val"):
        build("cifar100", tmp_path)


def test_trees_that_do_not_fit(tmp_path):
    root = make_tree(tmp_path / "sizes", [(32, 32), (32, 30)])
    with pytest.raises(ValueError, match=r"of the first one's size, 32 x 32, got 32 x 30 in \S+1\.png"):
        build("cifar100", root)
    root = make_tree(tmp_path / "halves", [(32, 32)], splits=("train",))
    make_tree(root, [(16, 16)], splits=("test",))
    with pytest.raises(ValueError, match=r"one size in .*got \(32, 32\) and \(16, 16\)"):
        build("cifar100", root)
    root = make_tree(tmp_path / "classes", [(32, 32)], splits=("train",))
    make_tree(root, [(32, 32)], splits=("test",), classes=("ant", "bee", "dog"))
    with pytest.raises(ValueError, match="2 are in one alone: cat, dog"):
        build("cifar100", root)
    root = make_tree(tmp_path / "damaged", [(32, 32)])
    (root / "train" / "bee" / "1.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"^cannot read the image \S+bee/1\.png"):
        build("cifar100", root)
    root = make_tree(tmp_path / "many", [(8, 8)], each=700)
    (root / "train" / "bee" / "1.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"^cannot read the image \S+bee/1\.png.*fetch it again$"):
        build("cifar100", root, num_workers=2)  # without the worker's traceback


def test_arguments_are_checked(small_tree):
    with pytest.raises(ValueError, match=r"expected a data set out of cifar100, cifar10, .*, digits, got 'x'"):
        build("x", small_tree)
    with pytest.raises(ValueError, match="expected views of 0 or more, got -1"):
        build("cifar100", small_tree, views=-1)
    with pytest.raises(ValueError, match="expected a batch size of at least 1, got 0"):
        build("cifar100", small_tree, batch_size=0)
    with pytest.raises(ValueError, match="got rank 2 of 2"):
        build("cifar100", small_tree, rank=2, world_size=2)
    with pytest.raises(ValueError, match="at least one image for each of 50 ranks, got 27"):
        build("cifar100", small_tree, world_size=50)
