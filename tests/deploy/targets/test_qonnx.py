"""QONNX: `Quant` nodes that an independent executor runs to the very codes of the integer form."""

import sys
from collections import Counter

import onnx
import pytest
import torch
from deploy_nets import exported, quantized
from torch import nn

import bitwright as bw
from bitwright.deploy import export, verify
from bitwright.errors import BitwrightError


@pytest.fixture
def _qonnx():
    pytest.importorskip("qonnx", reason='needs "bitwright[qonnx]"')


@pytest.mark.usefixtures("_qonnx")
def test_the_executor_computes_the_same_codes(tmp_path):
    """Depth-wise, dilated and reflect-padded convolutions, quantized sums, negative gains, zero filters."""
    model, _ = exported("lsq", 4)
    path = tmp_path / "net.onnx"
    report = export(model, path, torch.randn(2, 3, 8, 8), target="qonnx")
    assert report.dynamic_batch
    proto = onnx.load(str(path))
    kinds = Counter(n.op_type for n in proto.graph.node)
    assert kinds["Quant"] == len(bw.quantizers(model))
    assert not {"QuantizeLinear", "DequantizeLinear", "Cast"} & kinds.keys()
    assert proto.ir_version <= 13
    found = verify(model, path, [torch.randn(6, 3, 8, 8)])
    assert found.target == "qonnx"
    assert found.ok, found.first_difference
    assert sum(row["different_file"] for row in found.rows()) == 0
    assert found.clean_logit_difference <= 1e-5 * found.largest_logit


@pytest.mark.usefixtures("_qonnx")
def test_one_bit_weights_are_bipolar(tmp_path):
    x = torch.randn(32, 6)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    rule = bw.Rule.model_validate({"match": "*", "weight": {"bits": 1}, "input": {"bits": 8}})
    model = bw.calibrate(bw.prepare(net, [rule]), [x]).eval()
    export(model, tmp_path / "net.onnx", x[:2], target="qonnx")
    nodes = onnx.load(str(tmp_path / "net.onnx")).graph.node
    assert Counter(n.op_type for n in nodes)["BipolarQuant"] == 2
    found = verify(model, tmp_path / "net.onnx", [x])
    assert found.ok, found.first_difference


@pytest.mark.usefixtures("_qonnx")
def test_a_changed_bit_width_is_found(tmp_path):
    x = torch.randn(32, 6)
    model = quantized(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), "w5a5", x, ends=None)
    path = tmp_path / "net.onnx"
    export(model, path, x[:2], target="qonnx")
    proto = onnx.load(str(path))
    node = next(n for n in proto.graph.node if n.output[0] == "2.input.codes")
    proto.graph.initializer.append(onnx.helper.make_tensor("three", onnx.TensorProto.FLOAT, [], [3.0]))
    node.input[3] = "three"
    onnx.save(proto, str(path))
    assert verify(model, path, [x]).first_difference.startswith("2.input_quantizer: ")


@pytest.mark.usefixtures("_qonnx")
@pytest.mark.parametrize("what", ["a zero point that is no whole code", "scales per channel"])
def test_inputs_that_the_format_lacks_are_refused(what, tmp_path):
    x = torch.randn(64, 3, 4, 4)
    fields = {"bits": 4, "grid": "lsq+"} if "zero" in what else {"bits": 4, "per_channel": True}
    rule = bw.Rule.model_validate({"match": "0", "weight": {"bits": 4}, "input": fields})
    model = bw.calibrate(bw.prepare(nn.Sequential(nn.Conv2d(3, 4, 1)), [rule]), [x]).eval()
    with pytest.raises(BitwrightError, match=f"^0.input_quantizer: target qonnx keeps no input with {what}; use"):
        export(model, tmp_path / "net.onnx", x, target="qonnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_qonnx")
def test_a_silent_channel_without_a_zero_is_refused(tmp_path):
    norm = nn.BatchNorm2d(4)
    norm.weight.data[1] = 0
    x = torch.rand(8, 3, 4, 4)
    model = quantized(nn.Sequential(nn.Conv2d(3, 4, 1), norm), "w2a2", x, grid="dorefa", ends=None)
    with pytest.raises(BitwrightError, match=r"^0: target qonnx has no 0 for a channel whose scale is 0"):
        export(model, tmp_path / "net.onnx", x, target="qonnx")


def test_a_missing_package_is_one_line_that_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "qonnx.core.onnx_exec", None)
    monkeypatch.setitem(sys.modules, "qonnx", None)
    with pytest.raises(BitwrightError, match=r"qonnx is not installed: pip install \"bitwright\[qonnx\]\""):
        export(nn.Linear(4, 3), tmp_path / "net.onnx", torch.randn(2, 4), target="qonnx")
