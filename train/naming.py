"""What a run is called: its method, its folder, and the file of its teacher's weights."""

from __future__ import annotations

from pathlib import Path

from .schema import Config

_CORRECTED = {"sort": "Sort-", "swap": "Swap-", "none": ""}


def method_label(config: Config) -> str:
    """The method as the field writes it: CE, KD, Sort-DKD, Sort-LSKD+DKD, CTKD, ..."""
    distiller = config.DISTILLER
    if distiller.TYPE == "NONE":
        return "CE"
    switches = {"CTKD": distiller.LEARNED_TEMPERATURE, "LSKD": distiller.STANDARDIZE}
    parts = [name for name, on in switches.items() if on]
    # CTKD and LSKD are names of KD with a switch on; with DKD under them, DKD is named too.
    if distiller.TYPE == "DKD" or not parts:
        parts.append(distiller.TYPE)
    return _CORRECTED[distiller.CORRECTION] + "+".join(parts)


def run_name(config: Config) -> str:
    """NAME, or else TAG as mdistiller has it, or else the method and the pair."""
    experiment, distiller = config.EXPERIMENT, config.DISTILLER
    if experiment.NAME or experiment.TAG not in ("", "default"):
        return experiment.NAME or experiment.TAG
    models = [distiller.STUDENT] if distiller.TYPE == "NONE" else [distiller.TEACHER, distiller.STUDENT]
    return "_".join([method_label(config).lower(), *models]).replace("/", "-")


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
