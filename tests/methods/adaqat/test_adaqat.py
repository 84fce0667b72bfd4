import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitwright import (
    Batch,
    BitwrightError,
    QuantizerSpec,
    Rule,
    Step,
    calibrate,
    prepare,
    quant_layers,
    quantizers,
    rules,
)
from bitwright.costs import LayerCost, cost_table
from bitwright.grids.lsq import normal_step
from bitwright.methods.adaqat import AdaQAT
from bitwright.training.models.resnet import CifarResNet
from methods.nets import data, float_net, make_step, quantized, run, same_state


def toy(layers=1, bits=8, width=4):
    """Linear layers in a row, every one of them learned."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    spec = QuantizerSpec(bits=bits)
    prepare(net, [Rule(match="*", weight=spec, input=spec)])
    return calibrate(net, [torch.randn(16, width)]).train()


def toy_step(net, method, loss_of_bits):
    """A `Step` whose loss depends on nothing but the present bits of `net`."""

    def loss_fn(outputs, y):
        return outputs.sum() * 0 + loss_of_bits(net)

    return Step(net, loss_fn, torch.optim.SGD(net.parameters(), 0.1), [method])


def bits_of(net, role):
    return [int(getattr(layer, f"{role}_quantizer").bits) for layer in quant_layers(net).values()]


def steps(step, count, width=4):
    for _ in range(count):
        step(torch.randn(4, width), torch.zeros(4))


def falling(net):
    """0.5 + 3 * 4^-b_w + 2 * 4^-b_a, summed over layers."""
    return 0.5 + sum(
        3 * 4.0**-w + 2 * 4.0**-a for w, a in zip(bits_of(net, "weight"), bits_of(net, "input"), strict=True)
    )


def test_two_parameters_move_as_computed_by_hand():
    net = toy()
    method = AdaQAT(net, 1000, lam=0.02, eta=1.5, every=2, warmup_steps=3, start=6.0, fixed=())
    step = toy_step(net, method, falling)
    weight, inputs = method.widths()
    w = a = 6.0
    for i in range(1, 60):
        steps(step, 1)
        if i > 3 and (i - 3) % 2 == 0:
            b_w, b_a = math.ceil(w), math.ceil(a)
            grad_w = 3 * 4.0**-b_w - 3 * 4.0 ** -(b_w - 1) + 0.02 * b_a
            grad_a = 2 * 4.0**-b_a - 2 * 4.0 ** -(b_a - 1) + 0.02 * b_w
            w, a = w - 1.5 * grad_w, a - 1.5 * grad_a
        assert (weight.real, inputs.real) == pytest.approx((w, a), abs=1e-5)
        assert bits_of(net, "weight") == [math.ceil(w)]
        assert bits_of(net, "input") == [math.ceil(a)]
    assert (w, a) != (6.0, 6.0)
    assert method.probes == 3 * 28


def test_without_a_cost_no_bit_is_lost_and_with_a_large_one_the_floor_is_reached():
    for lam, floor, expected in ((0.0, 2, 8), (5.0, 2, 2), (5.0, 3, 3)):
        net = toy()
        method = AdaQAT(net, 100, lam=lam, eta=0.1, every=1, warmup_steps=0, floor=floor, fixed=())
        steps(toy_step(net, method, falling), 90)
        assert bits_of(net, "weight") == bits_of(net, "input") == [expected]
        assert all(w.frozen for w in method.widths())


def test_an_oscillating_width_freezes_on_the_documented_move():
    net = toy()
    # Three bits are bad: at 4 bits the probe pushes N above 4, at 5 bits the cost pulls it back, and so on.
    method = AdaQAT(net, 4000, lam=0.01, eta=0.5, every=1, warmup_steps=0, start=4.9, freeze_after=3, fixed=())
    step = toy_step(net, method, lambda n: sum(float(b < 4) for b in (*bits_of(n, "weight"), *bits_of(n, "input"))))
    arrivals, before = 0, 5
    while arrivals < 4:
        assert not method.widths()[0].frozen
        steps(step, 1)
        (now,) = bits_of(net, "weight")
        arrivals += now > before
        assert now in (4, 5)
        before = now
    assert method.widths()[0].frozen
    assert method.widths()[0].real == 5.0
    probes = method.probes
    steps(step, 400)
    assert all(w.frozen and w.real == 5.0 for w in method.widths())
    assert method.probes == probes


def test_what_still_moves_is_frozen_at_its_upper_integer_before_the_last_part():
    net = toy()
    method = AdaQAT(net, 100, lam=0.02, eta=0.3, every=1, warmup_steps=0, freeze_at=0.5, fixed=())
    step = toy_step(net, method, falling)
    steps(step, 49)
    bits = (bits_of(net, "weight"), bits_of(net, "input"))
    assert not any(w.frozen for w in method.widths())
    steps(step, 1)
    assert all(w.frozen and w.real == w.bits for w in method.widths())
    assert (bits_of(net, "weight"), bits_of(net, "input")) == bits
    probes = method.probes
    steps(step, 50)
    assert method.probes == probes


class Noisy(nn.Module):
    """Dropout and batch norms in front of a network."""

    def __init__(self):
        super().__init__()
        self.net, self.drop = float_net(), nn.Dropout(0.3)

    def forward(self, x):
        return self.net(self.drop(x))


@pytest.mark.parametrize("grid", ["lsq", "lsq+", "pact", "dorefa", "minmax", "tqt", "seq"])
@pytest.mark.parametrize("granularity", ["network", "layer"])
def test_probes_leave_no_trace(grid, granularity):
    plain, probed = (quantized(Noisy(), bits=3, grid=grid) for _ in range(2))
    method = AdaQAT(probed, 1000, granularity=granularity, eta=0.0, every=1, warmup_steps=0, start=None)
    one, two = make_step(plain), make_step(probed, [method])
    torch.manual_seed(5)
    for i in range(4):
        one(*data(seed=i))
    state = torch.get_rng_state()
    torch.manual_seed(5)
    for i in range(4):
        two(*data(seed=i))
    assert method.probes == 12
    assert torch.equal(state, torch.get_rng_state())
    assert same_state(plain, probed)
    assert [q.codes.zero for q in quantizers(plain).values()] == [q.codes.zero for q in quantizers(probed).values()]


@pytest.mark.parametrize("start", [2.0, 4.0])
def test_a_probe_has_one_bit_less_and_scales_follow(start):
    model = quantized(float_net(), bits=4)
    method = AdaQAT(model, 1000, every=1, warmup_steps=0, start=start, lam=0.0, eta=0.0)
    seen = []
    inside = [q for q in method.widths()[0].quantizers]

    def loss_fn(outputs, y):
        seen.append([(int(q.bits), q.grid.scale.detach() / normal_step(q.codes)) for q in inside])
        return F.cross_entropy(outputs, y)

    Step(model, loss_fn, torch.optim.SGD(model.parameters(), 0.0), [method])(*data())
    train, base, weights, inputs = seen
    assert [b for b, _ in weights] == [int(start) - 1] * len(inside)
    assert [b for b, _ in train] == [b for b, _ in base] == [b for b, _ in inputs] == [int(start)] * len(inside)
    for (_, a), (_, b) in zip(base, weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_probes_use_the_share_of_the_batch_that_is_asked_for():
    model = quantized(float_net())
    sizes = []
    model.conv1.register_forward_hook(lambda m, args, out: sizes.append(len(out)))
    method = AdaQAT(model, 1000, every=2, warmup_steps=0, probe_fraction=0.25)
    run(make_step(model, [method]), 0, 4)
    assert sizes == [8, 8, 2, 2, 2, 8, 8, 2, 2, 2]


def test_the_first_and_the_last_layer_keep_their_bits():
    model = quantized(float_net(), bits=3)
    method = AdaQAT(model, 1000, start=6.0)
    layers = quant_layers(model)
    names = list(layers)
    bits = {n: (int(m.weight_quantizer.bits), int(m.input_quantizer.bits)) for n, m in layers.items()}
    assert bits.pop(names[0]) == bits.pop(names[-1]) == (8, 8)
    assert set(bits.values()) == {(6, 6)}
    assert len(method.widths()[0].quantizers) == len(names) - 2


def costs_of(model, size):
    """MACs and weights of every convolution and linear layer, counted from the shapes of a forward pass."""
    rows = []

    def count(name, module, output):
        positions = output[0, 0].numel() if output.ndim == 4 else 1
        rows.append(LayerCost(name, module.weight.numel() * positions, module.weight.numel()))

    hooks = [
        m.register_forward_hook(lambda m, args, out, n=n: count(n, m, out))
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        model.eval()(torch.randn(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return rows


def network(depth=8):
    torch.manual_seed(0)
    net = CifarResNet(depth, 4, width=4)
    rows = costs_of(net, 8)
    return quantized(net, bits=4), rows


def uniform(rows, kind, w, a):
    """The cost with every layer at (w, a) but the first and the last, which have 8 bits."""
    bits = [(8, 8), *[(w, a)] * (len(rows) - 2), (8, 8)]
    if kind == "bitops":
        return sum(r.macs * x * y for r, (x, y) in zip(rows, bits, strict=True))
    return sum(r.weights * x / 8 for r, (x, _) in zip(rows, bits, strict=True))


SENSITIVE = {0: 8.0, 3: 3.0}


def layered(net):
    """A loss that falls with bits, for some layers much more than for others."""
    return 0.5 + sum(
        SENSITIVE.get(i, 0.3) * (4.0**-w + 0.5 * 4.0**-a)
        for i, (w, a) in enumerate(zip(bits_of(net, "weight")[1:-1], bits_of(net, "input")[1:-1], strict=True))
    )


@pytest.mark.parametrize("rule", ["pid", "dual"])
@pytest.mark.parametrize("kinds", [("bitops",), ("size",), ("bitops", "size")])
@pytest.mark.parametrize(("w", "a"), [(3, 4), (2, 3)])
def test_budgets_are_met_from_below_within_a_hundredth_and_better_than_by_uniform_bits(kinds, rule, w, a):
    model, rows = network()
    budget = {kind: float(uniform(rows, kind, w, a)) for kind in kinds}
    method = AdaQAT(model, 300, rows, budget, granularity="layer", every=1, rule=rule)
    step = Step(nn.Identity(), lambda o, y: torch.tensor(layered(model)), torch.optim.SGD(model.parameters(), 0.1), [])
    step.batch = Batch(*data())
    for _ in range(300):
        method.after_step(step)
    for kind, limit in budget.items():
        assert 0.99 * limit <= method.cost(kind) <= limit
    learned = layered(model)
    for x, y in itertools.product(range(2, 9), repeat=2):
        if all(uniform(rows, kind, x, y) <= limit for kind, limit in budget.items()):
            for layer in list(quant_layers(model).values())[1:-1]:
                layer.weight_quantizer.set_bits(x)
                if "bitops" in kinds:  # a size budget leaves inputs where they start
                    layer.input_quantizer.set_bits(y)
            assert learned <= layered(model) + 1e-9, (x, y)


def test_a_budget_is_met_by_the_network_wide_widths_too_as_far_as_there_are_any():
    model, rows = network()
    method = AdaQAT(model, 300, rows, {"bitops": uniform(rows, "bitops", 3, 4) * 1.02}, every=1)
    step = Step(nn.Identity(), lambda o, y: torch.tensor(layered(model)), torch.optim.SGD(model.parameters(), 0.1), [])
    step.batch = Batch(*data())
    for _ in range(300):
        method.after_step(step)
    (w,), (a,) = ({b for b in bits_of(model, role)[1:-1]} for role in ("weight", "input"))
    assert w * a == 12
    assert method.cost("bitops") == uniform(rows, "bitops", w, a)


def test_real_training_meets_its_budget_and_tells_what_it_did():
    model, rows = network()
    budget = {"bitops": uniform(rows, "bitops", 3, 3), "size": uniform(rows, "size", 4, 4)}
    method = AdaQAT(model, 40, rows, budget, granularity="layer", every=1, warmup_steps=2)
    step = make_step(model, [method])
    run(step, 0, 40)
    metrics = {}
    step.end_epoch(metrics)
    for kind, limit in budget.items():
        assert metrics[f"adaqat/{kind}"] == method.cost(kind) <= limit
    assert metrics["adaqat/frozen"] == 1.0
    assert {"adaqat/weight_bits", "adaqat/input_bits", "adaqat/lambda_bitops", "adaqat/lambda_size"} <= metrics.keys()
    summary = method.summary()
    last = {(name, role): bits for _, name, role, bits in summary["path"]}
    for name, widths in summary["widths"].items():
        layer = model.get_submodule(name)
        assert int(layer.weight_quantizer.bits) == widths["weight"] == last[name, "weight"]
        assert int(layer.input_quantizer.bits) == widths["input"] == last[name, "input"]
    assert summary["frozen"]
    assert summary["budget"] == budget


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.attention, self.fc = (
            nn.Linear(8, 8),
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, 4),
        )
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.stem.weight

    def forward(self, x):
        h = self.tied(self.stem(x))
        return self.fc(self.attention(h, h, h, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("granularity", ["network", "layer"])
@pytest.mark.parametrize("make", [lambda: CifarResNet(8, 4, width=4), Attending], ids=["resnet", "attention"])
def test_totals_are_those_of_the_cost_table_at_any_bits(make, granularity):
    torch.manual_seed(0)
    example = torch.randn(2, 3, 8, 8) if make is not Attending else torch.randn(2, 5, 8)
    model = calibrate(prepare(make(), rules("w4a4")), [example])
    fixed = ("first", "last") if make is not Attending else ("first", "last", "tied")
    method = AdaQAT(model, 100, cost_table(model, example), granularity=granularity, start=None, fixed=fixed)
    for bits in (4, 7, 3):
        for i, width in enumerate(method.widths()):
            width.real = float(min(bits + i % 3, 8))
            width.apply()
        table = cost_table(model, example)
        assert method.cost("bitops") == table.bitops
        assert method.cost("size") == pytest.approx(table.size_bytes, rel=1e-12)


def test_costs_may_be_plain_triples_or_rows_of_the_table():
    model, rows = network()
    triples = [tuple(r) for r in rows]
    table = cost_table(model, data()[0]).rows
    assert AdaQAT(model, 100, table).cost("bitops") == AdaQAT(model, 100, rows).cost("bitops")
    assert AdaQAT(model, 100, triples).cost("bitops") == AdaQAT(model, 100, rows).cost("bitops")


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("budget", [False, True])
def test_a_resumed_run_ends_bit_identical_whatever_is_loaded_first(model_first, budget):
    def fresh():
        model, rows = network()
        amount = {"bitops": uniform(rows, "bitops", 3, 3)} if budget else None
        return model, lambda: make_step(
            model, [AdaQAT(model, 24, rows, amount, granularity="layer", every=1, warmup_steps=1, eta=0.6, lam=0.05)]
        )

    whole, make = fresh()
    run(make(), 0, 20)
    half, make = fresh()
    step = make()
    run(step, 0, 11)
    assert bits_of(half, "weight")[1:-1] != [8] * 5
    saved = copy.deepcopy((half.state_dict(), step.optimizer.state_dict(), step.state_dict()))
    rest, make = fresh()
    if model_first:
        rest.load_state_dict(saved[0])
        step = make()
    else:
        step = make()
        rest.load_state_dict(saved[0])
    step.optimizer.load_state_dict(saved[1])
    step.load_state_dict(saved[2])
    run(step, 11, 20)
    assert same_state(whole, rest)


def test_a_state_that_is_not_the_models_is_refused():
    model, _ = network()
    method = AdaQAT(model, 100)
    state = method.state_dict()
    state["widths"][0]["real"] = 5.0
    with pytest.raises(BitwrightError, match="where the checkpoint says 5"):
        AdaQAT(model, 100).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "channel"}, "granularity"),
        ({"rule": "fixed"}, "rule"),
        ({"total_steps": 0}, "total_steps"),
        ({"every": 0}, "every"),
        ({"floor": 1}, "floor"),
        ({"start": 9.0}, "start"),
        ({"lam": -0.1}, "lam"),
        ({"eta": -0.1}, "eta"),
        ({"probe_fraction": 0.0}, "probe_fraction"),
        ({"freeze_at": 0.0}, "freeze_at"),
        ({"freeze_after": -1}, "freeze_after"),
        ({"warmup_steps": 70}, "warmup_steps"),
        ({"budget": {"bitops": 1e6}}, "costs"),
        ({"budget": {"latency": 1.0}}, "budget.latency is not accepted: one bit less seldom changes a kernel"),
        ({"fixed": ["layer9.*"]}, "'layer9.[*]' names no layer"),
        ({"fixed": ["*"]}, "no quantized layer is left"),
    ],
)
def test_bad_values_are_refused_in_one_line(options, message):
    model, _ = network()
    with pytest.raises(BitwrightError, match=message) as caught:
        AdaQAT(model, **({"total_steps": 100} | options))
    assert "\n" not in str(caught.value)


def test_a_budget_below_the_floor_or_without_a_record_is_refused_at_once():
    model, rows = network()
    with pytest.raises(BitwrightError, match="cannot be met: with all learned layers at 2 bits"):
        AdaQAT(model, 100, rows, {"bitops": 0.9 * uniform(rows, "bitops", 2, 2)})
    with pytest.raises(BitwrightError, match=r"no record of 'layer1.0.conv1'"):
        AdaQAT(model, 100, [r for r in rows if r.name != "layer1.0.conv1"], {"bitops": 1e9}, granularity="layer")
    with pytest.raises(BitwrightError, match="costs names 'layer7', which the model does not have"):
        AdaQAT(model, 100, [LayerCost("layer7", 1, 1)])
    mixed = quantized(float_net(), bits=4)
    quantizers(mixed)["layer1.0.conv1.weight_quantizer"].set_bits(3)
    with pytest.raises(BitwrightError, match=r"weight bits are \[3, 4\] by the rules"):
        AdaQAT(mixed, 100, start=None)
