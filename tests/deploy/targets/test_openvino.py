"""OpenVINO: the network that was trained at every width with float sums, and a refusal for any other."""

import copy
import subprocess
import sys
from types import ModuleType

import onnx
import pytest
import torch
from deploy_nets import exported, quantized, settle, trained_resnet
from torch import nn

import bitwright as bw
from bitwright.deploy import export, snap_biases, verify
from bitwright.deploy.targets import openvino_file, target_of
from bitwright.errors import BitwrightError


@pytest.fixture
def openvino():
    return pytest.importorskip("openvino", reason='needs "bitwright[openvino]"')


@pytest.mark.usefixtures("openvino")
def test_a_trained_network_runs_on_integer_kernels_and_predicts_the_same(tmp_path):
    model, x = copy.deepcopy(trained_resnet("w2a2"))
    snap_biases(model, x[:2])
    path = tmp_path / "net.onnx"
    report = export(model, path, x[:2], target="openvino")
    assert [layer.packing for layer in report.layers[:2]] == ["int8", "int8"]
    assert not onnx.load(str(path)).functions
    found = verify(model, path, x[:256].split(64))
    assert found.target == "openvino"
    assert found.ok, found.first_difference
    assert found.different_file == found.different_frozen == 0
    flips = sum(r["different_file"] for r in found.rows() if r["what"] == "input")
    assert flips <= 100e-6 * sum(r["values"] for r in found.rows() if r["what"] == "input")
    assert all(r["different_file"] == 0 for r in found.rows() if r["what"] == "weight")
    assert openvino_file.kernels(openvino_file.compiled(path.read_bytes(), path)) == {"u8": 8}


@pytest.mark.usefixtures("openvino")
@pytest.mark.parametrize(("grid", "bits"), [("dorefa", 8), ("lsq", 4)])
def test_every_kind_of_grid(grid, bits, tmp_path):
    """Codes without a zero, 9-bit numbers; depth-wise and padded convolutions."""
    model = nn.Sequential(
        nn.ReLU(), nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5),
    )  # fmt: skip
    settle(model, 16, 3, 8, 8)
    model = quantized(model, f"w{bits}a{bits}", torch.randn(64, 3, 8, 8), grid=grid, ends=None)
    x = torch.randn(64, 3, 8, 8)
    snap_biases(model, x[:2])
    export(model, tmp_path / "net.onnx", x[:2], target="openvino")
    found = verify(model, tmp_path / "net.onnx", [x])
    assert all(row["ok"] for row in found.rows()), found.first_difference
    assert found.different_file <= found.images - found.clean_images
    assert found.clean_logit_difference <= 1e-5 * found.largest_logit


@pytest.mark.usefixtures("openvino")
def test_a_changed_file_is_found(tmp_path):
    model = quantized(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), "w4a4", torch.randn(64, 6))
    path = tmp_path / "net.onnx"
    export(model, path, torch.randn(2, 6), target="openvino")
    proto = onnx.load(str(path))
    tensor = next(t for t in proto.graph.initializer if t.name == "2.codes")
    tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]
    onnx.save(proto, str(path))
    found = verify(model, path, [torch.randn(8, 6)])
    assert found.first_difference == "2: 1 of 24 weights in the file differ from the trained ones"


@pytest.mark.usefixtures("openvino")
@pytest.mark.parametrize("where", ["sum", "output"])
def test_quantized_sums_are_refused(where, tmp_path):
    if where == "sum":
        model, x, name = exported("lsq", 4)[0], torch.randn(2, 3, 8, 8), "add"
    else:
        model, x, name = nn.Sequential(nn.Linear(4, 3)), torch.randn(8, 4), "0"
        fields = {"match": "0", "weight": {"bits": 4}, "output": {"bits": 8}}
        bw.calibrate(bw.prepare(model, [bw.Rule.model_validate(fields)]), [x]).eval()
    (tmp_path / "net.onnx").write_text("what was there before")
    with pytest.raises(BitwrightError, match=f"^{name}: target openvino keeps float sums only.*use target onnx$"):
        export(model, tmp_path / "net.onnx", x, target="openvino")
    assert (tmp_path / "net.onnx").read_text() == "what was there before"


@pytest.mark.usefixtures("openvino")
def test_zero_points_between_codes_are_refused(tmp_path):
    x = torch.randn(64, 4)
    model = quantized(nn.Sequential(nn.Linear(4, 3)), "w3a3", x, grid="lsq+", ends=None)
    with pytest.raises(BitwrightError, match=r"^0\.input_quantizer: target openvino rounds zero points"):
        export(model, tmp_path / "net.onnx", x, target="openvino")


def test_a_missing_or_old_runtime_is_one_line_that_names_the_extra(monkeypatch, tmp_path):
    model = nn.Sequential(nn.Linear(4, 3))
    for module, message in ((None, "is not installed"), (ModuleType("openvino"), "2024.6.0-17404 is too old")):
        if module is not None:
            module.__version__ = "2024.6.0-17404"  # pyright: ignore
        monkeypatch.setitem(sys.modules, "openvino", module)
        with pytest.raises(BitwrightError, match=message + r".*bitwright\[openvino\]"):
            export(model, tmp_path / "net.onnx", torch.randn(2, 4), target="openvino")


def test_an_unknown_target_in_a_file(tmp_path):
    model, data = exported("lsq", 4)
    proto = onnx.load_from_string(data)
    onnx.helper.set_model_props(proto, {"target": "tomorrow"})
    onnx.save(proto, str(tmp_path / "net.onnx"))
    with pytest.raises(BitwrightError, match="is of target 'tomorrow'; known are onnx, packed"):
        verify(model, tmp_path / "net.onnx", [torch.randn(2, 3, 8, 8)])
    (tmp_path / "old.onnx").write_bytes(data)
    assert target_of(tmp_path / "old.onnx") == "onnx"


AFTER_A_SIGNAL = """
import gc, os, signal, sys, time
from pathlib import Path
from bitwright.deploy.targets.openvino_file import compiled
path = Path(sys.argv[1])
networks = [compiled(path.read_bytes(), path) for _ in range(2)]
networks.pop(0)
networks.clear()
gc.collect()
signal.signal(signal.SIGCHLD, lambda *_: print("handled"))
if not os.fork():
    os._exit(0)
time.sleep(1)
"""


@pytest.mark.usefixtures("openvino")
def test_the_process_takes_signals_after_the_networks_are_gone(tmp_path):
    """With a core each, on a processor with AMX, the handler ran on a stack that was freed."""
    x = torch.randn(8, 16)
    model = quantized(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), "w8a8", x, ends=None)
    export(model, tmp_path / "net.onnx", x[:2], target="openvino")
    line = [sys.executable, "-c", AFTER_A_SIGNAL, str(tmp_path / "net.onnx")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_what_it_refuses_is_said_with_its_reason(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    x = torch.randn(2, 2, 8, 8)
    bw.calibrate(bw.prepare(model, bw.rules("w4a4")), [x])
    with pytest.raises(BitwrightError, match=r"openvino cannot open it: Unsupported padding mode"):
        bw.export(model, tmp_path / "net.onnx", x, target="openvino")
