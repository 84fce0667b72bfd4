"""The ImageNet recipe by its name, on a small folder in the same format and torchvision's own file of weights."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from bitwright import cli
from bitwright.training.vision import import_torchvision

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


def write_images(root: Path, rng: np.random.Generator) -> None:
    """Pictures of different sizes: 2 classes, 4 to train and 2 to test with in each."""
    for split, count in (("train", 4), ("val", 2)):
        for label in ("n01440764", "n01443537"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (60 + 9 * i, 70, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.JPEG")


@pytest.mark.slow
def test_the_resnet18_recipe_trains_from_published_weights_and_exports(tmp_path, monkeypatch, capsys):
    models = import_torchvision().models
    write_images(tmp_path / "imagenet", np.random.default_rng(0))
    # Where a download would lie: torch's hub takes a file that is there as it is.
    name = models.ResNet18_Weights.DEFAULT.url.rsplit("/", 1)[1]
    published = tmp_path / "torch" / "hub" / "checkpoints" / name
    published.parent.mkdir(parents=True)
    weights = models.resnet18().state_dict()
    torch.save(weights, published)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    monkeypatch.chdir(tmp_path)

    def bitwright(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["bitwright", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        assert not left.value.code, err
        return out

    changes = ["schedule.epochs=1", "schedule.batch_size=4", "threads=1", "amp=none", "optimizer.lr=1e-30"]
    out = bitwright("train", "imagenet-resnet18-w4a4", *changes, "--data-dir", "imagenet", "--out", "run")
    assert "float partner: published weights" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    ends, inner = {"conv1", "fc"}, summary["weight_bits"]
    assert {bits for layer, bits in inner.items() if layer not in ends} == {4}
    assert {inner[layer] for layer in ends} == {8}
    # Steps of 1e-30 vanish in float32: the published weights must be there, beside a classifier for two classes.
    model = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    assert torch.equal(model["layer3.1.conv2.weight"], weights["layer3.1.conv2.weight"])
    assert model["fc.weight"].shape == (2, 512)
    bitwright("export", "run", "--to", "onnx", "-o", "model.onnx")
    file = onnx.load(tmp_path / "model.onnx")
    assert [d.dim_value for d in file.graph.input[0].type.tensor_type.shape.dim][1:] == [3, 224, 224]
