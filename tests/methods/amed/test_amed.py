import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitwright import AMED, HGQ, BitwrightError, QuantizerSpec, Rule, Step, calibrate, prepare, quant_layers, quantizers
from bitwright.costs import LatencyTable, LayerCost, cost_table
from bitwright.methods.amed.chain import metropolis, score
from methods.nets import data, float_net, make_step, quantized, resumed, run, same_state


def built(bits=8, total=20, **options):
    model = quantized(float_net(), bits=bits)
    costs = cost_table(model, data()[0][:1])
    return model, AMED(model, total, costs, **{"every": 1, **options}), costs


def test_the_score_is_the_logarithm_of_a_ratio_to_references_of_one():
    assert score(1.0, 1.0, 1.0, 3.0) == 0.0
    assert score(0.1, 0.1, 1.0, 3.0) == pytest.approx(1.0)
    assert score(2.0, 0.5, 1.0, 2.0) == pytest.approx(math.log10(3 / 3))
    assert score(2.0, 0.5, 1.0, 0.0) == pytest.approx(-math.log10(2))


def test_the_chains_stationary_law_is_the_softmax_of_the_scores():
    row = torch.tensor([0.0, 0.05, 0.1, -0.03], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    chains = 4000
    present = torch.zeros(chains, dtype=torch.int64)
    seen = torch.zeros(4, dtype=torch.float64)
    for i in range(60):
        present = metropolis(row.expand(chains, 4), present, 0.05, generator)
        if i >= 20:
            seen += torch.bincount(present, minlength=4)
    torch.testing.assert_close(seen / seen.sum(), (row / 0.05).softmax(0), rtol=0.03, atol=0)


def test_windows_update_the_scores_of_the_widths_that_they_used():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4))
    prepare(net, [Rule(match="*", weight=QuantizerSpec(bits=8), input=QuantizerSpec(bits=8))])
    calibrate(net, [torch.randn(16, 4)]).train()
    method = AMED(net, 1000, [LayerCost("0", 16, 16)], every=2, rate=0.25, alpha=2.0, beta=1.0, fixed=())
    losses = iter(torch.linspace(3.0, 1.0, 24).tolist())
    given = []

    def loss_fn(outputs, y):
        given.append(next(losses))
        return outputs.sum() * 0 + given[-1]

    step = Step(net, loss_fn, torch.optim.SGD(net.parameters(), 0.1), [method])
    expected, reference = [0.0] * 4, None
    for _ in range(12):
        used = method.bits()[0]
        for _ in range(2):
            step(torch.randn(3, 4), torch.zeros(3))
        window = sum(given[-2:]) / 2
        relative = window / (reference or window)
        reference = window if reference is None else 0.8 * reference + 0.2 * window
        new = math.log10(3 / (2 * relative + used * used / 64))
        index = [2, 3, 4, 8].index(used)
        expected[index] += 0.25 * (new - expected[index])
        assert method.scores[0].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert {int(q.bits) for q in quantizers(net).values()} == set(method.bits())
    assert sum(v != 0 for v in expected) > 1


@pytest.mark.parametrize("kind", ["bitops", "size"])
def test_without_a_budget_the_cheapest_width_wins_where_the_loss_says_nothing(kind):
    model, method, _ = built(total=120, alpha=0.0, cost=kind, temperature=1e3)
    step = Step(model, lambda o, y: F.cross_entropy(o, y) * 0 + 1, torch.optim.SGD(model.parameters(), 0.0), [method])
    run(step, 0, 120)
    assert method.done
    # With random choices a layer's score is the network's: what it tells apart is what it costs itself, on average.
    ranks = method.scores.mean(0)
    assert ranks.argmax() < ranks.argmin()
    assert method.widths() == {
        name: {role: [2, 3, 4, 8][i] for role in ("weight", "input")}
        for name, i in zip(method.layers, method.scores.argmax(1).tolist(), strict=True)
    }


def test_the_budget_is_met_and_bits_then_stay():
    limit = 0.3 * built()[2].bitops
    model, method, _ = built(budget={"bitops": limit})
    step = make_step(model, [method])
    run(step, 0, 14)
    widths, told = method.widths(), method.summary()
    now = cost_table(model, data()[0][:1])
    assert told["frozen"]
    assert told["cost"]["bitops"] == pytest.approx(now.bitops)
    assert now.bitops <= limit
    assert told["choices"] > 3
    run(step, 14, 18)
    assert method.widths() == widths
    for name, layer in quant_layers(model).items():
        if name not in widths:  # first and last
            assert {int(q.bits) for q in layer.quantizers().values()} == {8}
    metrics = {}
    method.after_epoch(metrics)
    assert {"amed/weight_bits", "amed/input_bits", "amed/bitops"} == metrics.keys()


@pytest.mark.parametrize("options", [{}, {"amp_dtype": torch.bfloat16}, {"accumulate": 2}], ids=["", "bf16", "micro"])
@pytest.mark.parametrize("stop", [1, 4, 9])
def test_a_resumed_run_ends_bit_identical(stop, options):
    def fresh():
        model, method, _ = built(total=12 // options.get("accumulate", 1), every=1 if options.get("accumulate") else 2)
        return model, make_step(model, [method], **options)

    whole, step = fresh()
    run(step, 0, 12)
    assert len({int(q.bits) for q in quantizers(whole).values()}) > 1
    assert same_state(whole, resumed(fresh, stop, 12))


def test_a_window_that_is_not_finite_scores_nothing():
    _, method, _ = built()
    method._observe(float("nan"))
    assert not method.scores.any()
    assert method.reference is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": {"bitops": 1}}, "amed: budget.bitops=1 cannot be met: with all learned layers at 2 bits it is"),
        ({"candidates": [4]}, r"amed: candidates=\[4\] is not accepted; use several bits, 1 to 8"),
        ({"candidates": [0, 4]}, r"amed: candidates=\[0, 4\]"),
        ({"candidates": [2, 4]}, r"starts at \[8\] bits; weights and inputs start together at one of \[2, 4\]"),
        ({"cost": "latency"}, "amed: cost='latency' is not accepted; use bitops or size"),
        ({"alpha": -1.0}, "amed: alpha=-1.0"),
        ({"alpha": 0.0, "beta": 0.0}, "amed: beta=0.0"),
        ({"rate": 0.0}, "amed: rate=0.0"),
        ({"temperature": 0.0}, "amed: temperature=0.0"),
        ({"every": 0}, "amed: every=0"),
        ({"freeze_at": 2.0}, "amed: freeze_at=2.0"),
    ],
)
def test_values_that_are_not_accepted(options, words):
    with pytest.raises(BitwrightError, match=words):
        built(**options)


def test_other_layers_and_a_second_method_that_sets_bits_are_refused():
    model, method, costs = built()
    with pytest.raises(BitwrightError, match="made for other layers or candidates"):
        built(candidates=(2, 8))[1].load_state_dict(method.state_dict())
    with pytest.raises(BitwrightError, match="amed and hgq both set bit-widths"):
        make_step(model, [method, HGQ(model, 20, costs, beta=1.0)])


def test_latencies_count_in_the_score_and_in_the_budget():
    model = quantized(float_net(), bits=8)
    x = data()[0][:1]
    names = [row.name for row in cost_table(model, x).rows]
    entries = {n: {(8, 8): 2.0, (4, 4): 1.0} for n in names}
    costs = cost_table(model, x, latencies=LatencyTable(entries, 0.0))
    limit = costs.latency - 1.0
    method = AMED(model, 10, costs, {"latency": limit}, cost="latency", candidates=(4, 8), every=1, freeze_at=0.5)
    assert method.at_start == costs.latency
    run(make_step(model, [method]), 0, 6)
    assert method.summary()["cost"]["latency"] <= limit
    plain = cost_table(quantized(float_net(), bits=8), x)
    with pytest.raises(BitwrightError, match="amed: cost='latency' is not accepted; use bitops or size"):
        AMED(quantized(float_net(), bits=8), 10, plain, cost="latency")
