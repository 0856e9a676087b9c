"""Runs compared: paired by seed and by all but the correction, drawn so that the question can be read off; and the
command that makes all of them, in pieces, whatever stops it."""

import re
import signal
import subprocess
import sys
import time

import pytest
from train_cases import CONFIGS, ROOT, one_thread_fixture  # noqa: F401

from train import plots
from train.compare import facets_of, markdown_table, paired_difference, plain_of
from train.config import ConfigError, load_config
from train.naming import run_folder
from train.protocol import make_plan
from train.reproduce import main, parse
from train.summary import Run, group_runs

TINY = [
    "DATASET.TYPE", "digits", "DATASET.NUM_WORKERS", "0", "EXPERIMENT.THREADS", "1", "SOLVER.BATCH_SIZE", "256",
    "DATASET.TEST.BATCH_SIZE", "500", "SOLVER.EPOCHS", "2",
]  # fmt: skip
PAIR = ["--pairs", "digits_teacher:digits_student"]


def made(tmp_path, method, *words, seed=1, accuracy=(50.0, 60.0), **columns):
    """A run that never ran: `accuracy` an epoch, everything else even."""
    words = [*words, "EXPERIMENT.SEED", str(seed), "LOG.PREFIX", str(tmp_path), "SOLVER.EPOCHS", str(len(accuracy))]
    config = load_config(CONFIGS / "cifar100" / f"{method}.yaml", words)
    names = ("lr", "temperature", "train_loss", "train_kd", "train_ce", "train_top1", "corrected", "mean_rank")
    history = []
    for number, value in enumerate(accuracy):
        row = dict.fromkeys([*names, "seconds", "test_ce", "test_top5"], 1.0) | {"train_loss": 3.0, "corrected": 0.25}
        row |= {name: values[number] for name, values in columns.items()}
        history.append(row | {"epoch": number + 1, "test_top1": value})
    return Run(run_folder(config), config, history)


def two_methods(tmp_path, *words):
    """Three seeds of KD and Sort-KD, one of CE, and the teacher's."""
    none = ["DISTILLER.CORRECTION", "none", *words]
    runs = [made(tmp_path, "vanilla", "DISTILLER.STUDENT", "resnet32x4", accuracy=(70.0, 80.0))]
    runs += [made(tmp_path, "vanilla", "DISTILLER.STUDENT", "resnet8x4")]
    runs += [made(tmp_path, "kd", *none, seed=seed, accuracy=(50.0, 60.0 + seed)) for seed in (1, 2, 3)]
    runs += [made(tmp_path, "kd", *words, seed=seed, accuracy=(50.0, 60.0 + 2 * seed)) for seed in (3, 1, 2)]
    return group_runs(runs)


def test_differences_are_paired_by_seed(tmp_path):
    groups = two_methods(tmp_path)
    difference = paired_difference(groups["KD"], groups["Sort-KD"], "last")
    assert sorted(difference.values) == [1, 2, 3] and difference.mean == 2
    # Student's t with 2 degrees of freedom is 4.3027 at 97.5 %; the deviation is 1.
    assert difference.interval == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
    assert str(difference) == "+2.00 [-0.48, +4.48]"
    one = paired_difference(groups["KD"][:1], groups["Sort-KD"], "best")
    assert one.values == [1] and one.interval is None and str(one) == "+1.00"
    unfinished = [Run(run.folder, run.config, run.history[:1]) for run in groups["Sort-KD"]]
    assert paired_difference(groups["KD"], unfinished, "last") is None


def test_only_the_correction_may_differ(tmp_path):
    groups = two_methods(tmp_path)
    assert plain_of(groups) == {"Sort-KD": "KD"}
    hotter = {"hotter": [made(tmp_path, "kd", "KD.TEMPERATURE", "5")], "KD": groups["KD"]}
    assert plain_of(hotter) == {}
    assert "corrected - plain" not in markdown_table(hotter)


def test_the_table_tells_what_the_correction_adds(tmp_path):
    table = markdown_table(two_methods(tmp_path))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    assert [line[0] for line in lines] == ["", "CE", "CE", "KD", "Sort-KD"]
    columns = dict(zip(lines[0], lines[-1], strict=True))
    assert columns["corrected - plain, last"] == "+2.00 [-0.48, +4.48]" and columns["corrected rows"] == "25.0%"
    assert columns["top-1 last"] == "64.00 ± 2.00" and columns["models"] == "resnet32x4 → resnet8x4"


def test_facets_put_a_pair_together(tmp_path):
    other = ["DISTILLER.TEACHER", "resnet8x4", "DISTILLER.STUDENT", "resnet8"]
    groups = group_runs(
        [run for runs in two_methods(tmp_path).values() for run in runs] + [made(tmp_path, "kd", *other)]
    )
    first, second = facets_of(groups)
    assert (first.pair, list(first.groups)) == ("resnet32x4 → resnet8x4", ["CE", "KD", "Sort-KD"])
    assert first.plain == {"Sort-KD": "KD"} and first.methods["Sort-KD"] == "KD"
    assert [run.last for run in first.teacher] == [80.0]
    # The student of one pair is the teacher of the other.
    assert second.pair == "resnet8x4 → resnet8" and [run.last for run in second.teacher] == [60.0]


@pytest.fixture
def figures(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots.plt, "close", drawn.append)
    return drawn


def panels(figure):
    return {axes.get_ylabel(): axes for axes in figure.axes}


def test_one_spike_does_not_squash_a_curve(tmp_path, figures):
    calm = [2.0 - 0.05 * number for number in range(12)]
    spiky = [*calm[:6], 90.0, *calm[7:]]
    run = made(tmp_path, "kd", accuracy=(50.0,) * 12, test_ce=spiky, train_ce=calm)
    plots.plot_run(run, tmp_path / "a.png")
    axes = panels(figures[0])["cross-entropy"]
    assert axes.get_ylim()[1] < 2.5 and axes.get_ylim()[0] < calm[-1]
    assert [text.get_text() for text in axes.texts] == ["not shown: up to 90"]
    plots.plot_run(made(tmp_path, "kd", accuracy=(50.0,) * 12, test_ce=calm, train_ce=calm), tmp_path / "b.png")
    axes = panels(figures[1])["cross-entropy"]
    assert axes.get_ylim()[0] < calm[-1] and axes.get_ylim()[1] > calm[0] and not axes.texts


def test_the_loss_is_the_sum_of_its_parts(tmp_path, figures):
    run = made(tmp_path, "dkd", train_loss=[9.0, 5.0], train_ce=[3.0, 1.5])
    plots.plot_run(run, tmp_path / "a.png")
    axes = panels(figures[0])["training loss, its weighted parts"]
    cross_entropy, distillation = (part.get_paths()[0].vertices[:, 1] for part in axes.collections)
    assert (cross_entropy.max(), distillation.max(), distillation.min()) == (3.0, 9.0, 1.5)
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 9


@pytest.mark.parametrize(
    ("method", "words", "expected"),
    [
        ("vanilla", [], set()),
        ("kd", ["DISTILLER.CORRECTION", "none"], {"parts"}),
        ("kd", [], {"parts", "corrected"}),
        ("ctkd", [], {"parts", "corrected", "temperature"}),
    ],
)
def test_a_run_has_the_panels_that_say_something(method, words, expected, tmp_path, figures):
    run = made(tmp_path, method, *words, seed=7)
    plots.plot_run(run, tmp_path / "a.png")
    names = {"training loss, its weighted parts": "parts", "corrected training rows, %": "corrected"}
    names |= {"learned temperature": "temperature"}
    shown = panels(figures[0])
    assert {names[label] for label in shown if label in names} == expected and len(shown) == 3 + len(expected)
    assert all(axes.lines or axes.collections for axes in shown.values())
    title = figures[0].get_suptitle()
    assert title.endswith("seed 7" if "temperature" in expected or method == "vanilla" else "seed 7, temperature 1")
    assert "resnet8x4" in title and ("resnet32x4 → " in title) == (method != "vanilla")
    if "corrected" in expected:
        assert shown["corrected training rows, %"].get_ylim()[0] == 0


def test_the_comparison_names_its_rows_and_leaves_the_teacher_out(tmp_path, figures):
    plots.plot_groups(two_methods(tmp_path), tmp_path / "a.png", "title")
    curves, ends, differences, shares = figures[0].axes
    assert [text.get_text() for text in ends.get_yticklabels()] == ["CE", "KD", "Sort-KD"]
    assert ends.get_xlim()[1] < 70 and ends.get_title(loc="right") == "teacher 80.00 →"  # students end at 66
    assert curves.get_title(loc="left") == "resnet32x4 → resnet8x4" and shares.get_ylim()[0] == 0
    points = sorted(x for line in differences.lines if line.get_marker() == "o" for x in line.get_xdata())
    assert points == [1, 2, 3] and differences.get_xlim()[0] < 0 < 3 < differences.get_xlim()[1]
    named = two_methods(tmp_path)
    plots.plot_groups({"$KD$ \\frac": named["KD"], "CE": named["CE, resnet8x4"]}, tmp_path / "names.png", "$a_$")
    without = two_methods(tmp_path)
    del without["Sort-KD"]
    plots.plot_groups(without, tmp_path / "b.png", "title")
    assert len(figures[2].axes) == 2  # nothing to correct, nothing to pair


# -- the protocol ------------------------------------------------------------------------------------------------------


def test_a_protocol_is_the_recipe_in_proportion():
    full, short = (
        make_plan(name, ["resnet56:resnet20"], ["Sort-LSKD+DKD", "CTKD"], [1], []) for name in ("full", "short")
    )
    teacher, dkd, ctkd = full
    assert dkd.SOLVER == load_config(CONFIGS / "cifar100" / "lskd_dkd.yaml").SOLVER and dkd.DKD.WARMUP == 20
    assert (dkd.DKD.T, dkd.DKD.KD_WEIGHT, dkd.DKD.BETA) == (3, 18, 2)  # the pair's own
    assert (dkd.DISTILLER.CORRECTION, ctkd.DISTILLER.CORRECTION, ctkd.CTKD.EPOCHS) == ("sort", "none", 10)
    assert (teacher.DISTILLER.TYPE, teacher.DISTILLER.STUDENT, teacher.SOLVER.EPOCHS) == ("NONE", "resnet56", 240)
    assert dkd.TEACHER.WEIGHTS == "output/cifar100_full/ce_resnet56/seed_1/checkpoints/epoch_0240.pth"
    teacher, dkd, ctkd = short
    assert (dkd.SOLVER.EPOCHS, dkd.SOLVER.LR_DECAY_STAGES, dkd.DKD.WARMUP) == (60, [38, 45, 52], 5)
    assert (teacher.SOLVER, ctkd.CTKD.EPOCHS, dkd.DKD.KD_WEIGHT) == (dkd.SOLVER, 2, 18)
    # Fewer epochs by hand keep the proportion, too; a schedule by hand is taken as it is.
    (_, fewer) = make_plan("short", ["resnet56:resnet20"], ["KD"], [1], ["SOLVER.EPOCHS", "24"])
    assert fewer.SOLVER.LR_DECAY_STAGES == [15, 18, 21]
    words = ["SOLVER.EPOCHS", "24", "SOLVER.LR_DECAY_STAGES", "[5]"]
    assert make_plan("short", ["resnet56:resnet20"], ["KD"], [1], words)[1].SOLVER.LR_DECAY_STAGES == [5]


def test_what_pairs_share_is_trained_once():
    pairs = ["resnet56:resnet20", "resnet110:resnet20", "wrn_40_2:wrn_16_2", "resnet32x4:wrn_40_2"]
    plan = make_plan("short", pairs, ["CE", "KD"], [1, 2], [])
    names = [f"{config.EXPERIMENT.NAME} {config.EXPERIMENT.SEED}" for config in plan]
    assert len(names) == len(set(names)) and names.count("ce_resnet20 1") == 1
    assert names[:3] == ["ce_resnet56 1", "ce_resnet20 1", "kd_resnet56_resnet20 1"]
    assert names.count("ce_wrn_40_2 1") == names.count("ce_wrn_40_2 2") == 1  # a student, and with seed 1 a teacher


def test_a_teachers_keys_are_for_those_who_have_one():
    words = ["TEACHER.CACHE_VIEWS", "3", "SOLVER.AMP", "bf16"]
    teacher, alone, taught = make_plan("short", ["resnet56:resnet20"], ["CE", "KD"], [1], words)
    assert [config.TEACHER.CACHE_VIEWS for config in (teacher, alone, taught)] == [0, 0, 3]
    assert teacher.TEACHER.WEIGHTS == alone.TEACHER.WEIGHTS == "" != taught.TEACHER.WEIGHTS
    assert {config.SOLVER.AMP for config in (teacher, alone, taught)} == {"bf16"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "Sort-KDD"], r"--methods: .*got 'Sort-KDD'; nearest: Sort-KD"),
        (["--methods", "Sort-CE"], r"--methods: .*got 'Sort-CE'"),
        (["--pairs", "resnet56:"], r"--pairs: expected TEACHER:STUDENT.*got 'resnet56:'"),
        (["SOLVER.LRR", "1"], r"nearest: SOLVER\.LR$"),
    ],
)
def test_what_cannot_be_planned_is_refused_before_anything_runs(words, message, capsys):
    with pytest.raises(SystemExit, match=message):
        main(words)
    for word, option in (("none", "--seeds"), ("resnet56", "--pairs"), ("-1", "--minutes"), ("0", "--together")):
        with pytest.raises(SystemExit):
            parse([option, word])
        assert f"argument {option}" in capsys.readouterr().err


def test_lists_end_where_the_overrides_start():
    arguments = parse(["--methods", "CE", "Sort-KD", "SOLVER.LR", "1", "--seeds", "4", "5", "SOLVER.EPOCHS", "2"])
    assert (arguments.methods, arguments.seeds) == (["CE", "Sort-KD"], [4, 5])
    assert sorted(arguments.overrides) == ["1", "2", "SOLVER.EPOCHS", "SOLVER.LR"]
    with pytest.raises(ConfigError, match="without a value"):
        make_plan("short", ["a:b"], ["KD"], [1], ["SOLVER.LR"])


@pytest.mark.slow
@pytest.mark.parametrize("together", ("1", "4"))
def test_it_goes_on_where_it_stopped(tmp_path, capsys, together):
    """Stopped by its minutes, killed, then left alone: every run once, one table and one picture."""
    words = [*PAIR, "--methods", "CE", "KD", "Sort-KD", "--seeds", "1", "2", *TINY, "LOG.PREFIX", str(tmp_path)]
    words += ["--together", together]
    folder = tmp_path / "cifar100_short"
    command = [sys.executable, str(ROOT / "train" / "reproduce.py"), *words]
    long = [*command, "SOLVER.EPOCHS", "100000", "EXPERIMENT.PROJECT", "long"]
    done = subprocess.run([*long, "--minutes", "0.05"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "stopped: 0.05 minutes are over" in done.stderr, done.stderr
    assert "0 of 7 runs are finished" in done.stdout and "Traceback" not in done.stderr
    assert done.stderr.endswith("runs are left: the same command goes on with them\n")
    with subprocess.Popen(long, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(0.5 if process.stderr.readline() else 0)  # the first run's bar
        process.send_signal(signal.SIGTERM)
        assert process.stderr.read().endswith("stopped by SIGTERM; the same command goes on\n")
    assert process.returncode == 143
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        while not (folder / "kd_digits_teacher_digits_student" / "seed_1" / "checkpoints" / "epoch_0001.pth").exists():
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    main(words)
    shown = capsys.readouterr().out
    assert "[1/7] CE, digits_teacher, seed 1: finished before" in shown and "7 of 7 runs are finished" in shown
    table = (folder / "report.md").read_text()
    assert table in shown and (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(
        r"^\| Sort-KD \| digits_teacher → digits_student \| 2 \| 2 \| .*\| [+-]\d.* \[", table, re.MULTILINE
    )
    main(words)
    shown = capsys.readouterr().out
    assert shown.count("finished before") == 7 and table in shown


@pytest.mark.parametrize("together", ("1", "3"))
@pytest.mark.filterwarnings("ignore:run 1 of 2 ended with ConfigError")
def test_a_run_that_fails_leaves_the_others_going(tmp_path, capsys, together):
    words = [*PAIR, "--methods", "KD", "LSKD", "--seeds", "1", *TINY, "LOG.PREFIX", str(tmp_path)]
    words += ["--together", together]
    blocked = tmp_path / "cifar100_short" / "kd_digits_teacher_digits_student"
    blocked.parent.mkdir()
    blocked.write_text("a file where a folder should be")
    with pytest.raises(SystemExit, match="runs are left"):
        main(words)
    shown = capsys.readouterr()
    assert re.search(r"\[2/3\] KD, .*: ConfigError: .*LOG\.PREFIX: expected a folder", shown.err)
    assert "2 of 3 runs are finished" in shown.out and "| LSKD |" in shown.out
