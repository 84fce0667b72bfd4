"""Networks from a Python file of the user's."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bitwright.errors import BitwrightError
from bitwright.training.models import build_model
from bitwright.training.models.own import fingerprint

NET = """
import torch
from torch import nn
from blocks import WIDTH

class Net(nn.Module):
    def __init__(self, num_classes, in_channels=3, width=WIDTH):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(in_channels, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))

def plain():
    return Net(10, 1)

def needs(depth):
    return Net(10, 1)

def breaks():
    return Net(10, 1)[0]

class Wide(Net):
    def forward(self, x):
        return {"logits": super().forward(x)}

text = "no function"
number = lambda: 5
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "net", raising=False)  # another test's
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "blocks.py").write_text("WIDTH = 6\n")
    yield tmp_path
    for name in [n for n, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(str(tmp_path))]:
        del sys.modules[name]


def build(name: str, **options: object) -> torch.nn.Module:
    return build_model(name, num_classes=10, in_channels=1, image_size=8, **options)  # pyright: ignore


@pytest.mark.parametrize("where", ["net.py", "net"])
def test_a_class_gets_what_it_asks_for_of_the_data(folder: Path, where: str) -> None:
    model = build(f"{where}:Net", width=5)
    assert model.training
    assert {k: tuple(v.shape) for k, v in model.named_parameters()}["features.0.weight"] == (5, 1, 3, 3)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    assert build(f"{where}:Net").state_dict()["head.weight"].shape == (10, 6)  # of the file's neighbour


def test_a_function_without_parameters(folder: Path) -> None:
    assert build("net.py:plain")(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_looking_at_the_model_leaves_statistics_and_random_numbers_alone(folder: Path) -> None:
    torch.manual_seed(1)
    direct = build("net.py:plain")
    after = torch.rand(1)
    torch.manual_seed(1)
    import net  # pyright: ignore[reportMissingImports]

    own = net.plain()
    assert torch.equal(after, torch.rand(1))
    for key, value in own.state_dict().items():
        assert torch.equal(value, direct.state_dict()[key])


def test_a_checkpoint_of_it(folder: Path) -> None:
    source = build("net.py:plain")
    torch.save(source.state_dict(), "net.pt")
    loaded = build("net.py:plain", checkpoint="net.pt")
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in source.state_dict().items())
    torch.save(source, "whole.pt")
    with pytest.raises(BitwrightError, match=r"whole\.pt: .*holds Python objects.*torch\.save\(model\.state_dict\(\)"):
        build("net.py:plain", checkpoint="whole.pt")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nets.py:Net", {}, r"model 'nets\.py:Net': no such file; .*folder that the command runs in"),
        ("nets:Net", {}, r"model 'nets:Net': cannot be imported \(ModuleNotFoundError: No module named 'nets'\)"),
        ("net.py:Nett", {}, r"model 'net\.py:Nett': 'Nett' is not in the file; did you mean Net\?"),
        ("net.py:", {}, r"model 'net\.py:': use FILE\.py:NAME"),
        (":Net", {}, r"model ':Net': use FILE\.py:NAME"),
        ("net.py:text", {}, r"'net\.py:text': 'text' is a str; use a class or function that returns"),
        ("net.py:number", {}, r"'net\.py:number': returned a int; use a class or function that returns"),
        ("net.py:Net", {"wdith": 3}, r"unknown option 'wdith' for model 'net\.py:Net'; did you mean width\?"),
        ("net.py:needs", {}, r"'net\.py:needs': needs the option 'depth'"),
        ("net.py:Net", {"width": -1}, r"'net\.py:Net': cannot be made \(RuntimeError: "),
        ("net.py:breaks", {}, r"'net\.py:breaks': cannot be made \(TypeError: .*net\.py, line \d+\)"),
        ("net.py:Wide", {}, r"'net\.py:Wide': its output is a dict; .*\(samples, classes\)"),
        ("net.py:Net", {"pretrained": True}, r"has no published weights; give checkpoint=FILE"),
        ("bad.py:Net", {}, r"'bad\.py:Net': cannot be imported \(SyntaxError: .*bad\.py, line 2\)"),
        ("exits.py:Net", {}, r"'exits\.py:Net': cannot be imported \(SystemExit: 3"),
        ("three.py:Net", {}, r"'three\.py:Net': fails on samples of shape \(1, 1, 8, 8\) \(RuntimeError: "),
        ("few.py:Net", {}, r"'few\.py:Net': its output has shape \(1, 4\); the data has 10 classes"),
    ],
)
def test_what_is_wrong_with_it_in_one_line(folder: Path, name: str, options: dict, message: str) -> None:
    (folder / "bad.py").write_text("x = 1\ndef Net(:\n")
    (folder / "exits.py").write_text("import sys\nsys.exit(3)\n")
    (folder / "three.py").write_text("from torch import nn\ndef Net():\n    return nn.Conv2d(3, 4, 3)\n")
    (folder / "few.py").write_text(
        "from torch import nn\ndef Net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))\n"
    )
    with pytest.raises(BitwrightError, match=message) as caught:
        build(name, **options)
    assert "\n" not in str(caught.value)


def test_the_fingerprint_follows_the_file_and_the_model(folder: Path) -> None:
    model = build("net.py:Net")
    first = fingerprint("net.py:Net", model)
    assert first == fingerprint("net.py:Net", build("net.py:Net"))
    assert first != fingerprint("net.py:Net", build("net.py:Net", width=3))
    (folder / "net.py").write_text(NET + "# another version\n")
    assert first != fingerprint("net.py:Net", model)
    assert fingerprint("resnet8", model) is None
