import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitwright import HGQ, AdaQAT, BitwrightError, QuantizerSpec, Rule, Step, calibrate, prepare, quantizers
from bitwright.costs import LayerCost, cost_table
from bitwright.kernels import reference_only
from methods.nets import data, float_net, make_step, quantized, resumed, run, same_state


def toy(bits=6, width=4):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, width))
    spec = QuantizerSpec(bits=bits)
    prepare(net, [Rule(match="*", weight=spec, input=spec)])
    return calibrate(net, [torch.randn(16, width)]).train()


def built(bits=8, grid="lsq", share=0.3, total=20, **options):
    model = quantized(float_net(), bits=bits, grid=grid)
    costs = cost_table(model, data()[0][:1])
    options = {"budget": {"bitops": share * costs.bitops}, "warmup_steps": 1, **options}
    return model, HGQ(model, total, costs, **options), costs


def test_one_update_is_adam_on_the_losses_slope_and_the_costs_share():
    """Adam's first step is its rate against the sign of the gradient; the gradient is compared in full."""
    net = toy()
    costs = [LayerCost("0", 16, 16)]
    method = HGQ(net, 100, costs, beta=0.5, eta=0.3, warmup_steps=0, fixed=())
    seen = []
    inner = method.optimizer.step
    method.optimizer.step = lambda: (seen.append([s.real.grad.item() for s in method.slots]), inner())
    step = Step(net, lambda o, y: (o * y).sum(), torch.optim.SGD(net.parameters(), 0.0), [method])
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    before = copy.deepcopy(net)
    step(x, y)
    layer = before[0]
    w_q, x_q = layer.weight_quantizer(layer.weight), layer.input_quantizer(x)
    inside = lambda e, q: e * (e.abs() <= 0.5 * q.grid.effective_scale().view(-1, *[1] * (e.ndim - 1)))  # noqa: E731
    loss_w = -(0.6931471805599453 * inside(w_q - layer.weight, layer.weight_quantizer) * (y.T @ x_q)).sum()
    loss_a = -(0.6931471805599453 * inside(x_q - x, layer.input_quantizer) * (y @ w_q)).sum()
    # d (0.5 * 16 w a / (16 * 36)) / d w = 0.5 * a / 36, over the root of 16 weights, or of 4 features.
    expected = [loss_w.item() + 0.5 * 6 / 36 / 4, loss_a.item() + 0.5 * 6 / 36 / 2]
    assert seen[0] == pytest.approx(expected, rel=1e-4)
    moved = [s.real.item() for s in method.slots]
    assert moved == pytest.approx([6 - 0.3 * (1 if g > 0 else -1) for g in expected], abs=1e-4)
    assert all(s.bits == round(s.real.item()) for s in method.slots)


def test_a_cost_alone_leads_to_the_floor_and_a_loss_alone_to_many_bits():
    for beta, expected in ((1e3, {3}), (1e-9, {7, 8})):
        net = toy(bits=6)
        method = HGQ(net, 60, [LayerCost("0", 16, 16)], beta=beta, eta=0.2, floor=3, fixed=(), freeze_at=1.0)
        x = torch.randn(64, 4)
        target = x @ net[0].weight.detach().T
        step = Step(net, F.mse_loss, torch.optim.SGD(net.parameters(), 0.0), [method])
        for _ in range(60):
            step(x, target)
        assert {int(q.bits) for q in quantizers(net).values()} <= expected
        assert method.done


@pytest.mark.parametrize("grid", ["lsq", "tqt"])
@pytest.mark.parametrize("rule", ["pid", "dual"])
def test_the_budget_is_met_from_below_and_bits_then_stay(grid, rule):
    model, method, costs = built(grid=grid, rule=rule)
    step = make_step(model, [method])
    run(step, 0, 14)
    assert method.done
    widths = method.widths()
    now = cost_table(model, data()[0][:1])
    assert 0.9 * 0.3 * costs.bitops < now.bitops <= 0.3 * costs.bitops
    told = method.summary()
    assert told["cost"]["bitops"] == pytest.approx(now.bitops)
    assert told["cost"]["size"] == pytest.approx(now.size_bytes)
    assert told["frozen"]
    ends = [q for n, q in quantizers(model).items() if n.rpartition(".")[0] not in widths]
    assert {int(q.bits) for q in ends} == {8}
    assert not any(q._forward_hooks for q in quantizers(model).values())
    run(step, 14, 20)
    assert method.widths() == widths
    metrics = {}
    method.after_epoch(metrics)
    assert {"hgq/weight_bits", "hgq/input_bits", "hgq/bitops", "hgq/size", "hgq/lambda_bitops"} == metrics.keys()


def test_bits_go_where_the_loss_is_sensitive():
    """Two parallel layers of the same cost, one of which hardly matters."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.heavy, self.light = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.heavy(x) + 0.01 * self.light(x)

    torch.manual_seed(0)
    net = Two()
    goal = copy.deepcopy(net)
    prepare(net, [Rule(match="*", weight=QuantizerSpec(bits=4), input=QuantizerSpec(bits=4))])
    x = torch.randn(64, 16)
    calibrate(net, [x]).train()
    costs = [LayerCost("heavy", 256, 256), LayerCost("light", 256, 256)]
    method = HGQ(net, 100, costs, budget={"bitops": 256 * 24}, fixed=(), warmup_steps=0)
    step = Step(net, F.mse_loss, torch.optim.SGD(net.parameters(), 0.0), [method])
    for _ in range(100):
        step(x, goal(x).detach())
    widths = method.widths()
    assert all(widths["heavy"][role] > widths["light"][role] for role in ("weight", "input"))


def test_attention_shares_a_width_among_its_inputs():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.fc = nn.Linear(8, 8), nn.Linear(8, 4)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            h = self.stem(x)
            return self.fc(self.attention(h, h, h, need_weights=False)[0].mean(1))

    torch.manual_seed(0)
    net = Attending()
    six = QuantizerSpec(bits=6)
    prepare(net, [Rule(match="*", weight=six, input=six), Rule(match="attention", attention=six)])
    x, y = torch.randn(16, 5, 8), torch.randint(4, (16,))
    calibrate(net, [x]).train()
    costs = cost_table(net, x)
    method = HGQ(net, 20, costs, budget={"bitops": 0.5 * costs.bitops}, warmup_steps=0, fixed=())
    step = Step(net, F.cross_entropy, torch.optim.SGD(net.parameters(), 0.1), [method])
    for _ in range(15):
        step(x, y)
    sizes = {slot.role: slot.values for slot in method.slots if slot.layer == "attention"}
    # What it reads, queries, keys and values of 5 x 8 each, and 2 heads' attention of 5 x 5.
    assert sizes == {"weight": 3 * 64, "input": 4 * 40 + 2 * 25}
    assert method.done
    assert cost_table(net, x).bitops <= 0.5 * costs.bitops


def test_inputs_alone_cost_no_bytes():
    spec = QuantizerSpec(bits=4)
    model = prepare(float_net().requires_grad_(True), [Rule(match="*", input=spec)])
    calibrate(model, [data(count=32)])
    costs = cost_table(model, data()[0][:1])
    method = HGQ(model.train(), 8, costs, budget={"size": costs.size_bytes}, warmup_steps=0)
    run(make_step(model, [method]), 0, 8)
    assert method.done
    assert cost_table(model, data()[0][:1]).size_bytes == costs.size_bytes


def test_beta_goes_between_its_ends_in_the_logarithm():
    _, method, _ = built(budget=None, beta=[0.01, 1.0])
    assert [method.beta_at(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.01, 0.1, 1.0])


@pytest.mark.parametrize("options", [{}, {"amp_dtype": torch.bfloat16}, {"accumulate": 2}], ids=["", "bf16", "micro"])
@pytest.mark.parametrize("stop", [1, 7, 17])
def test_a_resumed_run_ends_bit_identical(stop, options):
    def fresh():
        model, method, _ = built(total=20 // options.get("accumulate", 1))
        return model, make_step(model, [method], **options)

    whole, step = fresh()
    run(step, 0, 20)
    assert len({int(q.bits) for q in quantizers(whole).values()}) > 1
    assert same_state(whole, resumed(fresh, stop, 20))


def test_a_compiled_model_trains_as_the_eager_one():
    def double(seed):
        x, y = data(seed)
        return x.double(), y

    states, reals = [], []
    for compiled in (None, "aot_eager"):
        torch._dynamo.reset()
        model, method, _ = built(eta=0.3)
        step = make_step(model.double(), [method], compiled=compiled)
        with reference_only():
            for i in range(10):
                step(*double(i))
        states.append(model.state_dict())
        reals.append([s.real.item() for s in method.slots])
    assert len(set(reals[0])) > 2
    assert reals[0] == pytest.approx(reals[1], abs=1e-4)
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_states_of_other_layers_or_before_the_models_are_refused():
    model, method, _ = built()
    step = make_step(model, [method])
    run(step, 0, 10)
    saved = method.state_dict()
    with pytest.raises(BitwrightError, match="load the model's state before the method's"):
        built()[1].load_state_dict(saved)
    with pytest.raises(BitwrightError, match="the checkpoint holds 12 widths, this run learns 6"):
        built(share=0.9, fixed=("first", "last", "*conv1"))[1].load_state_dict(saved)


def test_a_gradient_that_is_not_finite_moves_nothing():
    _, method, _ = built()
    before = [s.real.item() for s in method.slots]
    method.slots[0].real.grad = torch.tensor([float("nan")])
    method.steps = 5
    method.after_step(None)
    assert [s.real.item() for s in method.slots] == before
    assert not method.means.any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": {"bitops": 1}}, "hgq: budget.bitops=1 cannot be met: with all learned layers at 2 bits it is"),
        ({"budget": {"time": 1}}, "hgq: budget.time is not accepted"),
        ({"budget": {"latency": "5ms"}}, "hgq: budget.latency is not accepted: one bit less seldom changes a kernel"),
        ({"budget": None}, "hgq: beta=None is not accepted; use either a budget or beta"),
        ({"beta": 1.0}, "hgq: beta=1.0 is not accepted; use either a budget or beta"),
        ({"budget": None, "beta": 0.0}, "hgq: beta=0.0"),
        ({"floor": 0}, "hgq: floor=0"),
        ({"eta": -1.0}, "hgq: eta=-1.0"),
        ({"freeze_at": 0.0}, "hgq: freeze_at=0.0"),
        ({"warmup_steps": 15}, "hgq: warmup_steps=15 is not accepted; use less than the freeze at step 14"),
        ({"rule": "fixed"}, "hgq: rule='fixed' is not accepted; use pid or dual"),
        ({"fixed": ["*"]}, "hgq: no quantized layer is left"),
        ({"grid": "dorefa"}, "hgq: the grid 'dorefa' of"),
    ],
)
def test_values_that_are_not_accepted(options, words):
    with pytest.raises(BitwrightError, match=words):
        built(**options)


def test_two_methods_that_set_bits_are_refused():
    model, method, costs = built()
    with pytest.raises(BitwrightError, match="methods: hgq and adaqat both set bit-widths; use one of them"):
        make_step(model, [method, AdaQAT(model, 20, costs)])
