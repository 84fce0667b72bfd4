"""`calibrate`: real statistics, once, without a trace elsewhere."""

import copy

import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.calibrate import Collector
from bitwright.grids import Shape, Stats
from bitwright.grids.lsq import lsq_initial_scale
from bitwright.rules import Rule


def net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Hardswish(), nn.Conv2d(4, 2, 1)
    )


def test_signedness_is_what_the_data_shows():
    model = bw.prepare(net(), bw.rules("w4a4"))
    bw.calibrate(model, [torch.randn(2, 3, 6, 6) for _ in range(3)])
    signed = {r.name: r.signed for r in bw.describe(model) if "input" in r.name}
    assert signed == {"0.input_quantizer": True, "3.input_quantizer": False, "5.input_quantizer": True}
    model = bw.prepare(net(), [*bw.rules("w4a4"), Rule(match="3", input=bw.QuantizerSpec(bits=4, signed=True))])
    bw.calibrate(model, [torch.rand(2, 3, 6, 6)])
    assert model[3].input_quantizer.signed.item()
    assert not model[0].input_quantizer.signed.item()


def test_scales_come_from_the_float_models_own_tensors():
    model, batches = net(), [torch.randn(2, 3, 6, 6) for _ in range(3)]
    model.eval()
    with torch.no_grad():
        model[1].running_mean.fill_(0.1)  # as if trained
        inner = [model[:3](b) for b in batches]
    bw.calibrate(bw.prepare(model, bw.rules("w4a2", ends=4)), [(b, "target") for b in batches])
    expected = 2 * torch.stack([t.abs().mean() for t in inner]).mean() / 3**0.5
    torch.testing.assert_close(model[3].input_quantizer.grid.scale[0].detach(), expected)


def test_nothing_but_quantizers_changes():
    model = bw.prepare(net(), bw.rules("w4a4")).train()
    before = {k: v.clone() for k, v in model.state_dict().items() if "quantizer" not in k}
    bw.calibrate(model, [torch.randn(2, 3, 6, 6)])
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items()), "running statistics included"
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not any(q.bypass for q in bw.quantizers(model).values())


def test_the_same_data_gives_the_same_scales():
    batches = [torch.randn(2, 3, 60, 60) for _ in range(3)]
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        model = bw.prepare(net(), [Rule(match="*", input=bw.QuantizerSpec(bits=3, grid_options={"init": "mse"}))])
        torch.rand(len(states) * 7)  # the global generator's state plays no part
        states.append(bw.calibrate(model, batches).state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_statistics_over_batches():
    collector = Collector(Shape("input", channels=2, axis=1), seed=0)
    batches = [torch.randn(3, 2, 5) * (i + 1) for i in range(4)]
    for batch in batches:
        collector.add(batch)
    collector.add(torch.empty(0, 2, 5))
    stats, everything = collector.result(), torch.cat(batches).movedim(1, 0).flatten(1)
    torch.testing.assert_close(stats.minimum, everything.amin(1))
    torch.testing.assert_close(stats.maximum, everything.amax(1))
    torch.testing.assert_close(stats.mean, everything.mean(1))
    torch.testing.assert_close(stats.mean_abs, everything.abs().mean(1))
    torch.testing.assert_close(stats.std, everything.std(1, correction=0))
    assert stats.sample.shape == (2, 60)


def test_refusals_name_the_cause():
    x = torch.randn(1, 3, 6, 6)
    with pytest.raises(bw.BitwrightError, match=r"call bitwright\.prepare first"):
        bw.calibrate(net(), [x])
    with pytest.raises(bw.BitwrightError, match="no batch was given"):
        bw.calibrate(bw.prepare(net(), bw.rules("w4a4")), [])
    with pytest.raises(bw.BitwrightError, match=r"0\.input_quantizer saw NaN or infinity"):
        bw.calibrate(bw.prepare(net(), bw.rules("w4a4")), [x * torch.nan])
    model = net()
    nn.init.constant_(model[3].weight, torch.inf)
    with pytest.raises(bw.BitwrightError, match="saw NaN or infinity"):
        bw.calibrate(bw.prepare(model, bw.rules("w4a4")), [x])


def test_a_layer_whose_weights_are_read_around_it_is_named():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return nn.functional.linear(x, self.fc.weight)

    with pytest.raises(bw.BitwrightError, match=r"fc\.input_quantizer saw no data; its layer was not called"):
        bw.calibrate(bw.prepare(Around(), bw.rules("w4a4")), [torch.rand(2, 3)])
    model = bw.prepare(Around(), [Rule(match="fc", weight=bw.QuantizerSpec(bits=4))])
    bw.calibrate(model, [torch.rand(2, 3)])
    assert bw.coverage(model, torch.rand(2, 3)).missed == ("fc.weight_quantizer",)


def test_norms_that_were_never_trained_normalise_by_the_batch():
    """Scales are those of training's first step, not of signals that shrink with untrained statistics."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
    net, x = nn.Sequential(*layers), torch.randn(8, 3, 8, 8) * 1e-3
    nn.init.zeros_(net[0].bias)
    seen = net[:3].train()(x)
    for norm in (net[1], net[4]):
        norm.reset_running_stats()
    before = copy.deepcopy(net.state_dict())
    bw.prepare(net, bw.rules("w4a4", ends=None))
    bw.calibrate(net, [x])
    stats = Stats.of(seen.reshape(1, -1))
    quantizer = net[3].input_quantizer
    expected = lsq_initial_scale(stats.mean_abs, quantizer.codes)
    torch.testing.assert_close(quantizer.grid.effective_scale(), expected)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())
    # One row says nothing of a batch; a norm that was trained keeps its statistics.
    bw.calibrate(net, [x[:1]])
    small = quantizer.grid.effective_scale().item()
    net[1].running_var.fill_(0.5)
    bw.calibrate(net, [x])
    assert max(small, quantizer.grid.effective_scale().item()) < expected.item() / 100


def test_heads_that_run_in_training_alone_are_named_with_the_rule_that_leaves_them_float():
    class Helped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
            self.aux = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1)), nn.Conv2d(4, 2, 1))
            self.spare, self.head = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.body(x)
            return (self.head(x), self.aux(x), self.spare(x)) if self.training else self.head(x)

    x = torch.randn(2, 3, 4, 4)
    message = (
        r"aux\.0\.0\.input_quantizer and 2 more saw no data; their layers were not called .* "
        r"by a last rule: bw\.Rule\(match=\['aux\.\*', 'spare'\], weight=None, input=None\)"
    )
    with pytest.raises(bw.BitwrightError, match=message):
        bw.calibrate(bw.prepare(Helped(), bw.rules("w4a4")), [x])
    rules = [*bw.rules("w4a4"), bw.Rule(match=["aux.*", "spare"], weight=None, input=None)]
    bw.calibrate(bw.prepare(Helped(), rules), [x])


def test_empty_batches_are_named():
    model = bw.prepare(nn.Sequential(nn.Linear(3, 2)), bw.rules("w4a4"))
    with pytest.raises(bw.BitwrightError, match=r"^calibrate: every batch is empty$"):
        bw.calibrate(model, [torch.zeros(0, 3)])


def test_an_input_of_zeros_is_mentioned(caplog):
    """A dead relu has no scale to tell; the network trains, but its user should know."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1.0)
    bw.calibrate(bw.prepare(model, bw.rules("w4a4")), [torch.randn(8, 3)])
    assert [r.message.partition(" and ")[0] for r in caplog.records] == [
        "bitwright: calibrate: 2.input_quantizer saw only zeros"
    ]
    assert model(torch.randn(2, 3)).isfinite().all()
