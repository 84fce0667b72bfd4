"""Snapped networks: scales and biases of few bits in the training form, the frozen form and every file."""

import copy

import pytest
import torch
from deploy_nets import quantized
from torch import fx, nn

import bitwright as bw
from bitwright.deploy import export, freeze, snap_biases, verify
from bitwright.deploy.compact import fixed, floating, whole
from bitwright.deploy.integer import IntLayer
from bitwright.deploy.probe import read
from bitwright.deploy.targets import packed_loader
from bitwright.layers.significant import significant_bits
from bitwright.training.models.resnet import CifarResNet


class Separable(nn.Module):
    """A convolution, a depth-wise one and a product, with norms of all kinds of gains, then two linear layers."""

    def __init__(self, channels: int = 48):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.depth = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.point = nn.Conv2d(channels, channels, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(3))
        self.plain = nn.Conv2d(channels, channels, 1)
        self.norm = nn.LayerNorm(channels)
        self.hidden, self.head = nn.Linear(channels, channels), nn.Linear(channels, 5)
        for norm in self.norms:
            nn.init.normal_(norm.weight, 0.5, 0.5)
            nn.init.normal_(norm.bias, 0.0, 0.5)
            nn.init.uniform_(norm.running_var, 0.1, 2.0)
            nn.init.normal_(norm.running_mean, 0.0, 0.2)
            with torch.no_grad():
                norm.weight[:3] = torch.tensor([0.0, 1e-12, -1.0])
        nn.init.normal_(self.norm.weight, 1.0, 0.2)

    def forward(self, x):
        for layer, norm in zip((self.stem, self.depth, self.point), self.norms, strict=True):
            x = norm(layer(x)).relu()
        x = self.plain(x).mean((2, 3))
        return self.head(self.hidden(self.norm(x)).relu())


def network(bits: int, topology: str | None = None):
    """(model, images), quantized at every layer."""
    torch.manual_seed(bits)
    model, x = Separable().eval(), torch.randn(64, 3, 8, 8)
    rules = bw.rules(f"w{bits}a{bits}", ends=None)
    if topology:
        rules += bw.topology(model, x[:2], topology)
    bw.calibrate(bw.prepare(model, rules), [x]).eval()
    return model, x


def layers_of(frozen: nn.Module) -> dict[str, IntLayer]:
    return {m.name: m for m in frozen.modules() if isinstance(m, IntLayer)}


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_scale_and_bias_is_short(bits):
    model, x = network(bits)
    before = copy.deepcopy(model)
    snap_biases(model, x[:2])
    found = layers_of(freeze(model, x[:2]))
    assert len(found) == 6
    for name, layer in found.items():
        values = layer.weight_scale.numpy()
        made = floating(values)
        mantissas = made.about[3]
        assert mantissas <= 2 ** (significant_bits(bits) - 1), name
        assert len(set(values.tolist())) > 2, name
        if layer.bias_codes is not None:
            assert whole(layer.bias_codes.numpy()) is not None
        elif layer.bias is not None:
            assert fixed(layer.bias.numpy()).about[1] <= 17, name
    x = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        distance = (model(x) - before(x)).pow(2).mean().sqrt() / before(x).std()
    assert distance < {2: 0.5, 4: 0.2, 8: 0.05}[bits]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("topology", [None, "res8"])
@pytest.mark.parametrize("snapped", [True, False])
def test_files_are_the_network_in_every_runtime(bits, topology, snapped, tmp_path):
    model, x = network(bits, topology)
    if snapped:
        snap_biases(model, x[:2])
    frozen = freeze(model, x[:2])
    path = tmp_path / "net"
    for target in ("onnx", "packed"):
        export(model, path, x[:2], target=target)
        for runtime in ("default", "native") if target == "onnx" else ("default",):
            report = verify(model, path, [x], runtime=runtime)
            for row in report.rows():
                if row["what"] == "weight":
                    assert row["different_file"] == row.get("different_bias", 0) == 0, (target, runtime, row)
            if snapped:
                assert report.ok, (target, runtime, report.first_difference)
        if target == "onnx":
            functions = {f.name for f in read(path).functions}
            assert not snapped or {"Floating", "Bits"} <= functions
        else:
            with torch.no_grad():
                assert torch.equal(bw.load_packed(path, Separable())(x), frozen(x))


def test_snapping_again_changes_nothing_that_is_stored(tmp_path):
    model, x = network(4)
    snap_biases(model, x[:2])
    export(model, tmp_path / "one", x[:2], target="packed")
    snap_biases(model, x[:2])
    export(model, tmp_path / "two", x[:2], target="packed")
    one, two = (packed_loader.read(tmp_path / name) for name in ("one", "two"))  # metadata come in any order
    assert one[0] == two[0]
    assert one[1].keys() == two[1].keys()
    assert all(torch.equal(tensor, two[1][name]) for name, tensor in one[1].items())


def test_constant_channels_need_no_wider_biases():
    """A filter of zeros and a gain of 0 leave a bias alone, with a scale among the others'."""
    model, x = network(4)
    with torch.no_grad():
        model.stem.weight[5] = 0.0
    snap_biases(model, x[:2])
    stem = layers_of(freeze(model, x[:2]))["stem"]
    constant = (stem.weight_codes == 0).flatten(1).all(1)
    assert constant[:2].all()
    assert constant[5]
    assert not constant.all()
    scale, codes = stem.weight_scale.abs(), stem.bias_codes.abs()
    assert scale[~constant].min() <= scale[constant].min()
    assert scale[constant].max() <= scale[~constant].max()
    assert codes[constant].max() <= max(int(codes[~constant].max()), 2**10)
    shift = model.norms[0].bias - model.norms[0].running_mean * model.norms[0].weight / (
        (model.norms[0].running_var + model.norms[0].eps).sqrt()
    )
    torch.testing.assert_close(stem.bias[constant], shift[constant], rtol=1e-5, atol=1e-6)


def test_a_file_of_a_snapped_network_is_smaller(tmp_path):
    model = quantized(
        nn.Sequential(nn.Conv2d(3, 256, 3), nn.ReLU(), nn.Conv2d(256, 256, 1), nn.Flatten()),
        "w4a4",
        torch.randn(16, 3, 6, 6),
        ends=None,
    )
    x = torch.randn(2, 3, 6, 6)
    before = {t: export(model, tmp_path / t, x, target=t).size_bytes for t in ("onnx", "packed")}
    snap_biases(model, x)
    for target, size in before.items():
        smaller = export(model, tmp_path / target, x, target=target).size_bytes
        assert smaller < size - 512


class Tokens(nn.Module):
    """A table of positions, a norm that a quantizer reads and one that a sum reads."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 40, 24))
        self.first, self.norm, self.fc = nn.Linear(8, 24), nn.LayerNorm(24), nn.Linear(24, 24)
        self.last, self.head = nn.LayerNorm(24), nn.Linear(24, 4)

    def forward(self, x):
        x = self.first(x) + self.positions
        return self.head((x + self.last(self.fc(self.norm(x)))).mean(1))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_norms_and_tables_are_as_fine_as_what_reads_them(bits, tmp_path):
    torch.manual_seed(bits)
    model, x = Tokens().eval(), torch.randn(32, 40, 8)
    for parameter in (*model.norm.parameters(), *model.last.parameters()):
        nn.init.normal_(parameter, 1.0, 0.3)
    bw.prepare(model, bw.rules(f"w{bits}a{bits}", ends=None))
    bw.calibrate(model, [x]).eval()
    before = copy.deepcopy(model)
    snap_biases(model, x[:2])
    width = lambda t: fixed(t.detach().numpy().reshape(-1)).about[1]  # noqa: E731
    assert width(model.norm.weight) <= significant_bits(bits)
    assert width(model.positions) <= significant_bits(bits) + 1  # and a sign
    assert significant_bits(bits) + 1 < width(model.last.weight) <= 17
    step = float(model.fc.input_quantizer.affine().scale)
    assert (model.norm.bias - before.norm.bias).abs().max() <= step / 64
    size = export(model, tmp_path / "net.onnx", x[:2]).size_bytes
    assert size < export(before, tmp_path / "net.onnx", x[:2]).size_bytes - 40 * 24 // 2
    snap_biases(model, x[:2])
    export(model, tmp_path / "net.onnx", x[:2])
    assert verify(model, tmp_path / "net.onnx", [x]).ok
    constants = {tuple(t.dims) for t in read(tmp_path / "net.onnx").graph.initializer if t.data_type == 1}
    assert (1, 40, 24) not in constants


def test_a_network_traced_to_a_graph_makes_the_same_file(tmp_path):
    files = []
    for traced in (False, True):
        torch.manual_seed(0)
        model, x = CifarResNet(8, 5, 3), torch.randn(4, 3, 8, 8)
        if traced:
            model = fx.symbolic_trace(model)
        bw.prepare(model, bw.rules("w2a2") + bw.topology(model, x))
        bw.calibrate(model, [x]).eval()
        snap_biases(model, x)
        files.append(tmp_path / f"{traced}.onnx")
        export(model, files[-1], x)
        assert verify(model, files[-1], [x]).ok
    assert files[0].read_bytes() == files[1].read_bytes()
