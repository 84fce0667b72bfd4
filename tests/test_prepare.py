"""`prepare`: in place, complete, or not at all; what can be asked of a prepared model."""

import copy

import pytest
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.layers import why_not, without_form
from bitwright.prepare import warn_once
from bitwright.rules import Rule

SPEC = bw.QuantizerSpec(bits=4)


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 2))


def test_a_float_checkpoint_loads_with_only_quantizer_keys_missing():
    model = net()
    state = copy.deepcopy(model.state_dict())
    missing, unexpected = bw.prepare(model, bw.rules("w4a4")).load_state_dict(state, strict=False)
    assert unexpected == []
    assert {key.rsplit("_quantizer", 1)[0].rpartition(".")[2] for key in missing} == {"weight", "input"}
    assert all("_quantizer." in key for key in missing)


def test_a_quantized_checkpoint_loads_strictly_and_needs_no_calibration():
    x = torch.randn(2, 3, 4, 4)
    model = bw.calibrate(bw.prepare(net(), bw.rules("w3a2")), [x])
    other = bw.prepare(net(), bw.rules("w8a8"))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert [r.bits for r in bw.describe(other)] == [r.bits for r in bw.describe(model)]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([*bw.rules("w4a4"), Rule(match="4", weight=bw.QuantizerSpec(bits=4, estimator="x"))], "4: estimator: 'x'"),
        ([*bw.rules("w4a4"), Rule(match="9", weight=None)], "names no layer"),
        (
            [*bw.rules("w4a4"), Rule(match="4", weight=bw.QuantizerSpec(bits=4, grid_options={"y": 1}))],
            "4: grid_options",
        ),
        ([], "nothing to quantize"),
        ([Rule(match="*", weight=None)], "nothing to quantize"),
        ("w4a4", r"a list of rules is expected, not 'w4a4'; bitwright.rules\('w4a4'\) makes one"),
    ],
)
def test_a_refusal_leaves_the_model_as_it_was(rules, message):
    model = net()
    before = {n: type(m) for n, m in model.named_modules()}
    keys = list(model.state_dict())
    with pytest.raises(bw.BitwrightError, match=message) as caught:
        bw.prepare(model, rules)
    assert "\n" not in str(caught.value)
    assert {n: type(m) for n, m in model.named_modules()} == before
    assert list(model.state_dict()) == keys
    bw.prepare(model, bw.rules("w4a4"))


def test_preparing_twice_is_refused():
    model = bw.prepare(net(), bw.rules("w4a4"))
    with pytest.raises(bw.BitwrightError, match="prepared already"):
        bw.prepare(model, bw.rules("w4a4"))


def test_the_image_scale_is_fixed_unless_asked_for():
    model = bw.prepare(net(), bw.rules("w4a4"))
    learned = {r.name: r.learned for r in bw.describe(model)}
    assert not learned["0.input_quantizer"]
    assert all(v for n, v in learned.items() if n != "0.input_quantizer")
    asked = [*bw.rules("w4a4"), Rule(match="first", input=bw.QuantizerSpec(bits=8, learn=True))]
    assert all(r.learned for r in bw.describe(bw.prepare(net(), asked)))


def test_a_single_layer_can_be_the_model():
    layer, x = nn.Linear(4, 2), torch.randn(3, 4)
    assert bw.calibrate(bw.prepare(layer, [Rule(match="*", weight=SPEC, input=SPEC)]), [x]) is layer
    assert set(bw.quantizers(layer)) == {"weight_quantizer", "input_quantizer"}
    assert bw.coverage(layer, x).complete


def test_split_parameters_parts_weights_from_grids():
    model = bw.prepare(net(), bw.rules("w4a4"))
    weights, grids = bw.split_parameters(model)
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)] for p in grids} == {
        f"{n}.grid.scale" for n in bw.quantizers(model) if n != "0.input_quantizer"
    }
    assert {names[id(p)] for p in weights} == {f"{i}.{w}" for i in (0, 3, 4) for w in ("weight", "bias")}


def test_describe_has_a_row_per_quantizer():
    model = bw.prepare(net(), bw.rules("w3a4", grid="pact", estimator="ewgs"))
    row = {r.name: r for r in bw.describe(model)}["3.weight_quantizer"]
    assert (row.layer, row.grid, row.estimator, row.bits, row.signed, row.scales, row.calibrated) == (
        "Linear",
        "pact",
        "ewgs",
        3,
        True,
        8,
        False,
    )


def test_quantizers_take_the_mode_of_their_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2)).eval()
    model[1].train()
    bw.prepare(model, bw.rules("w4a4", grid="minmax"))
    modes = {name: q.training for name, q in bw.quantizers(model).items()}
    assert modes == {n: n.startswith("1.") for n in modes}


class Doubled(nn.Conv2d):
    """A class of the user's that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_layers_without_a_quantized_form_are_named_once_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def net() -> nn.Module:
        parts = [nn.Conv2d(3, 4, 3), Doubled(4, 4, 3), nn.Bilinear(4, 4, 3), nn.Bilinear(4, 2, 2)]
        return nn.Sequential(*parts, nn.Flatten(), nn.Linear(8, 2))

    warn_once.cache_clear()
    for _ in range(2):
        bw.prepare(net(), bw.rules("w4a4"))
    assert [r.message for r in caplog.records] == [
        "bitwright: 1 Doubled, 2 Bilinear stay float (1, 2, 3): it cannot be quantized: its class is a Conv2d "
        "with a forward of its own; bitwright.coverage lists all"
    ]
    caplog.clear()
    bw.prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), bw.rules("w4a4"))
    assert not caplog.records


class OwnAttention(nn.Module):
    """Calls torch's function for its products, which nothing quantizes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def products(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        return self.products(*self.qkv(x).chunk(3, -1))


def test_attention_products_that_stay_float_are_said(caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    model = bw.prepare(nn.Sequential(OwnAttention(), nn.MultiheadAttention(8, 2), OwnAttention()), bw.rules("w4a4"))
    assert [r.message for r in caplog.records] == [
        "bitwright: attention products of 2 OwnAttention stay float (0, 2): those of nn.MultiheadAttention and of "
        "torchvision's, timm's and transformers' models have a quantized form"
    ]
    assert type(model[0].qkv).__name__ == "QuantLinear"  # pyright: ignore
    assert why_not(OwnAttention()) == "its products have no quantized form"


def test_why_a_layer_stays_float() -> None:
    class Other(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    model = nn.Sequential(Other(3, 3), normed, nn.LSTM(3, 3))
    reasons = without_form(model)
    assert list(reasons) == ["0", "1", "2"]
    assert reasons["0"].endswith("its class is a Linear with a forward of its own")
    assert reasons["1"].endswith("weight is parametrized; torch.nn.utils.parametrize.remove_parametrizations")
    assert reasons["2"] == "layers of this class have no quantized form"


def test_lazy_layers_are_asked_for_their_shapes():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    with pytest.raises(bw.BitwrightError, match=r"^0\.weight has no shape yet: call the model on an example first"):
        bw.prepare(model, bw.rules("w4a4"))
    model(torch.randn(1, 3, 8, 8))
    assert list(bw.quant_layers(bw.prepare(model, bw.rules("w4a4")))) == ["0", "2"]


def test_a_model_without_layers_says_so():
    with pytest.raises(bw.BitwrightError, match="this Sequential has no layer that can be quantized"):
        bw.prepare(nn.Sequential(nn.ReLU()), bw.rules("w4a4"))


def test_a_model_prepared_in_inference_mode_is_calibrated_and_trained_as_any():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    expected, made = copy.deepcopy(net), copy.deepcopy(net)
    example = torch.randn(2, 3, 8, 8)
    bw.prepare(expected, bw.rules("w4a4") + bw.topology(expected, example))
    with torch.inference_mode():
        bw.prepare(made, bw.rules("w4a4") + bw.topology(made, example.clone()))
    gradients = []
    for model in (expected, made):
        bw.calibrate(model, [example])
        model(example).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
