"""`coverage`: says what ran and what stayed float, and why."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitwright as bw
from bitwright.coverage import require_complete
from bitwright.rules import Rule


class Standardized(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, input):
        return self._conv_forward(input, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Standardized3d(nn.Conv3d):
    """One whose weight another method computes."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


def test_layers_without_a_quantized_form_are_listed_with_the_reason():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        Standardized(4, 4, 1),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
        nn.Unflatten(1, (4, 1)),
        Standardized3d(4, 4, 1),
        nn.Flatten(1, 2),
        nn.Conv2d(4, 2, 1),
    )
    x = torch.randn(2, 3, 5, 5)
    bw.calibrate(bw.prepare(model, [*bw.rules("w4a4", ends=None), Rule(match="6", weight=None, input=None)]), [x])
    found = bw.coverage(model, (x, "target"))
    assert found.complete
    assert found.float_layers == ("1", "2", "4", "6")
    assert found.notes.keys() == {"1", "2", "4"}, "a layer left out by rule needs no excuse"
    assert found.notes["1"] == "a Standardized: it cannot be quantized: its class is a Conv2d with a forward of its own"
    assert found.notes["2"].startswith("a ParametrizedConv2d:")
    assert found.notes["4"] == (
        "a Standardized3d: it cannot be quantized: its class is a Conv3d that computes in a way of its own"
    )


def test_a_quantizer_that_did_not_run_or_let_everything_pass_is_missed():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.both = nn.Linear(3, 3), nn.Linear(3, 3), True

        def forward(self, x):
            return self.b(self.a(x)) if self.both else self.a(x)

    x = torch.randn(2, 3)
    model = bw.calibrate(bw.prepare(Sometimes(), bw.rules("w4a4")), [x])
    assert bw.coverage(model, x).complete
    model.both = False
    model.a.weight_quantizer.bypass = True
    found = bw.coverage(model, x)
    assert found.ran == ("a.input_quantizer",)
    assert found.missed == ("a.weight_quantizer", "b.weight_quantizer", "b.input_quantizer")
    with pytest.raises(bw.BitwrightError, match="3 of 4 quantizers did not run in evaluation: a"):
        require_complete(found)


def test_looking_leaves_no_trace():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), torch.randn(2, 3)
    bw.calibrate(bw.prepare(model, bw.rules("w4a4")), [x])
    model.train()
    bw.coverage(model, x)
    assert model.training
    assert "forward" not in vars(model[0].weight_quantizer)


def test_attention_whose_products_stay_float_is_listed():
    class WindowAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(3, 3)

        def forward(self, x):
            return self.qkv(x)

    model, x = nn.Sequential(WindowAttention()), torch.randn(2, 3)
    bw.calibrate(bw.prepare(model, bw.rules("w4a4")), [x])
    assert bw.coverage(model, x).notes == {"0": "a WindowAttention: its products have no quantized form"}


def test_the_weights_of_reproducible_layers_count():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    x = torch.randn(4, 3, 8, 8)
    bw.prepare(model, bw.rules("w4a4"))
    bw.make_reproducible(bw.calibrate(model, [x]).eval())
    assert bw.coverage(model, x).complete
    model[0].weight_quantizer.bypass = True
    assert bw.coverage(model, x).missed == ("0.weight_quantizer",)
    assert not {"forward", "integer_codes"} & set(vars(model[0].weight_quantizer))


class Own(nn.Module):
    """Multiplies parameters itself: its own, a layer's, a view; and one that its layer multiplies, in float by rule."""

    def __init__(self):
        super().__init__()
        self.conv, self.plain = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.kernel, self.matrix = nn.Parameter(torch.randn(4, 4, 1, 1)), nn.Parameter(torch.randn(2, 4))
        self.shift = nn.Parameter(torch.zeros(1, 4, 1, 1))

    def forward(self, x):
        x = self.plain(self.conv(x) + self.shift) + F.conv2d(x, self.conv.weight)
        return F.conv2d(x, self.kernel).mean((2, 3)) @ self.matrix.t()


def test_parameters_that_the_models_own_code_multiplies_are_listed():
    model, x = Own(), torch.randn(2, 3, 5, 5)
    rules = [*bw.rules("w4a4"), Rule(match="plain", weight=None, input=None)]
    found = bw.coverage(bw.calibrate(bw.prepare(model, rules), [x]), x)
    assert found.complete
    assert found.float_layers == ("plain", "kernel", "matrix", "conv.weight")
    assert found.notes["kernel"] == "conv2d multiplies this parameter in float: only what layers do is quantized"
    assert found.notes["matrix"].startswith("matmul")
    assert "plain" not in found.notes


def test_a_norm_that_was_replaced_after_prepare_has_lost_its_output_quantizer():
    """`convert_sync_batchnorm` keeps a module's children, and leaves its hooks."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).eval()
    x = torch.randn(2, 3, 5, 5)
    spec = bw.QuantizerSpec(bits=8)
    bw.calibrate(bw.prepare(model, [*bw.rules("w4a4"), Rule(match="1", output=spec)]), x)
    assert bw.coverage(model, x).complete
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    found = bw.coverage(converted, x)
    assert found.missed == ("1.output_quantizer",)
    assert "convert first, then prepare" in found.notes["1.output_quantizer"]
    with pytest.raises(bw.BitwrightError, match=r"^calibrate: 1: its output quantizer is not called: .*convert first"):
        bw.calibrate(converted, x)
