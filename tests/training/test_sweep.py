"""Sweeps: expansion, the table, and real processes."""

import csv
import fcntl
import json
import os
import shutil
import signal
import statistics
import sys
import threading

import pytest
import yaml

from bitwright.errors import BitwrightError
from bitwright.training import sweep as sweeping
from bitwright.training.folder import RunFolder
from bitwright.training.sweep import command, markdown, run_sweep
from bitwright.training.sweep_file import Run, SweepFile, as_override, expand, read_sweep

TINY = {
    "data": {"name": "digits", "options": {"subset": 128}},
    "model": {"name": "resnet8", "options": {"width": 4}},
    "bits": "w4a4",
    "schedule": {"epochs": 1, "batch_size": 64},
    "threads": 1,
}


def test_every_combination_once_whole_rounds_of_seeds_first():
    sweep = SweepFile(
        recipe="r", seeds=[3, 4], grid={"bits": ["w2a2", "w4a4"]}, variants={"a": {}, "b": {"optimizer.lr": 0.5}}
    )
    runs = expand(sweep)
    assert [r.name for r in runs[:4]] == ["a-w2a2-seed3", "b-w2a2-seed3", "a-w4a4-seed3", "b-w4a4-seed3"]
    assert len({r.name for r in runs}) == 8
    assert runs[1].overrides == ("threads=1", "bits=w2a2", "optimizer.lr=0.5", "seed=3")


@pytest.mark.parametrize("value", [1, 0.04, "w2a2", True, None, [{"bwrf": {"sample": True}}, "kd"], {"a": [1, "x: y"]}])
def test_overrides_are_one_line_of_yaml_that_reads_back(value):
    key, _, text = as_override("some.key", value).partition("=")
    assert key == "some.key"
    assert "\n" not in text
    assert yaml.safe_load(text) == value


def test_two_runs_may_not_share_a_folder():
    with pytest.raises(BitwrightError, match="share the folder"):
        expand(SweepFile(recipe="r", seeds=[1, 1]))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        # Before: the variant won, and its accuracy stood in the rows of w2a2 and of w4a4.
        ({"grid": {"bits": ["w2a2", "w4a4"]}, "variants": {"v": {"bits": "w8a8"}}}, r"variants\.v\.bits: grid\.bits"),
        ({"grid": {"schedule.epochs": [1, 2]}, "variants": {"v": {"schedule": {"batch_size": 9}}}}, "v.schedule: grid"),
        ({"grid": {"schedule": [{"epochs": 1}]}, "variants": {"v": {"schedule.epochs": 9}}}, "v.schedule.epochs: grid"),
        # Before: `seeds` won, without a word.
        ({"grid": {"seed": [5, 6]}}, r"grid\.seed: \[5, 6\] is not accepted; use seeds"),
        ({"variants": {"v": {"seed": 7}}}, r"variants\.v\.seed: 7"),
        ({"overrides": {"seed": 7}}, r"overrides\.seed: 7"),
    ],
)
def test_a_key_that_another_would_hide_is_refused(keys, message):
    with pytest.raises(BitwrightError, match=message):
        expand(SweepFile(recipe="r", **keys))


def test_a_variant_may_set_a_neighbour_of_a_grid_key():
    keys = {"grid": {"optimizer.lr": [0.1]}, "variants": {"v": {"optimizer.lr_x": 1, "optimizer.name": "adamw"}}}
    assert expand(SweepFile(recipe="r", **keys))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe: r\nvariant: {}\n", "variant: .*accepted keys: recipe"),
        ("recipe: r\njobs: 0\n", "jobs: 0"),
        ("recipe: r\nseeds: [a]\n", "seeds.0: 'a'"),
        ("- r\n", "mapping"),
        ("recipe: [\n", "not YAML"),
        ("recipe: r\nrecipe: s\n", "not YAML: the key 'recipe' is given twice"),
        ("recipe: r\ngrid: {bits: []}\n", r"grid\.bits: \[\]"),
        ("recipe: r\nvariants: {}\n", "variants: {}"),
        ("\x00", "not YAML"),
    ],
)
def test_bad_files_get_one_line(tmp_path, text, message):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(BitwrightError, match=message) as caught:
        read_sweep(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_markdown_has_mean_and_sample_deviation():
    accuracies = [0.80, 0.82, 0.87]
    rows = [
        {"variant": "v", "accuracy": a, "float_accuracy": 0.9, "train_seconds": 10.0, "bitops": 2e9} for a in accuracies
    ]
    line = markdown(rows, []).splitlines()[2]
    percent = [100 * a for a in accuracies]
    assert line == f"| v | 83.00 ± {statistics.stdev(percent):.2f} | 90.00 | 3 | 10 | 2.0000 |"


def test_a_name_with_a_bar_or_a_break_stays_one_cell():
    row = {"accuracy": 0.5, "float_accuracy": None, "train_seconds": 1.0, "bitops": 1e9}
    table = markdown([{"variant": "a|b", **row}, {"variant": "c\nd", **row}], []).splitlines()
    assert [line.split("|")[1] for line in table[2:]] == [" a/b ", " c d "]
    assert {line.count("|") for line in table} == {7}


@pytest.mark.slow
def test_a_sweep_runs_survives_a_failing_run_and_goes_on(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(TINY))
    path, out = tmp_path / "sweep.yaml", tmp_path / "out"
    bad = {"methods": ["kd"]}  # no partner in the recipe
    sweep = {"recipe": "base.yaml", "seeds": [0], "jobs": 2, "variants": {"lsq": {}, "bad": bad}}
    path.write_text(yaml.safe_dump(sweep, sort_keys=False))
    said: list[str] = []
    assert run_sweep(path, out, say=said.append) == 1
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert [r["run"] for r in rows] == ["lsq-seed0", "bad-seed0"]
    summary = json.loads((out / "lsq-seed0" / "summary.json").read_text())
    assert float(rows[0]["accuracy"]) == summary["accuracy"]
    assert "partner" in rows[1]["error"]
    assert rows[1]["accuracy"] == ""
    # A second call runs only what is missing: finished runs keep their files.
    stamp = (out / "lsq-seed0" / "summary.json").stat().st_mtime_ns
    sweep["variants"] = {"lsq": {}}
    path.write_text(yaml.safe_dump(sweep))
    said.clear()
    assert run_sweep(path, out, say=said.append) == 0
    assert said == ["1 runs, 1 finished before, 2 side by side"]
    assert (out / "lsq-seed0" / "summary.json").stat().st_mtime_ns == stamp


def sweep_of(folder, **keys):
    (folder / "base.yaml").write_text(yaml.safe_dump(TINY))
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"recipe": "base.yaml", "seeds": [0], **keys}))
    return path


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"grid": {"optimizr.lr": [0.1]}}, r"sweep\.yaml: run base-0\.1-seed0: .*optimizr: unknown key"),
        ({"grid": {"bits": ["w4a4", "w9a9"]}}, r"run base-w9a9-seed0: .*bits 'w9a9' is not accepted"),
        ({"recipe": "nope.yaml"}, "nope.yaml: no such file"),
        ({"grid": {"bits": ["w4a4", "w4a4"]}}, r"sweep\.yaml: two runs would share the folder"),
    ],
)
def test_a_recipe_that_is_not_accepted_starts_nothing(tmp_path, keys, message):
    with pytest.raises(BitwrightError, match=message):
        run_sweep(sweep_of(tmp_path, **keys), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_recipe_is_not_taken_for_this_one(tmp_path):
    path, out = sweep_of(tmp_path), tmp_path / "out"
    (out / "base-seed0").mkdir(parents=True)
    (out / "base-seed0" / "recipe.yaml").write_text(yaml.safe_dump({**TINY, "bits": "w2a2", "seed": 0}))
    (out / "base-seed0" / "summary.json").write_text('{"accuracy": 0.5, "bitops": 1}')
    with pytest.raises(BitwrightError, match=r"base-seed0: made by another recipe than .*sweep\.yaml says now"):
        run_sweep(path, out)
    (out / "base-seed0" / "recipe.yaml").write_text(yaml.safe_dump({**TINY, "topology": "res8", "threads": 2}))
    said: list[str] = []
    assert run_sweep(path, out, jobs=1, say=said.append) == 0
    assert said == ["1 runs, 1 finished before, 1 side by side"]


def test_a_folder_that_goes_away_during_the_sweep_is_one_line(tmp_path, monkeypatch):
    path, out = sweep_of(tmp_path), tmp_path / "out"
    monkeypatch.setattr(sweeping, "command", lambda *_: [sys.executable, "-c", ""])
    monkeypatch.setattr(sweeping.time, "sleep", lambda _: shutil.rmtree(out, ignore_errors=True))
    with pytest.raises(BitwrightError, match=r"base-seed0\.log: cannot be written .No such file"):
        run_sweep(path, out, jobs=1, say=lambda _: None)


def test_a_second_sweep_in_the_same_folder_is_refused_and_touches_nothing(tmp_path):
    path, out = tmp_path / "sweep.yaml", tmp_path / "out"
    path.write_text("recipe: digits-w4a4\nseeds: [0]\n")
    out.mkdir()
    with (out / "sweep.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BitwrightError, match="another sweep is running there") as caught:
            run_sweep(path, out)
    assert "\n" not in str(caught.value)
    assert [p.name for p in out.iterdir()] == ["sweep.lock"]


FINISHED = """import pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir(exist_ok=True)
(folder / "summary.json").write_text('{"accuracy": 0.5}')
"""


def test_a_run_that_a_killed_sweep_left_training_is_waited_for(tmp_path, monkeypatch):
    path, out = sweep_of(tmp_path), tmp_path / "out"
    run = out / "base-seed0"
    monkeypatch.setattr(sweeping, "command", lambda *_: [sys.executable, "-c", FINISHED, str(run)])
    said: list[str] = []
    with RunFolder(run).alone():  # flock counts by open file: this process is another one to the sweep
        going = threading.Thread(target=run_sweep, args=(path, out), kwargs={"jobs": 1, "say": said.append})
        going.start()
        while len(said) < 2:
            going.join(0.05)
            assert going.is_alive(), said
        going.join(0.5)
        assert not (run / "summary.json").exists()  # not started beside the other one
    going.join(60)
    assert said[1:] == ["base-seed0: another process is training there; waiting for it", "base-seed0: 50.00 %"]


def test_a_run_that_was_killed_says_so_not_its_last_epoch(tmp_path, monkeypatch):
    path, out = sweep_of(tmp_path), tmp_path / "out"
    dies = "import os; print('epoch 1/20  loss 0.1', flush=True); os.kill(os.getpid(), 9)"
    monkeypatch.setattr(sweeping, "command", lambda *_: [sys.executable, "-c", dies])
    assert run_sweep(path, out, jobs=1, say=lambda _: None) == 1
    (row,) = csv.DictReader((out / "results.csv").read_text().splitlines())
    assert row["error"] == "killed by SIGKILL; the machine may have run out of memory"


def test_ctrl_c_reaches_a_run_once_so_that_it_can_save(tmp_path, monkeypatch):
    """A terminal sends SIGINT to the whole group; runs are told by the sweep, as a second signal ends them unsaved."""
    path, out = sweep_of(tmp_path), tmp_path / "out"
    monkeypatch.setattr(sweeping, "command", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    started: list[int] = []
    popen = sweeping.subprocess.Popen

    def note(*args, **options):
        process = popen(*args, **options)
        started.append(process.pid)
        return process

    def stop(_):
        assert os.getpgid(started[0]) != os.getpgid(0)
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeping.subprocess, "Popen", note)
    monkeypatch.setattr(sweeping.time, "sleep", stop)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(path, out, jobs=1, say=lambda _: None)
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], signal.SIGTERM)


def test_data_of_a_resumed_run_are_looked_for_where_the_sweep_says(tmp_path):
    (tmp_path / "checkpoint.pt").touch()
    line = command(SweepFile(recipe="r"), "r", Run("n", "v", (), 0, ()), tmp_path, "/elsewhere")
    assert line[-4:] == ["--resume", str(tmp_path), "--data-dir", "/elsewhere"]
