"""How large are the files? Every target that packs weights, five networks, five widths.

    python benchmarks/size/files.py --out benchmarks/size/files.csv

`ideal` is the sum of weights * bits / 8 over all quantized layers, every layer at that width; `limit` is 1.05 * ideal
+ 20 kB; bytes over it are in `over` (negative: within). Weights are as initialized: a file's size does not depend on
them. It depends on how far scales and biases of a layer's channels are apart, so norms have random gains and biases,
farther apart than those of our short trainings, and statistics of random images. As at the end of every training,
`snap_biases` is called before the export.
"""

import argparse
import csv
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bitwright as bw
from bitwright.errors import BitwrightError
from bitwright.training.models.resnet import CifarResNet
from bitwright.training.models.vgg import VGGSmall
from bitwright.training.vision import import_timm, import_torchvision

NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-20": (lambda: CifarResNet(20, 10, 3), 32),
    "VGG-small": (lambda: VGGSmall(10, 3), 32),
    "ResNet-18": (lambda: import_torchvision().models.resnet18(), 64),
    "MobileNetV2": (lambda: import_torchvision().models.mobilenet_v2(), 64),
    "ViT-tiny": (lambda: import_timm().create_model("vit_tiny_patch16_224", img_size=64), 64),
}
FIELDS = ["network", "topology", "target", "bits", "weights", "channels", "ideal", "size", "limit", "over"]


@torch.no_grad()
def settle(model: nn.Module, size: int) -> None:
    """Random norms and biases, in place, and running statistics to match."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)]
    for norm in norms:
        spread, shift = (0.4, 0.5) if isinstance(norm, nn.BatchNorm2d) else (0.1, 0.1)
        nn.init.normal_(norm.weight, 0.0, spread).exp_()
        nn.init.normal_(norm.bias, 0.0, shift)
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.normal_(layer.bias, 0.0, 0.1)
    model.train()
    for _ in range(20):
        model(torch.randn(16, 3, size, size))
    model.eval()


def measure(name: str, topology: str, bits: int, folder: Path) -> list[dict[str, Any]]:
    """One row per target."""
    make, size = NETS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(8, 3, size, size)
    settle(model, size)
    rules = bw.rules(f"w{bits}a{bits}", ends=None)
    if topology != "fpres":
        rules += bw.topology(model, x, topology)  # pyright: ignore
    bw.calibrate(bw.prepare(model, rules), [x]).eval()
    bw.snap_biases(model, x[:2])
    rows = []
    for target in ("onnx", "packed"):
        try:
            report = bw.export(model, folder / target, x[:2], target=target)
        except BitwrightError as error:
            print(error)
            continue
        weights = sum(layer.weights for layer in report.layers)
        channels = sum(m.weight.shape[0] for m in bw.quant_layers(model).values() if hasattr(m, "weight"))  # pyright: ignore
        ideal = weights * bits // 8
        limit = ideal * 105 // 100 + 20_000
        row = [
            name,
            topology,
            target,
            bits,
            weights,
            channels,
            ideal,
            report.size_bytes,
            limit,
            report.size_bytes - limit,
        ]
        rows.append(dict(zip(FIELDS, row, strict=True)))
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, default=Path("files.csv"))
    arguments.add_argument("--networks", nargs="*", default=list(NETS), choices=list(NETS))
    given = arguments.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.networks:
            for topology in ("fpres", "res8") if name in ("ResNet-20", "ResNet-18") else ("fpres",):
                for bits in (8, 4, 3, 2, 1):
                    rows += measure(name, topology, bits, Path(folder))
                    with given.out.open("w", newline="") as table:
                        writer = csv.DictWriter(table, FIELDS)
                        writer.writeheader()
                        writer.writerows(rows)


if __name__ == "__main__":
    main()
