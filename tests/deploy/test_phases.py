"""Transposed convolutions in the frozen form and in files: a convolution of all phases, on integer kernels."""

import pytest
import torch
import torch.nn.functional as F
from deploy_nets import quantized
from torch import nn

import bitwright as bw
from bitwright.deploy import export, freeze, snap_biases, verify
from bitwright.deploy.phases import interleaved, phases
from bitwright.errors import BitwrightError
from bitwright.layers.transposed import outputs_first

# kernel, stride, padding, dilation, groups, output_padding
SHAPES = [
    (2, 2, 0, 1, 1, 0),
    (3, 2, 1, 1, 1, 1),
    (4, 2, 1, 1, 2, 0),
    (5, 2, 2, 1, 1, 0),
    (3, 1, 1, 1, 1, 0),
    (4, 3, 0, 1, 1, 2),  # rows that the kernel does not reach
    (3, 2, 2, 2, 2, 1),
    (3, (2, 3), (1, 0), 1, 1, 0),
    (2, 3, 0, 1, 1, 0),  # pixels between taps that nothing reaches
    (3, 2, 4, 1, 1, 1),  # cuts more than the kernel adds
]


def test_phases_by_hand():
    """Stride 2: even outputs read taps 0 and 2, odd ones tap 1 and a 0; the later tap reads the earlier pixel."""
    weight = torch.tensor([[[1, 2, 3]]])
    assert phases(weight, (2,), (1,)).tolist() == [[[3, 1]], [[0, 2]]]
    x = torch.tensor([[[1, 10, 100]]])
    y = interleaved(F.conv1d(x, phases(weight, (2,), (1,)), padding=1), (2,))
    assert y.tolist() == [[[1, 2, 13, 20, 130, 200, 300, 0]]]
    assert y[..., :7].equal(F.conv_transpose1d(x, weight, stride=2))


def net(kernel, stride, padding, dilation, groups, extra):
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, kernel, stride, padding, extra, groups, True, dilation)
    return nn.Sequential(layer, nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()


@pytest.mark.parametrize(("shape", "bits"), [(s, "w1a3" if i % 2 else "w8a8") for i, s in enumerate(SHAPES)])
def test_the_frozen_form_is_the_layer(shape, bits):
    x = torch.randn(2, 4, 6, 5)
    model = quantized(net(*shape), bits, x, ends=None)
    with torch.no_grad():
        model[1].weight.normal_()
    assert snap_biases(model, x) == 1  # of the transposed convolution, behind which a quantizer reads
    frozen = freeze(model, x)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x), rtol=0, atol=1e-6)
    assert isinstance(frozen[1], nn.Identity), "the norm is folded"


def operators(path):
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path) + ".optimized"
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


@pytest.mark.parametrize(
    ("bits", "shape"), [("w8a8", SHAPES[0]), ("w4a4", SHAPES[1]), ("w1a3", SHAPES[2]), ("w3a3", SHAPES[6])]
)
def test_files_are_the_network_and_run_on_integers(bits, shape, tmp_path):
    x = torch.randn(4, 4, 6, 5)
    model = quantized(net(*shape), bits, x, ends=None)
    snap_biases(model, x)
    path = tmp_path / "net.onnx"
    report = export(model, path, x)
    assert report.layers[0].weights == model[0].weight.numel(), "the file holds the weight as it is, not its phases"
    for runtime in ("default", "native"):
        found = verify(model, path, [x], runtime=runtime)
        assert found.ok, (runtime, found.first_difference)
        assert found.different_file == 0
    rows = {(r["name"], r["what"]): r for r in verify(model, path, [x]).rows()}
    assert rows["0", "weight"]["different_file"] == 0
    kinds = operators(path)
    assert "QLinearConv" in kinds
    assert "ConvTranspose" not in kinds


def test_a_changed_weight_is_found(tmp_path):
    import onnx

    from bitwright.deploy.probe import read

    x = torch.randn(2, 4, 6, 5)
    model = quantized(net(*SHAPES[1]), "w8a8", x, ends=None)
    export(model, tmp_path / "net.onnx", x)
    proto = read(tmp_path / "net.onnx")
    codes = next(t for t in proto.graph.initializer if t.name == "0.taps")
    values = onnx.numpy_helper.to_array(codes).copy()
    values[5, 1, 2, 0] ^= 1
    codes.raw_data = values.tobytes()
    onnx.save(proto, str(tmp_path / "net.onnx"))
    found = verify(model, tmp_path / "net.onnx", [x])
    assert not found.ok
    assert found.first_difference.startswith("0: 1 of")


class Joined(nn.Module):
    """An up-sampling to the size of what it is joined with, and one along one axis."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 4, 3, 2, 1)
        self.line, self.head = nn.ConvTranspose1d(4, 4, 4, 2, 1), nn.Conv2d(7, 2, 1)

    def forward(self, x):
        up = torch.relu(self.up(self.down(x), output_size=x.shape[2:]))
        return self.head(torch.cat([up, x], 1)).mean((1, 2, 3))[:, None] + self.line(up.mean(2)).flatten(1)


def test_output_size_and_one_axis(tmp_path):
    torch.manual_seed(1)
    x = torch.randn(4, 3, 8, 8)
    model = Joined().eval()
    bw.prepare(model, bw.rules("w4a4") + bw.topology(model, x))
    bw.calibrate(model, [x])
    snap_biases(model, x)
    export(model, tmp_path / "net.onnx", x)
    found = verify(model, tmp_path / "net.onnx", [x])
    assert found.ok, found.first_difference


def test_reproducible_evaluation_is_the_file(tmp_path):
    x = torch.randn(4, 4, 6, 5)
    torch.manual_seed(2)
    layers = [
        nn.ConvTranspose2d(4, 6, 4, 2, 1, groups=2),
        nn.BatchNorm2d(6),
        nn.Sigmoid(),
        nn.ConvTranspose2d(6, 2, 2, 2),
    ]
    model = quantized(nn.Sequential(*layers), "w4a4", x)
    bw.make_reproducible(model)
    snap_biases(model, x)
    export(model, tmp_path / "net.onnx", x)
    found = verify(model, tmp_path / "net.onnx", [x])
    assert found.ok, found.first_difference
    with torch.no_grad():
        frozen = freeze(model, x)
        first, norm = model[0](x), model[1]
        assert norm(first).equal(frozen[0](x)), "the norm scales the sums themselves"


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2]])
def test_packed_checkpoints_hold_the_weight_as_it_is(shape, tmp_path):
    x = torch.randn(4, 4, 6, 5)
    model = quantized(net(*shape), "w1a4", x, ends=None)
    snap_biases(model, x)
    report = export(model, tmp_path / "net.safetensors", x, target="packed")
    assert report.layers[0].weights == model[0].weight.numel()
    found = verify(model, tmp_path / "net.safetensors", [x])
    assert found.ok, found.first_difference
    loaded = bw.load_packed(tmp_path / "net.safetensors", net(*shape))
    assert loaded(x).equal(freeze(model, x)(x))


def test_costs_count_what_a_transposed_convolution_multiplies():
    from bitwright.costs import cost_table

    model = quantized(
        nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, 1, groups=2)), "w4a2", torch.randn(1, 4, 5, 6), ends=None
    )
    row = cost_table(model, torch.randn(1, 4, 5, 6)).rows[0]
    macs = 4 * 3 * 9 * 5 * 6
    assert (row.kind, row.macs, row.weight_bits, row.input_bits, row.bitops) == (
        "ConvTranspose2d",
        macs,
        4,
        2,
        macs * 8,
    )


def test_executorch_refuses_in_one_line():
    from bitwright.deploy.targets.executorch_form import refuse_what_is_lost

    x = torch.randn(2, 4, 6, 5)
    frozen = freeze(quantized(net(*SHAPES[0]), "w8a8", x), x)
    with pytest.raises(BitwrightError, match=r"^0: target executorch keeps no quantized transposed convolution"):
        refuse_what_is_lost(frozen)


def test_qonnx_refuses_skipped_pixels_on_a_grid_without_0(tmp_path):
    pytest.importorskip("qonnx")
    x = torch.randn(2, 4, 6, 5)
    model = quantized(net(*SHAPES[1]), "w1a8", x, ends=None)
    with pytest.raises(BitwrightError, match=r"^0: target qonnx has no 0 for the pixels"):
        export(model, tmp_path / "net.onnx", x, target="qonnx")


@pytest.mark.parametrize("target", ["openvino", "qonnx"])
def test_other_runtimes(target, tmp_path):
    pytest.importorskip(target)
    x = torch.randn(2, 4, 6, 5)
    model = quantized(net(*SHAPES[1]), "w4a4", x, ends=None)
    snap_biases(model, x)
    export(model, tmp_path / "net.onnx", x, target=target)
    found = verify(model, tmp_path / "net.onnx", [x])
    assert found.ok, found.first_difference


def test_the_layout_of_groups():
    weight = torch.arange(2 * 2 * 3).view(4, 3)  # 2 groups of 2 inputs and 3 outputs
    assert outputs_first(weight, 2).tolist() == [[0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11]]
    assert outputs_first(outputs_first(weight, 2), 2).equal(weight)
