"""The page shows what the run's files say, holds everything itself, and shows their text as text."""

import json
import re
import xml.etree.ElementTree as ET

import pytest

from bitwright.errors import BitwrightError
from bitwright.report import write_report
from bitwright.report.figures import mean_path
from bitwright.report.page import results
from bitwright.report.runs import read_run

SUMMARY = {
    "accuracy": 0.9125,
    "accuracy_best": 0.92,
    "float_accuracy": None,
    "weight_bits": {"conv1": 8, "layer1.0.conv1": 4, "fc": 8},
    "input_bits": {"conv1": 8, "layer1.0.conv1": 3, "fc": None},
    "bitops": 510_000_000,
    "size_bytes": 123_456,
    "epochs": 2,
    "train_seconds": 1234.4,
    "seed": 7,
    "versions": {"torch": "2.13.0"},
    "methods": {"adaqat": {"path": [[0, "a", "weight", 8], [0, "b", "weight", 8], [8, "a", "weight", 7]]}},
}
METRICS = [{"epoch": 1, "loss": 2.0, "accuracy": 0.5}, {"epoch": 2, "loss": 1.0, "accuracy": 0.9125}]


def make_run(folder, *, recipe="bits: w4a4\n", metrics=METRICS, summary=SUMMARY):
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe)
    if metrics is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_results_are_those_of_the_summary(tmp_path):
    cells = dict(results(read_run(make_run(tmp_path / "one"))))
    assert cells == {
        "run": "one",
        "accuracy, last epoch": "91.25%",
        "best": "92.00%",
        "float": "–",
        "weight bits": "4 (1), 8 (2)",
        "input bits": "3 (1), 8 (1)",
        "GBitOPs": "0.5100",
        "size, KB": "123.5",
        "epochs": "2",
        "training, s": "1,234",
        "seed": "7",
    }


def test_a_run_that_has_not_ended_shows_how_far_it_is(tmp_path):
    cells = dict(results(read_run(make_run(tmp_path / "one", summary=None, metrics=METRICS[:1]))))
    assert cells["accuracy, last epoch"] == "50.00%"
    assert cells["epochs"] == "1 so far"
    cells = dict(results(read_run(make_run(tmp_path / "two", summary=None, metrics=None))))
    assert (cells["accuracy, last epoch"], cells["epochs"]) == ("–", "0 so far")


def test_the_page_is_self_contained_and_escapes_what_it_shows(tmp_path):
    evil = "</pre><script>alert(1)</script>"
    runs = [make_run(tmp_path / "one", recipe=evil), make_run(tmp_path / "<i>two", summary=None)]
    write_report(runs, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "<i>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert not re.search(r'(?:src|href)="(?!#)', page.replace("xlink:href", "x"))
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    # Accuracy and loss of both; bits and learned widths of the one that ended.
    assert len(pictures) == 4
    for picture in pictures:
        ET.fromstring(picture)
    write_report(runs, tmp_path / "again.html")
    assert [p.name for p in tmp_path.glob("*.tmp")] == []


def test_mean_of_learned_widths_follows_every_move():
    path = [
        [0, "a", "weight", 8],
        [0, "b", "weight", 6],
        [8, "a", "weight", 7],
        [8, "a", "input", 2],
        [16, "b", "weight", 5],
    ]
    assert mean_path(path, "weight") == ([0, 8, 16], [7.0, 6.5, 6.0])
    assert mean_path(path, "input") == ([8], [2.0])


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(BitwrightError, match=r"nothing: not a run \(no recipe.yaml in it\)"):
        write_report([tmp_path / "nothing"], tmp_path / "report.html")
    run = make_run(tmp_path / "one")
    (run / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo')
    with pytest.raises(BitwrightError, match=r"metrics.jsonl, line 2: not JSON"):
        write_report([run], tmp_path / "report.html")
    (run / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(BitwrightError, match="line 1: an object with 'epoch'"):
        write_report([run], tmp_path / "report.html")
    run = make_run(tmp_path / "two")
    (run / "summary.json").write_text("[]")
    with pytest.raises(BitwrightError, match=r"summary.json: an object is expected"):
        write_report([run], tmp_path / "report.html")
    (run / "summary.json").write_text('{"accuracy": 0.5, "versions": 3}')
    with pytest.raises(BitwrightError, match=r"summary\.json: versions is 3; an object is expected"):
        write_report([run], tmp_path / "report.html")
    with pytest.raises(BitwrightError, match="cannot be written"):
        write_report([make_run(tmp_path / "three")], tmp_path / "absent" / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_leaves_nothing_beside_it(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(BitwrightError, match="cannot be written"):
        write_report([make_run(tmp_path / "run")], tmp_path / "report.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "run"]
