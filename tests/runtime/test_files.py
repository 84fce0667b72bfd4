"""Whole files: every path is the reference, and the reference is the file in onnxruntime."""

import os
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from graphs import Net, residual_net
from onnx import TensorProto, helper
from running import PATHS

import bitwright as bw
from bitwright.batches import inputs_of
from bitwright.deploy.targets import OPEN
from bitwright.errors import BitwrightError
from bitwright.runtime import load
from bitwright.runtime.opened import NativeFile
from bitwright.runtime.session import Session
from bitwright.training.models.resnet import CifarResNet


def saved(model: onnx.ModelProto, path) -> str:
    path.write_bytes(model.SerializeToString())
    return str(path)


def in_onnxruntime(path: str, x: np.ndarray, *outputs: str, kind: int = TensorProto.UINT8) -> list[np.ndarray]:
    model = onnx.load(path)
    model.graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name in outputs)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(v) for v in session.run(None, {"input": x})]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_residual_networks(tmp_path, shared, bits):
    """Codes of every quantizer are onnxruntime's but for ties, predictions are equal, every kind of kernel runs."""
    path = saved(residual_net(np.random.default_rng(bits), shared=shared, bits=bits), tmp_path / "net.onnx")
    x = normal(3, 3, 45, 39)
    session = load(path, kernels="reference")
    values = session.values(x)
    for name, value in load(path).values(x).items():
        np.testing.assert_array_equal(value, values[name], err_msg=name)
    names = [name for name in values if name.endswith(".codes")]
    logits, *codes = in_onnxruntime(path, x, *names)
    assert len(names) > 9
    for name, theirs in zip(names, codes, strict=True):
        assert len(np.unique(theirs)) > 3, f"{name} shows nothing"
        off = np.abs(values[name].astype(int) - theirs)
        assert off.max() <= 1, name
        assert (off > 0).mean() <= 1e-3, name
    np.testing.assert_allclose(values[session.output], logits, rtol=1e-3, atol=1e-2)
    np.testing.assert_array_equal(values[session.output].argmax(1), logits.argmax(1))
    rows = session.describe()
    assert {"winograd", "direct", "depthwise"} <= {row["kernel"] for row in rows}
    assert {row["kernel"] for row in rows if row["layer"] in ("one.a", "one.b")} == {"winograd"}
    assert [row["kernel"] for row in rows if row["op"] == "host"] == ["slice", "pad"] * 2 * shared


@pytest.mark.parametrize("path", PATHS)
def test_paths_are_the_reference(tmp_path, path):
    """Bit for bit, with and without Winograd, over batch sizes and threads."""
    file = saved(residual_net(np.random.default_rng(1), shared=False), tmp_path / "net.onnx")
    x = normal(5, 3, 45, 39)
    want = load(file, kernels="reference").run(x)
    native = load(file, kernels=path)
    np.testing.assert_array_equal(native.run(x), want)
    np.testing.assert_array_equal(native.run(x[:2]), want[:2])
    np.testing.assert_array_equal(native.run(x), want)
    np.testing.assert_array_equal(load(file, kernels=path, winograd=False).run(x), want)
    np.testing.assert_array_equal(load(file, kernels=path, threads=2).run(x), want)


def cifar_net() -> tuple[torch.nn.Module, torch.Tensor]:
    model, x = CifarResNet(8, 10, 3, width=16), torch.randn(8, 3, 16, 16)
    model.train()
    with torch.no_grad():
        model(x)
    bw.prepare(model.eval(), bw.rules("w4a4"))
    bw.calibrate(model, [x]).eval()
    bw.snap_biases(model, x)
    return model, x


def test_float_residuals(tmp_path, monkeypatch):
    """A file of the textbook topology: float sums, slices and pads of floats between integer convolutions.

    `verify` takes the runtime as it takes any other: training form, frozen form and the runtime's own codes agree.
    """
    model, x = cifar_net()
    path = str(bw.export(model, tmp_path / "net.onnx", x).path)
    opened = []
    monkeypatch.setitem(OPEN, "onnx", lambda *args: opened.append(NativeFile(*args)) or opened[0])
    report = bw.verify(model, path, [x])
    assert report.ok, report.first_difference
    assert set(opened[0].weights) == {
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)
    }
    assert len(opened[0].run(inputs_of(x, "test"))[1]) == len(opened[0].network.calls)
    (want,) = in_onnxruntime(path, x.numpy())
    for kernels in ("reference", None):
        out = load(path, kernels=kernels).run(x.numpy())
        np.testing.assert_array_equal(out.argmax(1), want.argmax(1))
        np.testing.assert_allclose(out, want, atol=1e-4 * np.abs(want).max())
    with torch.no_grad():
        np.testing.assert_array_equal(model(x).argmax(1).numpy(), want.argmax(1))


@pytest.mark.parametrize("path", PATHS)
def test_every_run_reads_its_own_input(tmp_path, path):
    """Where the first operator is a view of the input, as in a network of linear layers over images."""
    model, x = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5)), torch.randn(6, 3, 4, 4)
    bw.prepare(model.eval(), bw.rules("w4a4"))
    bw.calibrate(model, [x])
    bw.export(model, tmp_path / "net.onnx", x)
    session = load(tmp_path / "net.onnx", kernels=path)
    for batch in (x[:3], x[3:]):
        with torch.no_grad():
            np.testing.assert_allclose(session.run(batch.numpy()), model(batch).numpy(), atol=1e-5)


def test_what_is_unknown_runs_in_onnxruntime(tmp_path):
    """Softmax, LayerNormalization and a product of two activations between integer layers."""
    net = Net(np.random.default_rng(0))
    x = net.linear(net.quantized("input", "a.input", 0.03, 8, signed=True), "a", 4, 24, 24)
    ones, zeros = (net.constant(n, np.full(24, v, np.float32)) for n, v in (("ones", 1), ("zeros", 0)))
    x = net.node("LayerNormalization", [x, ones, zeros], "norm", axis=-1)
    weights = net.node("Softmax", [net.node("MatMul", [x, net.node("Transpose", [x], "t", perm=[0, 2, 1])], "s")], "p")
    x = net.node("MatMul", [weights, x], "mixed")
    x = net.linear(net.quantized(x, "b.input", 0.02, 8, signed=True), "b", 3, 24, 7)
    path = saved(net.model(x, 3, None, 5, 24), tmp_path / "net.onnx")
    x = normal(3, 5, 24)
    (want,) = in_onnxruntime(path, x)
    session = load(path)
    np.testing.assert_allclose(session.run(x), want, atol=0.03)
    np.testing.assert_array_equal(session.run(x).argmax(-1), want.argmax(-1))
    hosts = [row["kernel"] for row in session.describe() if row["op"] == "host"]
    assert hosts == ["onnxruntime: LayerNormalization, MatMul, Softmax, Transpose"]


def tiny(tmp_path, **attributes) -> str:
    """One convolution of 8 channels over a free image."""
    net = Net(np.random.default_rng(0))
    x = net.conv(net.quantized("input", "c.input", 0.1, 4), 0.1, "c", 4, 4, 8, 3, 3, **attributes)
    return saved(net.model(net.quantized(x, "out", 0.1, 8), 4, None, None, None, None), tmp_path / "net.onnx")


def test_images_of_any_size(tmp_path):
    path = tiny(tmp_path, pads=[1, 0, 1, 1])
    session: Session = load(path)
    for shape in ((1, 8, 5, 9), (2, 8, 12, 3), (1, 8, 5, 9)):
        x = normal(*shape)
        np.testing.assert_array_equal(session.run(x), in_onnxruntime(path, x)[0])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 7, 5, 5), r"c: has 8 input channels and is given 7"),
        ((1, 8, 2, 5), r"an image of 2 x 5 is smaller than the kernel"),
        ((8, 5, 5), r"the input is 8 x 5 x 5; any x any x any x any is accepted"),
        ((0, 8, 5, 5), r"the input is empty"),
    ],
)
def test_inputs_that_do_not_fit(tmp_path, shape, message):
    with pytest.raises(BitwrightError, match=message):
        load(tiny(tmp_path)).run(np.zeros(shape, np.float32))


def test_files_that_do_not_open(tmp_path):
    whole = residual_net(np.random.default_rng(0), shared=True).SerializeToString()
    for content, message in ((whole[:-999], "damaged"), (b"PK\x03\x04", "damaged"), (None, "cannot be read")):
        path = tmp_path / "x.onnx"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(BitwrightError, match=message):
            load(path)
    two = onnx.ModelProto.FromString(whole)
    two.graph.output.append(two.graph.output[0])
    with pytest.raises(BitwrightError, match="one float32 input and one output"):
        load(saved(two, tmp_path / "two.onnx"))
    with pytest.raises(BitwrightError, match="threads: 0 is not accepted"):
        load(tiny(tmp_path), threads=0)


def test_files_beyond_what_is_planned(tmp_path):
    """A tensor in another file, and a branch, whose readers the planner would not see."""
    model = residual_net(np.random.default_rng(0), shared=True)
    tensor = next(t for t in model.graph.initializer if t.name == "stem.codes")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    tensor.ClearField("raw_data")
    (tmp_path / "weights.bin").write_bytes(bytes(16 * 3 * 49))
    with pytest.raises(BitwrightError, match="codes lies in another file"):
        load(saved(model, tmp_path / "net.onnx"))
    net = Net(np.random.default_rng(0))
    bodies = {}
    for name in ("then_branch", "else_branch"):
        out = helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, [None, 3])
        bodies[name] = helper.make_graph([helper.make_node("Relu", ["input"], [f"{name}.y"])], name, [], [out])
    y = net.node("If", [net.constant("yes", np.array(True))], "y", **bodies)
    with pytest.raises(BitwrightError, match="If holds a graph of its own"):
        load(saved(net.model(y, 2, None, 3), tmp_path / "if.onnx"))


def test_weights_that_lie_about_their_size(tmp_path):
    """A raw tensor shorter than its shape says is refused before any kernel sees it."""
    model = residual_net(np.random.default_rng(0), shared=True)
    tensor = next(t for t in model.graph.initializer if t.name == "stem.codes")
    tensor.raw_data = tensor.raw_data[:-64]
    with pytest.raises(BitwrightError):
        load(saved(model, tmp_path / "net.onnx"))


def test_without_a_compiler(tmp_path):
    """The reference takes over, says so once, and gives the same numbers."""
    path = saved(residual_net(np.random.default_rng(0), shared=True), tmp_path / "net.onnx")
    x = normal(1, 3, 45, 39)
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys, numpy as np\n"
        "from bitwright.runtime import load\n"
        "s = load(sys.argv[1]); print(s.path); np.save(sys.argv[3], s.run(np.load(sys.argv[2])))\n"
    )
    out = str(tmp_path / "y.npy")
    command = [sys.executable, "-c", code, path, str(tmp_path / "x.npy"), out]
    environment = {**os.environ, "CC": "no-such-compiler", "BITWRIGHT_CACHE": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["reference"]
    assert done.stderr.count("native kernels are off") == 1
    np.testing.assert_array_equal(np.load(out), load(path).run(x))


def test_reproducible_convolutions_with_float_sums_run_here_to_the_last_bit(tmp_path):
    torch.manual_seed(0)
    model, x = CifarResNet(8, 10, 3, width=8).eval(), torch.randn(8, 3, 16, 16)
    bw.prepare(model, bw.rules("w3a3") + bw.topology(model, x, "fpres"))
    bw.make_reproducible(bw.calibrate(model, [x]).eval())
    path = tmp_path / "net.onnx"
    bw.export(model, path, x[:2])
    for kernels in ("reference", None):
        session = load(path) if kernels is None else load(path, kernels=kernels)
        np.testing.assert_array_equal(session.values(x.numpy())[session.output], in_onnxruntime(path, x.numpy())[0])
    convolutions = [row["layer"] for row in session.describe() if row["op"] == "Conv"]
    assert {"conv1", "layer1.0.conv2", "layer3.0.conv2"} <= set(convolutions)
