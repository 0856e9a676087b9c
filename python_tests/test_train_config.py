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
METHODS = ["vanilla", "kd", "dkd", "ctkd", "lskd", "lskd_dkd"]  # of both data sets

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


# As published, pair by pair: lr, DKD's beta, LSKD's (temperature, weight), LSKD + DKD's (temperature, weight, beta).
RECIPES = {
    ("resnet32x4", "resnet8x4"): (0.05, 8, (2, 9), (2, 9, 8)),
    ("resnet32x4", "vgg8"): (0.05, 8, (2, 9), (2, 9, 8)),
    ("resnet32x4", "ShuffleV1"): (0.01, 8, (2, 9), (2, 9, 8)),
    ("resnet32x4", "ShuffleV2"): (0.01, 8, (2, 9), (2, 9, 8)),
    ("resnet32x4", "wrn_16_2"): (0.05, 8, (3, 9), (2, 9, 2)),
    ("resnet32x4", "wrn_40_2"): (0.05, 8, (3, 9), (2, 9, 8)),
    ("ResNet50", "MobileNetV2"): (0.01, 8, (3, 1), (2, 15, 2)),
    ("wrn_40_2", "ShuffleV1"): (0.01, 8, (2, 9), (2, 9, 8)),
    ("wrn_40_2", "MobileNetV2"): (0.01, 8, (3, 9), (2, 15, 2)),
    ("wrn_40_2", "wrn_16_2"): (0.05, 6, (2, 9), (2, 12, 2)),
    ("wrn_40_2", "wrn_40_1"): (0.05, 6, (2, 9), (2, 12, 2)),
    ("wrn_40_2", "resnet8x4"): (0.05, 8, (2, 9), (2, 18, 2)),
    ("vgg13", "vgg8"): (0.05, 6, (3, 9), (2, 15, 2)),
    ("vgg13", "MobileNetV2"): (0.01, 6, (3, 9), (3, 9, 2)),
    ("resnet56", "resnet20"): (0.05, 2, (2, 9), (3, 18, 2)),
    ("resnet110", "resnet32"): (0.05, 2, (2, 9), (2, 15, 2)),
    ("resnet110", "resnet20"): (0.05, 8, (4, 12), (2, 15, 2)),
}


def test_every_pair_of_the_field_is_listed():
    assert sorted(published_pairs(CIFAR / "kd.yaml")) == sorted(f"{t} -> {s}" for t, s in RECIPES)
    assert published_pairs(IMAGENET / "dkd.yaml") == ["ResNet34 -> ResNet18", "ResNet50 -> MobileNetV1"]


@pytest.mark.parametrize("pair", RECIPES, ids="-".join)
def test_cifar_recipes(pair):
    lr, beta, lskd, lskd_dkd = RECIPES[pair]
    methods = [*METHODS, "ctkd_lskd"]
    configs = {method: load_config(CIFAR / f"{method}.yaml", pair=pair) for method in methods}
    for config in configs.values():
        solver = config.SOLVER
        assert (64, 240, lr, 5e-4) == (solver.BATCH_SIZE, solver.EPOCHS, solver.LR, solver.WEIGHT_DECAY)
        assert (solver.LR_DECAY_STAGES, solver.LR_DECAY_RATE, solver.MOMENTUM) == ([150, 180, 210], 0.1, 0.9)
        assert pair == (config.DISTILLER.TEACHER, config.DISTILLER.STUDENT)
        assert config.DISTILLER.CORRECTION == "sort"
    for method, (t, kd) in {"kd": (4, 0.9), "ctkd": (4, 0.9), "lskd": lskd, "ctkd_lskd": (4, 9)}.items():
        loss = configs[method].KD.LOSS
        assert (t, 0.1, kd) == (configs[method].KD.TEMPERATURE, loss.CE_WEIGHT, loss.KD_WEIGHT)
    for method, (t, factor, b) in {"dkd": (4, 1, beta), "lskd_dkd": lskd_dkd}.items():
        dkd = configs[method].DKD
        assert (t, 1, b, factor, 20) == (dkd.T, dkd.ALPHA, dkd.BETA, dkd.KD_WEIGHT, dkd.WARMUP)
    for method in ("ctkd", "ctkd_lskd"):
        ctkd = configs[method].CTKD
        assert (ctkd.START, ctkd.END, ctkd.EPOCHS) == (1, 20, 10)
    labels = [method_label(configs[method]) for method in methods]
    assert labels == ["CE", "Sort-KD", "Sort-DKD", "Sort-CTKD", "Sort-LSKD", "Sort-LSKD+DKD", "Sort-CTKD+LSKD"]


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


# YAML by itself would make of these 1.1, 7, 45000, 1000, "run", a date, True, a mapping, None, a list and "q".
TEXTS = ["1.10", "007", "12:30:00", "1_000", "run #3", "2026-11-26", "on", "a: b", "null", "~", "[x]", '"q"', ""]


@pytest.mark.parametrize("text", TEXTS)
def test_text_stays_text(text, tmp_path):
    assert text == load_config(CIFAR / "kd.yaml", ["EXPERIMENT.NAME", text]).EXPERIMENT.NAME
    assert (
        f"runs {text}/x.pth"
        == load_config(CIFAR / "kd.yaml", ["TEACHER.WEIGHTS", f"runs {text}/x.pth"]).TEACHER.WEIGHTS
    )


def test_values_of_a_file_are_read_by_their_keys_type(tmp_path):
    config = loaded(
        tmp_path, "EXPERIMENT: {NAME: 1.10, TAG: 007}\nLOG: {WANDB: off, PREFIX: 2026-11-26}\nSOLVER: {LR: 1e-3}\n"
    )
    assert (config.EXPERIMENT.NAME, config.EXPERIMENT.TAG, config.LOG.PREFIX) == ("1.10", "007", "2026-11-26")
    assert (config.LOG.WANDB, config.SOLVER.LR) == (False, 1e-3)


@pytest.mark.parametrize(
    "text", ["SOLVER:\n  # LR: 1\n", "WHEN:\nPAIRS:\nBASE:\n", "EXPERIMENT: {NAME: }", "SOLVER: {LR: null}"]
)
def test_a_key_without_a_value_is_not_there(text, tmp_path):
    assert loaded(tmp_path, text) == load_config(None) and published_pairs(tmp_path / "given.yaml") == []


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(encoding, tmp_path):
    (tmp_path / "given.yaml").write_text("EXPERIMENT: {NAME: café}", encoding=encoding)
    assert load_config(tmp_path / "given.yaml").EXPERIMENT.NAME == "café"


def test_a_runs_folder_carries_what_was_overridden(tmp_path):
    """So that two runs of one file with other values do not meet; what a resumed run may differ in stays out."""
    path = tmp_path / "given.yaml"
    path.write_text(MDISTILLER)

    def folder(words="", path=path, pair=None):
        return run_folder(load_config(path, words.split(), pair=pair)).parent.name

    assert folder() == folder("SOLVER.EPOCHS 3 EXPERIMENT.SEED 0 LOG.WANDB off DATASET.ROOT x") == "dkd,res56,res20"
    assert folder("SOLVER.LR 0.05 DKD.T 4") == folder()  # nothing but what the file says
    assert folder("DISTILLER.CORRECTION none") == "dkd,res56,res20,DISTILLER.CORRECTION=none"
    assert folder(pair=("vgg13", "vgg8")) == "dkd,res56,res20,DISTILLER.TEACHER=vgg13,DISTILLER.STUDENT=vgg8"
    assert folder("SOLVER.LR 1e-1") == folder("SOLVER.LR 0.10") == "dkd,res56,res20,SOLVER.LR=0.1"
    words = "SOLVER.LR_DECAY_STAGES [5,9] DISTILLER.STUDENT timm/resnet18"
    assert folder(words) == "dkd,res56,res20,DISTILLER.STUDENT=timm-resnet18,SOLVER.LR_DECAY_STAGES=5,9"
    assert folder("EXPERIMENT.NAME mine SOLVER.LR 1") == "mine"  # a name given says it all
    # Without NAME and TAG the name has the method and the pair in it already.
    ours = CIFAR / "kd.yaml"
    assert folder("DISTILLER.CORRECTION none SOLVER.LR 1", ours) == "kd_resnet32x4_resnet8x4,SOLVER.LR=1.0"
    assert folder("", ours, ("vgg13", "vgg8")) == "sort-kd_vgg13_vgg8"


FEATURES = "AT CRD FITNET KDSVD NST OFD PKT REVIEWKD RKD SP VID"


@pytest.mark.parametrize("method", [*FEATURES.split(), "ReviewKD"])
def test_methods_that_are_not_here_are_refused_by_name(method, tmp_path):
    for text in (
        f"DISTILLER: {{TYPE: {method}}}\nSOLVER: {{TRAINER: crd}}\n{method}: {{LOSS: {{CE_WEIGHT: 1}}}}",
        f"{method}: {{}}",
    ):
        with pytest.raises(
            ConfigError, match=rf"^\S+: .*logits .*got '{method}', which compares features and is not here; run"
        ) as e:
            loaded(tmp_path, text)
        assert "--pair TEACHER STUDENT" in str(e.value) and "expected a known key" not in str(e.value)


@pytest.mark.parametrize("solver", ["TRAINER: dot, DOT: {DELTA: 0.075}", "TRAINER: crd_dot", "DOT: {DELTA: 0.075}"])
def test_the_dot_trainer_is_refused_by_name(solver, tmp_path):
    text = f"DATASET: {{TYPE: tiny_imagenet}}\nDISTILLER: {{TYPE: KD}}\nSOLVER: {{{solver}}}"
    with pytest.raises(
        ConfigError, match=r"^SOLVER\.(TRAINER|DOT): .*mdistiller's DOT trainer .* leave SOLVER\.TRAINER"
    ):
        loaded(tmp_path, text)


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
        ("SOLVER.LR 0", r"SOLVER\.LR: expected greater than 0, got '0'"),
        ("SOLVER.EPOCHS 1.5", r"SOLVER\.EPOCHS: expected a valid integer.*got '1\.5'"),
        ("SOLVER.LR_DECAY_STAGES ['a']", r"SOLVER\.LR_DECAY_STAGES\.0: expected a valid integer"),
        ("SOLVER.LR_DECAY_STAGES [a]", r"SOLVER\.LR_DECAY_STAGES: expected a valid list, got '\[a\]'"),
        ("SOLVER 3", r"SOLVER: expected a section with keys, got '3'"),
        ("EXPERIMENT.SEED 9223372036854775808", r"EXPERIMENT\.SEED: expected less than 9223372036854775808"),
        ("EXPERIMENT.THREADS 100000", r"EXPERIMENT\.THREADS: expected less than or equal to 1024"),
        ("SOLVER.BATCH_SIZE 99999999999999999999", r"SOLVER\.BATCH_SIZE: expected less than 2147483648"),
        ("EXPERIMENT.NAME ../..", r"EXPERIMENT\.NAME: expected a name of a folder below LOG\.PREFIX, got '\.\./\.\.'"),
        ("EXPERIMENT.PROJECT a/../../b", r"EXPERIMENT\.PROJECT: expected a name of a folder below LOG\.PREFIX"),
        ("EXPERIMENT.TAG /tmp/elsewhere", r"EXPERIMENT\.TAG: expected a name of a folder below LOG\.PREFIX"),
        ("EXPERIMENT.NAME caf\udce9", r"EXPERIMENT\.NAME: expected characters that can be printed"),
        ("DISTILLER.STANDARDIZE maybe", r"DISTILLER\.STANDARDIZE: expected a valid boolean.*got 'maybe'"),
        ("DISTILLER.CORRECTION sorted", r"expected 'sort', 'swap' or 'none', got 'sorted'; nearest: sort"),
        ("DISTILLER.TYPE dk", r"DISTILLER\.TYPE: .*; nearest: DKD"),
        ("SOLVER.TRAINER fast", r"SOLVER\.TRAINER: expected 'base', got 'fast'"),
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
    with pytest.raises(
        ConfigError, match=r"expected a YAML file, got \S+cifar100: a folder, with .*ctkd\.yaml.* in it"
    ):
        load_config(CIFAR)
    with pytest.raises(ConfigError, match=r"expected YAML in UTF-8 in .*given\.yaml"):
        loaded(tmp_path, "SOLVER: {LR: [")
    (tmp_path / "given.yaml").write_bytes("EXPERIMENT: {NAME: café}".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"expected YAML in UTF-8 in \S+given\.yaml, got .*position 22"):
        load_config(tmp_path / "given.yaml")
    with pytest.raises(ConfigError, match=r"expected sections with keys .* got list"):
        loaded(tmp_path, "- 1")
    with pytest.raises(ConfigError, match=r"BASE: .* got a circle"):
        loaded(tmp_path, "BASE: given.yaml")


@pytest.mark.parametrize(
    ("text", "lines"),
    [("SOLVER: {LR: 1}\nLOG: {WANDB: off}\nSOLVER: {EPOCHS: 3}", (1, 3)), ("SOLVER:\n  LR: 1\n  LR: 2", (2, 3))],
)
def test_a_key_given_twice(text, lines, tmp_path):
    with pytest.raises(
        ConfigError, match=rf"each key once in \S+, got (SOLVER|LR) in line {lines[0]} and again in line {lines[1]}$"
    ):
        loaded(tmp_path, text)
    # What a merge key brings along is there to be overridden.
    merged = "SOLVER: &base {LR: 1, EPOCHS: 3}\nWHEN: [{PAIRS: ['* -> *'], SOLVER: {<<: *base, LR: 2}}]"
    assert loaded(tmp_path, merged).SOLVER.LR == 2


PAIRS = r'WHEN\.0\.PAIRS: expected a list of "teacher -> student", got '


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("WHEN: 3", r"WHEN: expected a valid list, got '3', in \S+given\.yaml"),
        ("WHEN: {PAIRS: [a -> b]}", r"WHEN: expected a valid list, got \{"),
        ("WHEN: [3]", r"WHEN\.0: expected a section with keys, got '3'"),
        ("WHEN: [{SOLVER: {LR: 1}}]", PAIRS),
        ("WHEN: [{PAIRS: }]", PAIRS),
        ("WHEN: [{PAIRS: [3]}]", PAIRS),
        ("WHEN: [{PAIRS: resnet56 -> resnet20}]", PAIRS),
        ("WHEN: [{PAIRS: [resnet56]}]", PAIRS),
        ("WHEN: [{PAIRS: [no -> pair], SOLVERR: {LR: 1}}]", r"WHEN: SOLVERR\.LR: expected a known key, .*; nearest: SOLVER\.LR"),
        ("PAIRS: x", r'PAIRS: expected a list of "teacher -> student", got \'x\', in \S+given\.yaml'),
        ("BASE: [a]", r"BASE: expected a valid string, got \['a'\], in \S+given\.yaml"),
        ("BASE: ''", r"BASE: expected a YAML file, got \S+: a folder, with given\.yaml in it"),
        ("BASE: gven.yaml", r"BASE: expected a YAML file, got \S+/gven\.yaml: no such file; nearest: given\.yaml"),
        ("3: 4", r"3: expected a known key, got '3'"),
        ("SOLVER: {3: 4}", r"SOLVER\.3: expected a known key"),
        ("''", r"expected sections with keys in \S+, got str ''"),
    ],
)  # fmt: skip
def test_odd_files_are_refused_in_words(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, text)


def test_the_command_line_takes_seeds_before_overrides():
    arguments = parse(["--cfg", "a.yaml", "--seeds", "1", "2", "3", "SOLVER.LR", "1", "--resume"])
    assert (arguments.seeds, arguments.overrides, arguments.resume) == ([1, 2, 3], ["SOLVER.LR", "1"], True)
    arguments = parse(["--pair", "a", "b", "SOLVER.LR", "1", "SOLVER.EPOCHS", "2", "--seeds", "4"])
    assert (arguments.pair, arguments.seeds, len(arguments.overrides)) == (["a", "b"], [4], 4)


@pytest.mark.parametrize("words", ["one", "1.5", "1 2,3", "-1", "²", "1 2 3rd SOLVER.LR 1"])
def test_seeds_that_are_no_numbers(words, capsys):
    with pytest.raises(SystemExit):
        parse(["--seeds", *words.split()])
    assert "argument --seeds: expected whole numbers, got '" in capsys.readouterr().err


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
