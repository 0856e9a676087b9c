"""A run's parts put together from its configuration: data, models, teacher, optimizer."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint import seed_everything
from .config import ConfigError
from .data import Loader, Loaders, build_loaders
from .data.seeds import derive_seed
from .data.stream import StreamLoader
from .distillers import Distiller
from .distributed import World, gather
from .loop import Trainer
from .models import build_model
from .naming import teacher_weights
from .schema import Config
from .solver import AMP_DTYPES
from .teacher import Teacher, build_teacher, state_digest


def build_trainer(config: Config, world: World, loaders: Loaders | None = None) -> Trainer:
    """Student, data, teacher and optimizer of a configuration, the generators seeded."""
    configured = loaders is None
    loaders = loaders or make_loaders(config, world)
    seed_everything(config.EXPERIMENT.SEED)  # the same weights on every rank
    student = make_model("DISTILLER.STUDENT", config, loaders.num_classes, loaders.image_shape)
    check_fits("DISTILLER.STUDENT", student, loaders.num_classes, loaders.image_shape)
    if configured:
        for loader in (loaders.train, loaders.test):
            check_images(loader, config, world)
        check_smallest_batch(student, loaders, config)
    if config.SOLVER.SYNC_BN and world.size > 1:
        if world.device.type == "cpu":
            raise ConfigError("SOLVER.SYNC_BN: expected GPUs, which torch's SyncBatchNorm needs, got the CPU")
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    distiller = Distiller(student, config)
    teacher = None if config.DISTILLER.TYPE == "NONE" else make_teacher(config, loaders, world)
    trainer = Trainer(config, loaders, distiller, teacher, world)
    seed_everything(derive_seed("rank", config.EXPERIMENT.SEED, world.rank))  # other dropout on every rank
    return trainer


def make_loaders(config: Config, world: World) -> Loaders:
    """The configured data; SOLVER.BATCH_SIZE is that of all ranks together."""
    per_rank, left = divmod(config.SOLVER.BATCH_SIZE, world.size)
    if left or not per_rank:
        raise ConfigError(
            f"SOLVER.BATCH_SIZE: expected a multiple of the {world.size} ranks, got {config.SOLVER.BATCH_SIZE}"
        )
    dataset = config.DATASET
    if dataset.DECODE == "cuda" and world.device.type != "cuda":
        raise ConfigError(f"DATASET.DECODE: expected cpu where EXPERIMENT.DEVICE is {world.device}, got cuda")
    try:
        return build_loaders(
            dataset.TYPE, Path(dataset.ROOT), batch_size=per_rank, test_batch_size=dataset.TEST.BATCH_SIZE,
            num_workers=dataset.NUM_WORKERS, device=world.device, seed=config.EXPERIMENT.SEED, rank=world.rank,
            world_size=world.size, views=config.TEACHER.CACHE_VIEWS, view_seed=config.TEACHER.CACHE_SEED,
            decode=dataset.DECODE,
        )  # fmt: skip
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"DATASET.ROOT: {error}") from error


def make_model(
    key: str, config: Config, num_classes: int, image_shape: tuple[int, ...], weights: str | None = None
) -> nn.Module:
    """The model that the configuration names under `key`, DISTILLER.STUDENT or DISTILLER.TEACHER."""
    kind = config.DATASET.TYPE
    if kind in ("cifar10", "tiny_imagenet", "imagefolder"):
        # They have no models of their own, and the two zoos' networks fit images by their size.
        kind = "cifar100" if image_shape[-1] <= 64 else "imagenet"
    name = config.DISTILLER.STUDENT if key == "DISTILLER.STUDENT" else config.DISTILLER.TEACHER
    try:
        return build_model(name, num_classes, dataset=kind, weights=weights)
    except (ValueError, ImportError) as error:
        keys = key if weights is None else f"{key}, TEACHER.WEIGHTS"
        raise ConfigError(f"{keys}: {error}") from error


@torch.no_grad()
def check_fits(key: str, model: nn.Module, num_classes: int, image_shape: tuple[int, ...]) -> None:
    """Refuse a model that takes other images or returns other logits than the data's, by one black image."""
    try:
        image = torch.zeros(1, *image_shape, device=next(model.parameters()).device)
        logits = model.eval()(image)
    except Exception as error:  # whatever the library of the model raises
        raise ConfigError(f"{key}: expected a model of {image_shape} images, got one that says: {error}") from error
    model.train()
    came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if came != (1, num_classes):
        raise ConfigError(f"{key}: expected a model that returns logits {(1, num_classes)}, got one of {came}")


def check_images(loader: Loader, config: Config, world: World) -> None:
    """Refuse images on disk that cannot be read, before a run meets them in its last epoch."""
    if not isinstance(loader, StreamLoader):
        return  # in memory: all of them have been read
    error = None
    try:
        loader.listing.check(range(world.rank, loader.samples, world.size), config.DATASET.NUM_WORKERS)
    except (ValueError, OSError) as found:
        error = str(found)
    # Every rank looks at a part, and all of them stop for what one has found.
    if errors := [text for text in gather(error, world) if text]:
        raise ConfigError(f"DATASET.ROOT: {errors[0]}")


@torch.no_grad()
def check_smallest_batch(student: nn.Module, loaders: Loaders, config: Config) -> None:
    """Refuse a batch of one image on a rank where the student cannot train on one, as BatchNorm cannot."""
    plan = loaders.train.plan
    if plan.smallest() > 1:
        return
    try:
        copy.deepcopy(student).train()(torch.zeros(1, *loaders.image_shape))
    except ValueError as error:
        raise ConfigError(
            f"SOLVER.BATCH_SIZE: expected batches of two images or more on each rank for {config.DISTILLER.STUDENT}, "
            f"got {plan.samples} training images in batches of {config.SOLVER.BATCH_SIZE} on {plan.world_size} ranks, "
            f"one of which is left with a single image ({error}); choose another SOLVER.BATCH_SIZE"
        ) from error


def make_teacher(config: Config, loaders: Loaders, world: World) -> Teacher:
    """The frozen teacher, or its cache."""
    name, weights = config.DISTILLER.TEACHER, teacher_weights(config)
    try:
        model = make_model("DISTILLER.TEACHER", config, loaders.num_classes, loaders.image_shape, weights)
    except FileNotFoundError as error:
        kind = config.DATASET.TYPE
        file = (
            f"{kind}/vanilla.yaml" if kind in ("imagenet", "digits") else f"cifar100/vanilla.yaml DATASET.TYPE {kind}"
        )
        raise ConfigError(
            f"TEACHER.WEIGHTS: {error}; train this teacher with `python train/run.py --cfg "
            f"train/configs/{file} DISTILLER.STUDENT {name}` and give its checkpoint, or "
            f"unpack mdistiller's cifar_teachers.tar (its release `checkpoints` on GitHub) into {config.TEACHER.ROOT}"
        ) from error
    check_fits("DISTILLER.TEACHER", model, loaders.num_classes, loaders.image_shape)
    amp = config.SOLVER.AMP if config.TEACHER.AMP == "same" else config.TEACHER.AMP
    compiled = config.TEACHER.COMPILE or config.SOLVER.COMPILE
    cache_dir = Path(config.TEACHER.CACHE_DIR or Path(config.DATASET.ROOT) / "teacher_cache")
    try:
        return build_teacher(
            model.to(world.device), loaders, weights_digest=state_digest(model), views=config.TEACHER.CACHE_VIEWS,
            cache_dir=cache_dir, amp_dtype=AMP_DTYPES[amp], compile=compiled, channels_last=True,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        key = "TEACHER.CACHE_VIEWS" if isinstance(error, ValueError) else "TEACHER.CACHE_DIR"
        raise ConfigError(f"{key}: {error}") from error
