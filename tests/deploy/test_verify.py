"""`verify` says yes to the network that was trained, and no, naming the layer, to any other."""

import copy
import json

import numpy as np
import onnx
import pytest
import torch
from deploy_nets import exported, mixed_kinds, mixed_net, quantized, shipped, trained_resnet
from onnx import numpy_helper
from test_freeze import WIDTHS, Attending
from torch import nn

import bitwright as bw
from bitwright.deploy import export, snap_biases, verify
from bitwright.deploy.comparison import VerifyReport
from bitwright.deploy.names import spelled_out
from bitwright.deploy.predictions import compare_outputs
from bitwright.deploy.probe import read
from bitwright.errors import BitwrightError


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(WIDTHS), 3))
def test_every_grid_at_every_width_in_the_runtime(first, tmp_path):
    """Each in two or three of the seven layers; `test_freeze` has each in all of them."""
    model = mixed_kinds([WIDTHS[(first + 11 * i) % len(WIDTHS)] for i in range(7)])
    snap_biases(model, torch.randn(2, 3, 8, 8))
    report = shipped(model, tmp_path / "net.onnx", torch.randn(256, 3, 8, 8))
    assert report.ok, report.first_difference
    assert report.clean_logit_difference <= 2e-6 * max(1.0, report.largest_logit)


@pytest.mark.parametrize("bits", ["w2a2", "w4a4"])
def test_a_trained_network_is_shipped_exactly(bits, tmp_path):
    model, x = copy.deepcopy(trained_resnet(bits))
    snap_biases(model, x[:2])
    report = shipped(model, tmp_path / "net.onnx", x)
    assert report.ok, report.first_difference
    assert report.images == len(x)
    assert report.different_file == report.different_frozen == 0
    inputs = [r for r in report.rows() if r["what"] == "input"]
    total = sum(r["values"] for r in inputs)
    assert sum(r["different_file"] for r in inputs) <= 100e-6 * total
    assert sum(r["different_frozen"] for r in inputs) <= 100e-6 * total
    assert max(r["largest_steps"] for r in inputs) <= 1
    assert report.clean_logit_difference <= 1e-5 * report.largest_logit


def test_biases_that_were_not_snapped_are_found(tmp_path):
    model, x = trained_resnet("w2a2")
    report = shipped(model, tmp_path / "net.onnx", x)
    assert not report.ok
    assert "codes differ between the training form and the frozen form" in report.first_difference


def behind(proto: onnx.ModelProto, name: str) -> str:
    """A tensor's name; "OUTPUT/i" is the i-th input of the node that makes OUTPUT, and so on."""
    name, *path = name.split("/")
    for index in path:
        name = next(n for n in proto.graph.node if name in n.output).input[int(index)]
    return name


def edit(path, name: str, change) -> None:
    """Apply `change` to the bytes of one initializer, see `behind`."""
    proto = read(path)
    name = behind(proto, name)
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    raw = bytearray(tensor.raw_data)
    change(raw)
    tensor.raw_data = bytes(raw)
    onnx.save(proto, str(path))


def flip_lowest(raw: bytearray) -> None:
    raw[len(raw) // 2] ^= 1


@pytest.mark.parametrize(
    ("bits", "tensor", "layer"),
    [
        (4, "depthwise.codes/0", "depthwise"),
        (8, "point.codes", "point"),
        (1, "stem.codes/0", "stem"),
        (2, "fc.codes/0", "fc"),
        (3, "head.codes/1", "head"),
        (3, "last.codes/0", "last"),
        (4, "stem.weight/1/0", "stem"),
        (4, "point.bias/0", "point"),
        (4, "head.negative_bias", "head"),
    ],
)
def test_one_changed_weight_is_found(bits, tensor, layer, tmp_path):
    model, data = exported("lsq", bits)
    x = torch.randn(32, 3, 8, 8)
    path = tmp_path / "net.onnx"
    path.write_bytes(data)
    assert verify(model, path, [x]).ok
    edit(path, tensor, flip_lowest)
    report = verify(model, path, [x])
    assert not report.ok
    assert report.first_difference.startswith(f"{layer}: ")
    if tensor != "stem.weight/1/0" and "bias" not in tensor:
        assert f"{layer}: 1 of " in report.first_difference


def test_a_changed_input_scale_is_found_at_its_quantizer(tmp_path):
    model, data = exported("lsq", 4)
    x = torch.randn(32, 3, 8, 8)
    path = tmp_path / "net.onnx"
    path.write_bytes(data)

    def larger(raw: bytearray) -> None:
        raw[:] = (np.frombuffer(raw, np.float32) * np.float32(1.05)).tobytes()

    edit(path, "last.input.codes/1", larger)
    assert verify(model, path, [x]).first_difference.startswith("last.input_quantizer: ")


def test_a_changed_float_parameter_is_found_at_the_output(tmp_path):
    """Nothing quantized differs: the logits tell."""
    model = quantized(nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8)), "w4a4", torch.randn(64, 6))
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 2.0)
    path = tmp_path / "net.onnx"
    export(model, path, torch.randn(2, 6))
    normalize = next(n for n in read(path).graph.node if n.op_type == "LayerNormalization")
    name = normalize.input[1]
    edit(path, name, lambda raw: raw.__setitem__(2, raw[2] ^ 0x10))
    report = verify(model, path, [torch.randn(64, 6)])
    assert not report.ok
    assert report.first_difference.startswith("output: ")


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_attention_in_the_runtime(bits, tmp_path):
    index = torch.randint(0, 11, (128, 7))
    model = quantized(Attending(), bits, index)
    report = shipped(model, tmp_path / "net.onnx", index)
    assert report.ok, report.first_difference
    assert {r["name"] for r in report.rows()} >= {"table", "cross", "cross.attention_quantizer", "block.linear1"}
    proto = read(tmp_path / "net.onnx")
    whole = any(t.name == "table.codes" for t in proto.graph.initializer)
    edit(tmp_path / "net.onnx", "table.codes" if whole else "table.codes/0", flip_lowest)
    assert verify(model, tmp_path / "net.onnx", [index]).first_difference.startswith("table: 1 of ")


def test_the_report_is_json(tmp_path):
    model, data = exported("lsq", 4)
    (tmp_path / "net.onnx").write_bytes(data)
    report = verify(model, tmp_path / "net.onnx", [torch.randn(8, 3, 8, 8)])
    back = json.loads(json.dumps(report.as_dict()))
    assert back["ok"] is True
    assert back["images"] == 8
    assert {r["what"] for r in back["layers"]} == {"weight", "input"}


def test_the_models_mode_and_weights_are_kept(tmp_path):
    model = mixed_net("minmax", 4)
    path = tmp_path / "net.onnx"
    export(model, path, torch.randn(2, 3, 8, 8))
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    verify(model, path, [(torch.randn(4, 3, 8, 8), torch.zeros(4))])
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(q._forward_hooks for q in bw.quantizers(model).values())


def test_files_that_are_no_export_of_this_network(tmp_path):
    model, whole = exported("lsq", 4)
    x = torch.randn(4, 3, 8, 8)
    path = tmp_path / "net.onnx"

    def refused(data: bytes, message: str) -> None:
        path.write_bytes(data)
        with pytest.raises(BitwrightError, match=message) as caught:
            verify(model, path, [x])
        assert "\n" not in str(caught.value)
        assert "net.onnx" in str(caught.value)

    refused(whole[: len(whole) // 2], "is damaged or no ONNX file")
    refused(b"not a network at all", "is damaged or no ONNX file")
    refused(b"", "was not written by bitwright")
    other = onnx.load_from_string(whole)
    other.producer_name = "someone"
    refused(other.SerializeToString(), "was not written by bitwright export")
    broken = onnx.load_from_string(whole)
    next(n for n in broken.graph.node if n.op_type == "Conv").op_type = "NoSuchOperator"
    refused(broken.SerializeToString(), "onnxruntime cannot open it")
    smaller = quantized(nn.Sequential(nn.Conv2d(3, 4, 3)), "w4a4", x)
    export(smaller, tmp_path / "other.onnx", x)
    refused((tmp_path / "other.onnx").read_bytes(), "is of another network")
    path.unlink()
    with pytest.raises(BitwrightError, match=r"net\.onnx: cannot be read: No such file"):
        verify(model, path, [x])


def test_the_same_layers_with_other_weights_are_named(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(exported("lsq", 4)[1])
    report = verify(mixed_net("lsq", 4), path, [torch.randn(4, 3, 8, 8)])
    assert not report.ok
    assert report.first_difference.startswith("stem: ")


def test_no_batch_is_refused(tmp_path):
    with pytest.raises(BitwrightError, match="verify: no batch was given"):
        verify(mixed_net("lsq", 4), tmp_path / "net.onnx", [])


def test_numbers_survive():
    """The file's integers are the frozen form's, read without the runtime."""
    model, data = exported("lsq", 8)
    proto = spelled_out(onnx.load_from_string(data))
    tensors = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    codes = model.last.weight_quantizer.integer_codes(model.last.weight)
    assert np.array_equal(tensors["last.codes"], codes.numpy())


def test_float64_decides_where_float32_cannot():
    trained, file = torch.tensor([[1.0, 1.0], [2.0, 1.0]]), torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    asked = []

    def exact(rows: torch.Tensor) -> list[torch.Tensor]:
        asked.append(rows.tolist())
        return [torch.tensor([[1.0, 1.0 + 2.0**-30]], dtype=torch.float64)]

    report = VerifyReport("f", [])
    compare_outputs(report, [trained], [file], [file], torch.ones(2, dtype=torch.bool), exact)
    assert asked == [[True, False]]
    assert (report.float32_differs, report.different_frozen, report.different_file) == (1, 0, 0)


@pytest.mark.parametrize("answer", [torch.tensor([[1.0, 0.0]]).double(), None])
def test_what_float64_does_not_explain_stays_a_difference(answer):
    trained, file = torch.tensor([[1.0, 0.0], [2.0, 1.0]]), torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    report = VerifyReport("f", [])
    answers = None if answer is None else [answer]
    compare_outputs(report, [trained], [trained], [file], torch.ones(2, dtype=torch.bool), lambda _: answers)
    assert (report.float32_differs, report.different_frozen, report.different_file) == (0, 0, 1)
    assert not report.ok


@pytest.mark.parametrize(("gap", "wrong"), [(0.0, 0), (1e-16, 0), (1e-9, 1)])
def test_classes_that_tie_in_exact_arithmetic_are_no_difference(gap, wrong):
    report = VerifyReport("file", [])
    exact = torch.tensor([[0.0, 0.5 + gap, 0.5]], dtype=torch.float64)
    trained, file = torch.tensor([[0.0, 0.5, 0.5]]), torch.tensor([[0.0, 0.5, 0.5 + 1e-7]])
    compare_outputs(report, [trained], [file], [file], torch.ones(1, dtype=torch.bool), lambda _: [exact])
    assert (report.float32_differs, report.different_frozen, report.different_file) == (0, wrong, wrong)


@pytest.mark.parametrize("runtime", ["default", "native"])
def test_a_file_of_a_newer_format_is_refused_in_one_line(runtime, tmp_path):
    model, content = exported("lsq", 4)
    for what, change in (("IR", {"ir_version": 99}), ("opset", {"opset": 99})):
        proto = onnx.load_from_string(content)
        proto.ir_version = change.get("ir_version", proto.ir_version)
        proto.opset_import[0].version = change.get("opset", proto.opset_import[0].version)
        path = tmp_path / "net.onnx"
        path.write_bytes(proto.SerializeToString())
        with pytest.raises(BitwrightError, match=f"is of {what} version 99, .*export it again"):
            verify(model, path, [torch.randn(2, 3, 8, 8)], runtime=runtime)


@pytest.mark.parametrize(
    ("stride", "classes", "message"),
    [
        (2, 5, r"is of another network: 2\.input_quantizer is \(4, 4, 3, 3\) in it, \(4, 4, 6, 6\) in the network"),
        (1, 7, r"is of another network: logits is \(4, 7\) in it, \(4, 5\) in the network"),
    ],
)
def test_a_file_of_a_network_of_other_sizes_is_one_line(stride, classes, message, tmp_path):
    def net(stride: int, classes: int) -> nn.Module:
        layers = [
            nn.Conv2d(3, 4, 3, stride),
            nn.ReLU(),
            nn.Conv2d(4, classes, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ]
        return bw.calibrate(bw.prepare(nn.Sequential(*layers), bw.rules("w4a4")), [x]).eval()

    x = torch.randn(4, 3, 8, 8)
    path = tmp_path / "other.onnx"
    export(net(stride, classes), path, x)
    with pytest.raises(BitwrightError, match=message) as caught:
        verify(net(1, 5), path, x)
    assert "\n" not in str(caught.value)
