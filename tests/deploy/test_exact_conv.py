"""Convolutions with float outputs in reproducible networks: PyTorch, frozen form and onnxruntime to the last bit."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from deploy_nets import settle
from test_export import optimized
from torch import Tensor, nn

import bitwright as bw
from bitwright.deploy import export, freeze, snap_biases, verify
from bitwright.deploy.bench import bench
from bitwright.deploy.exact_conv import bounds
from bitwright.deploy.integer import IntConv
from bitwright.layers.whole import EXACT
from bitwright.training.models.resnet import CifarResNet
from bitwright.training.vision import import_timm


def in_runtime(model: nn.Module, x: Tensor, path) -> Tensor:
    """The file's output."""
    export(model, path, x[:2])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(np.array(session.run(None, {"input": x.numpy()})[0]))


def reproducible(model: nn.Module, bits: str, x: Tensor, topology: str = "fpres") -> nn.Module:
    """Quantized, calibrated on `x`."""
    rules = bw.rules(bits, ends=None)
    bw.prepare(model.eval(), rules + bw.topology(model, x, topology, rules=rules))
    return bw.make_reproducible(bw.calibrate(model, [x]).eval())


def all_forms(model: nn.Module, x: Tensor, path) -> list[Tensor]:
    """Outputs of training form, frozen form and file."""
    with torch.no_grad():
        return [model(x), freeze(model, x[:2])(x), in_runtime(model, x, path)]


def agree(model: nn.Module, x: Tensor, path) -> bool:
    """Whether all three forms give the same bits."""
    trained, frozen, file = all_forms(model, x, path)
    return torch.equal(trained, frozen) and torch.equal(frozen, file)


class Random(nn.Module):
    """Convolutions over one or two axes, drawn at random, side by side: (N, 20, 17, 17) to (N, features)."""

    def __init__(self, count: int):
        super().__init__()
        self.parts = nn.ModuleList(self.part(2 if i % 3 else 1) for i in range(count))

    def part(self, axes: int) -> nn.Module:
        """A convolution, every second one with a norm, every second one with a bias."""
        kind, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d))[axes - 1]
        layer = kind(
            20,
            4 * pick(1, 2, 5),
            pick(1, 3, 5),
            stride=pick(1, 2),
            padding=pick(0, 1, 2),
            dilation=pick(1, 2),
            groups=pick(1, 1, 2, 4),
            bias=pick(True, False),
            padding_mode=pick("zeros", "zeros", "reflect", "circular"),
        )
        return nn.Sequential(layer, norm(layer.out_channels, affine=pick(True, False)) if pick(True, False) else ID)

    def forward(self, x: Tensor) -> Tensor:
        parts = [part(x if i % 3 else x.flatten(2)) for i, part in enumerate(self.parts)]
        return torch.cat([y.flatten(1) for y in parts], 1)


ID = nn.Identity()


def pick(*values):
    """One of them, by torch's generator."""
    return values[int(torch.randint(len(values), ()))]


@pytest.mark.parametrize(
    ("bits", "snapped", "signed"),
    [("w1a1", True, False), ("w2a2", True, True), ("w3a5", False, False), ("w4a4", False, True), ("w8a8", True, True)],
)
def test_random_convolutions_agree_to_the_last_bit(bits, snapped, signed, tmp_path):
    torch.manual_seed(int(bits[1]))
    x = torch.randn(24, 20, 17, 17)
    x = x if signed else x.relu()
    model = reproducible(settle(Random(9), *x.shape), bits, x)
    if snapped:
        snap_biases(model, x[:2])
    assert agree(model, x, tmp_path / "net.onnx")


class Wide(nn.Module):
    """A convolution whose sums of 8-bit numbers pass 2^24, without bias, with one, or with a norm."""

    def __init__(self, bias: bool, norm: bool):
        super().__init__()
        self.conv = nn.Conv2d(640, 32, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(32) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


@pytest.mark.parametrize(("bias", "norm"), [(False, False), (True, False), (False, True)])
def test_sums_that_float32_does_not_hold_are_taken_in_two_pieces(bias, norm, tmp_path):
    model, x = Wide(bias, norm), torch.rand(4, 640, 6, 6)
    reproducible(settle(model, 8, 640, 6, 6), "w8a8", x)
    with torch.no_grad():
        model.conv.weight_quantizer.grid.scale.div_(8)
    layer = next(m for m in freeze(model, x[:2]).modules() if isinstance(m, IntConv))
    one_piece, two_pieces = bounds(layer).amax(1)
    assert two_pieces < EXACT < one_piece
    assert agree(model, x, tmp_path / "net.onnx")
    assert [n.op_type for n in optimized(tmp_path / "net.onnx", tmp_path).graph.node].count("Sum") == 2


def test_pieces_are_the_whole():
    layer = next(m for m in freeze(one_conv("w8a8"), torch.randn(2, 3, 8, 8)).modules() if isinstance(m, IntConv))
    assert layer.weight_codes is not None
    numbers, reach = layer.weight_codes.long(), layer.input_quantizer.reach
    assert torch.equal(bounds(layer)[0], numbers.abs().flatten(1).sum(1) * reach + layer.bias_codes.abs())


def one_conv(bits: str) -> nn.Module:
    """A convolution with a bias."""
    torch.manual_seed(0)
    return reproducible(nn.Sequential(nn.Conv2d(3, 4, 3)), bits, torch.randn(8, 3, 8, 8))


@pytest.mark.parametrize(("bits", "shortcut"), [("w2a2", "A"), ("w4a4", "B"), ("w8a8", "A")])
def test_a_network_with_float_sums_agrees_to_the_last_bit(bits, shortcut, tmp_path):
    torch.manual_seed(0)
    model, x = CifarResNet(8, 10, 3, width=8, shortcut=shortcut), torch.randn(64, 3, 16, 16)
    reproducible(settle(model, 16, 3, 16, 16), bits, x)
    snap_biases(model, x[:2])
    path = tmp_path / "net.onnx"
    assert agree(model, x, path)
    report = verify(model, path, x.split(32))
    assert report.ok
    assert sum(row["different_frozen"] + row["different_file"] for row in report.rows()) == 0
    assert (report.float32_differs, report.logit_difference) == (0, 0)
    kinds = [n.op_type for n in optimized(path, tmp_path).graph.node]
    # The first of each block has a quantizer behind it; the stem and the others add up in float.
    assert kinds.count("QLinearConv") == 3
    assert kinds.count("Sum") >= (6 if shortcut == "B" else 4)


def test_without_it_sums_differ_from_the_file_s(tmp_path):
    """What the tests above would not notice if they could not fail."""
    torch.manual_seed(0)
    x = torch.randn(24, 16, 9, 9)
    model = settle(nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)), *x.shape)
    bw.prepare(model, bw.rules("w4a4", ends=None))
    bw.calibrate(model, [x]).eval()
    assert not agree(model, x, tmp_path / "net.onnx")


@pytest.mark.parametrize("topology", ["res8", "shared"])
def test_other_topologies_agree_too(topology, tmp_path):
    torch.manual_seed(0)
    model, x = CifarResNet(8, 10, 3, width=8), torch.randn(64, 3, 16, 16)
    reproducible(settle(model, 16, 3, 16, 16), "w3a3", x, topology)
    snap_biases(model, x[:2])
    assert agree(model, x, tmp_path / "net.onnx")


def test_scalings_are_no_convolutions(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 3)), images(16)
    twin = copy.deepcopy(model)
    export(reproducible(model, "w4a4", x), tmp_path / "net.onnx", x[:2])
    report = bench(tmp_path / "net.onnx", twin, x[:1], threads=1, runs=2)
    assert sum(report.float_kernels.values()) == sum(report.integer_kernels.values()) == 1


def test_layers_of_timm_agree(tmp_path):
    timm = import_timm()
    torch.manual_seed(0)
    parts = [timm.layers.Conv2dSame(16, 8, 3, 2), timm.layers.BatchNormAct2d(8), timm.layers.Conv2dSame(8, 4, 4)]
    x = images(16)
    model = reproducible(settle(nn.Sequential(*parts), *x.shape), "w2a2", x)
    assert agree(model, x, tmp_path / "net.onnx")


def images(channels: int) -> Tensor:
    """(24, channels, 11, 11)."""
    return torch.randn(24, channels, 11, 11)


class Fork(nn.Module):
    """Two quantizers read what the first convolution gives, the second one's output is the network's."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.left(x) + self.right(x)


def test_what_two_quantizers_read_is_exact(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(32, 3, 8, 8)
    model = reproducible(settle(Fork(), *x.shape), "w2a2", x)
    assert agree(model, x, tmp_path / "net.onnx")


class Linears(nn.Module):
    """A norm behind a linear layer."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.head = nn.Linear(20, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.fc(x)).relu())


def test_norms_behind_linear_layers_are_folded_in_evaluation_too(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(256, 20)
    model = reproducible(settle(Linears(), *x.shape), "w4a4", x)
    assert agree(model, x, tmp_path / "net.onnx")


def test_file_holds_weights_at_their_own_width(tmp_path):
    x = torch.randn(4, 32, 8, 8)
    model = reproducible(nn.Sequential(nn.Conv2d(32, 64, 3)), "w2a2", x)
    report = export(model, tmp_path / "net.onnx", x[:2])
    assert report.packed_bytes == 32 * 64 * 9 // 4
    tensors = onnx.load(report.path).graph.initializer
    assert all(t.data_type != onnx.TensorProto.FLOAT or np.prod(t.dims) < 100 for t in tensors)


class Followed(nn.Module):
    """A convolution, something that a runtime takes into it, and a quantizer: (N, 3, 8, 8) to (N, 6)."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
        self.norm, self.gain = nn.BatchNorm2d(6), nn.Parameter(torch.rand(6, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.kind == "norm":
            x = self.norm(x)
        elif self.kind == "scale":
            x = x * self.gain
        elif self.kind == "shift":
            x = x + self.gain
        elif self.kind == "number":
            x = torch.relu(x * 1.7)
        x = self.second(x)
        return (self.norm(x) if self.kind == "norm" else x).mean((2, 3))  # twice, so it is not folded


@pytest.mark.parametrize("kind", ["norm", "scale", "shift", "number"])
def test_a_runtime_does_not_round_weights_anew_where_constants_stand_before_a_quantizer(kind, tmp_path):
    """onnxruntime makes one convolution of both, with weights that were float and are then 8 bits of its own."""
    torch.manual_seed(0)
    model, x = Followed(kind), torch.randn(64, 3, 8, 8)
    settle(model, 16, 3, 8, 8)
    bw.prepare(model.eval(), bw.rules("w4a4"))
    bw.calibrate(model, [x]).eval()
    snap_biases(model, x[:2])
    export(model, tmp_path / "net.onnx", x[:2])
    report = verify(model, tmp_path / "net.onnx", [x])
    assert report.ok, report.first_difference
    assert all(r["different_file"] == 0 for r in report.rows() if r["what"] == "weight")
