import math

import pytest
import torch

from bitwright import BitwrightError
from bitwright.constraints import RULES, Constraint


def made(rule, **options):
    return Constraint(200.0, rule, **({"weight": 0.5} | options))


@pytest.mark.parametrize("value", [100.0, 200.0, 330.0])
def test_penalties_are_those_of_the_table(value):
    g = value / 200.0
    assert made("fixed").penalty(value) == pytest.approx(0.5 * g)
    assert made("hinge2").penalty(value) == pytest.approx(0.5 * max(0.0, g - 1) ** 2)
    assert made("signed").penalty(value) == pytest.approx(0.5 * (g - 1) * g)
    assert made("dual").penalty(value) == pytest.approx(0.5 * (g - 1))
    assert made("pid").penalty(value) == pytest.approx(0.5 * g)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [150.0, 260.0])
def test_the_multiplier_is_the_slope_of_the_penalty_in_the_relative_value(rule, value):
    constraint = made(rule)
    constraint.update(value)
    x = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    constraint.penalty(x).backward()
    assert x.grad is not None
    assert x.grad.item() * 200.0 == pytest.approx(constraint.multiplier, abs=1e-15)


def test_dual_ascent_integrates_the_slack_and_stays_nonnegative():
    constraint = made("dual", weight=0.0, rate=0.1)
    path = [constraint.update(v) for v in (300.0, 300.0, 100.0, 100.0, 100.0)]
    assert path == pytest.approx([0.05, 0.10, 0.05, 0.0, 0.0], abs=1e-12)


def test_pid_acts_on_the_logarithm_of_the_cost():
    constraint = made("pid", gains=(0.7, 0.2, 0.3))
    total, last = 0.0, 0.0
    for value in (400.0, 250.0, 90.0):
        error = math.log(value / 200.0)
        total += error
        expected = 0.5 * math.exp(0.7 * error + 0.2 * total + 0.3 * (error - last))
        assert constraint.update(value) == pytest.approx(expected)
        last = error


def test_a_moving_target_replaces_the_budget_for_one_update():
    constraint = made("dual", weight=0.0, rate=1.0)
    assert constraint.update(300.0, target=300.0) == 0.0
    assert constraint.update(300.0) == pytest.approx(0.5)


@pytest.mark.parametrize("rule", ["dual", "pid"])
def test_controllers_bring_a_plant_to_its_target(rule):
    # The cost answers a multiplier as the bits of a network do: less cost, the larger the multiplier.
    constraint = made(rule, weight=0.01, rate=0.05)
    value = 800.0
    for _ in range(4000):
        value += 0.05 * (200.0 / (0.05 + constraint.multiplier) ** 0.5 - value)
        constraint.update(value)
    assert value == pytest.approx(200.0, rel=0.01)


@pytest.mark.parametrize("rule", RULES)
def test_a_restored_controller_goes_on_identically(rule):
    values = [300.0, 250.0, 180.0, 190.0, 260.0, 220.0]
    one, two = made(rule), made(rule)
    whole = [one.update(v) for v in values]
    for v in values[:3]:
        two.update(v)
    three = made(rule)
    three.load_state_dict(two.state_dict())
    assert [three.update(v) for v in values[3:]] == whole[3:]


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "abs"},
        {"target": 0.0},
        {"target": math.inf},
        {"weight": -1.0},
        {"weight": 0.0},
        {"rate": 0.0},
        {"gains": (1.0, -1.0, 0.0)},
        {"gains": (1.0, 1.0)},
    ],
)
def test_bad_values_are_refused_in_one_line(options):
    with pytest.raises(BitwrightError) as caught:
        Constraint(**({"target": 1.0} | options))
    assert "\n" not in str(caught.value)
