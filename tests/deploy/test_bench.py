"""`bench` reports what it measured and which kernels ran; how long anything took is not asserted."""

import copy
import json

import pytest
import torch
from deploy_nets import quantized, settle
from torch import nn

from bitwright.deploy import bench, export, snap_biases
from bitwright.errors import BitwrightError


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(float model, path): conv - norm - relu - conv, flatten, linear; the second convolution feeds floats."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Hardswish()]
    model = settle(nn.Sequential(*layers, nn.Flatten(), nn.Linear(144, 5)), 8, 3, 8, 8)
    net = quantized(copy.deepcopy(model), "w4a4", torch.randn(32, 3, 8, 8))
    snap_biases(net, torch.randn(2, 3, 8, 8))
    path = tmp_path_factory.mktemp("bench") / "net.onnx"
    export(net, path, torch.randn(2, 3, 8, 8))
    return model, path


def test_what_is_reported(pair):
    model, path = pair
    before = copy.deepcopy(model.state_dict())
    report = bench(path, model, torch.randn(3, 3, 8, 8), threads=1, runs=5)
    assert (report.batch, report.threads, report.runs) == (3, 1, 5)
    for latency in (report.file, report.float_model):
        assert 0 < latency.lower <= latency.median <= latency.upper
    assert report.static is not None
    assert report.static.lower <= report.static.median <= report.static.upper
    assert report.ratio > 0
    assert (report.static_ratio or 0) > 0
    assert sum(report.operators.values()) == pytest.approx(1)
    # The profile is of the graph that runs: both kinds of kernels below appear in it.
    assert {*report.integer_kernels, *report.float_kernels} <= report.operators.keys()
    assert report.integer_kernels == {"MatMulIntegerToFloat": 1, "QLinearConv": 1}
    assert sum(report.float_kernels.values()) == 1
    assert report.integer_share == pytest.approx(2 / 3)
    assert json.loads(json.dumps(report.as_dict()))["integer_share"] == report.integer_share
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_refusals_are_one_line(pair, tmp_path):
    model, path = pair
    (tmp_path / "broken.onnx").write_bytes(path.read_bytes()[:500])
    with pytest.raises(BitwrightError, match="is damaged"):
        bench(tmp_path / "broken.onnx", model, torch.randn(1, 3, 8, 8))
    with pytest.raises(BitwrightError, match="bench: takes models of one tensor in, not of 2 inputs, a, b"):
        bench(path, model, {"a": torch.randn(1, 3, 8, 8), "b": torch.randn(1, 3, 8, 8)})
    with pytest.raises(BitwrightError, match="at least 1 thread and 2 runs"):
        bench(path, model, torch.randn(1, 3, 8, 8), threads=0)
    with pytest.raises(BitwrightError, match=r"onnxruntime cannot run it on this input|failed"):
        bench(path, model, torch.randn(1, 4, 8, 8))
