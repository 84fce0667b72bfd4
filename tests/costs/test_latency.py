import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright import BitwrightError, QuantizerSpec, Rule, prepare
from bitwright.costs import LatencyTable, cost_table, read_latencies
from bitwright.costs.assignment import Row, kinds, make_rows, solve, total
from bitwright.costs.latency import entry_for
from methods.nets import data, float_net

ENTRIES = {(4, 4): 1.0, (8, 8): 3.0, (8, 4): 2.0}


def table_of(model, **layers):
    """Entries for every layer of a model: 8/8 costs two and 4/4 costs one, unless `layers` say otherwise."""
    names = [row.name for row in cost_table(model, data()[0][:1]).rows]
    return LatencyTable({n: layers.get(n, {(8, 8): 2.0, (4, 4): 1.0}) for n in names}, 0.25)


@pytest.mark.parametrize(
    ("pair", "time"), [((4, 4), 1.0), ((2, 3), 1.0), ((5, 4), 2.0), ((8, 2), 2.0), ((4, 5), 3.0), ((8, 8), 3.0)]
)
def test_fewer_bits_take_the_cheapest_kernel_that_holds_them(pair, time):
    assert entry_for(ENTRIES, *pair) == time


def test_more_bits_than_were_measured_are_refused():
    with pytest.raises(BitwrightError, match=r"6/8 bits .* were not measured, only 4/4$"):
        entry_for({(4, 4): 1.0}, 6, 8)


def test_a_file_holds_the_table(tmp_path):
    table = LatencyTable({"layer1.0": {(8, 8): 0.5, (4, 4): 0.25}, "fc": {(8, 8): 1e-3}}, 0.125)
    (tmp_path / "table.csv").write_text(table.to_csv())
    assert read_latencies(tmp_path / "table.csv") == table


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "the column layer is missing"),
        ("layer,weight_bits,input_bits\nconv,8,8\n", "the column milliseconds is missing"),
        ("layer,weight_bits,input_bits,milliseconds\n(rest),,,1\n", "there is no layer"),
        ("layer,weight_bits,input_bits,milliseconds\nconv,8,8,0.5\nconv,four,4,0.3\n", "line 3 is not accepted"),
        ("layer,weight_bits,input_bits,milliseconds\nconv,8,8,-1\n", "line 2 is not accepted"),
        ("layer,weight_bits,input_bits,milliseconds\nconv,8\n", "line 2 is not accepted"),
        ("layer,weight_bits,input_bits,milliseconds\nconv,8,8,nan\n", "line 2 is not accepted"),
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path, text, complaint):
    file = tmp_path / "table.csv"
    file.write_text(text)
    with pytest.raises(BitwrightError, match=complaint) as caught:
        read_latencies(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_none_is_refused_in_one_line(tmp_path):
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x01" * 8)
    for name in ("missing.csv", "binary.csv", "."):
        with pytest.raises(BitwrightError, match="cannot be read as a table of latencies"):
            read_latencies(tmp_path / name)


def test_the_table_of_costs_adds_up_what_its_layers_take():
    model = float_net()
    x = data()[0][:1]
    layers = len(cost_table(model, x).rows)
    prepare(model, [Rule(match="*", weight=QuantizerSpec(bits=4), input=QuantizerSpec(bits=3))])
    table = cost_table(model, x, latencies=table_of(model))
    assert table.latency == layers * 1.0 + 0.25
    assert table.as_dict()["latency"] == table.latency
    assert f"{table.latency:.4g} ms (0.25 ms of it outside of layers)" in str(table)
    plain = cost_table(model, x)
    assert plain.latency is None
    assert "latency" not in plain.as_dict()
    assert " ms" not in str(plain)


def test_float_layers_are_part_of_the_rest():
    model = float_net()
    first = cost_table(model, data()[0][:1]).rows[0].name
    prepare(model, [Rule(match=first, weight=QuantizerSpec(bits=8), input=QuantizerSpec(bits=8))])
    assert cost_table(model, data()[0][:1], latencies=table_of(model)).latency == 2.25


def test_rows_have_the_latencies_of_their_layers():
    model = prepare(float_net(), [Rule(match="*", weight=QuantizerSpec(bits=8), input=QuantizerSpec(bits=8))])
    costs = cost_table(model, data()[0][:1], latencies=table_of(model))
    names = [row.name for row in costs.rows]
    rows = make_rows(costs, model, {names[1]: 0}, "test")
    assert kinds(rows) == ("bitops", "size", "latency")
    assert total(rows, "latency", [(8, 8)]) == costs.latency
    assert total(rows, "latency", [(2, 4)]) == costs.latency - 1.0
    assert kinds(make_rows(cost_table(model, data()[0][:1]), model, {names[1]: 0}, "test")) == ("bitops", "size")
    lacking = LatencyTable({n: e for n, e in costs.latencies.layers.items() if n != names[1]}, 0.0)
    with pytest.raises(BitwrightError, match=f"test: latencies: there is no row for the layer '{names[1]}'"):
        make_rows(cost_table(model, data()[0][:1], latencies=lacking), model, {names[1]: 0}, "test")


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 4), st.integers(0, 2**31), st.floats(0.2, 1.1))
def test_the_choice_under_a_latency_is_that_of_trying_them_all(count, seed, share):
    draw = random.Random(seed)
    measured = [{(8, 8): draw.uniform(1, 3), (4, 4): draw.uniform(0.5, 2)} for _ in range(count)]
    rows = [Row(1, 1, i, None, None, entries=each) for i, each in enumerate(measured)]
    rows.append(Row(0, 0, None, 32, 32, entries={(32, 32): 0.5}))
    options = [[(w, a) for w in (2, 4, 8) for a in (2, 4, 8)] for _ in range(count)]
    losses = [[draw.uniform(-1, 5) for _ in each] for each in options]
    budget = {"latency": share * total(rows, "latency", [(8, 8)] * count)}
    inside = [
        sum(losses[g][i] for g, i in enumerate(picks))
        for picks in itertools.product(range(9), repeat=count)
        if total(rows, "latency", [options[g][i] for g, i in enumerate(picks)]) <= budget["latency"]
    ]
    got = solve(rows, options, losses, budget)
    assert (got is None) == (not inside)
    if got is not None:
        assert total(rows, "latency", got) <= budget["latency"]
        value = sum(losses[g][options[g].index(pair)] for g, pair in enumerate(got))
        assert value == pytest.approx(min(inside), rel=1e-3, abs=1e-3)
