"""The frozen integer form is the training form: same function, integers inside."""

import copy

import numpy as np
import pytest
import torch
from deploy_nets import MixedNet, mixed_net, quantized, settle
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

import bitwright as bw
from bitwright.deploy import freeze, snap_biases
from bitwright.deploy.attention import IntMultiheadAttention
from bitwright.deploy.integer import InputCodes, IntConv, IntEmbedding, IntLayer, IntLinear
from bitwright.errors import BitwrightError

GRIDS = ("lsq", "lsq+", "pact", "dorefa", "sat", "minmax", "tqt", "seq")


def assert_same(model: nn.Module, frozen: nn.Module, x: Tensor, atol: float = 2e-6) -> None:
    with torch.no_grad():
        wanted, got = model(x), frozen(x)
    torch.testing.assert_close(got, wanted, atol=atol, rtol=2e-6)


# Powers of two at 1 bit: see the end of TQT's docstring.
WIDTHS = [(grid, bits) for grid in GRIDS for bits in (1, 2, 3, 4, 8) if (grid, bits) != ("tqt", 1)]


@pytest.mark.parametrize(("grid", "bits"), WIDTHS)
def test_every_grid_at_every_width(grid, bits):
    model = mixed_net(grid, bits)
    snap_biases(model, torch.randn(2, 3, 8, 8))
    frozen = freeze(model, torch.randn(2, 3, 8, 8))
    codes = {m.name: [] for m in frozen.modules() if isinstance(m, InputCodes)}
    for module in frozen.modules():
        if isinstance(module, InputCodes):
            module.register_forward_hook(lambda m, _, y: codes[m.name].append(y + m.zero.double()))
    seen = {}
    for name, quantizer in bw.quantizers(model).items():
        if name in codes:
            quantizer.register_forward_pre_hook(lambda q, args, n=name: seen.update({n: q.integer_codes(args[0])}))
    x = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        wanted, got = model(x), frozen(x)
    moved = {n: int((codes[n][0].round() != seen[n]).sum()) for n in codes}
    assert max(moved[n] / seen[n].numel() for n in codes) <= 1e-4, moved
    if not any(moved.values()):
        torch.testing.assert_close(got, wanted, atol=2e-6, rtol=2e-6)
    layers = [m for m in frozen.modules() if isinstance(m, IntLayer)]
    assert all(m.weight_codes is not None and not m.weight_codes.is_floating_point() for m in layers)
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in frozen.modules())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_weights_are_the_training_forms_values(grid, bits):
    model = mixed_net(grid, bits)
    frozen = freeze(model, torch.randn(2, 3, 8, 8))
    layer, deployed = model.get_submodule("last"), frozen.get_submodule("last")
    wanted = layer.weight_quantizer(layer.weight).detach()
    torch.testing.assert_close(deployed.values, wanted, rtol=1e-6, atol=0)
    # 2k - 255 is the one map of the library that leaves eight bits.
    wide = bits == 8 and grid in ("dorefa", "sat")
    assert deployed.weight_codes.dtype == (torch.int16 if wide else torch.int8)


def direct_convolution(x: np.ndarray, w: np.ndarray, stride: int, dilation: int, groups: int) -> np.ndarray:
    """A convolution of int64 arrays by its definition; `x` is padded already."""
    n, _, height, width = x.shape
    out_channels, per_group, kh, kw = w.shape
    rows = (height - dilation * (kh - 1) - 1) // stride + 1
    columns = (width - dilation * (kw - 1) - 1) // stride + 1
    out = np.zeros((n, out_channels, rows, columns), np.int64)
    for o in range(out_channels):
        first = o // (out_channels // groups) * per_group
        for i in range(rows):
            for j in range(columns):
                top, left = i * stride, j * stride
                bottom, right = top + dilation * (kh - 1) + 1, left + dilation * (kw - 1) + 1
                patch = x[:, first : first + per_group, top:bottom:dilation, left:right:dilation]
                out[:, o, i, j] = (patch * w[o]).sum((1, 2, 3))
    return out


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 2),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.booleans(),
)
def test_convolution_by_its_definition(mode, stride, dilation, groups, padding, bits, bias):
    conv = nn.Conv2d(4, 4, 3, stride, padding, dilation, groups, bias, mode)
    spec = bw.QuantizerSpec(bits=bits, signed=True)
    model = nn.Sequential(conv)
    bw.prepare(model, [bw.Rule(match=("*",), weight=spec, input=spec)])
    x = torch.randn(2, 4, 7, 7)
    bw.calibrate(model, [x])
    frozen = freeze(model, x)
    w, a = conv.weight_quantizer.affine(conv.weight), conv.input_quantizer.affine()
    # Half codes (1 bit) are doubled to stay integers.
    twice = lambda k, zero: (2 * k.double() - 2 * zero.view(-1, *[1] * (k.ndim - 1))).long().numpy()  # noqa: E731
    numbers = twice(conv.weight_quantizer.integer_codes(conv.weight), w.zero)
    codes = twice(conv.input_quantizer.integer_codes(x), a.zero)
    np_mode = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}[mode]
    codes = np.pad(codes, ((0, 0), (0, 0), (padding, padding), (padding, padding)), np_mode)
    sums = direct_convolution(codes, numbers, stride, dilation, groups)
    wanted = sums * (w.scale.double() * a.scale.double() / 4).view(-1, 1, 1).numpy()
    if bias:
        wanted = wanted + conv.bias.detach().double().view(-1, 1, 1).numpy()
    torch.testing.assert_close(frozen(x), torch.from_numpy(wanted).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_one_axis_and_same_padding(bits):
    model = nn.Sequential(nn.Conv1d(3, 6, 4, padding="same"), nn.ReLU(), nn.Conv1d(6, 4, 3, 2, groups=2, padding=1))
    model = quantized(model, f"w{bits}a{bits}", torch.randn(32, 3, 11), ends=None)
    snap_biases(model, torch.randn(2, 3, 11))
    frozen = freeze(model, torch.randn(2, 3, 11))
    assert_same(model, frozen, torch.randn(16, 3, 11))


def test_negative_gain_keeps_the_lowest_code():
    """-2^(b-1) has no negative counterpart in b bits: the sign goes into the scale."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-8.0, 7.0], [3.0, -8.0]]).view(2, 2, 1, 1))
        model[1].weight.copy_(torch.tensor([-2.0, 1.0]))
    spec = bw.QuantizerSpec(bits=4, per_channel=False)
    bw.prepare(model, [bw.Rule(match=("*",), weight=spec, input=bw.QuantizerSpec(bits=8))])
    bw.calibrate(model, [torch.randn(64, 2, 3, 3)])
    with torch.no_grad():
        model[0].weight_quantizer.grid.scale.fill_(1.0)
    frozen = freeze(model, torch.randn(2, 2, 3, 3))
    layer = frozen[0]
    assert layer.weight_codes.flatten(1).tolist() == [[-8, 7], [3, -8]]
    assert layer.weight_scale[0] < 0 < layer.weight_scale[1]
    assert_same(model, frozen, torch.randn(16, 2, 3, 3))


def test_a_channel_without_weights_is_its_bias():
    model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1)).eval()
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].weight[1] = 1e-20
        model[1].weight[2] = 0
        model[1].bias.copy_(torch.tensor([1.3, -0.7, 5.1]))
    model = quantized(model, "w4a4", torch.randn(32, 2, 6, 6))
    with torch.no_grad():
        model[0].weight_quantizer.grid.scale[1] = 1e-21
    frozen = freeze(model, torch.randn(2, 2, 6, 6))
    layer = frozen[0]
    assert layer.bias_codes is not None
    assert layer.bias_codes.abs().max() < 2**31
    assert (layer.weight_scale > 1e-12).all()
    torch.testing.assert_close(layer.bias, model[1].bias.detach(), rtol=1e-5, atol=0)
    assert_same(model, frozen, torch.randn(16, 2, 6, 6), atol=1e-5)


class Crossed(nn.Module):
    """Norms whose names and order of definition point at the wrong layers, and norms that cannot be folded."""

    def __init__(self):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv2, self.conv1 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.conv3, self.bn3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv4, self.bn4 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv5, self.bn5 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
        self.twice, self.bn6 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn2(self.conv1(x)))
        x = torch.relu(self.bn1(self.conv2(x)))
        y = self.conv3(x)
        x = self.bn3(y) + y  # two readers
        x = self.bn4(torch.relu(self.conv4(x)))  # something in between
        x = self.bn5(self.conv5(x))  # statistics of the batch
        x = self.bn6(self.twice(x))
        return self.twice(x).mean((2, 3))  # a layer that is called twice


def test_norms_are_found_by_the_graph():
    model = settle(Crossed(), 16, 4, 5, 5)
    model = quantized(model, "w4a4", torch.randn(64, 4, 5, 5))
    frozen = freeze(model, torch.randn(2, 4, 5, 5))
    left = {n for n, m in frozen.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert left == {"bn3", "bn4", "bn5", "bn6"}
    assert_same(model, frozen, torch.randn(16, 4, 5, 5), atol=1e-5)


def test_a_norm_over_tokens_is_not_folded():
    """BatchNorm1d behind a linear layer on (N, tokens, features) normalises tokens, not features."""
    model = settle(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), 8, 5, 6)
    model = quantized(model, "w4a4", torch.randn(32, 5, 6))
    frozen = freeze(model, torch.randn(2, 5, 6))
    assert isinstance(frozen[1], nn.BatchNorm1d)
    assert_same(model, frozen, torch.randn(16, 5, 6), atol=1e-5)


class Attending(nn.Module):
    """An embedding, torch's encoder layer, cross attention with a mask, a head."""

    def __init__(self, batch_first: bool = True):
        super().__init__()
        self.table = nn.Embedding(11, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.cross = nn.MultiheadAttention(16, 4, batch_first=batch_first)
        self.head = nn.Linear(16, 3)

    def forward(self, index: Tensor) -> Tensor:
        x = self.block(self.table(index))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        a, b = (x, x.flip(1)) if self.cross.batch_first else (x.transpose(0, 1), x.flip(1).transpose(0, 1))
        y, _ = self.cross(a, b, b, attn_mask=mask, need_weights=False)
        return self.head((y if self.cross.batch_first else y.transpose(0, 1)).mean(1))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w2a3"])
def test_attention_and_embedding(bits, batch_first):
    index = torch.randint(0, 11, (32, 7))
    model = quantized(Attending(batch_first), bits, index)
    frozen = freeze(model, index[:2])
    assert isinstance(frozen.table, IntEmbedding)
    assert isinstance(frozen.cross, IntMultiheadAttention)
    assert isinstance(frozen.block.linear1, IntLinear)
    with torch.no_grad():
        wanted, got = model(index), frozen(index)
    close = torch.isclose(wanted, got, atol=1e-5).all(1)
    assert close.float().mean() > 0.9  # the rest flipped a code at a tie of float32


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_input_scales_per_channel(kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1) if kind == "conv" else nn.Linear(3, 4))
    shape = (16, 3, 5, 5) if kind == "conv" else (16, 3)
    spec = bw.QuantizerSpec(bits=4)
    bw.prepare(model, [bw.Rule(match=("*",), weight=spec, input=bw.QuantizerSpec(bits=4, per_channel=True))])
    bw.calibrate(model, [torch.randn(*shape)])
    assert_same(model, freeze(model, torch.randn(*shape)), torch.randn(*shape))


@pytest.mark.parametrize("side", ["weight", "input"])
def test_only_one_side_quantized(side):
    model = settle(MixedNet(), 16, 3, 8, 8)
    bw.prepare(model, [bw.Rule.model_validate({"match": "*", side: {"bits": 4}})])
    bw.calibrate(model, [torch.randn(64, 3, 8, 8)])
    frozen = freeze(model, torch.randn(2, 3, 8, 8))
    assert {m.bits for m in frozen.modules() if isinstance(m, IntLayer)} == {4 if side == "weight" else 32}
    assert_same(model, frozen, torch.randn(16, 3, 8, 8), atol=1e-5)


def test_the_model_is_not_changed():
    model = mixed_net("lsq", 4).train()
    before = copy.deepcopy(model.state_dict())
    freeze(model, torch.randn(2, 3, 8, 8))
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_shared_modules_stay_shared():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = quantized(nn.Sequential(conv, nn.ReLU(), conv), "w4a4", torch.randn(16, 4, 6, 6))
    frozen = freeze(model, torch.randn(2, 4, 6, 6))
    assert isinstance(frozen[0], IntConv)
    assert frozen[0] is frozen[2]
    assert_same(model, frozen, torch.randn(4, 4, 6, 6))


def test_the_root_can_be_a_layer():
    model = quantized(nn.Linear(6, 3), "w4a4", torch.randn(16, 6))
    assert_same(model, freeze(model, torch.randn(2, 6)), torch.randn(4, 6))


def test_snapped_biases_lie_on_the_grid_and_stay():
    model = mixed_net("lsq", 4)
    x = torch.randn(2, 3, 8, 8)
    unsnapped = freeze(model, x)
    before = copy.deepcopy(model.state_dict())
    assert snap_biases(model, x) == 3  # stem, depthwise (both read by codes) and point; the others feed float operators
    frozen = freeze(model, x)
    moved = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    biases = {"stem_norm.bias", "depthwise_norm.bias", "point_norm.running_mean"}
    biases |= {"reflect.bias", "last.bias", "head.bias", "fc_norm.bias"}  # added in floating point
    gains = {"stem_norm.weight", "depthwise_norm.weight", "fc_norm.weight"}
    scales = {k for k in moved if k.endswith("quantizer.grid.scale")}
    assert set(moved) - scales <= biases | gains
    own = {k for k in scales if "weight_quantizer" in k}  # of layers without a norm
    assert all("add." in k or k.startswith("depthwise.input") for k in scales - own)
    for key in gains | scales:
        torch.testing.assert_close(model.state_dict()[key], before[key], rtol=0.01, atol=0)
    layers = [m for m in frozen.modules() if isinstance(m, IntLayer) and m.bias_codes is not None]
    assert len(layers) == 3
    for layer in layers:
        before_codes = unsnapped.get_submodule(layer.name).bias_codes.double()  # large ones follow their scale
        torch.testing.assert_close(layer.bias_codes.double(), before_codes, rtol=2.0**-9, atol=1)
        step = layer.weight_scale.double() * layer.input_quantizer.scale.double()
        torch.testing.assert_close(layer.bias.double(), layer.bias_codes * step, rtol=1e-6, atol=0)
    again = copy.deepcopy(model.state_dict())
    snap_biases(model, x)
    for key in moved:
        torch.testing.assert_close(model.state_dict()[key], again[key], rtol=1e-6, atol=1e-7)


def test_a_bias_too_large_for_its_grid_stays_float():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1)).eval()
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
        model[0].bias.copy_(torch.tensor([3.0, 40.0]))
    model = quantized(model, "w8a8", torch.randn(64, 2, 4, 4))
    assert snap_biases(model, torch.randn(2, 2, 4, 4)) == 0
    frozen = freeze(model, torch.randn(2, 2, 4, 4))
    assert frozen[0].bias_codes is None
    assert frozen[0].late_bias
    assert_same(model, frozen, torch.randn(16, 2, 4, 4))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if float(x.sum()) > 0 else self.fc(-x)


def test_refusals_are_one_line():
    x = torch.randn(4, 4)
    with pytest.raises(BitwrightError, match=r"no quantizers; call bitwright\.prepare"):
        freeze(nn.Linear(4, 2), x)
    model = bw.prepare(nn.Sequential(nn.Linear(4, 2)), bw.rules("w4a4"))
    with pytest.raises(BitwrightError, match=r"0\.weight_quantizer is not calibrated"):
        freeze(model, x)
    bw.calibrate(model, [x])
    with torch.no_grad():
        model[0].input_quantizer.grid.scale.fill_(torch.nan)
    with pytest.raises(BitwrightError, match=r"0\.input_quantizer: its scale is NaN or infinite; training diverged"):
        snap_biases(model, x)
    bw.calibrate(model, [x])
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(BitwrightError, match="0: the weight or its scale holds NaN"):
        freeze(model, x)
    with pytest.raises(BitwrightError, match=r"Branching: torch\.export cannot capture it") as caught:
        freeze(quantized(Branching(), "w4a4", x), x)
    assert "\n" not in str(caught.value)


def test_pruned_weights_are_refused_until_they_are_parameters():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    prune.l1_unstructured(model[2], "weight", 0.5)
    x = torch.randn(4, 3, 8, 8)
    bw.calibrate(bw.prepare(model, bw.rules("w4a4")), [x])
    model(x).sum().backward()
    for refused in (bw.snap_biases, freeze):
        with pytest.raises(BitwrightError, match=r"^2\.weight is computed in every pass .*prune\.remove"):
            refused(model, x)
    prune.remove(model[2], "weight")
    bw.snap_biases(model, x)
    frozen = freeze(model, x)
    assert int((model[2].weight == 0).sum()) >= 72  # half of them
    assert torch.allclose(frozen(x), model.eval()(x), atol=1e-5)


class AsksItsWeight(nn.Module):
    """Makes a tensor where a layer's weight lives, as timm's XCiT does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(6, device=self.conv.weight.device, dtype=self.conv.weight.dtype)
        return self.head((self.conv(x) + place).mean((2, 3)))


def test_a_model_may_ask_a_weight_where_it_lives(tmp_path):
    x = torch.randn(4, 3, 8, 8)
    model = bw.calibrate(bw.prepare(AsksItsWeight(), bw.rules("w8a8")), [x]).eval()
    snap_biases(model, x)
    assert_same(model, freeze(model, x), x)
    bw.export(model, tmp_path / "m.onnx", x)
    assert bw.verify(model, tmp_path / "m.onnx", [x]).ok


def a_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))


def test_a_norm_that_was_replaced_after_prepare_is_named() -> None:
    x = torch.randn(4, 3, 8, 8)
    model = a_net()
    spec = bw.QuantizerSpec(bits=8)
    bw.calibrate(bw.prepare(model, [*bw.rules("w4a4"), bw.Rule(match="1", output=spec)]), [x])
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for deploy in (freeze, snap_biases):
        with pytest.raises(BitwrightError, match=r"^1: its output quantizer is not called: .* convert first"):
            deploy(model, x)


def test_models_that_are_held_in_shards_or_cast_are_refused() -> None:
    x = torch.randn(4, 3, 8, 8)
    model = bw.calibrate(bw.prepare(a_net(), bw.rules("w4a4")), [x])
    model._original_forward = model.forward  # pyright: ignore[reportArgumentType]
    with pytest.raises(BitwrightError, match=r"accelerate runs this model under autocast.*keep_fp32_wrapper=False"):
        freeze(model, x)
    del model._original_forward
    kind = type("FSDPModule", (), {})
    model[3].__class__ = type("FSDPQuantConv2d", (kind, type(model[3])), {})
    with pytest.raises(BitwrightError, match="shards of FSDP; gather its state dict"):
        freeze(model, x)
