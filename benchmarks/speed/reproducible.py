"""What does reproducible arithmetic cost? Files in onnxruntime, one thread, with it and without.

    python benchmarks/speed/reproducible.py --out benchmarks/speed/reproducible.csv

A ViT-tiny with the default topology, ResNets with float sums (`fpres`), weights as initialized. Runs alternate; times
are the thread's processor time, so that other work on the machine counts little. `ratio` is the median of the ratios
of neighbouring runs, with its quartiles.
"""

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.deploy.bench import session
from bitwright.topology import Topology
from bitwright.training.models.resnet import CifarResNet
from bitwright.training.vision import import_timm, import_torchvision

FIELDS = [
    "network",
    "bits",
    "plain_ms",
    "reproducible_ms",
    "ratio",
    "lower",
    "upper",
    "plain_bytes",
    "reproducible_bytes",
]


def vit_tiny() -> tuple[nn.Module, Tensor]:
    """With images of 224 x 224."""
    return import_timm().create_model("vit_tiny_patch16_224").eval(), torch.randn(4, 3, 224, 224)


def resnet18() -> tuple[nn.Module, Tensor]:
    """torchvision's, with images of 224 x 224."""
    return import_torchvision().models.resnet18().eval(), torch.randn(4, 3, 224, 224)


def resnet20() -> tuple[nn.Module, Tensor]:
    """For CIFAR, with images of 32 x 32."""
    return CifarResNet(20, 10).eval(), torch.randn(16, 3, 32, 32)


# By name: how it is made, the topology, and at which bits.
NETWORKS: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], Topology, tuple[str, ...]]] = {
    "ViT-tiny 224": (vit_tiny, "res8", ("w8a8", "w4a4")),
    "ResNet-20 32 fpres": (resnet20, "fpres", ("w8a8", "w4a4", "w2a2")),
    "ResNet-18 224 fpres": (resnet18, "fpres", ("w8a8", "w4a4", "w2a2")),
}


def export(network: str, bits: str, reproducible: bool, path: Path) -> tuple[int, Tensor]:
    """Write one file; its size and an image."""
    make, topology, _ = NETWORKS[network]
    torch.manual_seed(0)
    model, x = make()
    bw.prepare(model, bw.rules(bits) + bw.topology(model, x, topology))
    bw.calibrate(model, [x]).eval()
    if reproducible:
        bw.make_reproducible(model)
    bw.snap_biases(model, x[:2])
    return bw.export(model, path, x[:2]).size_bytes, x[:1]


def measure(network: str, bits: str, runs: int, folder: Path) -> dict:
    """One row."""
    paths = [folder / f"{kind}.onnx" for kind in ("plain", "reproducible")]
    sizes, images = zip(*(export(network, bits, i == 1, path) for i, path in enumerate(paths)), strict=True)
    sessions = [session(path, 1, None)[0] for path in paths]
    x = {"input": images[0].numpy()}
    times: list[list[float]] = [[], []]
    for turn in range(-5, runs):
        for log, made in zip(times, sessions, strict=True):
            start = time.process_time()
            made.run(None, x)
            if turn >= 0:
                log.append(time.process_time() - start)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    lower, middle, upper = statistics.quantiles(ratios, n=4)
    medians = [f"{statistics.median(log) * 1e3:.2f}" for log in times]
    row = [network, bits, *medians, *(f"{r:.2f}" for r in (middle, lower, upper)), *sizes]
    return dict(zip(FIELDS, row, strict=True))


def main() -> None:
    """All networks, or one, at their widths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reproducible.csv"))
    parser.add_argument("--runs", type=int, default=101)
    parser.add_argument("--network", choices=NETWORKS, help="this one alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, given.out.open("w", newline="") as table:
        writer = csv.DictWriter(table, FIELDS)
        writer.writeheader()
        for network in [given.network] if given.network else NETWORKS:
            for bits in NETWORKS[network][2]:
                writer.writerow(measure(network, bits, given.runs, Path(folder)))
    print(given.out.read_text())


if __name__ == "__main__":
    main()
