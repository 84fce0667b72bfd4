"""The runtime's own quantization is what its documentation says it is, and a failure is one line."""

from collections import Counter

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from bitwright.deploy.bench import float_onnx, session
from bitwright.deploy.static import quantize
from bitwright.errors import BitwrightError


def test_every_product_runs_on_integers_and_the_function_stays_close(tmp_path):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5)]
    model = nn.Sequential(*layers).eval()
    x = torch.randn(16, 3, 8, 8)
    (tmp_path / "float.onnx").write_bytes(float_onnx(model, x))
    quantize(tmp_path / "float.onnx", x.numpy(), tmp_path / "static.onnx")
    made, optimized = session(tmp_path / "static.onnx", 1, tmp_path / "optimized.onnx")
    assert isinstance(made, onnxruntime.InferenceSession)
    kinds = Counter(node.op_type for node in optimized.graph.node)
    assert kinds["QLinearConv"] == 2
    assert kinds["QGemm"] == 1
    assert kinds["Conv"] + kinds["FusedConv"] + kinds["Gemm"] == 0
    found, wanted = np.asarray(made.run(None, {"input": x.numpy()})[0]), model(x).detach().numpy()
    assert 0 < np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()


def test_a_file_that_it_cannot_take_is_one_line(tmp_path):
    (tmp_path / "float.onnx").write_bytes(b"no network")
    with pytest.raises(BitwrightError, match="static quantization failed: ") as caught:
        quantize(tmp_path / "float.onnx", np.zeros((1, 3), np.float32), tmp_path / "out.onnx")
    assert "\n" not in str(caught.value)
