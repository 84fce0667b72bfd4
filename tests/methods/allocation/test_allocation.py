import itertools

import pytest
import torch

from bitwright import Allocation, BitwrightError, QuantizerSpec, Rule, calibrate, prepare, quant_layers
from bitwright.costs import LatencyTable, cost_table
from methods.nets import data, float_net, make_step, quantized, resumed, run, same_state


def built(budget=None, **options):
    model = quantized(float_net(), bits=8)
    costs = cost_table(model, data()[0][:1])
    return model, Allocation(model, costs, budget or {"bitops": costs.bitops / 5}, **options), costs


def test_the_widths_are_the_best_inside_the_budget_and_stay():
    model, method, costs = built(candidates=[2, 4], steps=2)
    step = make_step(model, [method], lr=0.0)
    run(step, 0, 1)
    assert all(set(each.values()) == {8} for each in method.widths().values())
    run(step, 1, 2)
    widths = method.widths()
    now = cost_table(model, data()[0][:1])
    assert now.bitops <= costs.bitops / 5
    assert now.bitops == pytest.approx(method.summary()["cost"]["bitops"])
    # No single move to another pair inside the budget is better.
    measured = dict(zip(method.layers, method.measured, strict=True))
    share = {r.name: r.macs for r in now.rows}

    def loss(name, w, a):
        return (measured[name][0, [2, 4].index(w)] + measured[name][1, [2, 4].index(a)]).item()

    for name, each in widths.items():
        w, a = each["weight"], each["input"]
        for other in itertools.product([2, 4], repeat=2):
            room = costs.bitops / 5 - now.bitops + share[name] * w * a
            if share[name] * other[0] * other[1] <= room:
                assert loss(name, w, a) <= loss(name, *other) + 1e-3
    run(step, 2, 6)
    assert method.widths() == widths
    for name, layer in quant_layers(model).items():
        if name not in widths:  # first and last
            assert {int(q.bits) for q in layer.quantizers().values()} == {8}


def test_sensitivities_are_means_over_the_batches():
    seen = []
    for first in (0, 1, None):
        model, method, _ = built(candidates=[2, 8], steps=1 if first is not None else 2)
        step = make_step(model, [method], lr=0.0)
        run(step, first or 0, 2 if first is None else first + 1)
        seen.append(method.measured)
    torch.testing.assert_close((seen[0] + seen[1]) / 2, seen[2], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_ends_bit_identical(stop):
    def fresh():
        model, method, _ = built(candidates=[2, 3, 4], steps=2)
        return model, make_step(model, [method])

    whole, step = fresh()
    run(step, 0, 5)
    rest = resumed(fresh, stop, 5)
    assert same_state(whole, rest)


def test_layers_with_float_inputs_have_weights_to_choose():
    model = prepare(float_net().requires_grad_(True), [Rule(match="*", weight=QuantizerSpec(bits=8))])
    calibrate(model, [data(count=32)])
    costs = cost_table(model, data()[0][:1])
    method = Allocation(model.train(), costs, {"size": costs.size_bytes * 0.6}, steps=1)
    run(make_step(model, [method], lr=0.0), 0, 1)
    assert cost_table(model, data()[0][:1]).size_bytes <= costs.size_bytes * 0.6
    assert all(set(each) == {"weight"} for each in method.widths().values())
    metrics = {}
    method.after_epoch(metrics)
    assert set(metrics) == {"allocation/weight_bits"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": {"bitops": 1}}, r"budget.bitops=1 cannot be met: with all layers at 2 bits it is"),
        ({"budget": {"time": 1}}, "allocation: budget.time is not accepted"),
        ({"candidates": []}, r"candidates=\[\]"),
        ({"candidates": [0, 4]}, r"candidates=\[0, 4\]"),
        ({"steps": 0}, "steps=0"),
        ({"fixed": ["*"]}, "allocation: no quantized layer is left"),
        ({"fixed": ["nothing"]}, "'nothing' names no layer"),
    ],
)
def test_values_that_are_not_accepted(options, words):
    with pytest.raises(BitwrightError, match=words):
        built(**options)


def test_without_a_budget_there_is_nothing_to_solve():
    model = quantized(float_net(), bits=8)
    with pytest.raises(BitwrightError, match="give a budget"):
        Allocation(model, cost_table(model, data()[0][:1]), {})


def with_latencies(candidates=(2, 4, 8)):
    model = quantized(float_net(), bits=8)
    names = [row.name for row in cost_table(model, data()[0][:1]).rows]
    # 4 bits save nothing in the first of the layers that are learned, which so has no reason to have few.
    entries = {n: {(8, 8): 2.0, (4, 4): 2.0 if i == 1 else 1.0} for i, n in enumerate(names)}
    costs = cost_table(model, data()[0][:1], latencies=LatencyTable(entries, 0.5))
    method = Allocation(model, costs, {"latency": costs.latency - 1.0}, candidates=candidates, steps=1)
    return model, method, names, costs


def test_a_latency_is_met_where_kernels_are_faster():
    model, method, names, costs = with_latencies()
    run(make_step(model, [method], lr=0.0), 0, 1)
    now = cost_table(model, data()[0][:1], latencies=costs.latencies)
    assert now.latency == method.summary()["cost"]["latency"] == costs.latency - 1.0
    few = [name for name, each in method.widths().items() if max(each.values()) <= 4]
    assert len(few) == 1
    assert few[0] != names[1]


def test_a_latency_without_a_table_is_refused():
    with pytest.raises(BitwrightError, match=r"allocation: budget\.latency needs latencies"):
        built(budget={"latency": "5ms"})
    model, _, _, costs = with_latencies()
    with pytest.raises(
        BitwrightError, match=r"allocation: budget\.latency=0\.1 cannot be met: with all layers at 2 bits"
    ):
        Allocation(model, costs, {"latency": 0.1}, candidates=(2, 8))
