"""Quantized layers against torch's own functions on quantized tensors."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitwright as bw
from bitwright.errors import BitwrightError
from bitwright.layers import Add, QuantAdd, QuantConv2d, QuantConv2dSame, QuantConv3d, QuantEmbedding, QuantLinear
from bitwright.rules import Rule
from bitwright.training.vision import import_timm

W4A4 = bw.rules("w4a4", ends=None)


def ready(module, x, rules=W4A4):
    """`module` prepared and calibrated on x, and its weight and input as the formulas have them."""
    bw.calibrate(bw.prepare(module, rules), [x])
    w, s = module.weight.detach(), module.weight_quantizer.grid.scale.detach()
    s = s.view(-1, *[1] * (w.ndim - 1))
    a = module.input_quantizer.grid.scale.detach()
    lo, hi = (-8, 7) if x.min() < 0 else (0, 15)
    return module, (w / s).round().clamp(-8, 7) * s, (x / a).round().clamp(lo, hi) * a


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(("groups", "stride", "dilation"), [(1, 1, 1), (2, 2, 1), (4, 1, 2)])
def test_conv2d(mode, groups, stride, dilation):
    layer = nn.Conv2d(4, 8, 3, stride, (1, 2), dilation, groups, padding_mode=mode)
    x = torch.randn(2, 4, 9, 11)
    layer, w, xq = ready(layer, x)
    padded = F.pad(xq, (2, 2, 1, 1), mode="constant" if mode == "zeros" else mode)
    expected = F.conv2d(padded, w, layer.bias, stride, 0, dilation, groups)
    torch.testing.assert_close(layer(x), expected)
    assert layer.weight_quantizer.shape.channels == 8
    assert layer.input_quantizer.shape.channels == 1


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_conv1d(mode):
    layer, x = nn.Conv1d(6, 6, 3, 2, 1, groups=6, padding_mode=mode), torch.rand(2, 6, 12)
    layer, w, xq = ready(layer, x)
    padded = F.pad(xq, (1, 1), mode="constant" if mode == "zeros" else mode)
    torch.testing.assert_close(layer(x), F.conv1d(padded, w, layer.bias, 2, groups=6))


@pytest.mark.parametrize("mode", ["zeros", "replicate", "circular"])
@pytest.mark.parametrize(("groups", "stride", "dilation"), [(1, 1, 1), (2, (1, 2, 2), 1), (4, 1, (1, 2, 1))])
def test_conv3d(mode, groups, stride, dilation):
    layer = nn.Conv3d(4, 8, (1, 3, 2), stride, (1, 2, 0), dilation, groups, padding_mode=mode)
    x = torch.randn(2, 4, 5, 9, 6)
    layer, w, xq = ready(layer, x)
    assert type(layer) is QuantConv3d
    padded = F.pad(xq, (0, 0, 2, 2, 1, 1), mode="constant" if mode == "zeros" else mode)
    torch.testing.assert_close(layer(x), F.conv3d(padded, w, layer.bias, stride, 0, dilation, groups))
    assert layer.weight_quantizer.shape.channels == 8


def test_conv3d_with_inputs_per_channel():
    layer, x = nn.Conv3d(3, 2, 2), torch.randn(2, 3, 4, 4, 4) * torch.tensor([0.1, 1.0, 10.0]).view(1, 3, 1, 1, 1)
    per_channel = bw.QuantizerSpec(bits=4, per_channel=True)
    bw.calibrate(bw.prepare(layer, [Rule(match="*", weight=per_channel, input=per_channel)]), [x])
    a = layer.input_quantizer.grid.scale.detach()
    assert a.shape == (3,)
    assert a[0] < a[1] < a[2]
    a = a.view(1, 3, 1, 1, 1)
    torch.testing.assert_close(layer.input_quantizer(x), (x / a).round().clamp(-8, 7) * a)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_conv2d_with_padding_by_name(padding):
    layer, x = nn.Conv2d(3, 2, 4, padding=padding), torch.rand(1, 3, 8, 8)
    layer, w, xq = ready(layer, x)
    with torch.no_grad():
        reference = nn.Conv2d(3, 2, 4, padding=padding)
        reference.weight.copy_(w)
        reference.bias.copy_(layer.bias)
        torch.testing.assert_close(layer(x), reference(xq))


@pytest.mark.parametrize("size", [(7, 9), (8, 8), (5, 6)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_timms_same_padding(size, stride, dilation):
    import_timm()
    from timm.layers import Conv2dSame

    layer = Conv2dSame(4, 4, 3, stride=stride, dilation=dilation, groups=2)
    reference, x = copy.deepcopy(layer), torch.randn(2, 4, *size)
    layer, w, xq = ready(layer, x)
    assert type(layer) is QuantConv2dSame
    reference.weight.data.copy_(w)
    torch.testing.assert_close(layer(x), reference(xq))


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (6,)])
def test_linear_with_any_leading_axes(shape):
    layer, w, xq = ready(nn.Linear(6, 4), x := torch.randn(shape))
    torch.testing.assert_close(layer(x), F.linear(xq, w, layer.bias))


def test_inputs_per_channel_have_a_scale_for_each():
    rules = [Rule(match="*", input=bw.QuantizerSpec(bits=4, per_channel=True))]
    for layer, x, axis in (
        (nn.Conv2d(3, 4, 1), torch.randn(5, 3, 4, 4), 1),
        (nn.Conv1d(3, 4, 1), torch.randn(5, 3, 4), 1),
        (nn.Linear(3, 4), torch.randn(5, 2, 3), 2),
    ):
        x = x * torch.tensor([0.1, 1.0, 10.0]).view([3 if a == axis else 1 for a in range(x.ndim)])
        bw.calibrate(bw.prepare(layer, rules), [x])
        s = layer.input_quantizer.grid.scale.detach()
        assert s.shape == (3,)
        mean = x.abs().movedim(axis, 0).flatten(1).mean(1)
        torch.testing.assert_close(s, 2 * mean / 7**0.5)
        s = s.view([3 if a == axis else 1 for a in range(x.ndim)])
        torch.testing.assert_close(layer.input_quantizer(x), (x / s).round().clamp(-8, 7) * s)


def test_embedding_has_a_scale_per_row_and_a_padding_row_stays_zero():
    table = nn.Embedding(5, 4, padding_idx=0)
    bw.prepare(nn.Sequential(table), W4A4)
    index = torch.tensor([[0, 3, 4]])
    bw.calibrate(nn.Sequential(table), [index])
    assert type(table) is QuantEmbedding
    s = table.weight_quantizer.grid.scale.detach().view(5, 1)
    w = (table.weight.detach() / s).round().clamp(-8, 7) * s
    torch.testing.assert_close(table(index), w[index])
    assert table(index)[0, 0].abs().max() == 0
    table(index).sum().backward()
    assert table.weight.grad[0].abs().max() == 0


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}])
def test_embeddings_that_need_the_float_table_are_refused_with_the_reason(options):
    model = nn.Sequential(nn.Embedding(5, 4, **options), nn.Linear(4, 2))
    with pytest.raises(BitwrightError, match="max_norm or sparse is set"):
        bw.prepare(model, [Rule(match="0", weight=bw.QuantizerSpec(bits=4))])
    bw.calibrate(bw.prepare(model, W4A4), [torch.tensor([1, 2])])
    found = bw.coverage(model, torch.tensor([1, 2]))
    assert found.float_layers == ("0",)
    assert "max_norm" in found.notes["0"]


def test_add_quantizes_both_operands_with_scales_of_their_own():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.add = Add()

        def forward(self, x):
            return self.add(x, x.relu() * 3)

    model, x = Residual(), torch.randn(4, 5)
    bw.calibrate(bw.prepare(model, [Rule(match="add", residual=bw.QuantizerSpec(bits=8))]), [x])
    assert type(model.add) is QuantAdd
    left, right = model.add.input_quantizer, model.add.other_quantizer
    assert left.signed.item()
    assert not right.signed.item()
    torch.testing.assert_close(model(x), left(x) + right(x.relu() * 3))
    assert not torch.equal(left.grid.scale, right.grid.scale)


def test_scales_have_an_axis_everywhere():  # FSDP2 refuses parameters without one
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    for grid in ("lsq", "lsq+", "pact", "sat", "minmax", "tqt", "seq"):
        prepared = bw.prepare(copy.deepcopy(model), bw.rules("w4a4", grid=grid))
        assert all(t.ndim >= 1 for n, t in prepared.state_dict().items() if "quantizer" in n)


def test_swapping_keeps_identity_parameters_hooks_and_ties():
    shared = nn.Linear(4, 4)
    tied = nn.Linear(4, 4)
    tied.weight = shared.weight
    model = nn.Sequential(shared, nn.ReLU(), shared, tied)
    before = {n: id(p) for n, p in model.named_parameters()}
    calls = []
    shared.register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(3, 4)
    assert bw.calibrate(bw.prepare(model, W4A4), [x]) is model
    assert model[0] is model[2] is shared
    assert type(shared) is QuantLinear
    assert isinstance(shared, nn.Linear)
    assert model[3].weight is shared.weight
    after = {n: id(p) for n, p in model.named_parameters() if "quantizer" not in n}
    assert after == before
    calls.clear()
    model(x).sum().backward()
    assert len(calls) == 2
    weight = shared.weight.clone()
    optimizer.step()
    assert not torch.equal(weight, shared.weight), "an optimizer made before still moves the weights"
    assert bw.coverage(model, x).complete


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_prepared_models_can_be_copied_and_pickled(how):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)), torch.randn(2, 3, 4, 4)
    bw.calibrate(bw.prepare(model, bw.rules("w3a3")), [x])
    other = how(model)
    assert type(other[0]) is QuantConv2d
    assert torch.equal(other(x), model(x))
    other[0].weight_quantizer.set_bits(2)
    assert not torch.equal(other(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_quantizers_take_the_precision_of_their_layer(dtype):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).to(dtype)
    x = torch.randn(2, 3, 4, 4, dtype=dtype)
    bw.calibrate(bw.prepare(model, bw.rules("w4a4")), [x])
    y = model(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert all(q.grid.scale.dtype == dtype for q in bw.quantizers(model).values())


@pytest.mark.parametrize("training", [False, True])
def test_inference_mode(training):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    x = torch.randn(2, 3, 9, 9)
    bw.calibrate(bw.prepare(net, W4A4), [x]).train(training)
    with torch.no_grad():
        expected = net(x)
    with torch.inference_mode():
        torch.testing.assert_close(net(x), expected)
