"""Quantized attention: the float layer when bypassed, quantized operands everywhere otherwise."""

import copy

import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.calibrate import rows_per_scale
from bitwright.errors import BitwrightError
from bitwright.grids import Stats
from bitwright.layers import QuantLinear, QuantMultiheadAttention
from bitwright.layers.attention import PRODUCT_SLOTS
from bitwright.prepare import set_bypass
from bitwright.rules import Rule
from bitwright.training.vision import import_timm, import_torchvision

W4A4 = bw.rules("w4a4", ends=None)
E, H = 12, 3


def pair(batch_first, dropout=0.0, bias=True):
    """A float layer in float64 and its quantized, bypassed copy."""
    reference = nn.MultiheadAttention(E, H, dropout, bias, batch_first=batch_first).double()
    nn.init.normal_(reference.out_proj.bias) if bias else None
    nn.init.normal_(reference.in_proj_bias) if bias else None
    quantized = bw.prepare(nn.Sequential(copy.deepcopy(reference)), W4A4)
    set_bypass(bw.quantizers(quantized).values(), True)
    return reference, quantized[0]


def masks(kind, batch, tq, tk):
    """Keyword arguments of forward."""
    causal = torch.ones(tq, tk, dtype=torch.bool).triu(1)
    padding = torch.zeros(batch, tk, dtype=torch.bool)
    padding[:, -2:] = True
    added = torch.randn(tq, tk, dtype=torch.float64)
    return {
        "none": {},
        "bool": {"attn_mask": causal},
        "float": {"attn_mask": added},
        "per head": {"attn_mask": torch.randn(batch * H, tq, tk, dtype=torch.float64)},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.randn(batch, tk, dtype=torch.float64)},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
        "causal": {"attn_mask": causal, "is_causal": True},
    }[kind]


KINDS = ["none", "bool", "float", "per head", "padding", "float padding", "both", "causal"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("weights", ["none", "average", "each head"])
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask")
def test_bypassed_it_is_torchs_layer(kind, batch_first, cross, weights):
    reference, quantized = pair(batch_first)
    tq, tk = 5, 7 if cross else 5
    q = torch.randn(2, tq, E, dtype=torch.float64)
    k, v = (torch.randn(2, tk, E, dtype=torch.float64) for _ in range(2)) if cross else (q, q)
    if not batch_first:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v)) if cross else [q.transpose(0, 1)] * 3
    options = masks(kind, 2, tq, tk) | {"need_weights": weights != "none", "average_attn_weights": weights == "average"}
    expected, got = reference(q, k, v, **options), quantized(q, k, v, **options)
    torch.testing.assert_close(got[0], expected[0])
    if weights == "none":
        assert got[1] is None
    else:
        torch.testing.assert_close(got[1], expected[1])


@pytest.mark.parametrize("kind", ["none", "bool", "per head", "padding"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_without_a_batch_axis(kind, batch_first):
    reference, quantized = pair(batch_first, bias=False)
    x = torch.randn(5, E, dtype=torch.float64)
    options = masks(kind, 1, 5, 5)
    if kind == "padding":
        options["key_padding_mask"] = options["key_padding_mask"][0]
    for expected, got in zip(reference(x, x, x, **options), quantized(x, x, x, **options), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_causal_hint_without_a_mask_is_refused_as_in_torch():
    reference, quantized = pair(True)
    x = torch.randn(2, 5, E, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="attn_mask"):
        reference(x, x, x, is_causal=True)
    with pytest.raises(BitwrightError, match="needs attn_mask"):
        quantized(x, x, x, is_causal=True)


@pytest.mark.parametrize("options", [{"kdim": 8}, {"vdim": 8}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_features_it_lacks_are_refused_and_nothing_of_the_layer_is_half_done(options):
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(E, H, **options))
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(
        BitwrightError, match=r"'1' is a MultiheadAttention; it cannot be quantized: .* (differs|is set)"
    ):
        bw.prepare(model, [*W4A4, Rule(match="1", weight=None)])
    assert {n: type(m) for n, m in model.named_modules()} == before
    bw.prepare(model, W4A4)
    assert set(bw.quant_layers(model)) == {"0"}, "its projection would never be called"


def test_all_operands_are_quantized():
    layer = nn.Sequential(nn.MultiheadAttention(E, H, batch_first=True))[0]
    holder = bw.prepare(nn.ModuleDict({"a": layer}), W4A4)
    seen = {}
    for name, q in bw.quantizers(holder).items():
        q.register_forward_hook(lambda q, i, o, n=name: seen.__setitem__(n.removeprefix("a."), o))
    x = torch.randn(2, 5, E)
    set_bypass(bw.quantizers(holder).values(), True)
    layer(x, x, x)
    for name, q in bw.quantizers(holder).items():
        q.initialize(Stats.of(rows_per_scale(seen[name.removeprefix("a.")], q.shape)))
        q.bypass = False
    layer.eval()(x, x, x)
    expected = {
        "weight_quantizer",
        "input_quantizer",
        *PRODUCT_SLOTS,
        "out_proj.weight_quantizer",
        "out_proj.input_quantizer",
    }
    assert set(seen) == expected
    for name, value in seen.items():
        rows = value.flatten(1) if name.endswith("weight_quantizer") else value.reshape(1, -1)
        assert max(r.unique().numel() for r in rows) <= 16, name
    assert not layer.attention_quantizer.signed.item(), "probabilities are unsigned"
    assert layer.weight_quantizer.shape.channels == 3 * E


class Probe(nn.Module):
    """Self-attention with one input, so that it can be calibrated and covered."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x, x, x)[0]


def test_a_float_attention_around_a_quantized_projection_calls_it():
    model = Probe(nn.MultiheadAttention(E, H, batch_first=True))
    reference = copy.deepcopy(model)
    x = torch.randn(2, 5, E)
    bw.calibrate(bw.prepare(model, [Rule(match="*.out_proj", weight=bw.QuantizerSpec(bits=8))]), [x])
    assert type(model.inner) is QuantMultiheadAttention
    assert set(bw.quantizers(model)) == {"inner.out_proj.weight_quantizer"}
    assert bw.coverage(model, x).complete
    torch.testing.assert_close(model(x), reference(x), atol=0.05, rtol=0.05)
    assert not torch.equal(model(x), reference(x))


def encoder(layers=2):
    layer = nn.TransformerEncoderLayer(E, 2, 16, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()


def test_the_fast_path_of_torch_skips_swapped_layers_unless_disabled():
    x = torch.randn(2, 5, E)
    model = encoder()
    reference = copy.deepcopy(model)
    bw.calibrate(bw.prepare(model, W4A4), [x])
    assert bw.coverage(model, x).complete
    with torch.no_grad():
        quantized = model(x)
        assert not torch.allclose(quantized, reference(x), atol=1e-3)
        for layer in model.layers:  # what prepare took away
            layer.activation_relu_or_gelu = 1
        missed = bw.coverage(model, x)
        assert not missed.complete
        assert "layers.0.linear1.weight_quantizer" in missed.missed
        torch.testing.assert_close(model(x), reference(x), atol=1e-5, rtol=1e-5)


def test_encoder_masks_reach_the_quantized_layer():
    x = torch.randn(2, 5, E)
    model = encoder()
    reference = copy.deepcopy(model)
    bw.prepare(model, W4A4)
    set_bypass(bw.quantizers(model).values(), True)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for options in ({"mask": mask}, {"mask": mask, "is_causal": True}, {"src_key_padding_mask": padding}):
        expected = reference(x, **options)
        got = model(x, **options)
        keep = ~padding if "src_key_padding_mask" in options else torch.ones_like(padding)
        torch.testing.assert_close(got[keep], expected[keep], atol=1e-5, rtol=1e-5)


def timm_layers():
    import_timm()
    from timm.layers.attention import Attention

    yield Attention(E, H, qkv_bias=True)
    yield Attention(E, H, qk_norm=True, scale_norm=True, norm_layer=nn.LayerNorm, gated=True)
    yield Attention(E, H, attn_head_dim=8, dim_out=6)


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
@pytest.mark.parametrize("fused", [True, False])
def test_timms_attention_bypassed_and_quantized(index, mask, fused):
    reference = list(timm_layers())[index].double().eval()
    reference.fused_attn = fused
    options = {
        "none": {},
        "bool": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()},
        "float": {"attn_mask": torch.randn(5, 5, dtype=torch.float64)},
        "causal": {"is_causal": True},
    }[mask]
    model = nn.Sequential(copy.deepcopy(reference))
    x = torch.randn(2, 5, E, dtype=torch.float64)
    bw.prepare(model, W4A4)
    set_bypass(bw.quantizers(model).values(), True)
    torch.testing.assert_close(model[0](x, **options), reference(x, **options))
    bw.calibrate(model, [x])
    assert bw.coverage(model, x).complete
    assert set(PRODUCT_SLOTS) <= set(model[0].quantizers())
    assert isinstance(model[0].qkv, QuantLinear)
    assert not torch.equal(model(x), reference(x))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("size", "shift"), [((8, 8), (0, 0)), ((8, 8), (2, 2)), ((7, 10), (2, 2)), ((4, 9), (2, 2))])
def test_torchvisions_window_attention_bypassed_and_quantized(version, size, shift):
    import_torchvision()
    from torchvision.models import swin_transformer

    name = "ShiftedWindowAttention" + ("V2" if version == 2 else "")
    reference = getattr(swin_transformer, name)(E, [4, 4], list(shift), H).eval().requires_grad_(False)
    reference.double()
    for p in reference.parameters():
        nn.init.normal_(p, std=0.3)
    model = nn.Sequential(copy.deepcopy(reference))
    x = torch.randn(2, *size, E, dtype=torch.float64)
    bw.prepare(model, W4A4)
    set_bypass(bw.quantizers(model).values(), True)
    torch.testing.assert_close(model(x), reference(x))
    bw.calibrate(model, [x])
    found = bw.coverage(model, x)
    assert found.complete
    assert not found.float_layers
    assert "0.qkv.input_quantizer" in found.ran
    assert "0.attention_quantizer" in found.ran
    only = bw.prepare(nn.Sequential(copy.deepcopy(reference)), [Rule(match="*.proj", weight=bw.QuantizerSpec(bits=4))])
    bw.calibrate(only, [x])
    assert bw.coverage(only, x).complete
