import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitwright import KD, BitwrightError, QuantizerSpec, Rule, calibrate, prepare, quant_layers
from bitwright.methods.saq import SAQ
from methods.nets import data, float_net, make_step, quantized, run, same_state


def linear(bits=3):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    prepare(net, [Rule(match="*", weight=QuantizerSpec(bits=bits, per_channel=False, estimator="ste"))])
    return calibrate(net, [torch.randn(4, 4).double()])


def test_the_gradient_is_that_at_the_perturbed_quantized_weight():
    # A quadratic loss of a linear layer, by hand: y = x v', L = mean |y - t|^2, g(v) = 2/n (x v' - t)' x.
    net, rho = linear(), 0.7
    x, target = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    layer = net[0]
    v = layer.weight_quantizer(layer.weight).detach()
    gradient = lambda w: 2 / (5 * 3) * (x @ w.T - target).T @ x  # noqa: E731
    g = gradient(v)
    expected = gradient(v + rho * g / g.norm())
    before = layer.weight.detach().clone()
    step = make_step(net, [SAQ(net, rho)], lr=1.0)
    step.optimizer = torch.optim.SGD([layer.weight], lr=1.0)
    step.loss_fn = F.mse_loss
    result = step(x, target)
    torch.testing.assert_close(before - layer.weight, expected, rtol=1e-10, atol=1e-12)
    assert result.loss.item() == pytest.approx(F.mse_loss(x @ v.T, target).item())
    metrics, other = {}, SAQ(linear(), rho)
    other.load_state_dict(step.methods[0].state_dict())
    step.end_epoch(metrics)
    resumed = {}
    other.after_epoch(resumed)
    assert metrics == resumed
    at = F.mse_loss(x @ (v + rho * g / g.norm()).T, target) - F.mse_loss(x @ v.T, target)
    assert metrics["saq/sharpness"] == pytest.approx(at.item())


def test_norms_are_perturbed_along_and_put_back():
    model = quantized(float_net(), bits=3)
    method = SAQ(model, 0.5)
    assert {p.shape for p in method.passes.affine} == {p.shape for n, p in model.named_parameters() if ".bn" in f".{n}"}
    step = make_step(model, [method], lr=0.0)
    seen = []
    model.fc.register_forward_pre_hook(lambda *_: seen.append([p.detach().clone() for p in method.passes.affine]))
    before = copy.deepcopy(dict(model.named_parameters()))
    run(step, 0, 1)
    assert len(seen) == 2
    assert all(not torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_statistics_follow_the_first_pass_alone():
    plain, sharp = (quantized(float_net(), bits=3) for _ in range(2))
    run(make_step(plain, lr=0.0), 0, 2)
    run(make_step(sharp, [SAQ(sharp, 2.0)], lr=0.0), 0, 2)
    assert same_state(plain, sharp)


@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_at_rho_0_training_is_plain_to_the_last_bit(amp):
    plain, sharp = (quantized(float_net(), bits=3) for _ in range(2))
    run(make_step(plain, amp_dtype=amp), 0, 4)
    run(make_step(sharp, [SAQ(sharp, 0.0)], amp_dtype=amp), 0, 4)
    assert same_state(plain, sharp)


def test_outside_a_step_the_network_is_as_it_was():
    model = quantized(float_net(), bits=3)
    x, _ = data()
    plain = model.eval()(x)
    SAQ(model, 3.0)
    assert torch.equal(plain, model(x))


def test_accumulated_batches_give_the_mean_of_their_gradients():
    model = quantized(float_net(), bits=3).eval()  # without batch statistics batches do not meet
    whole = copy.deepcopy(model)
    (x, y), (a, b) = data(seed=1), data(seed=2)
    step = make_step(model, [SAQ(model, 0.3)], accumulate=2, lr=0.1)
    step(x, y)
    step(a, b)
    moves = []
    for batch in ((x, y), (a, b)):
        alone = copy.deepcopy(whole)
        make_step(alone, [SAQ(alone, 0.3)], lr=0.1)(*batch)
        moves.append([p - q for p, q in zip(alone.parameters(), whole.parameters(), strict=True)])
    for p, q, *both in zip(model.parameters(), whole.parameters(), *moves, strict=True):
        torch.testing.assert_close(p - q, sum(both) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compiled", [None, "aot_eager"])
def test_with_distillation_eager_and_compiled(compiled):
    torch._dynamo.reset()
    states = []
    for backend in (None, compiled):
        model = quantized(float_net(), bits=3).double()
        step = make_step(model, [SAQ(model, 0.3), KD(float_net().double())], compiled=backend)
        for i in range(3):
            x, y = data(seed=i)
            step(x.double(), y)
        states.append(model.state_dict())
    assert torch.isfinite(step.result.loss)
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-6, atol=1e-8, msg=name)


def test_two_methods_that_own_the_backward_pass_and_bad_values_are_refused():
    model = quantized(float_net())
    with pytest.raises(BitwrightError, match="both own the backward pass"):
        make_step(model, [SAQ(model), SAQ(model)])
    with pytest.raises(BitwrightError, match="rho=-1"):
        SAQ(model, -1)
    with pytest.raises(BitwrightError, match="no weight of the model is quantized"):
        SAQ(float_net())
    assert len(SAQ(model).passes.slots) == len(quant_layers(model))
