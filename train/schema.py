"""The keys of a run, their types and their defaults: mdistiller's, so that its files run unchanged, and ours."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from .elsewhere import refuse_other_methods

Amp = Literal["none", "bf16", "fp16"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# What no machine has more of: beyond it torch and the operating system fail in their own words, or not in words at all.
Count = Annotated[int, Field(gt=0, lt=2**31)]
CountOrNone = Annotated[int, Field(ge=0, lt=2**31)]
Workers = Annotated[int, Field(ge=0, le=1024)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


def _literal(value: Any) -> Any:
    """yacs, which read these files first, evaluates strings: `(150, 180)` in YAML is a string that means a tuple."""
    if isinstance(value, str):
        try:
            return ast.literal_eval(value)
        except (SyntaxError, ValueError):
            return value
    return value


def _below(name: str) -> str:
    """A part of the path of a run's folder, which stays below LOG.PREFIX and can be printed."""
    if PurePath(name).anchor or ".." in PurePath(name).parts:
        raise ValueError(f"expected a name of a folder below LOG.PREFIX, got {name!r}")
    if not name.isprintable():
        raise ValueError(f"expected characters that can be printed, got {name!r}")
    return name


FolderName = Annotated[str, AfterValidator(_below)]


class Section(BaseModel):
    """A part of the configuration; unknown keys are errors, so that a misspelt one cannot go unnoticed."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ExperimentSection(Section):
    PROJECT: FolderName = "distill"
    # The run's folder is PREFIX/PROJECT/NAME/seed_N; empty: TAG, or the method and the pair, and what was overridden.
    NAME: FolderName = ""
    TAG: FolderName = "default"
    SEED: Seed = 0
    DEVICE: str = "auto"  # auto: CUDA where there is one
    THREADS: Workers = 0  # of the CPU; 0: torch's choice. Another number rounds otherwise


class TestSection(Section):
    BATCH_SIZE: Count = 64


class DatasetSection(Section):
    TYPE: Literal["cifar100", "cifar10", "tiny_imagenet", "imagenet", "imagefolder", "digits"] = "cifar100"
    ROOT: str = "./data"
    NUM_WORKERS: Workers = 2
    DECODE: Literal["cpu", "cuda"] = "cpu"  # of large images' JPEGs; cuda: by nvJPEG, whose pixels differ a little
    TEST: TestSection = TestSection()


class DistillerSection(Section):
    TYPE: Literal["NONE", "KD", "DKD"] = "NONE"
    TEACHER: str = "ResNet50"
    STUDENT: str = "resnet32"
    CORRECTION: Literal["sort", "swap", "none"] = "sort"
    STANDARDIZE: bool = False  # LSKD
    LEARNED_TEMPERATURE: bool = False  # CTKD


class TeacherSection(Section):
    WEIGHTS: str = ""  # a file, or torchvision's or timm's name of weights; empty: see `config.teacher_weights`
    ROOT: str = "./download_ckpts"  # where mdistiller's archive of teachers is unpacked
    CACHE_VIEWS: CountOrNone = 0  # 0: no cache, fresh augmentation every epoch
    CACHE_SEED: Seed = 0  # fixes the views; runs of several seeds share a cache
    CACHE_DIR: str = ""  # empty: DATASET.ROOT/teacher_cache
    AMP: Literal["same", "none", "bf16", "fp16"] = "same"  # same: SOLVER.AMP
    COMPILE: bool = False


class SolverSection(Section):
    TRAINER: Literal["base"] = "base"
    BATCH_SIZE: Count = 64  # over all ranks together
    EPOCHS: Count = 240
    LR: Positive = 0.05
    LR_DECAY_STAGES: Annotated[list[int], BeforeValidator(_literal)] = [150, 180, 210]
    LR_DECAY_RATE: Positive = 0.1
    WEIGHT_DECAY: Weight = 0.0001
    MOMENTUM: Weight = 0.9
    TYPE: Literal["SGD", "AdamW"] = "SGD"
    NESTEROV: bool = False
    SCHEDULE: Literal["step", "cosine"] = "step"  # step: the two LR_DECAY keys
    LR_MIN: Weight = 0.0  # where the cosine ends
    WARMUP: CountOrNone = 0  # epochs in which the learning rate rises to LR
    CLIP_NORM: Weight = 0.0  # of all gradients together; 0: no clipping
    ACCUMULATION: Count = 1  # parts in which a batch is computed, one after the other, for less memory
    EMA: Annotated[float, Field(ge=0, lt=1)] = 0.0  # decay of averaged weights, which are then tested
    SYNC_BN: bool = False  # BatchNorm over the images of all ranks
    AMP: Amp = "none"
    GRAPH: Literal["auto", "off"] = "auto"  # auto: CUDA graphs on one GPU
    COMPILE: bool = False  # student and teacher through torch.compile

    @model_validator(mode="after")
    def _switches_have_an_effect(self) -> SolverSection:
        if self.NESTEROV and not (self.TYPE == "SGD" and self.MOMENTUM):
            raise ValueError("SOLVER.NESTEROV: expected SOLVER.TYPE SGD with a SOLVER.MOMENTUM beside it")
        if self.LR_MIN and self.SCHEDULE != "cosine":
            raise ValueError(f"SOLVER.LR_MIN: expected SOLVER.SCHEDULE cosine beside it, got {self.SCHEDULE}")
        if self.WARMUP >= self.EPOCHS:
            raise ValueError(f"SOLVER.WARMUP: expected fewer than the {self.EPOCHS} SOLVER.EPOCHS, got {self.WARMUP}")
        if self.WARMUP and self.SCHEDULE == "step" and any(stage <= self.WARMUP for stage in self.LR_DECAY_STAGES):
            raise ValueError(
                f"SOLVER.LR_DECAY_STAGES: expected epochs after the {self.WARMUP} of SOLVER.WARMUP, "
                f"got {self.LR_DECAY_STAGES}"
            )
        return self


class KDLossSection(Section):
    CE_WEIGHT: Weight = 0.1
    KD_WEIGHT: Weight = 0.9


class KDSection(Section):
    TEMPERATURE: Positive = 4.0
    LOSS: KDLossSection = KDLossSection()


class DKDSection(Section):
    CE_WEIGHT: Weight = 1.0
    ALPHA: Weight = 1.0
    BETA: Weight = 8.0
    T: Positive = 4.0
    WARMUP: CountOrNone = 20
    KD_WEIGHT: Weight = 1.0  # multiplies ALPHA and BETA: LSKD+DKD's 9


class CTKDSection(Section):
    START: Weight = 1.0
    END: Positive = 20.0
    EPOCHS: Count = 10


class LogSection(Section):
    TENSORBOARD_FREQ: Count = 500
    SAVE_CHECKPOINT_FREQ: Count = 40  # these are kept; the newest two and the best always are
    PREFIX: str = "./output"
    WANDB: bool = False  # mdistiller's default is True; a run here asks for no account unless told to


class Config(Section):
    """Everything that a run depends on."""

    EXPERIMENT: ExperimentSection = ExperimentSection()
    DATASET: DatasetSection = DatasetSection()
    DISTILLER: DistillerSection = DistillerSection()
    TEACHER: TeacherSection = TeacherSection()
    SOLVER: SolverSection = SolverSection()
    KD: KDSection = KDSection()
    DKD: DKDSection = DKDSection()
    CTKD: CTKDSection = CTKDSection()
    LOG: LogSection = LogSection()

    @model_validator(mode="before")
    @classmethod
    def _is_for_this_trainer(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            refuse_other_methods(values)
        return values

    @model_validator(mode="after")
    def _switches_have_an_effect(self) -> Config:
        if self.DISTILLER.TYPE == "NONE":
            switches = {
                "DISTILLER.STANDARDIZE": self.DISTILLER.STANDARDIZE,
                "DISTILLER.LEARNED_TEMPERATURE": self.DISTILLER.LEARNED_TEMPERATURE,
                "TEACHER.CACHE_VIEWS": self.TEACHER.CACHE_VIEWS,
            }
            for key, value in switches.items():
                if value:
                    raise ValueError(f"{key}: expected DISTILLER.TYPE KD or DKD beside it, got NONE, without a teacher")
        return self


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the schema."""
    keys = []
    for name, field in section.model_fields.items():
        inner = field.annotation if isinstance(field.annotation, type) else None
        if inner is not None and issubclass(inner, BaseModel):
            keys += known_keys(inner, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def choices(key: str) -> list[str]:
    """The values that a key with a fixed choice takes; none for any other key."""
    section: type[BaseModel] = Config
    *path, name = key.split(".")
    for part in path:
        section = section.model_fields[part].annotation  # type: ignore[assignment]
    return [value for value in get_args(section.model_fields[name].annotation) if isinstance(value, str)]
