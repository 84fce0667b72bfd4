"""ExecuTorch: the network that was trained, 8-bit sums included, on XNNPACK's integer kernels; the rest is refused."""

import importlib.metadata
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from deploy_nets import digits, quantized, settle
from torch import nn

import bitwright as bw
from bitwright.deploy import export, freeze, snap_biases, verify
from bitwright.deploy.targets import executorch_file, target_of
from bitwright.deploy.targets.executorch_form import Int8Form
from bitwright.errors import BitwrightError
from bitwright.training.models.resnet import CifarResNet


@pytest.fixture
def _executorch():
    try:
        executorch_file.parts()
    except BitwrightError as error:
        pytest.skip(str(error))


@cache
def trained_resnet(bits: str, steps: int = 60) -> nn.Module:
    """A ResNet-8 with convolutions as shortcuts, trained on digits, float first and then at `bits` with 8-bit sums."""
    x, y = digits()
    torch.manual_seed(0)
    model = CifarResNet(8, 10, 1, width=8, shortcut="B")
    for phase in ("float", bits):
        if phase != "float":
            bw.prepare(model.eval(), bw.rules(bits) + bw.topology(model, x[:2], "res8"))
            bw.calibrate(model, [x[:256]])
        optimizer = torch.optim.Adam(model.parameters(), 5e-3 if phase == "float" else 2e-3)
        model.train()
        for step in range(steps):
            rows = torch.arange(step * 64, step * 64 + 64) % 1200
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    snap_biases(model.eval(), x[:2])
    return model


@pytest.mark.slow
@pytest.mark.usefixtures("_executorch")
def test_a_trained_network_runs_on_integer_kernels_and_predicts_the_same(tmp_path):
    model, x = trained_resnet("w8a8"), digits()[0][1200:]
    path = tmp_path / "net.pte"
    report = export(model, path, x[:2], target="executorch")
    assert [layer.packing for layer in report.layers] == ["int8"] * 9 + ["float32"]
    assert (report.target, report.dynamic_batch) == ("executorch", False)
    assert report.size_bytes == path.stat().st_size
    assert target_of(path) == "executorch"
    found = verify(model, path, x.split(64))
    assert found.target == "executorch"
    assert found.ok, found.first_difference
    assert found.different_file == 0
    rows = [r for r in found.rows() if r["what"] != "weight"]
    assert len(rows) == 10 + 9  # every quantizer of an input and of an output
    assert sum(r["values"] for r in rows) > 1_000_000
    assert sum(r["different_file"] for r in rows) <= 100e-6 * sum(r["values"] for r in rows)
    assert max(r["largest_steps"] for r in rows) <= 1
    image = x[:1]
    form = Int8Form(freeze(model, x[:2]), image).eval()
    assert executorch_file.lowered(form, image)[1] == {"qs8": 9, "f32": 1}


def small() -> nn.Module:
    """A strided and a depth-wise convolution with negative gains, a max pooling and two linear layers."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(32, 12, bias=False), nn.ReLU(), nn.Linear(12, 5),
    )  # fmt: skip
    return settle(model, 16, 3, 8, 8)


@pytest.mark.slow
@pytest.mark.usefixtures("_executorch")
def test_narrow_weights_in_bytes_and_another_networks_file(tmp_path):
    x = torch.randn(64, 3, 8, 8)
    model = small()
    rules = [bw.Rule.model_validate({"match": "*", "weight": {"bits": 4}, "input": {"bits": 8}})]
    bw.calibrate(bw.prepare(model, rules), [x]).eval()
    snap_biases(model, x[:2])
    path = tmp_path / "net.pte"
    report = export(model, path, x[:2], target="executorch")
    assert [(layer.bits, layer.packing) for layer in report.layers] == [(4, "int8")] * 3 + [(4, "float32")]
    found = verify(model, path, [x])
    assert found.ok, found.first_difference
    assert found.different_file == 0
    with torch.no_grad():
        model[10].bias[0] += 1e-5  # what logits' tolerance would let pass
    changed = verify(model, path, [x[:8]])
    assert changed.first_difference == "output: the file's logits are not those of the same network lowered again"
    assert not changed.ok
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BitwrightError, match=r"net.pte: executorch cannot open it: ") as caught:
        verify(model, path, [x])
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("_executorch")
@pytest.mark.parametrize(
    ("layer", "rule", "message"),
    [
        (
            (0, 2),
            {"input": {"bits": 4}, "weight": {"bits": 4}},
            r"^0\.input_quantizer: .* of 8 bits only, not 4",
        ),
        ((0, 2), {"weight": {"bits": 4}}, r"^0: target executorch wants weight and input quantized"),
        ((0, 2), {"input": {"bits": 8}, "weight": {"bits": 8, "grid": "dorefa"}}, r"^0: .* this 8-bit grid has no 0"),
        ((1, 2), {"input": {"bits": 8}, "weight": {"bits": 8}}, r"^0: target executorch pads with as many zeros"),
        (
            (0, 1),
            {"input": {"bits": 8}, "weight": {"bits": 8}},
            r"^0: XNNPACK has no integer kernel with a float",
        ),
    ],
)
def test_the_rest_is_refused_in_one_line(layer, rule, message, tmp_path):
    reflect, quantize = layer
    conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect" if reflect else "zeros")
    model, x = nn.Sequential(conv, nn.Hardswish(), nn.Conv2d(4, 2, 1)), torch.randn(4, 3, 8, 8)
    both = {"match": "0", **rule}
    if quantize == 2:
        both["output"] = {"bits": 8}
    bw.calibrate(bw.prepare(model.eval(), [bw.Rule.model_validate(both)]), [x]).eval()
    (tmp_path / "net.pte").write_text("what was there before")
    with pytest.raises(BitwrightError, match=message) as caught:
        export(model, tmp_path / "net.pte", x, target="executorch")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "net.pte").read_text() == "what was there before"
    assert [p.name for p in tmp_path.iterdir()] == ["net.pte"]


@pytest.mark.usefixtures("_executorch")
def test_a_bias_that_the_sums_cannot_hold_is_refused(tmp_path):
    model, x = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(64, 2)
    quantized(model, "w8a8", x, ends=None)
    snap_biases(model, x[:2])
    with pytest.raises(BitwrightError, match=r"^0: target executorch would move its bias by 0\.0.* than 0.002; train"):
        export(model, tmp_path / "net.pte", x, target="executorch")


@pytest.mark.usefixtures("_executorch")
def test_a_file_of_others(tmp_path):
    (tmp_path / "net.pte").write_bytes(b"\x3c\x00\x00\x00ET12eh00" + bytes(100))
    model = quantized(nn.Sequential(nn.Linear(4, 3)), "w8a8", torch.randn(8, 4), ends=None)
    assert target_of(tmp_path / "net.pte") == "executorch"
    with pytest.raises(BitwrightError, match=r"net.pte: executorch cannot open it: "):
        verify(model, tmp_path / "net.pte", [torch.randn(2, 4)])


@pytest.mark.parametrize("version", [None, "0.9.1"])
def test_a_missing_or_old_package_is_one_line_that_names_the_extra(version, monkeypatch, tmp_path):
    def found(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(executorch_file, "importlib", SimpleNamespace(metadata=SimpleNamespace(
        version=found, PackageNotFoundError=importlib.metadata.PackageNotFoundError)))  # fmt: skip
    model = quantized(nn.Sequential(nn.Linear(4, 3)), "w8a8", torch.randn(8, 4), ends=None)
    message = "is not installed" if version is None else "0.9.1 is too old"
    with pytest.raises(BitwrightError, match=message + r".*bitwright\[executorch\]"):
        export(model, tmp_path / "net.pte", torch.randn(2, 4), target="executorch")
