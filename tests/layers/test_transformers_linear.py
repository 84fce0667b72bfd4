"""The linear layer of GPT-2 and its kin."""

import copy

import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.costs import cost_table
from bitwright.layers import QuantProduct
from bitwright.training.vision import import_torchvision

pytest.importorskip("transformers")
import_torchvision()  # which transformers imports
from transformers.pytorch_utils import Conv1D  # noqa: E402

RULES = [bw.Rule(match="*", weight=bw.QuantizerSpec(bits=4), input=bw.QuantizerSpec(bits=4))]
X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


def pair() -> tuple[nn.Sequential, nn.Sequential]:
    """The same network, quantized, of transposed and of ordinary linear layers."""
    torch.manual_seed(0)
    ours = nn.Sequential(Conv1D(8, 6), nn.ReLU(), Conv1D(3, 8))
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    for i in (0, 2):
        nn.init.normal_(ours[i].bias)  # pyright: ignore
        plain[i].weight.data.copy_(ours[i].weight.t())  # pyright: ignore
        plain[i].bias.data.copy_(ours[i].bias)  # pyright: ignore
    for model in (ours, plain):
        bw.calibrate(bw.prepare(model, RULES), X)
    return ours, plain


def test_it_is_a_linear_layer_whose_weight_is_turned() -> None:
    ours, plain = pair()
    assert all(isinstance(ours.get_submodule(i), QuantProduct) for i in "02")
    assert ours[0].weight_quantizer.shape.channels == 8  # pyright: ignore
    for model in (ours, plain):
        model(X).square().sum().backward()
    assert torch.equal(ours(X), plain(X))
    torch.testing.assert_close(ours[0].weight.grad, plain[0].weight.grad.t())  # pyright: ignore
    assert cost_table(ours, X).bitops == cost_table(plain, X).bitops
    assert cost_table(ours, X).size_bytes == cost_table(plain, X).size_bytes
    assert torch.equal(copy.deepcopy(ours)(X), ours(X))


def test_the_two_ends_are_found() -> None:
    model = bw.prepare(nn.Sequential(Conv1D(8, 6), nn.ReLU(), Conv1D(8, 8), Conv1D(3, 8)), bw.rules("w2a2"))
    bits = [row.bits for row in bw.describe(model)]
    assert bits == [8, 8, 2, 2, 8, 8]


@pytest.mark.parametrize("target", ["onnx", "packed"])
def test_it_is_deployed(target: str, tmp_path) -> None:
    model = pair()[0].eval()
    bw.snap_biases(model, X)
    bw.export(model, tmp_path / "file", X, target=target)
    report = bw.verify(model, tmp_path / "file", X)
    assert report.ok, report.first_difference
    assert sum(row["what"] == "weight" for row in report.rows()) == 2


def test_it_evaluates_reproducibly(tmp_path) -> None:
    model = bw.make_reproducible(pair()[0].eval())
    bw.snap_biases(model, X)
    bw.export(model, tmp_path / "file", X)
    report = bw.verify(model, tmp_path / "file", X)
    assert report.ok, report.first_difference
    assert report.logit_difference == 0
