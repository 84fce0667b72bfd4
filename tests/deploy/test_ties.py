"""Ratios of scales on residual paths: found in the graph, moved, and then every arithmetic agrees."""

import copy

import numpy as np
import pytest
import torch
from deploy_nets import shipped
from torch import nn

import bitwright as bw
from bitwright.deploy import snap_biases
from bitwright.deploy.capture import Requantized, captured, requantized
from bitwright.deploy.ties import LARGEST, PARTS, SMALLEST, part_ties, scale_of
from bitwright.prepare import quantizers
from bitwright.training.models.resnet import CifarResNet


def residual_net(topology: str) -> nn.Module:
    """A calibrated ResNet-8 with scales as training leaves them: anything."""
    torch.manual_seed(3)
    model, x = CifarResNet(8, 10, 3, width=8).eval(), torch.randn(16, 3, 16, 16)
    rules = bw.rules("w4a4")
    bw.prepare(model, rules + bw.topology(model, x, topology, rules=rules))  # pyright: ignore
    bw.calibrate(model, [x])
    with torch.no_grad():
        for quantizer in quantizers(model).values():
            quantizer.grid.scale.mul_(torch.rand_like(quantizer.grid.scale) * 0.2 + 0.9)  # pyright: ignore
    return model.eval()


class Residual(nn.Module):
    """Two convolutions and their sum, then a third convolution."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.relu(self.a(x) + nn.functional.max_pool2d(self.b(x), 1)))


def test_what_is_quantized_again_is_found():
    model = Residual()
    spec = bw.QuantizerSpec(bits=8)
    rules = [*bw.rules("w4a4", ends=None), bw.Rule(match=["a", "b"], output=spec)]
    bw.calibrate(bw.prepare(model, rules), [torch.randn(2, 3, 4, 4)])
    found = requantized(captured(model, torch.randn(2, 3, 4, 4)))
    assert found == [Requantized("c.input_quantizer", ("a.output_quantizer", "b.output_quantizer"))]


@pytest.mark.parametrize("topology", ["res8", "shared"])
def test_every_arithmetic_rounds_a_sum_to_the_same_code(topology):
    model, x = residual_net(topology), torch.randn(2, 3, 16, 16)
    before = {n: scale_of(q) for n, q in quantizers(model).items() if q.shape.channels == 1}
    snap_biases(model, x)
    graph, all_of = captured(model, x), quantizers(model)
    readings = requantized(graph)
    sums = 0
    codes = np.arange(-128, 128, dtype=np.float32)
    for reading in readings:
        s = np.float32(scale_of(all_of[reading.reader]))
        scales = [np.float32(scale_of(all_of[n])) for n in reading.sources]
        ratios = [float(t) / float(s) * PARTS for t in scales]
        if not all(SMALLEST <= r <= LARGEST for r in ratios):
            continue
        sums += len(ratios) == 2
        assert ratios == pytest.approx([round(r) for r in ratios], abs=1e-3)
        grids = np.meshgrid(*[codes] * len(scales))
        values = [k * t for k, t in zip(grids, scales, strict=True)]
        ours = np.rint(np.sum(values, 0, dtype=np.float32) / s)
        fused = np.rint(np.sum([k * (t / s) for k, t in zip(grids, scales, strict=True)], 0, dtype=np.float32))
        exact = sum(k.astype(np.float64) * float(t) for k, t in zip(grids, scales, strict=True)) / float(s)
        seen = np.abs(exact) <= 255  # beyond are no codes
        assert np.array_equal(ours[seen], np.rint(exact)[seen])
        assert np.array_equal(fused[seen], np.rint(exact)[seen])
        assert np.abs(exact - np.floor(exact) - 0.5)[seen].min() > 0.9 / (2 * PARTS)
    assert sums >= {"res8": 3, "shared": 1}[topology]
    moves = [scale_of(all_of[n]) / was - 1 for n, was in before.items()]
    assert 0 < max(map(abs, moves)) < 0.01


def test_a_second_call_moves_nothing():
    model, x = residual_net("res8"), torch.randn(2, 3, 16, 16)
    assert part_ties(model, captured(model, x)) > 0
    state = copy.deepcopy(model.state_dict())
    assert part_ties(model, captured(model, x)) == 0
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_sums_in_the_runtime_are_those_of_the_frozen_form(tmp_path):
    model, x = residual_net("res8"), torch.randn(512, 3, 16, 16)
    snap_biases(model, x[:2])
    report = shipped(model, tmp_path / "net.onnx", x)
    assert report.ok, report.first_difference
    assert not any(r["different_file"] for r in report.rows())
