import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from bitwright import (
    CAGE,
    CSQ,
    HGQ,
    SAQ,
    BitwrightError,
    Constrained,
    QuantizerSpec,
    Rule,
    calibrate,
    export,
    prepare,
    quantizers,
    snap_biases,
    topology,
    verify,
)
from bitwright.costs import LayerCost, cost_table
from bitwright.kernels import reference_only
from methods.nets import data, float_net, make_step, quantized, resumed, run, same_state

FAST = {"lr": 0.05, "mask_lr": 3.0}  # twenty steps are a whole training here


def built(bits=8, share=0.55, total=20, grid="lsq", **options):
    model = quantized(float_net(), bits=bits, grid=grid)
    costs = cost_table(model, data()[0][:1])
    limit = {} if "mean_bits" in options else {"budget": {"bitops": share * costs.bitops}}
    return model, CSQ(model, total, costs, **{**limit, **FAST, **options}), costs


def whole(layer):
    """Whether the weight of a layer is whole numbers of its quantizer's scale."""
    steps = layer.weight / layer.weight_quantizer.affine(layer.weight).scale.view(-1, 1, 1, 1)
    return bool((steps - steps.round()).abs().max() < 1e-5)


def norms(model):
    """Gains of the norms."""
    return [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_temperature_choice_and_hardening_have_their_moments():
    model, method, _ = built(total=20, choose_at=0.5, freeze_at=0.9)
    step, seen = make_step(model, [method]), []
    for i in range(20):
        run(step, i, i + 1)
        seen.append((method.temperature.item(), method.chosen, method.done, "csq" in step.result.losses))
    assert [t for t, *_ in seen] == pytest.approx([200 ** min((i + 1) / 18, 1.0) for i in range(20)], rel=1e-5)
    assert [chosen for _, chosen, _, _ in seen] == [i + 1 >= 10 for i in range(20)]
    assert [done for _, _, done, _ in seen] == [i + 1 >= 18 for i in range(20)]
    assert [pulled for *_, pulled in seen] == [i < 10 for i in range(20)]


def test_one_step_is_adam_on_the_bits_and_the_plain_gradient_on_the_planes():
    """The masks' gradient is that of the task and of lam (r - target) sigma'(0), both taken apart here."""
    model, method, _ = built(lam=0.5)
    twin, other, _ = built(lam=0.0)
    before = [[t.detach().clone() for t in p.leaves()] for p in method.planes]
    factors = list(method.factors)
    for net, each in ((model, method), (twin, other)):
        run(make_step(net, [each]), 0, 1)
    for planes, start, plain, factor in zip(method.planes, before, other.planes, factors, strict=True):
        for leaf, first in zip((planes.up, planes.down), start, strict=False):
            moved = (leaf.detach() - first).abs()
            assert moved.max() == pytest.approx(0.05, rel=1e-3), "Adam's first step is its rate"
        pulled = plain.mask - planes.mask
        torch.testing.assert_close(
            pulled.detach(), torch.full_like(pulled, 3.0 * 0.5 * factor * 0.25), rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("limit", [{"share": 0.55}, {"mean_bits": 3.5}], ids=["bitops", "mean"])
def test_the_budget_is_met_from_below_and_the_file_is_what_was_trained(limit, tmp_path):
    model, method, costs = built(**limit)
    step = make_step(model, [method])
    run(step, 0, 10)
    widths = method.widths()
    bits = [w["weight"] for w in widths.values()]
    now = cost_table(model, data()[0][:1])
    if "share" in limit:
        assert now.bitops <= 0.55 * costs.bitops
    else:
        assert sum(bits) / len(bits) <= 3.5
    assert min(bits) >= 2
    run(step, 10, 18)
    assert method.done
    inner = [m for n, m in model.named_modules() if n in widths]
    assert all(whole(layer) for layer in inner)
    codes = [m.weight_quantizer.integer_codes(m.weight) for m in inner]
    gains = [n.detach().clone() for n in norms(model)]
    run(step, 18, 20)
    assert method.widths() == widths
    assert all(torch.equal(m.weight_quantizer.integer_codes(m.weight), k) for m, k in zip(inner, codes, strict=True))
    # Norms train on; the scale of a channel that a norm divides by its own spread has no gradient but rounding.
    assert any(bool((n != before).any()) for n, before in zip(norms(model), gains, strict=True))
    told = method.summary()
    assert told["frozen"]
    assert told["cost"] == {"bitops": now.bitops, "size": now.size_bytes}
    assert told["planes"].keys() == widths.keys()
    inputs = [int(q.bits) for n, q in quantizers(model).items() if n.endswith("input_quantizer")]
    assert set(inputs) == {8}
    metrics = {}
    method.after_epoch(metrics)
    assert metrics.keys() == {"csq/weight_bits", "csq/bitops", "csq/size", "csq/temperature"}
    x = data(count=16)[0]
    snap_biases(model.eval(), x)
    export(model, tmp_path / "net.onnx", x[:1])
    assert verify(model, tmp_path / "net.onnx", [x]).ok


def test_size_and_bitops_are_both_met():
    _, _, costs = built()
    budget = {"bitops": 0.6 * costs.bitops, "size": 0.5 * costs.size_bytes}
    model, method, _ = built(budget=budget)
    run(make_step(model, [method]), 0, 10)
    now = cost_table(model, data()[0][:1])
    assert now.bitops <= budget["bitops"]
    assert now.size_bytes <= budget["size"]


@pytest.mark.parametrize(
    ("stop", "options"),
    [(7, {}), (13, {}), (19, {}), (7, {"amp_dtype": torch.bfloat16}), (7, {"accumulate": 2}), (7, {"clip_norm": 1.0})],
    ids=["soft", "chosen", "hard", "bf16", "micro", "clip"],
)
def test_a_resumed_run_ends_bit_identical(stop, options):
    def fresh():
        model, method, _ = built(total=20 // options.get("accumulate", 1))
        return model, make_step(model, [method], **options)

    whole_run, step = fresh()
    run(step, 0, 20)
    assert torch.isfinite(step.result.loss)
    assert {int(q.bits) for q in quantizers(whole_run).values()} != {8}
    assert same_state(whole_run, resumed(fresh, stop, 20))


@pytest.mark.parametrize("stop", [5, 15, 19])
def test_a_model_that_was_loaded_before_is_its_own_again(stop):
    model, method, _ = built()
    step = make_step(model, [method])
    run(step, 0, stop)
    saved = copy.deepcopy((model.state_dict(), method.state_dict()))
    other = quantized(float_net(), bits=8)
    other.load_state_dict(saved[0])
    again = CSQ(other, 20, cost_table(other, data()[0][:1]), method.summary()["budget"], **FAST)
    again.load_state_dict(saved[1])
    assert same_state(model, other)
    assert [p.kept for p in again.planes] == [p.kept for p in method.planes]
    x, y = data()
    for net in (model, other):
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
    ours, theirs = ([p.grad for p in net.parameters()] for net in (model, other))
    assert any(a is not None and bool(a.any()) for a in ours)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_a_compiled_model_trains_as_the_eager_one():
    def double(seed):
        x, y = data(seed)
        return x.double(), y

    states, widths = [], []
    counter = CompileCounterWithBackend("aot_eager")
    for compiled in (None, counter):
        torch._dynamo.reset()
        model, method, _ = built(total=12, choose_at=0.4, freeze_at=0.75)
        model.double()
        step = make_step(model, [method], compiled=compiled)
        with reference_only():
            for i in range(12):
                step(*double(i))
        states.append(model.state_dict())
        widths.append(method.summary()["path"])
        assert method.done
    assert widths[0] == widths[1]
    assert len(widths[0]) > 8, "widths did change"
    assert counter.frame_count == 3, "one graph for soft planes, one for chosen ones, one for hard bits"
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-5, atol=1e-7, msg=name)


def test_flat_valleys_of_hardening_bits():
    """SAQ perturbs what the bits make, whichever of the two came first."""
    rises = []
    for first in ("csq", "saq"):
        model = quantized(float_net(), bits=8)
        costs = cost_table(model, data()[0][:1])
        makers = {
            "csq": lambda model=model, costs=costs: CSQ(model, 20, costs, mean_bits=4, **FAST),
            "saq": lambda model=model: SAQ(model, 0.5),
        }
        methods = {name: makers[name]() for name in (first, *(makers.keys() - {first}))}
        step = make_step(model, [methods["csq"], methods["saq"]])
        run(step, 0, 20)
        assert methods["csq"].done
        rises.append(float(methods["saq"].sharpness))
        inner = [m for n, m in model.named_modules() if n in methods["csq"].widths()]
        assert all(whole(layer) for layer in inner)
    assert rises[0] == pytest.approx(rises[1], rel=1e-4)


def test_a_sum_that_shares_its_quantizer_with_readers_is_no_obstacle():
    """Only weights are learned, so that inputs may have whatever quantizer they have."""
    net = float_net().requires_grad_(True)
    spec = QuantizerSpec(bits=8)
    rules = [Rule(match="*", weight=spec, input=spec)]
    prepare(net, rules + topology(net, data()[0], "shared", rules=rules))
    calibrate(net, [data(count=32)])
    costs = cost_table(net, data()[0][:1])
    method = CSQ(net.train(), 10, costs, {"size": 0.5 * costs.size_bytes}, **FAST)
    run(make_step(net, [method]), 0, 10)
    assert cost_table(net, data()[0][:1]).size_bytes <= 0.5 * costs.size_bytes


def test_states_of_other_layers_are_refused():
    model, method, _ = built()
    run(make_step(model, [method]), 0, 12)
    saved = method.state_dict()
    with pytest.raises(BitwrightError, match="csq: the checkpoint holds 6 weights, this run learns 3"):
        built(share=0.9, fixed=("first", "last", "*conv1"))[1].load_state_dict(saved)


@pytest.mark.parametrize("name", ["cage", "constrained", "hgq"])
def test_methods_that_cannot_share_the_weights_or_the_bits(name):
    model, method, costs = built()
    other = {
        "cage": lambda: CAGE(model, 20),
        "constrained": lambda: Constrained(model, F.cross_entropy),
        "hgq": lambda: HGQ(model, 20, costs, {"bitops": costs.bitops}),
    }[name]()
    words = {"hgq": "methods: csq and hgq both set bit-widths; use one of them"}.get(
        name, f"methods: csq computes the weights, so that there are none for {name} to move; use one of them"
    )
    with pytest.raises(BitwrightError, match=words):
        make_step(model, [method, other])


def test_a_weight_of_two_layers_is_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    prepare(net, [Rule(match="*", weight=QuantizerSpec(bits=4))])
    calibrate(net, [torch.randn(4, 4)])
    with pytest.raises(BitwrightError, match="csq: 0 and 1 share a weight, which has one set of bits; fix them"):
        CSQ(net, 10, [LayerCost("0", 16, 16), LayerCost("1", 16, 16)], mean_bits=3, fixed=())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": {"bitops": 1}}, "csq: budget.bitops=1 cannot be met: with 2-bit weights in all layers it is"),
        ({"budget": {"latency": "5ms"}}, "csq: budget.latency is not accepted: one bit less seldom changes a kernel"),
        ({"budget": None}, "csq: mean_bits=None is not accepted; use either a budget or mean_bits"),
        ({"mean_bits": 3, "budget": {"size": 1000}}, "csq: mean_bits=3 is not accepted; use either a budget or"),
        ({"mean_bits": 1.5}, "csq: mean_bits=1.5 is not accepted; use 2 to 8"),
        ({"lam": -1.0}, "csq: lam=-1.0"),
        ({"temperature": 1.0}, "csq: temperature=1.0"),
        ({"lr": 0.0}, "csq: lr=0.0"),
        ({"mask_lr": 0.0}, "csq: mask_lr=0.0"),
        ({"start": 0.0}, "csq: start=0.0"),
        ({"freeze_at": 0.0}, "csq: freeze_at=0.0"),
        ({"choose_at": 0.95}, "csq: choose_at=0.95 is not accepted; use 0 < fraction <= freeze_at"),
        ({"fixed": ["*"]}, "csq: no quantized layer is left"),
        ({"grid": "dorefa"}, "csq: the grid 'dorefa' of .* is not the evenly spaced one"),
        ({"grid": "seq"}, "csq: the grid 'seq' of"),
        ({"bits": 1}, "csq: .* starts at 1 bit, which is its sign; use 2 to 8"),
    ],
)
def test_values_that_are_not_accepted(options, words):
    with pytest.raises(BitwrightError, match=words):
        built(**options)
