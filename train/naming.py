"""What a run is called: its method, its folder, and the file of its teacher's weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .schema import Config

# Prefixes of keys that are not part of what a run is: where it runs, what it keeps and how long, and where the file of
# the teacher lies, whose content is compared. A resumed run may differ in these, and no folder is named after them.
FREE = (
    "LOG.", "EXPERIMENT.DEVICE", "DATASET.ROOT", "DATASET.NUM_WORKERS", "TEACHER.CACHE_DIR", "TEACHER.WEIGHTS",
    "TEACHER.ROOT", "SOLVER.EPOCHS", "SOLVER.GRAPH",
)  # fmt: skip
# In a folder's name: no path, and nothing of a list that a shell takes for a pattern.
_IN_A_NAME = str.maketrans("/", "-", " []()'")
CORRECTED = {"sort": "Sort-", "swap": "Swap-", "none": ""}


def method_label(config: Config) -> str:
    """The method as the field writes it: CE, KD, Sort-DKD, Sort-LSKD+DKD, CTKD, ..."""
    correction = "none" if config.DISTILLER.TYPE == "NONE" else config.DISTILLER.CORRECTION
    return CORRECTED[correction] + plain_method(config)


def plain_method(config: Config) -> str:
    """The method whose teacher the correction corrects: the label without its prefix."""
    distiller = config.DISTILLER
    if distiller.TYPE == "NONE":
        return "CE"
    switches = {"CTKD": distiller.LEARNED_TEMPERATURE, "LSKD": distiller.STANDARDIZE}
    parts = [name for name, on in switches.items() if on]
    # CTKD and LSKD are names of KD with a switch on; with DKD under them, DKD is named too.
    if distiller.TYPE == "DKD" or not parts:
        parts.append(distiller.TYPE)
    return "+".join(parts)


def pair_label(config: Config) -> str:
    """The models: teacher → student, or the student that trains alone."""
    distiller = config.DISTILLER
    return distiller.STUDENT if distiller.TYPE == "NONE" else f"{distiller.TEACHER} → {distiller.STUDENT}"


def run_name(config: Config) -> str:
    """NAME, or else TAG as mdistiller has it, or else the method and the pair."""
    experiment, distiller = config.EXPERIMENT, config.DISTILLER
    if experiment.NAME or experiment.TAG not in ("", "default"):
        return experiment.NAME or experiment.TAG
    models = [distiller.STUDENT] if distiller.TYPE == "NONE" else [distiller.TEACHER, distiller.STUDENT]
    return "_".join([method_label(config).lower(), *models]).replace("/", "-")


def name_after_overrides(config: Config, overrides: Mapping[str, Any]) -> str:
    """The run's name with the overridden values behind it, `KEY=VALUE,...`, as mdistiller's folders have them.

    So a file and the same file with other values do not meet in one folder.
    """
    # Without NAME and TAG the name is made of the method and the pair.
    told = () if config.EXPERIMENT.NAME or config.EXPERIMENT.TAG not in ("", "default") else ("DISTILLER.",)
    kept = {key: value for key, value in overrides.items() if not key.startswith((*FREE, *told, "EXPERIMENT."))}
    if not kept:
        return config.EXPERIMENT.NAME
    parts = [f"{key}={value}".translate(_IN_A_NAME) for key, value in kept.items()]
    return ",".join([run_name(config), *parts])


def run_folder(config: Config) -> Path:
    """Where a run keeps its files; runs that differ in the seed alone lie side by side."""
    return Path(config.LOG.PREFIX) / config.EXPERIMENT.PROJECT / run_name(config) / f"seed_{config.EXPERIMENT.SEED}"


def teacher_weights(config: Config) -> str:
    """TEACHER.WEIGHTS, or where the field keeps them: torchvision's v1 for ImageNet, mdistiller's archive otherwise."""
    if config.TEACHER.WEIGHTS:
        return config.TEACHER.WEIGHTS
    if config.DATASET.TYPE == "imagenet":
        return "v1"
    archive = Path(config.TEACHER.ROOT) / "cifar_teachers"
    return str(archive / f"{config.DISTILLER.TEACHER}_vanilla" / "ckpt_epoch_240.pth")
