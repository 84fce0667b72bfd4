import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitwright import BitwrightError, QuantizerSpec, Rule, calibrate, prepare, quantizers
from bitwright.methods.ewgs import EWGSDelta, delta_from_curvature, mean_curvatures
from methods.nets import data, float_net, make_step, quantized, run, same_state


def loader():
    return [data(seed=50 + i, count=4) for i in range(5)]


def test_delta_is_the_published_ratio_clipped_at_zero():
    t = torch.tensor
    assert delta_from_curvature(t(0.6), t(0.1)).item() == pytest.approx(2.0)
    assert delta_from_curvature(t(-0.6), t(0.1)).item() == 0.0
    assert delta_from_curvature(t(0.6), t(0.0)).item() == 0.0
    assert delta_from_curvature(t(torch.inf), t(0.1)).item() == delta_from_curvature(t(torch.nan), t(0.1)).item() == 0.0


def test_curvature_and_gradient_of_known_functions():
    torch.manual_seed(0)
    a = torch.randn(6, 6, dtype=torch.float64)
    h = a @ a.T
    y = torch.randn(6, dtype=torch.float64, requires_grad=True)
    z = torch.randn(3, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    loss = 0.5 * y @ h @ y + 0.5 * (weights * z * z).sum() + 0.3 * y[:3] @ z
    widths = [torch.tensor([2.0], dtype=torch.float64), torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)]
    generator = torch.Generator().manual_seed(1)
    means, spread = mean_curvatures(loss, [y, z], widths, 4000, 0.0, generator)
    assert means[0].item() == pytest.approx(4.0 * h.trace().item() / 6, rel=0.03)
    assert means[1].item() == pytest.approx((1 + 2 * 9 + 5 * 0.25) / 3, rel=0.03)
    g_y, g_z = torch.autograd.grad(0.5 * y @ h @ y + 0.5 * (weights * z * z).sum() + 0.3 * y[:3] @ z, [y, z])
    assert spread[0].item() == pytest.approx((2 * g_y).std().item())
    assert spread[1].item() == pytest.approx((widths[1] * g_z).std().item())


def test_the_estimate_of_a_layer_is_its_closed_form():
    # loss = sum of h_i w_i^2 / 2 over the quantized weight w: the Hessian is diagonal, which Rademacher hits exactly.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 1, bias=False))
    spec = QuantizerSpec(bits=3, estimator="ewgs", per_channel=False)
    prepare(net, [Rule(match="*", weight=spec)])
    calibrate(net, [torch.randn(4, 5)])
    h = torch.tensor([1.0, 4.0, 2.0, 8.0, 5.0])

    def loss_fn(outputs, y):  # the identity as input makes the outputs the quantized weight
        return 0.5 * (h[:, None] * outputs**2).sum()

    method = EWGSDelta(net, loss_fn, lambda: [(torch.eye(5), torch.zeros(5))], every=1)
    (delta,) = method.estimate().values()
    quantizer = net[0].weight_quantizer
    w = quantizer(net[0].weight).detach().flatten()
    width = quantizer.grid.scale.item() * 7  # from the smallest to the largest of 2^3 values
    expected = (width**2 * h.mean() / (3 * (width * h * w).std())).item()
    assert delta == pytest.approx(expected, rel=1e-5)


def test_every_quantizer_with_a_gradient_gets_a_delta_and_nothing_else_changes():
    model = quantized(float_net(), bits=3, estimator="ewgs")
    torch.manual_seed(3)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    method = EWGSDelta(model, F.cross_entropy, loader, every=2, iterations=5)
    metrics = {}
    method.after_epoch(metrics)
    assert metrics == {"ewgs/delta": 0.0}
    method.after_epoch(metrics)
    after = model.state_dict()
    changed = {k for k in after if not torch.equal(before[k], after[k])}
    assert changed
    assert all(k.endswith("estimator.delta") for k in changed)
    deltas = [q.estimator.delta.item() for q in quantizers(model).values()]
    assert metrics["ewgs/delta"] == pytest.approx(sum(deltas) / len(deltas))
    assert min(deltas) >= 0
    assert max(deltas) > 0
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert quantizers(model)["conv1.input_quantizer"].estimator.delta.item() == 0.0  # the image has no gradient


class Wide(nn.Module):
    """Reads keywords, attends with torch's own fused function, and has a head that the loss may leave alone."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head, self.aux = nn.Linear(8, 24), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, tokens):
        q, k, v = (t[:, None] for t in self.qkv(tokens).chunk(3, -1))
        x = F.scaled_dot_product_attention(q, k, v)[:, 0].mean(1)
        return {"out": self.head(x), "aux": self.aux(x)}


def test_estimates_of_keywords_fused_attention_and_a_head_without_loss():
    torch.manual_seed(0)
    spec = QuantizerSpec(bits=3, estimator="ewgs")
    net = prepare(Wide(), [Rule(match="*", weight=spec, input=spec)])
    batches = [({"tokens": torch.randn(6, 5, 8)}, torch.arange(6) % 4) for _ in range(2)]
    calibrate(net, batches)
    method = EWGSDelta(net, lambda out, y: F.cross_entropy(out["out"], y), lambda: batches, iterations=20)
    found = method.estimate()
    assert found.keys() == {n for n in quantizers(net) if not n.startswith("qkv.input")}
    assert found["head.weight_quantizer"] > 0
    assert found["aux.weight_quantizer"] == 0


def test_the_estimate_is_of_training_mode_and_leaves_modes_as_they_were():
    """A loop that validates before it ends the epoch leaves the model in evaluation mode."""
    model = quantized(float_net(), bits=3, estimator="ewgs")
    method = EWGSDelta(model, F.cross_entropy, loader, iterations=3)
    model.layer1.eval()
    modes = [m.training for m in model.modules()]
    frozen = method.estimate()
    assert [m.training for m in model.modules()] == modes
    model.train()
    expected = method.estimate()
    assert expected != frozen
    model.eval()
    assert method.estimate() == expected
    assert not any(m.training for m in model.modules())


def test_estimates_without_gradients_or_batches():
    model = quantized(float_net(), bits=3, estimator="ewgs").requires_grad_(False)
    assert EWGSDelta(model, F.cross_entropy, loader).estimate() == {}
    once = iter(loader())
    method = EWGSDelta(quantized(float_net(), estimator="ewgs"), F.cross_entropy, lambda: once, iterations=1)
    method.estimate()
    method.estimate()  # two of five batches are left
    with pytest.raises(BitwrightError, match=r"^ewgs: batches\(\) gave no batch"):
        method.estimate()


@pytest.mark.slow
def test_the_estimate_works_for_a_compiled_model_and_is_that_of_the_eager_one():
    model = quantized(float_net(), bits=3, estimator="ewgs")
    eager = EWGSDelta(model, F.cross_entropy, loader, iterations=3).estimate()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(data()[0])
    assert EWGSDelta(compiled, F.cross_entropy, loader, iterations=3).estimate() == eager


def test_with_delta_0_training_is_that_of_the_clipped_estimator_to_the_last_bit():
    plain, other = quantized(float_net()), quantized(float_net(), estimator="ewgs")
    run(make_step(plain), 0, 4)
    run(make_step(other, [EWGSDelta(other, F.cross_entropy, loader)]), 0, 4)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("model_first", [True, False])
def test_a_resumed_run_ends_bit_identical(model_first):
    def fresh():
        model = quantized(float_net(), estimator="ewgs")
        return model, lambda: make_step(model, [EWGSDelta(model, F.cross_entropy, loader, every=2, iterations=2)])

    def epochs(step, first, last):
        for epoch in range(first, last):
            run(step, 2 * epoch, 2 * epoch + 2)
            step.end_epoch({})

    whole, make = fresh()
    epochs(make(), 0, 5)
    half, make = fresh()
    step = make()
    epochs(step, 0, 3)
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
    epochs(step, 3, 5)
    assert same_state(whole, rest)


def test_a_model_without_the_estimator_and_bad_values_are_refused():
    with pytest.raises(BitwrightError, match="no quantizer of the model uses the estimator 'ewgs'"):
        EWGSDelta(quantized(float_net()), F.cross_entropy, loader)
    model = quantized(float_net(), estimator="ewgs")
    with pytest.raises(BitwrightError, match=r"^ewgs: batches: list is not accepted.*lambda: loader"):
        EWGSDelta(model, F.cross_entropy, loader())
    for options in ({"every": 0}, {"batch_count": 0}, {"iterations": 0}, {"tolerance": -1.0}):
        with pytest.raises(BitwrightError, match="ewgs: every=") as caught:
            EWGSDelta(model, F.cross_entropy, loader, **options)
        assert "\n" not in str(caught.value)
