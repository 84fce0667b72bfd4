"""The file: names, versions, size, atomic writing, one-line refusals."""

import copy
import resource
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from deploy_nets import mixed_net, quantized, settle, shipped
from torch import Tensor, nn

import bitwright as bw
from bitwright.deploy import export, snap_biases, verify
from bitwright.deploy.probe import read
from bitwright.deploy.targets.onnx_file import write
from bitwright.errors import BitwrightError
from bitwright.training.models.resnet import CifarResNet


def optimized(path, folder) -> onnx.ModelProto:
    """The graph that onnxruntime really runs at default settings."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options)
    return onnx.load(options.optimized_model_filepath)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(model, path, report) of one small exported network."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = mixed_net("lsq", 4)
    snap_biases(model, torch.randn(2, 3, 8, 8))
    path = tmp_path_factory.mktemp("plain") / "net.onnx"
    return model, path, export(model, path, torch.randn(2, 3, 8, 8))


def test_names_versions_and_metadata(plain):
    model, path, report = plain
    proto = read(path)
    assert [i.name for i in proto.graph.input] == ["input"]
    assert [o.name for o in proto.graph.output] == ["logits"]
    assert proto.ir_version <= 13
    assert {o.domain: o.version for o in proto.opset_import}[""] <= 23
    nodes = {n.name: n.op_type for n in proto.graph.node}
    outputs = {o for n in proto.graph.node for o in n.output}
    for name in bw.quant_layers(model):
        if name != "add":
            assert nodes[name] in ("Conv", "MatMul")
            assert f"{name}.input.codes" in outputs
    assert not any(n.metadata_props or n.doc_string for n in proto.graph.node)
    assert not proto.metadata_props
    assert not proto.graph.value_info
    assert report.path == path
    assert report.size_bytes == path.stat().st_size
    assert [(x.name, x.bits, x.packing) for x in report.layers][:2] == [("stem", 4, "int4"), ("depthwise", 4, "int4")]
    assert report.packed_bytes == sum(x.weights for x in report.layers) // 2


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_any_batch_size(plain, rows):
    model, path, report = plain
    assert report.dynamic_batch
    x = torch.randn(rows, 3, 8, 8)
    (out,) = onnxruntime.InferenceSession(str(path)).run(None, {"input": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(out), model(x), atol=2e-6, rtol=1e-5)


def test_an_example_of_one_image_is_enough(tmp_path):
    model = mixed_net("lsq", 4)
    report = export(model, tmp_path / "net.onnx", torch.randn(1, 3, 8, 8))
    assert report.dynamic_batch
    assert verify(model, tmp_path / "net.onnx", [torch.randn(5, 3, 8, 8)]).images == 5


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_file_is_as_large_as_its_bits(bits, tmp_path):
    model = settle(CifarResNet(8, 10, 3, width=32), 4, 3, 16, 16)
    model = quantized(model, f"w{bits}a{bits}", torch.randn(8, 3, 16, 16), ends=None)
    report = export(model, tmp_path / "net.onnx", torch.randn(2, 3, 16, 16))
    ideal = sum(
        layer.weight.numel() * bits / 8 for layer in bw.quant_layers(model).values() if hasattr(layer, "weight")
    )
    assert report.packed_bytes == pytest.approx(ideal, rel=0.001)
    assert report.size_bytes <= 1.05 * ideal + 20_000


def test_what_feeds_a_quantizer_runs_on_integers(tmp_path):
    """conv - norm - relu - quantizer and every linear layer; the float residual stream does not."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(256, 16), nn.ReLU(), nn.Linear(16, 5),
    )  # fmt: skip
    settle(model, 16, 3, 8, 8)
    for bits in (4, 3, 8):
        net = quantized(copy.deepcopy(model), f"w{bits}a{bits}", torch.randn(64, 3, 8, 8), ends=None)
        snap_biases(net, torch.randn(2, 3, 8, 8))
        report = shipped(net, tmp_path / "net.onnx", torch.randn(128, 3, 8, 8))
        assert report.ok, report.first_difference
        kinds = Counter(n.op_type for n in optimized(tmp_path / "net.onnx", tmp_path).graph.node)
        assert kinds["QLinearConv"] == 3  # the last one through the flattening
        assert kinds["MatMulIntegerToFloat"] == 2
        assert kinds["Gemm"] + kinds["MatMul"] == 0
        assert not {"BitShift", "BitwiseAnd", "Unpack3"} & kinds.keys()  # folded at load


class ReluBehindRelu(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x))).mean((2, 3))


@pytest.mark.parametrize("signed", [True, False])
def test_relu_before_a_quantizer_survives(signed, tmp_path):
    """onnxruntime drops a Relu before a signed 4-bit QuantizeLinear; containers here are unsigned 8-bit."""
    model = ReluBehindRelu().eval()
    spec = bw.QuantizerSpec(bits=4)
    bw.prepare(model, [bw.Rule(match=("*",), weight=spec, input=bw.QuantizerSpec(bits=4, signed=signed))])
    bw.calibrate(model, [torch.randn(64, 3, 4, 4)]).eval()
    snap_biases(model, torch.randn(2, 3, 4, 4))
    report = shipped(model, tmp_path / "net.onnx", torch.randn(256, 3, 4, 4))
    assert report.ok, report.first_difference
    scalars = {t.data_type for t in onnx.load(str(tmp_path / "net.onnx")).graph.initializer if t.dims == []}
    assert onnx.TensorProto.UINT8 in scalars
    assert not scalars & {onnx.TensorProto.INT4, onnx.TensorProto.UINT4}


def test_an_old_file_survives_every_failure(tmp_path, monkeypatch):
    model = mixed_net("lsq", 4)
    x = torch.randn(2, 3, 8, 8)
    path = tmp_path / "net.onnx"
    path.write_bytes(b"what was there before")

    def unchanged(message: str) -> None:
        with pytest.raises(BitwrightError, match=message) as caught:
            export(model, path, x)
        assert "\n" not in str(caught.value)
        assert path.read_bytes() == b"what was there before"
        assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # what a full disk looks like: the write stops half-way
    try:
        unchanged("net.onnx: cannot be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.setattr(onnx.checker, "check_model", lambda *a, **k: (_ for _ in ()).throw(ValueError("bad graph\nx")))
    unchanged("not written, the new file does not open: bad graph")
    monkeypatch.undo()
    assert export(model, path, x).size_bytes == path.stat().st_size


@pytest.mark.parametrize("where", ["missing/net.onnx", "file/net.onnx"])
def test_folders_that_cannot_be_written(where, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(BitwrightError, match="cannot be written"):
        write(onnx.ModelProto(), tmp_path / where, torch.zeros(1))


def test_refusals_are_one_line(tmp_path):
    x = torch.randn(4, 4)
    model = quantized(nn.Sequential(nn.Linear(4, 2)), "w4a4", x)
    with pytest.raises(BitwrightError, match="target 'tflite' is not accepted"):
        export(model, tmp_path / "a", x, target="tflite")
    with pytest.raises(BitwrightError, match=r"call bitwright\.prepare"):
        export(nn.Linear(4, 2), tmp_path / "a", x)
    assert not list(tmp_path.iterdir())


def test_a_file_holds_no_path_of_this_machine(plain):
    _, path, _ = plain
    assert b"/" + b"work" not in path.read_bytes()
    assert b"site-packages" not in path.read_bytes()


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("side", ["both", "weight", "input"])
def test_partly_quantized_and_per_channel_inputs(kind, side, tmp_path):
    """Float weights beside integer inputs, and the reverse, must not be quantized by the runtime on its own."""
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 1)]
    if kind == "linear":
        layers = [nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 5)]
    model = nn.Sequential(*layers).eval()
    x = torch.randn(64, 3, 6, 6) if kind == "conv" else torch.randn(64, 8)
    fields = {"both": {"weight": {"bits": 4}, "input": {"bits": 4, "per_channel": True}}}
    rule = fields.get(side, {side: {"bits": 8}})
    bw.prepare(model, [bw.Rule.model_validate({"match": "*", **rule})])
    bw.calibrate(model, [x]).eval()
    out = export(model, tmp_path / "net.onnx", x[:2])
    assert out.layers[0].packing == {"both": "int4", "weight": "int8", "input": "float32"}[side]
    fresh = torch.randn_like(x)
    (got,) = onnxruntime.InferenceSession(str(tmp_path / "net.onnx")).run(None, {"input": fresh.numpy()})
    with torch.no_grad():
        wanted = model(fresh).numpy()
    assert np.median(np.abs(got - wanted)) <= 1e-6
    report = verify(model, tmp_path / "net.onnx", [fresh])
    assert not any(r["different_file"] for r in report.rows() if r["what"] == "weight")
    assert all(r["different_frozen"] + r["different_file"] <= 2 for r in report.rows())


@pytest.mark.parametrize(("bias", "stored"), [(0.5, onnx.TensorProto.INT16), (1000.0, onnx.TensorProto.INT32)])
def test_biases_take_two_bytes_where_that_is_enough(bias, stored, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten()), torch.randn(8, 3, 4, 4)
    nn.init.constant_(model[0].bias, bias)
    model = quantized(model, "w8a8", x, ends=None)
    snap_biases(model, x[:2])
    export(model, tmp_path / "net.onnx", x[:2])
    proto = onnx.load(str(tmp_path / "net.onnx"))
    codes = next(n.input[0] for n in proto.graph.node if n.op_type == "Bias")
    assert next(t.data_type for t in proto.graph.initializer if t.name == codes) == stored
    found = verify(model, tmp_path / "net.onnx", [x])
    assert found.ok, found.first_difference
    assert found.different_file == 0


@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w3a3", "w2a2"])
def test_weights_of_float_kernels_are_constants_at_load(bits, tmp_path):
    """Else onnxruntime would scale them again in every run; those of integer kernels stay integers."""
    torch.manual_seed(0)
    model = settle(CifarResNet(8, 10, 3, width=8), 8, 3, 16, 16)
    net = quantized(model, bits, torch.randn(16, 3, 16, 16))
    snap_biases(net, torch.randn(2, 3, 16, 16))
    export(net, tmp_path / "net.onnx", torch.randn(2, 3, 16, 16))
    graph = optimized(tmp_path / "net.onnx", tmp_path).graph
    constants = {t.name for t in graph.initializer}
    convolutions = [n for n in graph.node if "Conv" in n.op_type]
    floats = [n for n in convolutions if not n.op_type.startswith("QLinear")]
    assert 0 < len(floats) < len(convolutions)
    assert all(n.input[1] in constants for n in floats)


class Twice(nn.Module):
    """Its own code multiplies the weight of its layer as well."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + nn.functional.linear(x, self.layer.weight)


def test_a_weight_that_other_code_multiplies_too_is_one_line(tmp_path: Path) -> None:
    x = torch.randn(4, 8)
    model = bw.calibrate(bw.prepare(Twice(), bw.rules("w4a4")), [x]).eval()
    with pytest.raises(BitwrightError, match=r"Twice: its frozen form does not run \(.*bitwright.coverage"):
        bw.export(model, tmp_path / "net.onnx", x)
    assert not (tmp_path / "net.onnx").exists()
    assert "layer.weight" in bw.coverage(model, x).notes
