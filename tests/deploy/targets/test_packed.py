"""The packed checkpoint: as large as its bits, read back to the last bit, by its loader alone."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from deploy_nets import MixedNet, mixed_net, quantized, settle
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import bitwright as bw
from bitwright.deploy import export, freeze, snap_biases, verify
from bitwright.deploy.targets import packed_loader
from bitwright.errors import BitwrightError
from bitwright.training.models.resnet import CifarResNet
from bitwright.training.vision import import_torchvision


@settings(deadline=None, max_examples=40)
@given(bits=st.integers(1, 8), count=st.integers(1, 200), seed=st.integers(0, 2**31))
def test_words_hold_codes_without_gaps(bits, count, seed):
    """Against Python's own big integers: code i lies at bit i * bits of the stream."""
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    words = packed_loader.pack(codes.to(torch.uint8), bits)
    stream = sum(int(c) << (i * bits) for i, c in enumerate(codes))
    assert words.dtype == torch.int32
    assert len(words) == -(-count * bits // 32)
    assert sum((int(w) & 0xFFFFFFFF) << (32 * i) for i, w in enumerate(words)) == stream
    assert torch.equal(packed_loader.unpack(words, bits, count), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_are_those_of_compressed_tensors(bits):
    import_torchvision()  # which the package imports behind transformers
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(0, 2**bits, (1, 77))
    theirs = library.pack_to_int32((codes - 2 ** (bits - 1)).to(torch.int8), bits)
    assert torch.equal(theirs.flatten(), packed_loader.pack(codes.to(torch.uint8), bits))


@pytest.mark.parametrize(("grid", "bits"), [("lsq", 4), ("lsq+", 3), ("dorefa", 8)])
def test_predicts_what_the_integer_form_predicts(grid, bits, tmp_path):
    model = mixed_net(grid, bits)
    x = torch.randn(32, 3, 8, 8)
    snap_biases(model, x[:2])
    report = export(model, tmp_path / "net.safetensors", x[:2], target="packed")
    assert report.size_bytes == (tmp_path / "net.safetensors").stat().st_size
    loaded = bw.load_packed(tmp_path / "net.safetensors", MixedNet())
    with torch.no_grad():
        assert torch.equal(loaded(x), freeze(model, x[:2])(x))
    found = verify(model, tmp_path / "net.safetensors", [x])
    assert found.target == "packed"
    assert found.ok, found.first_difference
    assert sum(r["different_file"] for r in found.rows()) == 0


def test_quantized_outputs_and_per_channel_inputs_come_back(tmp_path):
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)), 8, 3, 6, 6)
    twin = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    fields = {"match": "*", "weight": {"bits": 3}, "input": {"bits": 5, "per_channel": True}}
    rules = [bw.Rule.model_validate(fields), bw.Rule.model_validate({"match": "2", "output": {"bits": 6}})]
    x = torch.randn(16, 3, 6, 6)
    bw.calibrate(bw.prepare(model, rules), [x]).eval()
    export(model, tmp_path / "net", x, target="packed")
    with torch.no_grad():
        assert torch.equal(bw.load_packed(tmp_path / "net", twin)(x), freeze(model, x)(x))
    assert verify(model, tmp_path / "net", [x]).ok


NET = """
import torch
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Flatten(), nn.Linear(128, 10), nn.LayerNorm(10),
    )
"""


def test_the_loader_alone_is_enough(tmp_path):
    """Another process that has torch and safetensors, a copied loader, and no bitwright."""
    scope: dict = {}
    exec(NET, scope)
    x = torch.rand(32, 1, 8, 8)
    model = quantized(settle(scope["make"](), 16, 1, 8, 8), "w2a3", x)
    snap_biases(model, x[:2])
    export(model, tmp_path / "net.safetensors", x[:2], target="packed")
    shutil.copy(packed_loader.__file__, tmp_path / "packed_loader.py")
    (tmp_path / "net.py").write_text(NET)
    with torch.no_grad():
        torch.save({"x": x, "y": freeze(model, x[:2])(x)}, tmp_path / "data.pt")
    code = """
import sys
sys.modules["bitwright"] = None  # an import of it fails
sys.path.insert(0, ".")
import torch, net, packed_loader
data = torch.load("data.pt", weights_only=True)
print(torch.equal(packed_loader.load("net.safetensors", net.make())(data["x"]), data["y"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("bits", [8, 3, 1])
def test_as_large_as_its_bits(bits, tmp_path):
    """ResNet-20 itself, where what is not weights counts most."""
    model = quantized(CifarResNet(20, 10, 3, width=16), f"w{bits}a{bits}", torch.randn(8, 3, 16, 16), ends=None)
    weights = sum(layer.weight.numel() for layer in bw.quant_layers(model).values() if hasattr(layer, "weight"))
    report = export(model, tmp_path / "net", torch.randn(2, 3, 16, 16), target="packed")
    assert report.packed_bytes == pytest.approx(weights * bits / 8, abs=100)
    assert report.size_bytes <= 1.05 * weights * bits / 8 + 20_000


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(model, path) of a small packed network."""
    torch.manual_seed(0)
    model = quantized(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), "w4a4", torch.randn(64, 6))
    path = tmp_path_factory.mktemp("small") / "net.safetensors"
    export(model, path, torch.randn(2, 6), target="packed")
    return model, path


def float_net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def rewritten(path, target, change) -> None:
    """The file with other metadata or tensors."""
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(str(path))
    change(metadata, tensors)
    save_file(tensors, str(target), metadata=metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, t: m.update(version="9"), "is of version 9; this loader reads 2"),
        (lambda m, t: m.update(version="1"), "is of version 1; this loader reads 2"),
        (lambda m, t: t.update(words=t["words"][:-1]), "is damaged: its words end too early"),
        (lambda m, t: m.pop("format"), "is no packed checkpoint of bitwright"),
        (lambda m, t: t.update(extra=torch.zeros(1)), "only one of the two has extra"),
        (lambda m, t: m.update(network=m["network"].replace('"2"', '"7"')), "'7' that the model lacks"),
    ],
)
def test_files_of_others_are_refused_in_one_line(small, change, message, tmp_path):
    model, path = small
    rewritten(path, tmp_path / "other", change)
    for act in (
        lambda: bw.load_packed(tmp_path / "other", float_net()),
        lambda: verify(model, tmp_path / "other", [torch.randn(2, 6)]),
    ):
        with pytest.raises(BitwrightError, match=message) as caught:
            act()
        assert "\n" not in str(caught.value)


def test_truncated_missing_and_foreign_files(small, tmp_path):
    model, path = small
    whole = path.read_bytes()
    for keep in (12, len(whole) // 2, len(whole) - 3):
        (tmp_path / "cut").write_bytes(whole[:keep])
        with pytest.raises(BitwrightError, match="cut: is damaged or no safetensors file: ") as caught:
            verify(model, tmp_path / "cut", [torch.randn(2, 6)])
        assert "\n" not in str(caught.value)
    with pytest.raises(BitwrightError, match="gone: is no file"):
        bw.load_packed(tmp_path / "gone", float_net())
    with pytest.raises(BitwrightError, match=r"shape \[8, 6\]"):
        bw.load_packed(path, nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)))


def test_a_changed_weight_is_found(small, tmp_path):
    model, path = small

    def flip(metadata, tensors):
        first = json.loads(metadata["network"])["layers"]["0"]
        rows = [48 * first["bits"], *(about[0] * about[1] for part in ("scale", "bias") if (about := first.get(part)))]
        tensors["words"][sum(-(-row // 32) for row in rows)] ^= 1

    rewritten(path, tmp_path / "flipped", flip)
    report = verify(model, tmp_path / "flipped", [torch.randn(8, 6)])
    assert report.first_difference == "2: 1 of 24 weights in the file differ from the trained ones"


def test_quantized_attention_is_refused_and_the_old_file_stays(tmp_path):
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(4, 5, 8)
    bw.calibrate(bw.prepare(model, bw.rules("w4a4")), [x]).eval()
    (tmp_path / "net").write_text("what was there before")
    with pytest.raises(BitwrightError, match="self_attn: target packed keeps no quantized attention"):
        export(model, tmp_path / "net", x, target="packed")
    assert (tmp_path / "net").read_text() == "what was there before"
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_metadata_says_how_each_layer_is_stored(small):
    _, path = small
    with safe_open(str(path), framework="pt") as file:
        layers = json.loads(file.metadata()["network"])["layers"]
    assert {name: (f["bits"], f["shape"]) for name, f in layers.items()} == {"0": (8, [8, 6]), "2": (8, [3, 8])}
