import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from bitwright import BitwrightError, QuantizerSpec
from bitwright.estimators import ClippedSTE, make_estimator
from bitwright.estimators.pege import PEGE
from bitwright.grids import Shape
from bitwright.kernels import reference_only
from bitwright.kernels.reference import random_mask
from bitwright.quantizer import Quantizer

LO, HI = torch.tensor([-2.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
WIDTH = HI - LO


def values(count=4000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(count, dtype=torch.float64, generator=generator)


def task(k):
    return (torch.sin(1.7 * k) * torch.linspace(-1, 1, k.numel(), dtype=k.dtype)).sum()


def estimate(estimator, v, seed=3, factor=1.0):
    v = v.clone().requires_grad_()
    torch.manual_seed(seed)
    k = estimator(v, LO, HI)
    k.retain_grad()
    (factor * task(k)).backward()
    return k.detach(), v.grad


def test_with_rate_1_and_strength_0_it_is_the_clipped_straight_through_estimator_to_the_last_bit():
    for dtype in (torch.float32, torch.float64):
        v = values().to(dtype)
        lo, hi = LO.to(dtype), HI.to(dtype)
        out = []
        for estimator in (PEGE(strength=0.0, rate=1.0), ClippedSTE()):
            leaf = v.clone().requires_grad_()
            k = estimator(leaf, lo, hi)
            task(k).backward()
            out.append((k.detach(), leaf.grad))
        assert torch.equal(out[0][0], out[1][0])
        assert torch.equal(out[0][1], out[1][1])


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.93])
def test_the_replaced_share_is_the_rate_within_binomial_bounds(rate):
    n = 200_000
    v = torch.rand(n, dtype=torch.float64) * 0.8 + 0.1  # no value is its own code
    torch.manual_seed(0)
    k = PEGE(rate=rate)(v, LO, HI)
    replaced = k == v.round()
    assert bool((replaced | (k == v)).all())
    assert abs(replaced.double().mean().item() - rate) < 5 * (rate * (1 - rate) / n) ** 0.5


def test_the_mask_is_white():
    """Neither neighbours, nor lags, nor the bits of consecutive seeds show in the mask."""
    n, like, rate = 1 << 18, torch.empty(1 << 18), torch.tensor([0.5])
    masks = [random_mask(like, rate, torch.tensor([s])).double() * 2 - 1 for s in (5, 6, 5 + 2**32, 2**61)]
    for i, a in enumerate(masks):
        for lag in (1, 2, 16, 256, 1024, 65536):
            assert abs((a * a.roll(lag)).mean().item()) < 5 / n**0.5
        for b in masks[:i]:
            assert abs((a * b).mean().item()) < 5 / n**0.5
        spectrum = torch.fft.rfft(a)[1:].abs().square() / n  # exponential with mean 1 for white noise
        assert spectrum.max().item() < 25
        assert abs(spectrum.mean().item() - 1) < 0.02


def test_every_forward_pass_draws_a_new_mask_and_a_seed_repeats_it():
    v, estimator = values(), PEGE(rate=0.5)
    torch.manual_seed(0)
    first, second = estimator(v, LO, HI), estimator(v, LO, HI)
    torch.manual_seed(0)
    again = estimator(v, LO, HI)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


@pytest.mark.parametrize("rate", [0.0, 0.31, 0.5, 1.0])
def test_ranked_replacement_takes_exactly_the_elements_nearest_to_their_codes(rate):
    v = torch.rand(1001, dtype=torch.float64) * 0.98 + 0.01
    k = PEGE(rate=rate, replacement="ranked")(v, LO, HI)
    order = (v - v.round()).abs().argsort()
    count = -int(-(torch.tensor([rate]) * 1001).item() // 1)
    expected = v.clone()
    expected[order[:count]] = v.round()[order[:count]]
    torch.testing.assert_close(k, expected, rtol=0, atol=1e-15)


def test_evaluation_replaces_everything_and_draws_nothing():
    estimator = PEGE(rate=0.2).eval()
    state = torch.get_rng_state()
    assert torch.equal(estimator(values(), LO, HI), values().clamp(LO, HI).round())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("variant", ["everywhere", "replaced"])
@pytest.mark.parametrize("form", ["constant", "scalar", "elementwise"])
@pytest.mark.parametrize("rate", [0.4, 1.0])
def test_the_gradient_is_that_of_loss_plus_half_u_squared_error(form, variant, rate):
    v, strength = values(), 0.375  # exact in float32, in which buffers are kept
    k, got = estimate(PEGE(form, strength, variant, rate=rate), v)

    leaf = v.clone().requires_grad_()
    c = leaf.clamp(LO, HI)
    mask = (k == c.detach().round()).double()
    mixed = c + mask * (c.round() - c).detach()
    x, x_q = (c - LO) / WIDTH, ((c.round() - LO) / WIDTH).detach()
    code_gradient = torch.autograd.grad(task(mixed), mixed, retain_graph=True)[0]
    g_x = code_gradient * WIDTH  # codes are WIDTH times as large as x in [0, 1]
    u = {"constant": strength, "scalar": strength * g_x.abs().mean(), "elementwise": strength * g_x.abs()}[form]
    chosen = torch.ones_like(mask) if variant == "everywhere" else mask
    (task(mixed) + (u / 2 * chosen * (x - x_q) ** 2).sum()).backward()

    torch.testing.assert_close(k, mixed.detach(), rtol=0, atol=0)
    torch.testing.assert_close(got, leaf.grad, rtol=1e-12, atol=1e-14)
    outside = (v < LO) | (v > HI)
    assert bool(outside.any())
    assert bool((got[outside] == 0).all())


@pytest.mark.parametrize("form", ["constant", "scalar", "elementwise"])
def test_under_a_scaled_loss_only_a_constant_pull_is_lost(form):
    """What GradScaler does: a factor on the loss, and a division of the gradients."""
    v = values()
    _, plain = estimate(PEGE(form, 0.375), v)
    _, none = estimate(PEGE(form, 0.0), v)
    _, scaled = estimate(PEGE(form, 0.375), v, factor=1024.0)
    kept = 1 / 1024 if form == "constant" else 1.0
    torch.testing.assert_close(scaled / 1024 - none, kept * (plain - none))


@pytest.mark.parametrize("grid", ["lsq", "lsq+", "pact", "dorefa", "sat", "minmax", "tqt", "seq"])
@pytest.mark.parametrize("role", ["weight", "input"])
def test_with_every_grid_full_replacement_without_pull_equals_the_clipped_estimator(grid, role):
    torch.manual_seed(0)
    x = torch.randn(6, 5) if role == "weight" else torch.rand(6, 5)
    made = []
    for name, options in (("pege", {"strength": 0.0}), ("clipped_ste", {})):
        spec = QuantizerSpec(bits=3, grid=grid, estimator=name, estimator_options=options)
        quantizer = Quantizer(spec, Shape(role, numel=x.numel() if role == "weight" else 0, linear=True))
        quantizer.calibrated.fill_(True)
        quantizer.refresh()
        leaf = x.clone().requires_grad_()
        with reference_only():
            y = quantizer(leaf)
        y.square().sum().backward()
        made.append([y.detach(), leaf.grad, *(p.grad for p in quantizer.grid.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_a_moving_rate_and_strength_do_not_recompile():
    counter = CompileCounterWithBackend("aot_eager")
    estimator = PEGE(rate=0.0)
    compiled = torch.compile(estimator, backend=counter, fullgraph=True)
    shares = []
    for rate in (0.0, 0.3, 0.7, 1.0):
        estimator.rate.fill_(rate)
        estimator.strength.fill_(rate)
        v = (torch.rand(20_000) * 0.8 + 0.1).requires_grad_()
        k = compiled(v, LO.float(), HI.float())
        k.sum().backward()
        shares.append((k == v.round()).float().mean().item())
        error = (v - v.round()).detach() / WIDTH.float()
        torch.testing.assert_close(v.grad, 1 + rate * error)
    assert counter.frame_count == 1
    assert shares == pytest.approx([0.0, 0.3, 0.7, 1.0], abs=0.02)


@pytest.mark.parametrize(
    "options",
    [{"form": "vector"}, {"variant": "some"}, {"replacement": "best"}, {"strength": -1}, {"rate": 1.5}, {"rte": 1}],
)
def test_bad_options_are_refused_in_one_line(options):
    with pytest.raises(BitwrightError, match="pege") as caught:
        make_estimator("pege", options)
    assert "\n" not in str(caught.value)
