"""Layers that 1-bit quantizers alone read: one scale for all channels, and not one code that changes."""

import copy

import pytest
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.deploy import export, freeze, snap_biases, verify
from bitwright.deploy.capture import captured
from bitwright.deploy.compact import floating, whole
from bitwright.deploy.freeze import layer_plans
from bitwright.deploy.integer import IntLayer
from bitwright.deploy.thresholds import only_step
from bitwright.prepare import quantizers


class Net(nn.Module):
    """A convolution, a depth-wise one and a product, then a sum, each behind a norm with gains of all kinds."""

    def __init__(self, channels: int = 48):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.depth = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.point, self.last = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(4))
        self.act, self.pool, self.head = nn.ReLU6(), nn.MaxPool2d(2), nn.Linear(channels, 5)
        for norm in self.norms:
            nn.init.normal_(norm.weight, 0.5, 0.5)
            nn.init.normal_(norm.bias, 0.2, 0.5)
            nn.init.uniform_(norm.running_var, 0.1, 2.0)
            nn.init.normal_(norm.running_mean, 0.0, 0.2)
            with torch.no_grad():
                norm.weight[:3] = torch.tensor([1e-12, -1.0, 0.01])

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norms[0](self.stem(x)))
        x = self.pool(self.act(self.norms[1](self.depth(x))))
        x = self.act(self.norms[2](self.point(x)))
        return self.head((x + self.norms[3](self.last(x))).relu().mean((2, 3)))


def network(bits: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(64, 3, 8, 8)
    bw.calibrate(bw.prepare(model, bw.rules(bits, ends=None)), [x]).eval()
    return model, x


@torch.no_grad()
def codes(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What input quantizers give, in float64."""
    model, found = copy.deepcopy(model).double(), {}
    for name, quantizer in quantizers(model).items():
        if name.endswith("input_quantizer"):
            quantizer.register_forward_hook(lambda _, args, out, name=name: found.update({name: out}))
    model(x.double())
    return found


def steps(model: nn.Module, x: Tensor) -> dict[str, float | None]:
    plans = layer_plans(model, captured(model, x))
    return {name: only_step(plan) for name, plan in plans.items()}


@pytest.mark.parametrize("bits", ["w1a1", "w2a1", "w4a1"])
def test_no_code_changes_and_channels_share_a_scale(bits):
    model, x = network(bits)
    before = codes(model, x)
    snap_biases(model, x[:2])
    after = codes(model, x)
    for name in ("depth", "point"):
        found = before[f"{name}.input_quantizer"]
        assert found.unique().numel() == 2
        assert torch.equal(found > 0, after[f"{name}.input_quantizer"] > 0), name
    layers = {m.name: m for m in freeze(model, x[:2]).modules() if isinstance(m, IntLayer)}
    for name in ("stem", "depth"):
        scale = layers[name].weight_scale
        assert scale[1] < 0
        live = (layers[name].weight_codes != 0).flatten(1).any(1)
        assert scale[live].abs().unique().numel() == 1, name
        assert floating(scale[live].numpy()).about[1] == 1
    # No wider than sums of nine codes, in the numbers of a 4-bit weight.
    assert whole(layers["depth"].bias_codes.numpy()).about[1] <= {"w1a1": 8, "w2a1": 9, "w4a1": 9}[bits]


def test_only_where_nothing_else_reads_the_layer():
    model, x = network("w1a1")
    assert {name for name, step in steps(model, x[:2]).items() if step} == {"stem", "depth"}  # `point` feeds the sum
    assert steps(model, x[:2])["stem"] == float(model.depth.input_quantizer.affine().scale)
    model, x = network("w1a2")
    assert not any(steps(model, x[:2]).values())


def test_files_are_the_network(tmp_path):
    model, x = network("w1a1")
    snap_biases(model, x[:2])
    for target in ("onnx", "packed"):
        export(model, tmp_path / target, x[:2], target=target)
        assert verify(model, tmp_path / target, [x]).ok
    assert verify(model, tmp_path / "onnx", [x], runtime="native").ok
    again = copy.deepcopy(model)
    snap_biases(again, x[:2])
    for ours, theirs in zip(freeze(model, x[:2]).modules(), freeze(again, x[:2]).modules(), strict=True):
        if isinstance(ours, IntLayer):
            assert torch.equal(ours.weight_scale, theirs.weight_scale), ours.name
            assert ours.bias is None or torch.equal(ours.bias, theirs.bias), ours.name
