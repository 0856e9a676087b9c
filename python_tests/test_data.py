"""The data: batched augmentation is torchvision's per-image one; seed and epoch fix every batch; ranks split it."""

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision", reason="the train extra is not installed")
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import functional as TF

from train.data import build_loaders
from train.data.augment import CropFlip, Normalize, draw_crop_flip
from train.data.folder import Listing
from train.data.plan import BatchPlan, ViewPlan
from train.data.seeds import derive_seed, generator
from train.data.sources import CIFAR_MEAN, CIFAR_STD
from train.data.stream import IMAGENET_MEAN, IMAGENET_STD

CPU = torch.device("cpu")
# float32 in another order of operations: (x * a + b) against ((x / 255) - mean) / std, values up to 3.
CLOSE = {"rtol": 0, "atol": 2e-6}


def make_tree(root, sizes, *, splits=("train", "test"), classes=("ant", "bee", "cat"), each=5, suffix="png"):
    """An ImageFolder tree of noise; `sizes` (width, height) are taken in turn."""
    rng = np.random.default_rng(0)
    count = 0
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(each):
                width, height = sizes[count % len(sizes)]
                pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.{suffix}")
                count += 1
    return root


@pytest.fixture(scope="module")
def small_tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("small"), [(32, 32)], each=9)


@pytest.fixture(scope="module")
def large_tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("large"), [(300, 260), (240, 280)], splits=("train", "val"))


def build(dataset, root, **changes):
    options = dict(batch_size=4, test_batch_size=4, num_workers=0, device=CPU, seed=3)
    return build_loaders(dataset, root, **{**options, **changes})


def epoch_of(loader, epoch=0):
    loader.set_epoch(epoch)
    return list(loader)


def stacked(batches):
    return torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(stacked(left), stacked(right), strict=True))


# -- the augmentation is torchvision's ---------------------------------------------------------------------------------


def augmented(images, index, choices):
    crop_flip = CropFlip(images, 4, flip=True, device=CPU)
    first = crop_flip.first(torch.as_tensor(index), torch.as_tensor(choices).to(torch.uint8))
    return Normalize(CIFAR_MEAN, CIFAR_STD, (3, 32, 32), device=CPU)(crop_flip(first))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_every_crop_and_flip_equals_torchvisions(place):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    images = torch.full((3, 32, 32, 3), 255, dtype=torch.uint8)  # white neighbours, which must not show in the border
    images[place] = torch.from_numpy(pixels)
    choices = [(top, left, flip) for top in range(9) for left in range(9) for flip in range(2)]
    got = augmented(images, [place] * len(choices), choices)
    assert got.is_contiguous(memory_format=torch.channels_last)
    padded = TF.pad(Image.fromarray(pixels), 4)  # raw zeros, before the normalisation, as RandomCrop(32, 4) pads
    for image, (top, left, flip) in zip(got, choices, strict=True):
        crop = TF.crop(padded, top, left, 32, 32)
        expected = TF.normalize(TF.to_tensor(TF.hflip(crop) if flip else crop), CIFAR_MEAN, CIFAR_STD)
        torch.testing.assert_close(image, expected, **CLOSE)


def test_border_is_black_and_not_the_mean():
    border = augmented(torch.full((1, 32, 32, 3), 200, dtype=torch.uint8), [0], [[0, 0, 0]])[0, :, 0, 0]
    torch.testing.assert_close(border, -torch.tensor(CIFAR_MEAN) / torch.tensor(CIFAR_STD), **CLOSE)


def chi_square(cells, count):
    """Of a sample that should be uniform over `count` cells, in standard deviations from its expectation."""
    observed = torch.bincount(cells, minlength=count).double()
    expected = len(cells) / count
    return (((observed - expected) ** 2 / expected).sum().item() - (count - 1)) / (2 * (count - 1)) ** 0.5


def test_choices_are_distributed_as_torchvisions():
    """Uniform over the 9 x 9 x 2 joint outcomes, as torchvision's own choices are: within 4 standard deviations.

    A fixed seed, so the test cannot flake; a crop that never reached one edge would be off by hundreds.
    """
    ours = draw_crop_flip(100_000, 4, True, generator("test", 0)).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        starts = [T.RandomCrop.get_params(torch.empty(3, 40, 40), (32, 32))[:2] for _ in range(16_000)]
        flips = torch.rand(16_000) < 0.5  # what RandomHorizontalFlip compares
    theirs = torch.cat([torch.tensor(starts), flips[:, None].long()], dim=1)
    for sample in (ours, theirs):
        assert abs(chi_square((sample[:, 0] * 9 + sample[:, 1]) * 2 + sample[:, 2], 162)) < 4
    assert not draw_crop_flip(1000, 4, False, generator("test", 0))[:, 2].any()


def test_choices_of_epochs_and_images_are_independent(small_tree):
    loader = build("cifar100", small_tree).train
    draws = torch.stack([loader._draw("augmentation", 3, epoch) for epoch in range(4000)]).long()
    for column, count in enumerate((9, 9, 2)):
        pairs = draws[1:, :, column] * count + draws[:-1, :, column]  # of one image, in consecutive epochs
        assert abs(chi_square(pairs.flatten(), count**2)) < 4
        pairs = draws[:, 1:, column] * count + draws[:, :-1, column]  # of neighbouring images
        assert abs(chi_square(pairs.flatten(), count**2)) < 4


@pytest.fixture(scope="module")
def jpeg_tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("jpeg")
    return make_tree(root, [(300, 260), (240, 280)], splits=("train", "val"), suffix="jpg")


@pytest.mark.parametrize("tree", ["large_tree", "jpeg_tree"])
def test_large_images_get_torchvisions_transforms(tree, request):
    """The same generator state gives the crop that torchvision's own pipeline makes of PIL's image, and evaluation
    equals it: to one level of 255, because PIL and torch round the weights of a resize in other places."""
    loaders = build("imagenet", request.getfixturevalue(tree))
    train = T.Compose([T.RandomResizedCrop(224), T.RandomHorizontalFlip(), T.ToTensor()])
    test = T.Compose([T.Resize(256), T.CenterCrop(224), T.ToTensor()])
    level = torch.tensor(1 / 255 / np.array(IMAGENET_STD), dtype=torch.float32)[:, None, None]
    for loader, transform in ((loaders.train, train), (loaders.test, test)):
        for batch in epoch_of(loader, 5)[:2]:
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            for image, index in zip(batch.images, batch.index.tolist(), strict=True):
                with torch.random.fork_rng():
                    torch.manual_seed(derive_seed("augmentation", 3, 5, index))
                    raw = transform(Image.open(loader.listing.path(index)).convert("RGB"))
                off = (image - TF.normalize(raw, IMAGENET_MEAN, IMAGENET_STD)).abs() / level
                # A crop from another place would be off by dozens of levels: the images are noise.
                assert off.max() < 1.001 and off.mean() < 0.1


@pytest.mark.parametrize("tree", ["large_tree", "jpeg_tree"])
def test_batches_decoded_at_once_are_the_workers(tree, request):
    """`decode="cuda"` on a CPU, where torchvision decodes a list of files as it would on a GPU; no JPEGs: fallen back."""
    root = request.getfixturevalue(tree)
    alone, at_once = build("imagenet", root, views=2), build("imagenet", root, views=2, decode="cuda", num_workers=1)
    assert same(epoch_of(alone.train, 1), epoch_of(at_once.train, 1))
    assert same(epoch_of(alone.test), epoch_of(at_once.test))
    assert alone.train.augmentation != at_once.train.augmentation  # on a GPU the pixels differ: so do teacher caches


@pytest.mark.parametrize("kind", ["RGB", "L", "CMYK", "progressive", "png in disguise", "bmp in disguise"])
def test_jpegs_are_decoded_as_pil_decodes_them(kind, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 65, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(kind if kind in ("L", "CMYK") else "RGB")
    (tmp_path / "ant").mkdir()
    path = tmp_path / "ant" / "1.JPEG"
    image.save(path, format=kind.split()[0] if "disguise" in kind else "jpeg", progressive=kind == "progressive")
    read = Listing(tmp_path).read(0)
    assert read.dtype == torch.uint8 and read.permute(1, 2, 0).is_contiguous()
    off = read.permute(1, 2, 0).int() - torch.from_numpy(np.array(Image.open(path).convert("RGB"))).int()
    # The standard leaves an inverse transform one level; PIL with torchvision's libjpeg-turbo has none of them.
    assert off.abs().max() <= 1


def test_a_truncated_jpeg_is_named(tmp_path):
    (tmp_path / "ant").mkdir()
    path = tmp_path / "ant" / "1.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 65, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cannot read the image \S+ant/1\.jpg: .*truncated.*; remove it or fetch it"):
        Listing(tmp_path).read(0)


# -- seed and epoch determine everything -------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset, root", [("cifar100", "small_tree"), ("imagenet", "large_tree")])
@pytest.mark.parametrize("views", [0, 2])
def test_epochs_replay(dataset, root, views, request):
    root = request.getfixturevalue(root)
    state = torch.get_rng_state()
    loader = build(dataset, root, views=views).train
    first, second = epoch_of(loader, 0), epoch_of(loader, 1)
    assert not same(first, second)
    assert same(epoch_of(build(dataset, root, views=views).train, 1), second)  # as after a resume
    assert same(epoch_of(loader, 0), first)
    assert not same(epoch_of(build(dataset, root, views=views, seed=4).train, 0), first)
    assert torch.equal(torch.get_rng_state(), state), "reading data must not change what the model draws"


def test_workers_change_nothing(large_tree):
    alone, workers = build("imagenet", large_tree, views=3), build("imagenet", large_tree, views=3, num_workers=2)
    for epoch in range(2):  # the workers stay alive in between
        assert same(epoch_of(alone.train, epoch), epoch_of(workers.train, epoch))
    assert same(epoch_of(alone.test), epoch_of(workers.test))


def test_batches_keep_their_memory(small_tree):
    """Batches that are kept do not see what comes after them."""
    loader = build("cifar100", small_tree).train
    kept = [(batch, batch.images.clone(), batch.labels.clone()) for batch in loader]
    assert all(torch.equal(batch.images, x) and torch.equal(batch.labels, y) for batch, x, y in kept)
    assert same([batch for batch, *_ in kept], epoch_of(loader))


def test_order_is_a_permutation(small_tree):
    batches = epoch_of(build("cifar100", small_tree).train)
    index = torch.cat([b.index for b in batches])
    assert sorted(index.tolist()) == list(range(27)) != index.tolist()
    assert [len(b.index) for b in batches] == [4] * 6 + [3]
    assert torch.equal(torch.cat([b.labels for b in batches]), torch.arange(3).repeat_interleave(9)[index])


# -- ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset, root", [("cifar100", "small_tree"), ("imagenet", "large_tree")])
@pytest.mark.parametrize("views", [0, 2])
def test_ranks_share_the_batches_of_one(dataset, root, views, request):
    root = request.getfixturevalue(root)
    one = epoch_of(build(dataset, root, views=views, batch_size=6).train, 2)
    ranks = [build(dataset, root, views=views, batch_size=2, rank=r, world_size=3).train for r in range(3)]
    assert [len(r) for r in ranks] == [len(one)] * 3
    for batch, *parts in zip(one, *(epoch_of(r, 2) for r in ranks), strict=True):
        assert torch.equal(batch.images, torch.cat([p.images for p in parts]))
        assert torch.equal(batch.labels, torch.cat([p.labels for p in parts]))


@pytest.mark.parametrize("samples", [3, 11, 12, 13, 14, 29])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_plan_of_ranks(samples, world_size):
    for shuffle in (True, False):
        plans = [
            BatchPlan(samples, 4, shuffle=shuffle, seed=0, rank=r, world_size=world_size) for r in range(world_size)
        ]
        epochs = [list(plan.batches(1)) for plan in plans]
        assert [len(e) for e in epochs] == [len(plan) for plan in plans]
        seen = torch.cat([part.index for e in epochs for part in e])
        rest = samples % (4 * world_size)
        left_out = rest if shuffle and rest < world_size else 0
        assert len(seen) == len(seen.unique()) == samples - left_out
        if shuffle:  # in step, and the ranks' weighted means average to the global batch's mean
            assert plans[0].smallest() == min(len(part.index) for e in epochs for part in e)
            for parts in zip(*epochs, strict=True):
                whole = torch.cat([p.index for p in parts]).double().mean()
                mean = sum(p.share * p.index.double().mean() for p in parts) / world_size
                torch.testing.assert_close(mean, whole)


# -- fixed views -------------------------------------------------------------------------------------------------------


def test_each_image_shows_each_view_once_in_m_epochs():
    plan = ViewPlan(500, 4, seed=1)
    shown = torch.stack([plan.of(torch.arange(500), epoch) for epoch in range(7, 11)])
    assert torch.equal(shown.sort(dim=0).values, torch.arange(4)[:, None].expand(4, 500))
    assert abs(chi_square(shown[0], 4)) < 4  # within an epoch the views mix


@pytest.mark.parametrize("dataset, root", [("cifar100", "small_tree"), ("imagenet", "large_tree")])
def test_a_view_is_the_same_image_always(dataset, root, request):
    root = request.getfixturevalue(root)
    loader = build(dataset, root, views=3).train
    views = [torch.cat([b.images for b in loader.view_batches(v, 7)]) for v in range(3)]
    assert not torch.equal(views[0], views[1])
    # another order, rank, batch size and seed of the run, but the same seed of the views
    other = build(dataset, root, views=3, batch_size=5, seed=99, view_seed=3, rank=1, world_size=2).train
    for epoch in range(3):
        for batch in epoch_of(other, epoch):
            for image, index, view in zip(batch.images, batch.index, batch.view, strict=True):
                assert torch.equal(image, views[view][index])
    changed = build(dataset, root, views=3, view_seed=4).train
    assert not torch.equal(next(iter(changed.view_batches(0, 7))).images, views[0][:7])


def test_without_views_there_is_none(small_tree):
    loader = build("cifar100", small_tree).train
    assert all(b.view is None for b in loader)
    with pytest.raises(ValueError, match=r"expected a view in \[0, 0\), got 0"):
        next(loader.view_batches(0, 4))
