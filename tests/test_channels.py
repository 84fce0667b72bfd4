"""Bits per channel: every channel is what it would be in a quantizer of its own, in training, in files and in costs."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.channels import ChannelQuantizer, by_channel
from bitwright.costs import cost_table
from bitwright.deploy import export, snap_biases, verify
from bitwright.errors import BitwrightError
from bitwright.grids import Shape, Stats
from bitwright.kernels import reference_only
from bitwright.layers.fold import integer_weight
from bitwright.methods.probe import untouched
from bitwright.quantizer import Quantizer
from bitwright.spec import QuantizerSpec
from making import make_quantizer

GRIDS = ["lsq", "lsq+", "pact", "minmax", "tqt", "seq"]
BITS = [2, 1, 3, 2, 4, 1]


def weight(seed=0):
    return torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(seed))


def mixed(grid="lsq", bits=BITS, estimator="clipped_ste", start=2):
    made = by_channel(make_quantizer(grid, start, weight(), channels=6, estimator=estimator))
    made.set_bits(bits)
    return made


def alone(grid, channel, bits=BITS, estimator="clipped_ste", start=2):
    """An ordinary quantizer of one channel, which took the same way."""
    made = make_quantizer(grid, start, weight()[channel : channel + 1], estimator=estimator)
    made.set_bits(bits[channel])
    return made


@pytest.mark.parametrize("estimator", ["clipped_ste", "ste", "ewgs", "dsq"])
@pytest.mark.parametrize("grid", GRIDS)
def test_each_channel_is_quantized_as_it_would_be_by_itself(grid, estimator):
    quantizer, pull = mixed(grid, estimator=estimator), weight(1)
    w = weight().requires_grad_()
    y = quantizer(w)
    y.backward(pull)
    scales = [p for p in quantizer.parameters() if p.requires_grad]
    for channel in range(6):
        other, one = alone(grid, channel, estimator=estimator), weight()[channel : channel + 1].requires_grad_()
        found = other(one)
        found.backward(pull[channel : channel + 1])
        assert torch.equal(y[channel : channel + 1], found)
        assert len(y[channel].unique()) <= 2 ** BITS[channel]
        torch.testing.assert_close(w.grad[channel : channel + 1], one.grad)
        for mine, its in zip(scales, [p for p in other.parameters() if p.requires_grad], strict=True):
            torch.testing.assert_close(mine.grad[channel : channel + 1], its.grad)


@pytest.mark.parametrize("grid", GRIDS)
def test_codes_and_integers_are_those_of_the_values(grid):
    quantizer, w = mixed(grid).eval(), weight()
    affine, codes = quantizer.affine(w), quantizer.integer_codes(w)
    view = (-1, 1, 1, 1)
    assert torch.equal((codes - affine.zero.view(view)) * affine.scale.view(view), quantizer(w))
    assert affine.lo <= codes.min()
    assert codes.max() <= affine.hi
    found = integer_weight(quantizer, w, "layer")
    assert torch.equal(found.values(), quantizer(w))
    assert found.bits == 4
    assert torch.equal(found.numbers.int(), found.step * found.stored.int() + found.offset)


def test_one_width_for_all_is_the_ordinary_quantizer():
    plain = make_quantizer("lsq", 2, weight(), channels=6)
    same = by_channel(make_quantizer("lsq", 2, weight(), channels=6))
    for bits in (2, 3, 1):
        plain.set_bits(bits)
        same.set_bits(bits)
        assert torch.equal(plain.grid.scale, same.grid.scale)
        assert torch.equal(plain(weight()), same(weight()))
        assert same.mean_bits == same.most_bits == bits


def test_a_state_dict_restores_it_whatever_loads_it():
    whole = mixed()
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = make_quantizer("lsq", 5, weight(1), channels=6)
    fresh.load_state_dict(state)
    assert type(fresh) is ChannelQuantizer
    for other in (fresh, copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert torch.equal(other(weight()), whole(weight()))
        assert other.bits.tolist() == BITS
    plain = make_quantizer("lsq", 3, weight(), channels=6)
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(fresh(weight()), plain(weight()))
    assert plain.bits.shape == (1,)
    with torch.device("meta"):
        empty = Quantizer(QuantizerSpec(bits=2, grid="lsq"), Shape("weight", 6, 0, 270))
    empty.load_state_dict(whole.state_dict(), assign=True)
    assert torch.equal(empty.eval()(weight()), whole.eval()(weight()))
    with pytest.raises(RuntimeError, match="size mismatch"):
        make_quantizer("lsq", 3, weight()[:4], channels=4).load_state_dict(state)


def test_what_somebody_writes_into_bits_is_taken_up():
    quantizer, other = mixed(), mixed(bits=[3] * 6)
    for mine, its in zip(quantizer.buffers(), other.buffers(), strict=True):
        mine.copy_(its)
    quantizer.grid.load_state_dict(other.grid.state_dict())
    assert torch.equal(quantizer.train()(weight()), other(weight()))


def test_looking_leaves_it_as_it_was():
    holder = nn.ModuleList([mixed()])
    before = holder[0](weight())
    with untouched(holder):
        holder[0].set_bits([5, 6, 7, 8, 1, 1])
        assert not torch.equal(holder[0](weight()), before)
    assert torch.equal(holder[0](weight()), before)
    assert [kind[0] for kind in holder[0].kinds] == [1, 2, 3, 4]


def test_what_is_refused():
    quantizer = mixed()
    with pytest.raises(BitwrightError, match="5 bit-widths for 6 channels"):
        quantizer.set_bits([2] * 5)
    with pytest.raises(BitwrightError, match="bits=9 is not accepted; use 1 to 8"):
        quantizer.set_bits([2, 2, 2, 2, 2, 9])
    assert quantizer.bits.tolist() == BITS
    with pytest.raises(BitwrightError, match="has bits per channel, and so no one range of codes"):
        _ = quantizer.codes
    with pytest.raises(BitwrightError, match="has bits per channel; calibrate before giving it these"):
        quantizer.initialize(Stats.of(weight().flatten(1)))
    for made in (make_quantizer("lsq", 2, weight()), make_quantizer("dorefa", 2, weight(), channels=6)):
        with pytest.raises(BitwrightError, match="bits per channel are for weights with a scale per channel"):
            by_channel(made)
    with pytest.raises(BitwrightError, match="bits per channel are for weights with a scale per channel"):
        by_channel(make_quantizer("lsq", 2, torch.randn(4, 6, 3), role="input", channels=6))


class Net(nn.Module):
    """Two convolutions, one with a norm, and two linear layers."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.middle = nn.Conv2d(6, 8, 3, stride=2)
        self.inner, self.last = nn.Linear(8, 10), nn.Linear(10, 4)

    def forward(self, x):
        x = torch.relu(self.middle(torch.relu(self.norm(self.first(x))))).mean((2, 3))
        return self.last(torch.relu(self.inner(x)))


def net(grid="lsq"):
    """At 2 bits, the inner layers' channels at 1 to 3, in evaluation mode."""
    torch.manual_seed(0)
    model = Net()
    for _ in range(3):
        model(torch.randn(16, 3, 9, 9) + 0.2)
    spec = QuantizerSpec(bits=2, grid=grid)
    bw.prepare(model, [bw.Rule(match="*", weight=spec, input=QuantizerSpec(bits=4, grid="lsq"))])
    bw.calibrate(model, [torch.randn(64, 3, 9, 9)])
    for layer in (model.first, model.middle, model.inner):
        count = len(layer.weight)
        by_channel(layer.weight_quantizer).set_bits(([3, 1, 2] * count)[:count])
    return model.eval()


@pytest.mark.parametrize("target", ["onnx", "packed", "openvino", "qonnx"])
@pytest.mark.parametrize("grid", ["lsq", "seq", "pact"])
def test_files_are_what_was_trained(tmp_path, grid, target):
    if target in ("openvino", "qonnx"):
        pytest.importorskip(target)
    model, x = net(grid), torch.randn(64, 3, 9, 9)
    snap_biases(model, x)
    report = export(model, tmp_path / "net", x[:1], target=target)
    assert verify(model, tmp_path / "net", [x]).ok
    if target in ("onnx", "packed"):  # the others hold bytes, or float32
        # A tensor of a file has one width: the largest of its channels', and so does the table of costs.
        rows = {row.name: row for row in cost_table(model, x[:1]).rows}
        assert {n: rows[n].stored_bits for n in rows} == {"first": 3, "middle": 3, "inner": 3, "last": 2}
        for layer in report.layers:
            assert layer.bits == rows[layer.name].stored_bits
            assert rows[layer.name].size_bytes <= layer.size_bytes <= rows[layer.name].size_bytes + 8


def test_reproducible_networks_too(tmp_path):
    model, x = bw.make_reproducible(net()), torch.randn(64, 3, 9, 9)
    snap_biases(model, x)
    export(model, tmp_path / "net.onnx", x[:1])
    report = verify(model, tmp_path / "net.onnx", [x])
    assert report.ok
    assert report.outputs[0].difference == 0


def test_costs_count_products_at_the_mean_and_bytes_at_the_largest():
    model = net()
    (row,) = [row for row in cost_table(model, torch.randn(1, 3, 9, 9)).rows if row.name == "first"]
    assert (row.weight_bits, row.stored_bits, row.weights) == (2, 3, 162)
    assert row.bitops == row.macs * 2 * 4
    assert row.size_bytes == 162 * 3 / 8
    (described,) = [r for r in bw.describe(model) if r.name == "inner.weight_quantizer"]
    assert (described.bits, described.most_bits) == (pytest.approx(2.1), 3)


def test_layers_train_on_integers_as_on_floats():
    """A layer asks its weight for integers, which quantizers of several widths do not have."""
    torch.manual_seed(1)
    layer, x = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, bias=False)), torch.randn(16, 32, 16, 16)
    spec = QuantizerSpec(bits=3)
    bw.prepare(layer, [bw.Rule(match="*", weight=spec, input=spec)])
    bw.calibrate(layer, [x])
    by_channel(layer[0].weight_quantizer).set_bits([2, 3, 4, 3] * 8)
    found = []
    for exact in (False, True):
        layer.zero_grad()
        with reference_only() if exact else torch.enable_grad():
            y = layer.train()(x)
            y.square().mean().backward()
        found.append([y.detach(), layer[0].weight.grad, layer[0].weight_quantizer.grid.scale.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled_networks_train_as_eager_ones():
    x, found = torch.randn(8, 3, 9, 9), []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = net().double().train()
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        with reference_only():
            run(x.double()).square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
