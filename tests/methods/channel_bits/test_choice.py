import copy

import pytest
import torch
from torch import nn

from bitwright import QuantizerSpec, Rule, calibrate, prepare
from bitwright.batches import inputs_of
from bitwright.channels import by_channel
from bitwright.methods.channel_bits.choice import Place, kurtosis, measure, spread_bits
from methods.nets import same_state


def test_kurtosis_is_that_of_the_definition():
    torch.manual_seed(0)
    w = torch.randn(3, 4, 5)
    w[1] = 2.5
    w[2, 0, 0] = 40.0
    for axis in (0, 1, 2):
        found = kurtosis(w, axis)
        for channel, value in enumerate(found):
            row = w.select(axis, channel).double().flatten()
            about = row - row.mean()
            wanted = (about**4).mean() / (about**2).mean() ** 2 if row.std() > 0 else torch.tensor(0.0).double()
            torch.testing.assert_close(value, wanted)
    assert kurtosis(w).argmax() == 2
    assert kurtosis(torch.randn(1, 100_000)).item() == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_bits_are_moved_up_in_front_and_down_behind(count):
    order = [3, 1, 4, 0, 2]
    found = spread_bits(order, 3, count)
    assert sum(found) == 15
    assert [found[i] for i in order] == [4] * count + [3] * (5 - 2 * count) + [2] * count


def place(counts, bits=3):
    """A convolution in which the weights of channel 2 have outliers, and those of channel 5 are as even as can be."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 10, 3, bias=False))
    with torch.no_grad():
        model[0].weight[2] *= 0.2
        model[0].weight[2, 0, 0, 0] = 8.0
        model[0].weight[5] = model[0].weight[5].sign() * 0.01
    spec = QuantizerSpec(bits=bits)
    prepare(model, [Rule(match="*", weight=spec, input=QuantizerSpec(bits=8))])
    x = torch.randn(8, 3, 7, 7)
    calibrate(model, [x])
    quantizer = by_channel(model[0].weight_quantizer)
    return model.train(), Place(model[0], "weight_quantizer", quantizer, bits, counts), x


def test_outliers_get_the_bit_that_even_weights_give():
    model, found, x = place([0, 1])
    assert found.assignment(1) == [3, 3, 4, 3, 3, 2, 3, 3, 3, 3]
    before = copy.deepcopy(model)
    (errors,) = measure(model, inputs_of(x, "test"), [found])
    assert errors[1] < errors[0]
    assert same_state(before, model)
    layer = model[0]
    with torch.no_grad():
        y, wanted = layer(x), torch.conv2d(x, layer.weight)
    torch.testing.assert_close(errors[0], ((y - wanted).double().square().sum() / wanted.double().square().sum()))


def test_a_layer_that_runs_twice_counts_twice():
    model, found, x = place([0, 1])
    (once,) = measure(model, inputs_of(x, "test"), [found])

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = model[0]

        def forward(self, x):
            return self.layer(x) + self.layer(x)

    (twice,) = measure(Twice().train(), inputs_of(x, "test"), [found])
    torch.testing.assert_close(twice, 2 * once)
