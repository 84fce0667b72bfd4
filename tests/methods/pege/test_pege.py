import copy
import itertools

import pytest
import torch

from bitwright import BitwrightError, Rule, quantizers
from bitwright.kernels import reference_only
from bitwright.methods.pege import PEGECurriculum, curriculum, discretization_error
from methods.nets import float_net, make_step, quantized, run, same_state


def rates(model):
    return {q.estimator.rate.item() for q in quantizers(model).values()}


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (2.718281828459045, (0.159, 0.357, 0.620, 0.828)),
        (10.0, (0.279, 0.512, 0.740, 0.889)),
        (100.0, (0.519, 0.705, 0.852, 0.938)),
    ],
)
def test_the_logarithmic_curve_has_its_tabulated_values(base, expected):
    got = [curriculum("log", t, 0.0, base) for t in (0.1, 0.25, 0.5, 0.75)]
    assert got == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("curve", ["log", "linear", "cosine"])
@pytest.mark.parametrize("start", [0.0, 0.3])
def test_curves_rise_from_the_start_to_exactly_1(curve, start):
    points = [curriculum(curve, i / 100, start) for i in range(100)]
    assert points[0] == pytest.approx(start, abs=1e-12)
    assert all(a < b < 1 for a, b in itertools.pairwise(points))
    assert curriculum(curve, 1.0, start) == 1.0 == curriculum(curve, 1.4, start)


def test_the_rate_follows_the_steps_and_is_held_at_1_from_reach_on():
    model = quantized(float_net(), estimator="pege")
    method = PEGECurriculum(model, total_steps=10, reach=0.5, base=100.0, strength_curve="linear")
    step = make_step(model, [method])
    seen, pulls = [], []
    for i in range(8):
        (rate,) = rates(model)
        seen.append(rate)
        pulls.append(next(iter(quantizers(model).values())).estimator.strength.item())
        run(step, i, i + 1)
    assert seen == pytest.approx([curriculum("log", min(i / 5, 1), 0.0, 100.0) for i in range(8)], abs=1e-6)
    assert seen[5:] == [1.0, 1.0, 1.0]
    assert pulls == pytest.approx([0.01 * min(i / 5, 1) for i in range(8)], abs=1e-8)


def test_metrics_are_the_rate_and_the_mean_squared_error_of_normalised_weights():
    model = quantized(float_net(), bits=3, estimator="pege")
    method = PEGECurriculum(model, total_steps=10)
    metrics = {}
    method.after_epoch(metrics)
    total, count = 0.0, 0
    for module in model.modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is not None:
            half = 2 ** (int(quantizer.bits) - 1)
            scale = quantizer.grid.scale.detach().double().view(-1, *[1] * (module.weight.ndim - 1))
            codes = (module.weight.detach().double() / scale).clamp(-half, half - 1)
            total += (((codes - codes.round()) / (2 * half - 1)) ** 2).sum().item()
            count += module.weight.numel()
    assert metrics["pege/discretization_error"] == pytest.approx(total / count, rel=1e-4)
    assert metrics["pege/rate"] == 0.0


def test_training_with_full_replacement_and_no_pull_is_plain_training_to_the_last_bit():
    plain = quantized(float_net())
    other = quantized(float_net(), estimator="pege", strength=0.0)
    method = PEGECurriculum(other, total_steps=6, curve="constant")
    with reference_only():
        run(make_step(plain), 0, 6)
        run(make_step(other, [method]), 0, 6)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_the_pull_brings_weights_nearer_to_their_codes_than_no_pull():
    errors = []
    for strength in (0.0, 20.0):
        model = quantized(float_net(), bits=3, estimator="pege", form="elementwise", strength=strength)
        run(make_step(model, lr=0.02), 0, 25)
        errors.append(discretization_error(model))
    assert errors[1] < 0.9 * errors[0]


def test_a_resumed_run_ends_bit_identical():
    whole = quantized(float_net(), estimator="pege")
    run(make_step(whole, [PEGECurriculum(whole, 8)]), 0, 8)

    half = quantized(float_net(), estimator="pege")
    step = make_step(half, [PEGECurriculum(half, 8)])
    run(step, 0, 4)
    saved = copy.deepcopy((half.state_dict(), step.optimizer.state_dict(), step.state_dict()))
    rest = quantized(float_net(), estimator="pege")
    rest.load_state_dict(saved[0])
    step = make_step(rest, [PEGECurriculum(rest, 8)])
    step.optimizer.load_state_dict(saved[1])
    step.load_state_dict(saved[2])
    run(step, 4, 8)
    assert same_state(whole, rest)


def test_a_model_without_the_estimator_is_refused():
    with pytest.raises(BitwrightError, match="no quantizer of the model uses the estimator 'pege'"):
        PEGECurriculum(quantized(float_net()), total_steps=10)


@pytest.mark.parametrize(
    "options",
    [
        {"total_steps": 0},
        {"curve": "exp"},
        {"strength_curve": "exp"},
        {"base": 1.0},
        {"start": -0.1},
        {"reach": 0.0},
        {"reach": 1.1},
    ],
)
def test_bad_values_are_refused_in_one_line(options):
    model = quantized(float_net(), estimator="pege")
    with pytest.raises(BitwrightError) as caught:
        PEGECurriculum(model, **({"total_steps": 10} | options))
    assert "\n" not in str(caught.value)


def test_rules_name_the_estimator():
    assert Rule(match="*", weight={"bits": 2, "estimator": "pege"}).weight.estimator == "pege"
