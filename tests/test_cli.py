import json
import re
import subprocess
import sys
from importlib import metadata

import onnx
import pytest
import torch
import yaml

from bitwright import cli
from bitwright.costs import LatencyTable, read_latencies
from bitwright.deploy.names import spelled_out
from bitwright.runtime import timing
from bitwright.training import quickstart
from bitwright.training.models import build_model
from bitwright.training.recipe_file import load_recipe
from bitwright.training.report import Reporter

RECIPE = """
data: {name: digits, options: {subset: 300}}
model: {name: resnet8, options: {width: 4}}
bits: w4a4
optimizer: {lr: 0.05}
schedule: {epochs: 1, batch_size: 50}
threads: 1
device: cpu
"""


@pytest.fixture
def bitwright(monkeypatch, capsys, tmp_path):
    """Runs the command line in this process: `(exit code, stdout, stderr)`."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bitwright", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run made by a real process, with a float partner."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(RECIPE)
    partner = "partner={schedule: {epochs: 1, batch_size: 50}}"
    line = [sys.executable, "-m", "bitwright", "train", "tiny.yaml", partner, "seed=3", "--out", "run"]
    done = subprocess.run([*line, "--cache", "cache"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("run/summary.json")
    return folder / "run"


NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, 2 * width, 3), nn.ReLU())
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))
"""
BUDGET_RECIPE = """
data: {name: digits, options: {subset: 300}}
model: {name: "net.py:Net"}
partner: {checkpoint: net.pt}
bits: w8a8
methods: [{adaqat: {granularity: layer, every: 1, budget: {size: 1.2KB, bitops: 0.6M}}}]
schedule: {epochs: 8, batch_size: 100}
threads: 1
"""


def refused(result, code=2):
    found, _, err = result
    assert found == code, err
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    return err


def test_train_writes_the_files_of_the_contract(trained):
    assert {p.name for p in trained.iterdir()} >= {"recipe.yaml", "metrics.jsonl", "checkpoint.pt", "summary.json"}
    assert list((trained / "tensorboard").glob("events*"))
    assert load_recipe(trained / "recipe.yaml").seed == 3
    assert yaml.safe_load((trained / "recipe.yaml").read_text())["schedule"]["warmup_epochs"] == 0.0  # resolved
    assert len((trained / "metrics.jsonl").read_text().splitlines()) == 1
    summary = json.loads((trained / "summary.json").read_text())
    expected = {"accuracy", "accuracy_best", "float_accuracy", "weight_bits", "input_bits", "bitops", "size_bytes"}
    assert expected | {"epochs", "train_seconds", "seed", "versions"} <= summary.keys()
    assert 0 <= summary["accuracy"] <= summary["accuracy_best"] <= 1
    assert summary["versions"]["torch"] == torch.__version__


def test_eval_agrees_with_the_summary(bitwright, trained):
    code, out, _ = bitwright("eval", trained, "--json")
    summary = json.loads((trained / "summary.json").read_text())
    found = json.loads(out)
    assert code == 0
    assert {k: found[k] for k in ("accuracy", "bitops", "size_bytes")} == {
        k: summary[k] for k in ("accuracy", "bitops", "size_bytes")
    }
    assert found["coverage"] == {"ran": 23, "missed": [], "float": []}
    _, text, _ = bitwright("eval", trained)
    assert f"accuracy {summary['accuracy']:.2%} on 500 images" in text
    assert "all 23 quantizers ran" in text
    # Signedness was found from the data: the normalised image has negative values, what follows a relu has none.
    signed = {q["name"]: q["signed"] for q in found["quantizers"]}
    assert len(signed) == 23
    assert signed["conv1.input_quantizer"]
    assert not signed["layer2.0.conv2.input_quantizer"]
    assert signed["layer2.0.bn2.output_quantizer"]
    assert not signed["layer2.0.relu2.output_quantizer"]
    row = next(line for line in text.splitlines() if line.startswith("layer2.0.conv2.input_quantizer"))
    assert row.split()[1:] == ["Conv2d", "lsq", "clipped_ste", "4", "unsigned", "1"]


def test_cost_of_a_run_and_of_its_recipe_agree(bitwright, trained):
    _, of_run, _ = bitwright("cost", trained, "--json")
    _, of_recipe, _ = bitwright("cost", trained / "recipe.yaml", "--json")
    found = json.loads(of_run)
    assert found["bitops"] == json.loads(of_recipe)["bitops"]
    assert found["bitops"] == sum(row["bitops"] for row in found["rows"])
    _, other, _ = bitwright("cost", trained / "recipe.yaml", "bits=w8a4", "--json")
    first, last = found["rows"][0], found["rows"][-1]
    ends = first["bitops"] + last["bitops"]
    assert json.loads(other)["bitops"] - ends == 2 * (found["bitops"] - ends)
    _, text, _ = bitwright("cost", "digits-w4a4")
    assert re.search(r"layer1\.0\.conv1 .* 4 +4 ", text)
    assert "a run has its recipe already" in refused(bitwright("cost", trained, "bits=w2a2"))


def test_latencies_are_measured_into_a_file_that_a_budget_can_name(bitwright, trained, tmp_path, monkeypatch):
    file = tmp_path / "table.csv"
    code, out, _ = bitwright("cost", trained / "recipe.yaml", "--latencies", file, "--json")
    assert code == 0
    layers = [row["name"] for row in json.loads(out)["rows"]]
    table = read_latencies(file)
    assert set(table.layers) <= set(layers)
    assert all(set(each) == {(8, 8), (4, 4)} for each in table.layers.values())
    assert json.loads(out)["latency"] > 0
    # Measured once: the second time it is the same table.
    monkeypatch.setattr(timing, "measure_latencies", lambda model, example: table)
    code, text, _ = bitwright("cost", trained, "--latencies", tmp_path / "again.csv")
    assert code == 0
    assert read_latencies(tmp_path / "again.csv") == table
    assert " ms outside of layers)" in text.replace(" of it", "")
    assert "the network is float" in refused(
        bitwright("cost", trained / "recipe.yaml", "bits=float", "partner=null", "--latencies", file)
    )
    assert read_latencies(file) == table  # as it was
    slow = LatencyTable({name: {(8, 8): 2.0, (4, 4): 1.0} for name in layers}, 0.0)
    file.write_text(slow.to_csv())
    budget = f"methods=[{{allocation: {{budget: {{latency: {2 * len(layers) - 3}ms}}, latencies: {file}, steps: 1}}}}]"
    code, _, err = bitwright("train", trained / "recipe.yaml", budget, "--out", tmp_path / "run")
    assert code == 0, err
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["methods"]["allocation"]
    assert found["cost"]["latency"] == 2 * len(layers) - 3
    missing = budget.replace(str(file), str(tmp_path / "none.csv"))
    line = refused(bitwright("train", trained / "recipe.yaml", missing, "--out", tmp_path / "other"))
    assert "none.csv: cannot be read as a table of latencies" in line
    number = budget.replace(str(file), "5")
    line = refused(bitwright("train", trained / "recipe.yaml", number, "--out", tmp_path / "other"))
    assert "latencies=5 is not accepted; use the path of a table" in line


def test_export_then_verify_then_a_changed_file(bitwright, trained, tmp_path):
    file = tmp_path / "net.onnx"
    code, out, _ = bitwright("export", trained, "--to", "onnx", "-o", file)
    assert code == 0
    assert out.startswith(f"{file}: ")
    code, out, _ = bitwright("verify", trained, file, "--images", 1000, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["ok"] is True
    assert report["images"] == 800  # 500 test images and the recipe's 300 training images: all there are
    assert report["different_file"] == 0
    code, out, _ = bitwright("verify", trained, file, "--images", 100)
    assert "verified: " in out
    assert "on 100 images, 0 predictions differ" in out
    code, out, _ = bitwright("bench", trained, file, "--runs", 3, "--json")
    timed = json.loads(out)
    assert code == 0
    assert timed["ratio"] > 0
    assert sum(timed["integer_kernels"].values()) + sum(timed["float_kernels"].values()) == 8  # 7 convolutions, fc
    assert "integer kernels" in bitwright("bench", trained, file, "--runs", 3)[1]
    code, out, _ = bitwright("verify", trained, file, "--images", 100, "--runtime", "native", "--json")
    native = json.loads(out)
    assert (code, native["ok"], native["different_file"]) == (0, True, 0)
    assert "use default or native" in refused(bitwright("verify", trained, file, "--runtime", "onnx"))
    code, out, _ = bitwright("bench", trained, file, "--runs", 3, "--runtime", "native", "--json")
    timed = json.loads(out)
    assert (code, timed["operators"]) == (0, {})
    assert sum(timed["integer_kernels"].values()) + sum(timed["float_kernels"].values()) == 8
    assert set(timed["integer_kernels"]) <= {"winograd", "direct", "depthwise"}

    content = bytearray(file.read_bytes())
    model = spelled_out(onnx.load(file))
    packed = next(n.input[0] for n in model.graph.node if n.output[0] == "layer2.0.conv1.codes")
    weight = next(t for t in model.graph.initializer if t.name == packed)
    place = content.index(weight.raw_data)
    content[place + 10] ^= 1
    file.write_bytes(content)
    code, out, err = bitwright("verify", trained, file, "--images", 100)
    assert code == 1
    assert "verified" not in out
    assert err.startswith("NOT the network that was trained: layer2.0.conv1")
    assert json.loads(bitwright("verify", trained, file, "--images", 50, "--json")[1])["ok"] is False


def test_other_targets_are_recognised_by_content(bitwright, trained, tmp_path):
    file = tmp_path / "network"
    assert "use -o" not in refused(bitwright("export", trained, "--to", "tflite"))
    assert "say where with -o FILE" in refused(bitwright("export", trained, "--to", "packed"))
    code, out, _ = bitwright("export", trained, "--to", "packed", "-o", file)
    assert code == 0
    assert f"{file}: " in out
    code, out, _ = bitwright("verify", trained, file, "--images", "50", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["target"], found["ok"], found["different_file"]) == ("packed", True, 0)
    assert "runs files of target onnx" in refused(bitwright("verify", trained, file, "--runtime", "native"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-50] + bytes(50))
    code, _, err = bitwright("verify", trained, file, "--images", "50")
    assert code == 1
    assert err.startswith("NOT the network that was trained: ")
    file.write_bytes(whole[:-1])
    assert "is damaged" in refused(bitwright("verify", trained, file))
    assert "target compressed-tensors keeps" in refused(
        bitwright("export", trained, "--to", "compressed-tensors", "-o", tmp_path / "folder")
    )


def test_from_a_network_in_a_file_its_weights_and_a_budget_to_a_verified_file(bitwright, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "net", raising=False)  # another test's
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "recipe.yaml").write_text(BUDGET_RECIPE)
    assert "net.pt: no such checkpoint file" in refused(bitwright("train", "recipe.yaml", "--out", "run"))
    assert not (tmp_path / "run").exists()  # so that the next try is not refused
    torch.manual_seed(0)
    float_net = build_model("net.py:Net", num_classes=10, in_channels=1, image_size=8)
    torch.save({"state_dict": float_net.state_dict()}, "net.pt")
    code, out, err = bitwright("train", "recipe.yaml", "--out", "run")
    assert code == 0, err
    assert "float partner: net.pt, accuracy " in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["size_bytes"] <= 1200
    assert summary["bitops"] <= 0.6e6
    assert set(summary["weight_bits"].values()) != {8}
    assert bitwright("export", "run")[0] == 0
    code, out, _ = bitwright("verify", "run", "--images", 100)
    assert code == 0
    assert "0 predictions differ" in out
    assert json.loads(bitwright("cost", "run", "--json")[1])["size_bytes"] == summary["size_bytes"]
    (tmp_path / "net.py").unlink()
    assert "model 'net.py:Net': no such file" in refused(bitwright("eval", "run"))


def test_export_refuses_what_it_does_not_know(bitwright, trained, tmp_path):
    assert "target 'tflite' is not accepted" in refused(bitwright("export", trained, "--to", "tflite"))
    (tmp_path / "file").write_text("")
    assert "file" in refused(bitwright("export", trained, "-o", tmp_path / "file" / "net.onnx"))


def test_files_that_are_missing_or_damaged_are_one_line(bitwright, trained, tmp_path):
    assert "not a run" in refused(bitwright("eval", tmp_path))
    assert "not a run" in refused(bitwright("train", "--resume", tmp_path / "nowhere"))
    assert "nowhere.onnx" in refused(bitwright("verify", trained, tmp_path / "nowhere.onnx"))
    (tmp_path / "bad.onnx").write_bytes(b"\x00\x01\x02nonsense")
    assert "bad.onnx" in refused(bitwright("verify", trained, tmp_path / "bad.onnx"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text((trained / "recipe.yaml").read_text())
    assert "no such checkpoint" in refused(bitwright("eval", tmp_path / "run"))
    (tmp_path / "run" / "checkpoint.pt").write_bytes((trained / "checkpoint.pt").read_bytes()[:-100])
    assert "damaged" in refused(bitwright("eval", tmp_path / "run"))
    (tmp_path / "run" / "recipe.yaml").write_text("seed: [")
    assert "not valid YAML" in refused(bitwright("eval", tmp_path / "run"))


def test_bad_recipes_and_places_are_one_line_and_make_nothing(bitwright, trained, tmp_path):
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    assert "tiny.yaml" in refused(bitwright("train", "tiny.yaml", "model.name=resnet21", "--out", "new"))
    assert "seed: 'x' is not accepted" in refused(bitwright("train", "tiny.yaml", "seed=x", "--out", "new"))
    assert "did you mean digits-w4a4" in refused(bitwright("train", "digits-w4a5", "--out", "new"))
    assert "no such folder" in refused(bitwright("train", "cifar10-resnet20-w4a4", "--data-dir", "zzz", "--out", "new"))
    assert not (tmp_path / "new").exists()
    assert "holds a run already" in refused(bitwright("train", "tiny.yaml", "--out", trained))
    (tmp_path / "file").write_text("kept")
    assert "cannot be written" in refused(bitwright("train", "tiny.yaml", "--out", tmp_path / "file" / "run"))
    assert (tmp_path / "file").read_text() == "kept"
    assert "--resume RUN goes on" in refused(bitwright("train", "tiny.yaml", "--resume", trained))


def test_a_recipe_in_a_folder_called_lr_0_1_is_a_recipe(bitwright, tmp_path):
    (tmp_path / "lr=0.1").mkdir()
    (tmp_path / "lr=0.1" / "tiny.yaml").write_text(RECIPE + "nonsense: 1\n")
    assert "lr=0.1/tiny.yaml: nonsense: unknown key" in refused(bitwright("train", "lr=0.1/tiny.yaml", "--out", "new"))


def test_a_diverged_run_exits_with_1(bitwright, tmp_path):
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    code, _, err = bitwright("train", "tiny.yaml", "bits=float", "optimizer.lr=1e30", "--out", "run")
    assert code == 1
    assert err.count("\n") == 1
    assert "not finite" in err
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_too_little_memory_is_one_line(bitwright, tmp_path):
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    huge = "model.options.width=1000000000000"
    assert "not enough memory" in refused(bitwright("train", "tiny.yaml", huge, "--out", "run"), code=1)
    assert not (tmp_path / "run").exists()


def test_a_traceback_only_with_debug(bitwright):
    _, _, err = bitwright("eval", "nowhere")
    assert "Traceback" not in err
    for line in (["--debug", "eval", "nowhere"], ["eval", "nowhere", "--debug"]):
        code, _, err = bitwright(*line)
        assert code == 2
        assert "Traceback" in err


def test_wrong_usage_exits_with_2(bitwright):
    for line in (["nosuch"], ["eval"], ["train", "--nosuch"], ["verify", "x", "--images", "0"]):
        assert bitwright(*line)[0] == 2


def test_version_is_one_line(bitwright):
    code, out, _ = bitwright("--version")
    assert code == 0
    python = ".".join(map(str, sys.version_info[:3]))
    assert out == f"bitwright {metadata.version('bitwright')} (torch {metadata.version('torch')}, Python {python})\n"


def test_help_names_every_command(bitwright):
    code, out, _ = bitwright("--help")
    assert code == 0
    for command in ("train", "eval", "export", "verify", "cost", "bench", "sweep"):
        assert command in out


def test_a_quick_start_that_goes_on_takes_no_other_recipe(bitwright, tmp_path):
    short = ["schedule.epochs=1", "partner.schedule.epochs=1"]
    quickstart.begin(tmp_path / "run", short, overwrite=False, reporter=Reporter())
    message = refused(bitwright("train", "--resume", "run", "schedule.epochs=2", "--cache", "cache"))
    assert "made by another recipe than with 'schedule.epochs=2'" in message


@pytest.mark.slow
def test_the_quick_start_trains_ships_and_verifies(bitwright, tmp_path):
    short = ("schedule.epochs=2", "partner.schedule.epochs=4", "threads=1")
    code, out, err = bitwright("train", "--out", "run", "--cache", "cache", *short)
    assert code == 0, err
    lines = out.splitlines()
    assert "minute" in "".join(lines[:2])  # said beforehand
    rows = {line.split()[0]: line.split() for line in lines if line.startswith(("float ", "W4A4 ", "W2A2 "))}
    summaries = {
        name: json.loads((tmp_path / where / "summary.json").read_text())
        for name, where in (("W4A4", "run"), ("W2A2", "run/w2a2"))
    }
    for name, summary in summaries.items():
        assert rows[name][1] == f"{summary['accuracy']:.2%}"
        assert summary["float_accuracy"] == summaries["W4A4"]["float_accuracy"]
    assert rows["float"][1:3] == [f"{summaries['W4A4']['float_accuracy']:.2%}", "32/32"]
    sizes = [float(rows[name][-1]) for name in ("float", "W4A4", "W2A2")]
    assert sizes == sorted(sizes, reverse=True)
    assert lines[-1].startswith("verified: run/model.onnx on 1,797 images, 0 predictions differ")
    assert (tmp_path / "run" / "model.onnx").exists()
    # Resuming a finished quick start ships again and trains nothing.
    code, out, _ = bitwright("train", "--resume", "run")
    assert code == 0
    assert "epoch" not in out
    assert "verified" in out
    assert "holds a run already" in refused(bitwright("train", "--out", "run"))


def test_report_is_one_page_about_the_runs_given(bitwright, trained, tmp_path):
    code, out, err = bitwright("report", trained, trained, "-o", "page.html")
    assert (code, out.strip()) == (0, "page.html"), err
    page = (tmp_path / "page.html").read_text()
    assert page.count("<h2>run</h2>") == 2
    assert json.loads((trained / "summary.json").read_text())["versions"]["torch"] in page
    assert "not a run" in refused(bitwright("report", tmp_path / "absent"))
