"""Where integer kernels and onnxruntime hand tensors to each other: layouts, codes, floats, constants."""

import numpy as np
import onnxruntime
import pytest
import torch
from graphs import Net
from onnx import TensorProto
from test_files import in_onnxruntime, normal, saved
from torch import nn

import bitwright as bw
from bitwright.errors import BitwrightError
from bitwright.runtime import load
from bitwright.runtime.ops import Codes
from bitwright.runtime.patterns import clipped


def exact(path: str, x: np.ndarray) -> np.ndarray:
    """The file as it is written, without what onnxruntime makes of it."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"input": x})[0])


def kernels(path: str) -> dict[str, str]:
    return {row["layer"]: row["kernel"] for row in load(path).describe() if row["op"] == "Conv"}


def test_linear_layers_over_maps_with_channels_at_the_end(tmp_path):
    """Four axes, as Swin has them, need not be an image: channels stay where MatMul has them, on integer kernels."""
    net = Net(np.random.default_rng(0))
    x = net.linear(net.quantized("input", "a.input", 0.03, 4, signed=True), "a", 4, 32, 64)
    x = net.node("Gelu", [x], "gelu")
    x = net.linear(net.quantized(x, "b.input", 0.02, 4, signed=True), "b", 4, 64, 32)
    path = saved(net.model(net.node("Add", [x, "input"], "sum"), 4, None, 6, 5, 32), tmp_path / "net.onnx")
    x = normal(3, 6, 5, 32)
    np.testing.assert_allclose(load(path).run(x), exact(path, x), rtol=1e-5, atol=1e-5)
    assert [row["kernel"] for row in load(path).describe() if row["op"] == "host"] == ["onnxruntime: Gelu"]
    assert sum(row["op"] == "Conv" for row in load(path).describe()) == 2


def test_one_tensor_of_codes_as_an_image_and_as_rows(tmp_path):
    """A convolution has its channels second, a MatMul of the same codes at the end."""
    net = Net(np.random.default_rng(0))
    codes = net.quantized("input", "a.input", 0.03, 4, signed=True)
    a = net.conv(codes, 0.03, "a", 4, 16, 16, 3, 3, pads=[1] * 4)
    b = net.linear(codes, "b", 4, 16, 16)
    path = saved(net.model(net.node("Add", [a, b], "sum"), 4, None, 16, 7, 16), tmp_path / "net.onnx")
    x = normal(2, 16, 7, 16)
    np.testing.assert_allclose(load(path).run(x), exact(path, x), rtol=1e-5, atol=1e-5)
    assert set(kernels(path).values()) == {"direct"}


def test_a_float_product_with_a_quantized_weight_stays_float(tmp_path):
    """onnxruntime rounds the other operand to 8 bits too where a DequantizeLinear shows it an integer weight."""
    net = Net(np.random.default_rng(0))
    y = net.node("MatMul", ["input", net.weight("a", 4, 0.1, 64, 32, axis=1)], "y")
    path = saved(net.model(y, 2, None, 64), tmp_path / "net.onnx")
    x = normal(5, 64)
    np.testing.assert_allclose(load(path).run(x), exact(path, x), rtol=1e-5, atol=1e-6)


def test_codes_that_something_else_computes(tmp_path):
    """Integers from a Cast, dequantized, go through integer kernels."""
    net = Net(np.random.default_rng(0))
    codes = net.node("Cast", [net.node("Abs", ["input"], "abs")], "integers", to=TensorProto.UINT8)
    pair = [net.constant("scale", np.float32(0.1)), net.constant("zero", np.uint8(3))]
    x = net.node("DequantizeLinear", [codes, *pair], "x")
    path = saved(net.model(net.linear(x, "a", 4, 24, 7), 2, None, 24), tmp_path / "net.onnx")
    x = 40 * normal(5, 24)
    np.testing.assert_allclose(load(path).run(x), exact(path, x), rtol=1e-5, atol=1e-4)
    assert list(kernels(path).values()) == ["direct"]


@pytest.mark.parametrize("image", [False, True])
def test_codes_that_something_else_reads(tmp_path, image):
    """A Cast of codes gets the codes, not what they stand for."""
    net = Net(np.random.default_rng(0))
    net.quantized("input", "a", 0.1, 4, signed=True)
    y = net.node("Cast", ["a.codes"], "numbers", to=TensorProto.FLOAT)
    shape = (4, 5, 6) if image else (4,)
    path = saved(net.model(y, 1 + len(shape), None, *shape), tmp_path / "net.onnx")
    x = normal(3, *shape)
    np.testing.assert_array_equal(load(path).run(x), exact(path, x))


@pytest.mark.parametrize(
    "options",
    [
        {"weight": bw.QuantizerSpec(bits=8, grid="dorefa"), "input": bw.QuantizerSpec(bits=4)},
        {"weight": bw.QuantizerSpec(bits=4), "input": bw.QuantizerSpec(bits=4, grid="lsq+")},
        {"weight": bw.QuantizerSpec(bits=4), "input": bw.QuantizerSpec(bits=1)},
    ],
)
def test_quantizers_beside_float_weights(tmp_path, options):
    """Zero points that are no codes, and weights that no integer kernel takes: exact, on signed inputs, but float."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 5)),
        torch.randn(4, 3, 6, 6),
    )
    bw.prepare(model.eval(), [bw.Rule(match="*", **options)])
    bw.calibrate(model, [x]).eval()
    path = str(bw.export(model, tmp_path / "net.onnx", x).path)
    with torch.no_grad():
        np.testing.assert_allclose(load(path).run(x.numpy()), model(x).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_with_pixels(tmp_path, mode):
    """Codes are padded with codes; every convolution stays on an integer kernel."""
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 5, padding=(2, 1), padding_mode=mode)
    model, x = nn.Sequential(*convolutions, nn.ReLU(), nn.Conv2d(8, 4, 1)), torch.randn(2, 3, 7, 8)
    bw.prepare(model.eval(), bw.rules("w4a4") + bw.topology(model, x))
    bw.calibrate(model, [x]).eval()
    bw.snap_biases(model, x)
    path = str(bw.export(model, tmp_path / "net.onnx", x).path)
    np.testing.assert_allclose(load(path).run(x.numpy()), exact(path, x.numpy()), rtol=1e-5, atol=1e-5)
    assert list(kernels(path)) == ["0", "1", "3"]
    assert "pad" in {row["kernel"] for row in load(path).describe()}


def test_values_are_what_the_file_has_under_their_names(tmp_path):
    """Codes that are cut, pooled and reshaped after they were dequantized there; `verify` reads the output so."""
    net = Net(np.random.default_rng(0))
    x = net.conv(net.quantized("input", "a.input", 0.1, 4), 0.1, "a", 4, 6, 3, 3, 3)
    x = net.quantized(x, "out", 0.1, 8)
    cut = [net.constant(f"cut{i}", np.array([v])) for i, v in enumerate((1, 5, 1))]
    x = net.node("MaxPool", [net.node("Slice", [x, *cut], "part")], "pooled", kernel_shape=[2, 2])
    path = saved(net.model(net.node("Flatten", [x], "y"), 2, None, 3, 6, 6), tmp_path / "net.onnx")
    x = normal(2, 3, 6, 6)
    for kernels in ("reference", None):
        session = load(path, kernels=kernels)
        values = session.values(x)
        for name in ("part", "pooled", "y"):
            (want,) = in_onnxruntime(path, x, name, kind=TensorProto.FLOAT)[1:]
            np.testing.assert_array_equal(values[name], want, err_msg=name)
        np.testing.assert_array_equal(values["y"], session.run(x))
        assert values["out.codes"].dtype == np.uint8


def test_bounds_that_exclude_each_other():
    """Values up to 1 that are then raised to 2 at least are 2."""
    codes = clipped(Codes(0.1, 0), [(0.0, 1.0), (2.0, 3.0)])
    assert (codes.lo, codes.hi) == (20, 20)


def test_types_that_no_kernel_reads(tmp_path):
    """A maximum over float64 pixels between two parts is onnxruntime's, as everything else of that type."""
    net = Net(np.random.default_rng(0))
    codes = net.quantized("input", "a", 0.1, 4, signed=True)
    wide = net.node("Cast", [codes], "wide", to=TensorProto.DOUBLE)
    x = net.quantized(net.node("Cast", [wide], "narrow", to=TensorProto.FLOAT), "b", 0.05, 8, signed=True)
    pooled = net.node("MaxPool", [wide], "pooled", kernel_shape=[2, 2], strides=[2, 2])
    small = net.node("MaxPool", [x], "small", kernel_shape=[2, 2], strides=[2, 2])
    y = net.node("Add", [net.node("Cast", [pooled], "back", to=TensorProto.FLOAT), small], "y")
    path = saved(net.model(y, 4, None, 3, 4, 4), tmp_path / "net.onnx")
    x = normal(2, 3, 4, 4)
    np.testing.assert_allclose(load(path).run(x), exact(path, x), rtol=1e-6)


def test_shapes_that_follow_the_numbers(tmp_path):
    """Buffers are planned once; what does not fit them is refused, not stretched or cut."""
    net = Net(np.random.default_rng(0))
    y = net.node("Cast", [net.node("NonZero", ["input"], "places")], "y", to=TensorProto.FLOAT)
    session = load(saved(net.model(y, 2, None, 4), tmp_path / "net.onnx"))
    with pytest.raises(BitwrightError, match=r"NonZero\): its output is \(2, 3\) for these numbers"):
        session.run(np.array([[1, 0, 2, 3]], np.float32))
