"""Training form, frozen form and file of reproducible networks in the real runtime, to the last bit."""

import numpy as np
import onnxruntime
import pytest
import torch
from deploy_nets import quantized
from onnx import TensorProto, helper
from test_export import optimized
from torch import Tensor, nn

import bitwright as bw
from bitwright.deploy import export, freeze, snap_biases, verify
from bitwright.deploy.elementary import FUNCTIONS, GELU_CODES, gelu_runs
from bitwright.deploy.integer import DOMAIN, InputCodes
from bitwright.deploy.packing import OPSET
from bitwright.errors import BitwrightError
from bitwright.grids import Affine
from bitwright.kernels import reproducible as exact
from bitwright.layers.reproducible import ReproducibleLayerNorm, is_reproducible


class Block(nn.Module):
    """A transformer's block in which everything that rounds differently elsewhere occurs."""

    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width, elementwise_affine=bias)
        self.attention = nn.MultiheadAttention(width, 4, bias=bias, batch_first=True)
        self.fc1, self.act, self.fc2 = nn.Linear(width, 3 * width, bias), nn.GELU(), nn.Linear(3 * width, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    """(N, 3, 16, 16) to (N, 10) by 64 tokens."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.patch, self.block = nn.Conv2d(3, 48, 2, 2), Block(48, bias)
        self.norm, self.pool, self.head = nn.LayerNorm(48), nn.AdaptiveAvgPool2d(1), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.block(self.patch(x).flatten(2).transpose(1, 2)))
        pooled = self.pool(x.transpose(1, 2).unflatten(2, (8, 8))).flatten(1)
        return self.head(pooled)


def bad_images(count: int) -> Tensor:
    """Images whose sizes are five powers of ten apart."""
    return torch.randn(count, 3, 16, 16) * torch.logspace(-3, 2, count)[:, None, None, None]


def transformer(bits: str, bias: bool = True) -> nn.Module:
    """Snapped, with parameters far apart."""
    torch.manual_seed(0)
    model = Transformer(bias).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.2, 0.6)
    images = bad_images(16)
    bw.prepare(model, bw.rules(bits) + bw.topology(model, images))
    bw.calibrate(model, [images]).eval()
    return model


@pytest.mark.parametrize(("bits", "bias"), [("w8a8", True), ("w8a8", False), ("w2a2", True)])
def test_all_three_forms_agree_to_the_last_bit(bits, bias, tmp_path):
    model = bw.make_reproducible(transformer(bits, bias))
    snap_biases(model, bad_images(2))
    path, x = tmp_path / "net.onnx", bad_images(96)
    export(model, path, x[:2])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        trained, frozen = model(x), freeze(model, x[:2])(x)
    assert torch.equal(trained, frozen)
    assert torch.equal(frozen, torch.from_numpy(session.run(None, {"input": x.numpy()})[0]))
    report = verify(model, path, x.split(32))
    assert report.ok
    assert sum(row["different_frozen"] + row["different_file"] for row in report.rows()) == 0
    assert report.float32_differs == 0


def test_without_it_codes_differ(tmp_path):
    """What the test above would not notice if it could not fail."""
    model = transformer("w8a8")
    snap_biases(model, bad_images(2))
    export(model, tmp_path / "net.onnx", bad_images(2))
    report = verify(model, tmp_path / "net.onnx", bad_images(96).split(32))
    assert report.logit_difference > 0


def test_the_runtime_keeps_the_nodes_apart(tmp_path):
    model = bw.make_reproducible(transformer("w4a4"))
    export(model, tmp_path / "net.onnx", bad_images(2))
    kinds = {node.op_type for node in optimized(tmp_path / "net.onnx", tmp_path).graph.node}
    merged = {"LayerNormalization", "SkipLayerNormalization", "Softmax", "Gelu", "BiasGelu", "QLinearMatMul"}
    assert not merged & kinds
    assert {"MatMulIntegerToFloat", "GatherElements"} <= kinds


def run_function(kind: str, output: int, **inputs: np.ndarray) -> np.ndarray:
    """One of `FUNCTIONS` in onnxruntime."""
    functions = [FUNCTIONS[kind]()]
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for name, a in inputs.items()
    ]
    node = helper.make_node(kind, list(inputs), ["y"], domain=DOMAIN)
    graph = helper.make_graph([node], "one", infos, [helper.make_tensor_value_info("y", output, None)])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.array(session.run(None, dict(inputs))[0])


@pytest.mark.parametrize("n", [1, 7, 192, 1000])
def test_functions_are_those_of_pytorch(n):
    x, gain, shift = torch.randn(40, n) * torch.logspace(-4, 3, 40)[:, None], torch.randn(n), torch.randn(n)
    eps = np.array(1e-6)
    found = run_function("Norm", TensorProto.FLOAT, x=x.numpy(), gain=gain.numpy(), shift=shift.numpy(), eps=eps)
    assert np.array_equal(found, exact.layer_norm(x, gain, shift, 1e-6).numpy())
    found = run_function("Softmax", TensorProto.FLOAT, x=x.numpy())
    assert np.array_equal(found, exact.softmax(x).numpy())
    images = x.reshape(2, 20, n, 1)
    assert np.array_equal(run_function("Pool", TensorProto.FLOAT, x=images.numpy()), exact.pooled(images).numpy())


def test_the_runtime_s_exponential_function_is_good_enough():
    """Every exponential that a softmax can meet."""
    below = -torch.arange(2**15) / 2048
    x = torch.stack([torch.zeros(2**15), below], -1)
    assert np.array_equal(run_function("Softmax", TensorProto.FLOAT, x=x.numpy()), exact.softmax(x).numpy())


@pytest.mark.parametrize(
    ("scale", "zero", "lo", "hi"), [(0.03, 0.0, -128, 127), (0.3, 0.0, 0, 15), (2.0, 1.0, 0, 3), (90.0, 0.0, 0, 1)]
)
def test_a_table_has_the_codes_of_gelu(scale, zero, lo, hi):
    codes = InputCodes("fc.input_quantizer", Affine(torch.tensor([scale]), torch.tensor([zero]), lo, hi), -1, 8)
    base = 128 if lo < 0 else 0
    x = torch.cat([torch.linspace(-10, 60, 200_001), torch.randn(1000)])[None]
    starts, values = gelu_runs(codes, base)
    found = run_function(GELU_CODES, TensorProto.UINT8, x=x.numpy(), starts=starts, codes=values)
    assert np.array_equal(found, (codes.codes(exact.gelu(x)) + base).numpy().astype(np.uint8))
    assert len(starts) <= 2 * (hi - lo) + 2


def test_training_and_evaluation_with_gradients_do_not_change():
    one, other, x = transformer("w4a4"), bw.make_reproducible(transformer("w4a4")), bad_images(8)
    for mode in (True, False):
        grads = []
        for model in (one.train(mode), other.train(mode)):
            model.zero_grad()
            y = model(x)
            y.square().sum().backward()
            grads.append([y.detach()] + [p.grad for p in model.parameters() if p.grad is not None])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_what_was_saved_evaluates_the_same(tmp_path):
    model, x = bw.make_reproducible(transformer("w4a4")), bad_images(8)
    snap_biases(model, x[:2])
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(1)
    again = Transformer().eval()
    bw.prepare(again, bw.rules("w4a4") + bw.topology(again, x))
    bw.make_reproducible(again)
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    with torch.no_grad():
        assert torch.equal(model(x), again(x))


def test_a_gelu_that_is_read_by_others_stays_a_gelu(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act, self.head = nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.fc(x))
            return self.head(x) + x[:, :4]

    x = torch.randn(32, 8)
    model = bw.make_reproducible(quantized(Net(), "w4a4", x))
    export(model, tmp_path / "net.onnx", x[:2])
    report = verify(model, tmp_path / "net.onnx", [x])
    assert report.ok
    assert report.logit_difference < 1e-5


def test_targets_without_such_arithmetic_refuse(tmp_path):
    model = bw.make_reproducible(transformer("w4a4"))
    with pytest.raises(BitwrightError, match="no reproducible arithmetic; use target onnx"):
        export(model, tmp_path / "net.onnx", bad_images(2), target="qonnx")


def test_a_network_that_is_not_prepared_is_refused():
    with pytest.raises(BitwrightError, match="no quantizers"):
        bw.make_reproducible(nn.LayerNorm(4))


def test_norms_over_two_axes_and_approximated_gelu_stay_as_they_are():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm((3, 4)), nn.GELU(approximate="tanh"), nn.LayerNorm(4))
    bw.prepare(model, bw.rules("w4a4"))
    assert not is_reproducible(model)
    bw.make_reproducible(model)
    assert is_reproducible(model)
    assert [isinstance(m, ReproducibleLayerNorm) for m in model] == [False, False, False, True]
