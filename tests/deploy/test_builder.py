"""Quantizers in a file: what stands in front of them and need not."""

import onnx
import onnxruntime
import pytest
import torch
from deploy_nets import quantized
from torch import nn

from bitwright.deploy import export, snap_biases, verify


def operators(path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = f"{path}.optimized"
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


@pytest.mark.parametrize(
    "between",
    [
        (nn.PixelShuffle(2),),
        (nn.PixelShuffle(2), nn.ReLU()),
        (nn.ReLU(), nn.PixelShuffle(2)),
    ],
)
def test_a_quantizer_stands_in_front_of_a_shuffle_of_pixels(between, tmp_path):
    """So that the convolution in front is an integer kernel, whose bias is on the grid of its sums."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, 6, 6)
    model = quantized(nn.Sequential(nn.Conv2d(4, 8, 3), *between, nn.Conv2d(2, 2, 3)), "w4a4", x, ends=None)
    assert snap_biases(model, x) == 1
    export(model, tmp_path / "net.onnx", x)
    found = verify(model, tmp_path / "net.onnx", [x])
    assert found.ok, found.first_difference
    assert found.different_file == 0
    kinds = operators(tmp_path / "net.onnx")
    assert kinds.index("QLinearConv") < kinds.index("DepthToSpace")
    assert "Relu" not in kinds


def test_what_two_read_is_shuffled_once_as_it_is(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.left, self.right = nn.Conv2d(4, 8, 3), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            y = nn.functional.pixel_shuffle(self.first(x), 2)
            return self.left(y) * self.right(y)

    torch.manual_seed(0)
    x = torch.randn(3, 4, 6, 6)
    model = quantized(Twice(), "w8a8", x, ends=None)
    snap_biases(model, x)
    export(model, tmp_path / "net.onnx", x)
    found = verify(model, tmp_path / "net.onnx", [x])
    assert found.ok, found.first_difference
    assert operators(tmp_path / "net.onnx").count("DepthToSpace") == 1
