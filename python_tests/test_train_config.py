"""Configurations: files of the field run unchanged, recipes are the published ones, errors name key and nearest."""

import re

import pytest
import torch
from train_cases import CONFIGS, ROOT

from train.assembly import make_model
from train.config import ConfigError, flatten, load_config, published_pairs
from train.naming import method_label, run_folder, teacher_weights
from train.run import main, parse

CIFAR, IMAGENET = CONFIGS / "cifar100", CONFIGS / "imagenet"
METHODS = ["vanilla", "kd", "dkd", "ctkd", "lskd", "lskd_dkd"]

# Written as mdistiller writes its files; the second as yacs allows it, with a tuple and exponents YAML reads as text.
MDISTILLER = """
EXPERIMENT: {NAME: "", TAG: "dkd,res56,res20", PROJECT: "cifar100_baselines"}
DISTILLER: {TYPE: "DKD", TEACHER: "resnet56", STUDENT: "resnet20"}
SOLVER:
  BATCH_SIZE: 64
  EPOCHS: 240
  LR: 0.05
  LR_DECAY_STAGES: [150, 180, 210]
  LR_DECAY_RATE: 0.1
  WEIGHT_DECAY: 0.0005
  MOMENTUM: 0.9
  TYPE: "SGD"
DKD: {CE_WEIGHT: 1.0, ALPHA: 1.0, BETA: 2.0, T: 4.0, WARMUP: 20}
"""
MDISTILLER_IMAGENET = """
EXPERIMENT: {NAME: 7, TAG: "kd,res34,res18", PROJECT: "imagenet_baselines"}
DATASET: {TYPE: "imagenet", NUM_WORKERS: 32, TEST: {BATCH_SIZE: 128}}
DISTILLER: {TYPE: "KD", TEACHER: "ResNet34", STUDENT: "ResNet18"}
SOLVER:
  TRAINER: base
  BATCH_SIZE: 512
  EPOCHS: 100
  LR: 2e-1
  LR_DECAY_STAGES: (30, 60, 90)
  WEIGHT_DECAY: 1e-4
KD: {TEMPERATURE: 1, LOSS: {CE_WEIGHT: 0.5, KD_WEIGHT: 0.5}}
LOG: {TENSORBOARD_FREQ: 50, SAVE_CHECKPOINT_FREQ: 10, PREFIX: "./output", WANDB: False}
"""


def loaded(tmp_path, text, *overrides):
    path = tmp_path / "given.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def test_a_file_of_mdistiller_runs_unchanged(tmp_path):
    config = loaded(tmp_path, MDISTILLER)
    assert (config.DKD.BETA, config.DKD.WARMUP, config.SOLVER.WEIGHT_DECAY) == (2.0, 20, 0.0005)
    assert config.DISTILLER.CORRECTION == "sort" and not config.DISTILLER.STANDARDIZE
    assert str(run_folder(config)) == "output/cifar100_baselines/dkd,res56,res20/seed_0"
    assert teacher_weights(config) == "download_ckpts/cifar_teachers/resnet56_vanilla/ckpt_epoch_240.pth"
    config = loaded(tmp_path, MDISTILLER_IMAGENET)
    assert (config.SOLVER.LR, config.SOLVER.WEIGHT_DECAY, config.SOLVER.LR_DECAY_STAGES) == (0.2, 1e-4, [30, 60, 90])
    assert config.EXPERIMENT.NAME == "7" and teacher_weights(config) == "v1"


def test_the_defaults_are_mdistillers():
    values = flatten(load_config(None).model_dump())
    expected = {
        "DATASET.TYPE": "cifar100", "DATASET.TEST.BATCH_SIZE": 64, "DISTILLER.TYPE": "NONE",
        "DISTILLER.TEACHER": "ResNet50", "DISTILLER.STUDENT": "resnet32", "SOLVER.BATCH_SIZE": 64,
        "SOLVER.EPOCHS": 240, "SOLVER.LR": 0.05, "SOLVER.LR_DECAY_STAGES": [150, 180, 210],
        "SOLVER.LR_DECAY_RATE": 0.1, "SOLVER.WEIGHT_DECAY": 1e-4, "SOLVER.MOMENTUM": 0.9, "KD.TEMPERATURE": 4,
        "KD.LOSS.CE_WEIGHT": 0.1, "KD.LOSS.KD_WEIGHT": 0.9, "DKD.CE_WEIGHT": 1, "DKD.ALPHA": 1, "DKD.BETA": 8,
        "DKD.T": 4, "DKD.WARMUP": 20, "LOG.SAVE_CHECKPOINT_FREQ": 40, "LOG.PREFIX": "./output",
    }  # fmt: skip
    assert {key: values[key] for key in expected} == expected


# RECIPES.md, pair by pair: lr, DKD's beta, LSKD's temperature and weight.
RECIPES = {
    ("resnet32x4", "resnet8x4"): (0.05, 8, 2, 9),
    ("resnet32x4", "ShuffleV1"): (0.01, 8, 2, 9),
    ("resnet32x4", "ShuffleV2"): (0.01, 8, 2, 9),
    ("resnet32x4", "wrn_16_2"): (0.05, 8, 3, 9),
    ("resnet32x4", "wrn_40_2"): (0.05, 8, 3, 9),
    ("ResNet50", "MobileNetV2"): (0.01, 8, 3, 1),
    ("wrn_40_2", "ShuffleV1"): (0.01, 8, 2, 9),
    ("wrn_40_2", "MobileNetV2"): (0.01, 8, 3, 9),
    ("wrn_40_2", "wrn_16_2"): (0.05, 6, 2, 9),
    ("wrn_40_2", "wrn_40_1"): (0.05, 6, 2, 9),
    ("vgg13", "vgg8"): (0.05, 6, 3, 9),
    ("vgg13", "MobileNetV2"): (0.01, 6, 3, 9),
    ("resnet56", "resnet20"): (0.05, 2, 2, 9),
    ("resnet110", "resnet32"): (0.05, 2, 2, 9),
    ("resnet110", "resnet20"): (0.05, 8, 4, 12),
}


def test_every_pair_of_the_field_is_listed():
    assert sorted(published_pairs(CIFAR / "kd.yaml")) == sorted(f"{t} -> {s}" for t, s in RECIPES)
    assert published_pairs(IMAGENET / "dkd.yaml") == ["ResNet34 -> ResNet18", "ResNet50 -> MobileNetV1"]


@pytest.mark.parametrize("pair", RECIPES, ids="-".join)
def test_cifar_recipes(pair):
    lr, beta, temperature, weight = RECIPES[pair]
    configs = {method: load_config(CIFAR / f"{method}.yaml", pair=pair) for method in METHODS}
    for config in configs.values():
        solver = config.SOLVER
        assert (64, 240, lr, 5e-4) == (solver.BATCH_SIZE, solver.EPOCHS, solver.LR, solver.WEIGHT_DECAY)
        assert (solver.LR_DECAY_STAGES, solver.LR_DECAY_RATE, solver.MOMENTUM) == ([150, 180, 210], 0.1, 0.9)
        assert pair == (config.DISTILLER.TEACHER, config.DISTILLER.STUDENT)
        assert config.DISTILLER.CORRECTION == "sort"
    for method, (t, kd) in {"kd": (4, 0.9), "ctkd": (4, 0.9), "lskd": (temperature, weight)}.items():
        loss = configs[method].KD.LOSS
        assert (t, 0.1, kd) == (configs[method].KD.TEMPERATURE, loss.CE_WEIGHT, loss.KD_WEIGHT)
    for method, (t, factor) in {"dkd": (4, 1), "lskd_dkd": (2, 9)}.items():
        dkd = configs[method].DKD
        assert (t, 1, beta, factor, 20) == (dkd.T, dkd.ALPHA, dkd.BETA, dkd.KD_WEIGHT, dkd.WARMUP)
    ctkd = configs["ctkd"].CTKD
    assert (ctkd.START, ctkd.END, ctkd.EPOCHS) == (1, 20, 10)
    labels = [method_label(configs[method]) for method in METHODS]
    assert labels == ["CE", "Sort-KD", "Sort-DKD", "Sort-CTKD", "Sort-LSKD", "Sort-LSKD+DKD"]


@pytest.mark.parametrize(("pair", "beta"), [(("ResNet34", "ResNet18"), 0.5), (("ResNet50", "MobileNetV1"), 2)])
def test_imagenet_recipes(pair, beta):
    configs = {method: load_config(IMAGENET / f"{method}.yaml", pair=pair) for method in METHODS}
    for config in configs.values():
        solver = config.SOLVER
        assert (solver.BATCH_SIZE, solver.EPOCHS, solver.LR, solver.WEIGHT_DECAY) == (512, 100, 0.2, 1e-4)
        assert (solver.LR_DECAY_STAGES, config.DATASET.TEST.BATCH_SIZE) == ([30, 60, 90], 128)
    kd, dkd, lskd = configs["kd"].KD, configs["dkd"].DKD, configs["lskd"].KD
    assert (kd.TEMPERATURE, kd.LOSS.CE_WEIGHT, kd.LOSS.KD_WEIGHT) == (1, 0.5, 0.5)
    assert (1, beta, 1) == (dkd.T, dkd.BETA, dkd.WARMUP)
    assert (lskd.TEMPERATURE, lskd.LOSS.CE_WEIGHT, lskd.LOSS.KD_WEIGHT) == (2, 1, 9)
    assert configs["ctkd"].CTKD.EPOCHS == 5


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("[!_]*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_every_file_parses_and_builds_its_models(path):
    shapes = {"cifar100": (100, (3, 32, 32)), "imagenet": (1000, (3, 224, 224)), "digits": (10, (1, 8, 8))}
    for pair in [None, *(line.split(" -> ") for line in published_pairs(path))]:
        config = load_config(path, pair=pair)
        roles = ["STUDENT"] if config.DISTILLER.TYPE == "NONE" else ["STUDENT", "TEACHER"]
        for role in roles:
            with torch.device("meta"):
                make_model(f"DISTILLER.{role}", config, *shapes[config.DATASET.TYPE])


def test_overrides_win_over_exceptions():
    config = load_config(CIFAR / "dkd.yaml", ["SOLVER.LR", "1e-3", "DKD.BETA", "3"], pair=("vgg13", "MobileNetV2"))
    assert (config.SOLVER.LR, config.DKD.BETA) == (1e-3, 3)
    # A pair given key by key has its exceptions as well.
    words = ["DISTILLER.TEACHER", "vgg13", "DISTILLER.STUDENT", "MobileNetV2", "SOLVER.LR_DECAY_STAGES", "[5, 9]"]
    config = load_config(CIFAR / "dkd.yaml", words)
    assert (config.SOLVER.LR, config.DKD.BETA, config.SOLVER.LR_DECAY_STAGES) == (0.01, 6, [5, 9])


def test_a_users_file_may_start_from_ours(tmp_path):
    text = f"BASE: {CIFAR / 'dkd.yaml'}\nDISTILLER: {{TEACHER: vgg13, STUDENT: vgg8}}\nDKD: {{BETA: 4}}\n"
    config = loaded(tmp_path, text)
    assert (config.DKD.BETA, config.DKD.WARMUP, config.SOLVER.WEIGHT_DECAY) == (4, 20, 5e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("SOLVER.LRR 3", r"SOLVER\.LRR: expected a known key, got 'SOLVER\.LRR'; nearest: SOLVER\.LR$"),
        ("LR 3", r"LR: expected a known key, got 'LR'; nearest: SOLVER\.LR"),
        ("DISTILER.TYPE KD", r"DISTILER: expected a known key"),
        ("KD.LOSS.KD_WEIHGT 3", r"nearest: KD\.LOSS\.KD_WEIGHT"),
        ("SOLVER.LR fast", r"SOLVER\.LR: expected a valid number.*got 'fast'"),
        ("SOLVER.LR 0", r"SOLVER\.LR: expected greater than 0, got 0"),
        ("SOLVER.EPOCHS 1.5", r"SOLVER\.EPOCHS: expected a valid integer.*got 1\.5"),
        ("SOLVER.LR_DECAY_STAGES [a]", r"SOLVER\.LR_DECAY_STAGES\.0: expected a valid integer"),
        ("SOLVER 3", r"SOLVER: expected a valid dictionary.*got 3"),
        ("DISTILLER.STANDARDIZE maybe", r"DISTILLER\.STANDARDIZE: expected a valid boolean.*got 'maybe'"),
        ("DISTILLER.CORRECTION sorted", r"expected 'sort', 'swap' or 'none', got 'sorted'; nearest: sort"),
        ("DISTILLER.TYPE dk", r"DISTILLER\.TYPE: .*; nearest: DKD"),
        ("SOLVER.TRAINER dot", r"SOLVER\.TRAINER: expected 'base', got 'dot'"),
        ("SOLVER.LR", r"expected KEY VALUE pairs, got 'SOLVER\.LR' without a value"),
        (
            "DISTILLER.TYPE NONE DISTILLER.STANDARDIZE true",
            r"DISTILLER\.STANDARDIZE: expected DISTILLER\.TYPE KD or DKD",
        ),
    ],
)
def test_errors_name_the_key_and_the_nearest(words, message):
    with pytest.raises(ConfigError, match=message):
        load_config(CIFAR / "kd.yaml", words.split())


def test_several_errors_are_told_at_once():
    with pytest.raises(ConfigError, match=r"SOLVER\.LR: .*; SOLVER\.MOMENTUM: "):
        load_config(None, ["SOLVER.LR", "x", "SOLVER.MOMENTUM", "y"])


def test_an_unknown_model_is_named_with_its_key():
    config = load_config(CIFAR / "kd.yaml", ["DISTILLER.STUDENT", "resnet8x5"])
    with pytest.raises(ConfigError, match=r"DISTILLER\.STUDENT: .*got 'resnet8x5'; nearest: resnet8x4"):
        make_model("DISTILLER.STUDENT", config, 100, (3, 32, 32))


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"kd2\.yaml: no such file; nearest: kd\.yaml"):
        load_config(CIFAR / "kd2.yaml")
    with pytest.raises(ConfigError, match=r"expected YAML in .*given\.yaml"):
        loaded(tmp_path, "SOLVER: {LR: [")
    with pytest.raises(ConfigError, match=r"expected sections with keys .* got list"):
        loaded(tmp_path, "- 1")
    with pytest.raises(ConfigError, match=r"BASE: .* got a circle"):
        loaded(tmp_path, "BASE: given.yaml")
    with pytest.raises(ConfigError, match="WHEN: expected entries with a list PAIRS"):
        loaded(tmp_path, "WHEN: [{SOLVER: {LR: 1}}]")


def test_the_command_line_takes_seeds_before_overrides():
    arguments = parse(["--cfg", "a.yaml", "--seeds", "1", "2", "3", "SOLVER.LR", "1", "--resume"])
    assert (arguments.seeds, arguments.overrides, arguments.resume) == ([1, 2, 3], ["SOLVER.LR", "1"], True)
    arguments = parse(["--pair", "a", "b", "SOLVER.LR", "1", "SOLVER.EPOCHS", "2", "--seeds", "4"])
    assert (arguments.pair, arguments.seeds, len(arguments.overrides)) == (["a", "b"], [4], 4)
    with pytest.raises(SystemExit):
        parse(["--seeds", "one"])


def test_the_readmes_commands_are_valid(capsys):
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^    python train/run\.py (.+)$", text, re.MULTILINE)
    for command in commands:
        main([*command.replace("train/configs", str(CONFIGS)).split(), "--dry-run"])
    shown = capsys.readouterr().out
    assert "student resnet32x4: 7,433,860 parameters" in shown and "student resnet8x4: 1,233,540 parameters" in shown
    for key, value in re.findall(r"`([A-Z]+(?:\.[A-Z_]+)+) (\w+)`", text):
        assert str(flatten(load_config(CIFAR / "kd.yaml", [key, value]).model_dump())[key]) == value
    assert len(commands) == 2 and "`TEACHER.CACHE_VIEWS 4`" in text
