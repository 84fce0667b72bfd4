import copy

import pytest
import torch
import torch.nn.functional as F

from bitwright import (
    CAGE,
    CSQ,
    HGQ,
    BitwrightError,
    Constrained,
    QuantizerSpec,
    QuantNet,
    Rule,
    calibrate,
    export,
    prepare,
    snap_biases,
    verify,
)
from bitwright.costs import cost_table
from bitwright.methods.quantnet.quantnet import binary_weights
from methods.nets import data, float_net, make_step, quantized, resumed, run, same_state


def binary(inputs=4, grid="lsq"):
    """1-bit weights and 4-bit inputs inside, 8 bits at the ends."""
    model = float_net().requires_grad_(True)
    spec = {n: QuantizerSpec(bits=n, grid=grid) for n in (1, inputs, 8)}
    rules = [Rule(match="*", weight=spec[1], input=spec[inputs])]
    prepare(model, [*rules, Rule(match=("first", "last"), weight=spec[8], input=spec[8])])
    calibrate(model, [data(seed=7, count=32)])
    return model.train()


def built(total=20, **options):
    model = binary()
    return model, QuantNet(model, total, **options)


def layer_of(method):
    return next(iter(method.sites.values()))[0]


def test_the_value_and_its_gradients_are_those_of_the_formula():
    _, method = built(width=4)
    layer = layer_of(method)
    quantizer, weight = layer.weight_quantizer, layer.weight
    scale = quantizer.grid.scale.detach().clone().requires_grad_()
    latent = weight.detach().clone().requires_grad_()
    leaves = [t.detach().clone().requires_grad_() for t in method.network.leaves()]
    a, v, c = (t.exp() for t in leaves)
    u = latent / scale.view(-1, 1, 1, 1)
    wanted = 0.5 * scale.view(-1, 1, 1, 1) * torch.tanh(a * u + (v * torch.tanh(c * u[..., None])).sum(-1))
    found = quantizer(weight)
    torch.testing.assert_close(found, wanted)
    ours = torch.autograd.grad(found.pow(3).sum(), [weight, quantizer.grid.scale, *method.network.leaves()])
    theirs = list(torch.autograd.grad(wanted.pow(3).sum(), [latent, scale, *leaves]))
    theirs[1] = theirs[1] / weight[0].numel() ** 0.5  # LSQ's factor, with Qp = 1
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_evaluation_sees_the_plain_quantizer_whose_sign_is_the_same():
    model, method = built()
    layer, plain = layer_of(method), layer_of(built()[1])
    soft = layer.weight_quantizer(layer.weight)
    model.eval()
    hard = layer.weight_quantizer(layer.weight)
    assert torch.equal(hard, plain.train(False).weight_quantizer(plain.weight))
    assert torch.equal(hard.sign(), soft.sign())
    assert bool((soft.abs() < hard.abs()).all())


@pytest.mark.parametrize("harden_at", [0, 0.5])
def test_without_its_network_training_is_plain(harden_at):
    """With 0 from the first step, with 0.5 from the tenth on."""
    model, method = built(harden_at=harden_at)
    step = make_step(model, [method])
    run(step, 0, round(20 * harden_at))
    assert method.done
    other = binary()
    other.load_state_dict(model.state_dict())
    twin = make_step(other)
    twin.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    run(step, 10, 14)
    run(twin, 10, 14)
    assert same_state(model, other)
    assert step.result.losses.keys() == {"task"}


def test_the_penalty_is_the_mean_over_all_weights_and_rises():
    _, method = built(lam=3.0, harden_at=0.5)
    values = torch.cat([v.flatten() for v in method.nearly_binary().values()])
    assert method.losses(None, None)["quantnet"] == 0
    method.steps = 5
    torch.testing.assert_close(method.losses(None, None)["quantnet"], 1.5 * (1 - values.abs()).square().mean())
    _, flat = built(lam=3.0, schedule="constant")
    torch.testing.assert_close(flat.losses(None, None)["quantnet"], 3.0 * (1 - values.abs()).square().mean())


def test_the_penalty_draws_values_to_the_grid():
    reached = []
    for lam in (0.0, 50.0):
        model, method = built(total=20, lam=lam, schedule="constant", harden_at=1)
        step, told = make_step(model, [method]), {}
        run(step, 0, 15)
        method.after_epoch(told)
        reached.append(told["quantnet/distance"])
    assert reached[1] < 0.8 * reached[0]


@pytest.mark.parametrize(
    ("stop", "options"),
    [(7, {}), (17, {}), (7, {"amp_dtype": torch.bfloat16}), (7, {"accumulate": 2}), (7, {"clip_norm": 1.0})],
    ids=["soft", "hard", "bf16", "micro", "clip"],
)
def test_a_resumed_run_ends_bit_identical(stop, options):
    def fresh():
        model, method = built(total=20 // options.get("accumulate", 1))
        return model, make_step(model, [method], **options)

    whole, step = fresh()
    run(step, 0, 20)
    assert torch.isfinite(step.result.loss)
    assert same_state(whole, resumed(fresh, stop, 20))


def test_the_file_is_what_was_trained(tmp_path):
    model, method = built()
    run(make_step(model, [method]), 0, 20)
    assert method.summary() == {"weights": list(method.sites), "hardened": True}
    assert len(method.sites) == 6
    x = data(count=16)[0]
    snap_biases(model.eval(), x)
    export(model, tmp_path / "net.onnx", x[:1])
    assert verify(model, tmp_path / "net.onnx", [x]).ok


@pytest.mark.parametrize("name", ["cage", "constrained", "csq", "hgq"])
def test_methods_that_cannot_share_the_weights_or_the_bits(name):
    model, method = built()
    deep = quantized(float_net(), bits=8)
    costs = cost_table(deep, data()[0][:1])
    other = {
        "cage": lambda: CAGE(model, 20),
        "constrained": lambda: Constrained(model, F.cross_entropy),
        "csq": lambda: CSQ(deep, 20, costs, mean_bits=3),
        "hgq": lambda: HGQ(deep, 20, costs, {"bitops": costs.bitops}),
    }[name]()
    words = f"methods: quantnet and {name} both set bit-widths; use one of them"
    if other.moves_weights:
        words = f"methods: quantnet computes the weights, so that there are none for {name} to move; use one of them"
    with pytest.raises(BitwrightError, match=words):
        make_step(model, [method, other])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"total": 0}, "quantnet: total_steps=0"),
        ({"width": 0}, "quantnet: width=0 is not accepted; use a whole number >= 1"),
        ({"lam": -1.0}, "quantnet: lam=-1.0"),
        ({"schedule": "cosine"}, "quantnet: schedule='cosine' is not accepted; use ramp or constant"),
        ({"lr": 0.0}, "quantnet: lr=0.0"),
        ({"harden_at": 1.5}, "quantnet: harden_at=1.5 is not accepted; use 0 <= fraction <= 1"),
    ],
)
def test_values_that_are_not_accepted(options, words):
    with pytest.raises(BitwrightError, match=words):
        built(**options)


def test_models_without_fitting_weights_are_refused():
    with pytest.raises(BitwrightError, match="quantnet: no weight of the model has 1 bit, and it binarizes; use bits"):
        QuantNet(quantized(float_net(), bits=2), 20)
    with pytest.raises(BitwrightError, match=r"quantnet: the grid 'dorefa' of .*weight_quantizer is not that of plus"):
        QuantNet(binary(grid="dorefa"), 20)
    assert len(binary_weights(binary(grid="seq"))) == 6


def test_states_of_another_width_are_refused():
    with pytest.raises(BitwrightError, match="quantnet: the checkpoint holds a network of width 4, this run has 16"):
        built()[1].load_state_dict(built(width=4)[1].state_dict())
