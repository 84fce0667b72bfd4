"""What does reproducible arithmetic cost? A ViT-tiny at 224 x 224 in onnxruntime, one thread, with it and without.

    python benchmarks/speed/reproducible.py --out benchmarks/speed/reproducible.csv

Weights as initialized, the default topology. Runs alternate; times are the thread's processor time, so that other work
on the machine counts little. `ratio` is the median of the ratios of neighbouring runs, with its quartiles.
"""

import argparse
import csv
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import bitwright as bw
from bitwright.deploy.bench import session
from bitwright.training.vision import import_timm

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


def export(bits: str, reproducible: bool, path: Path) -> int:
    """Write one file; its size."""
    torch.manual_seed(0)
    model, x = import_timm().create_model("vit_tiny_patch16_224").eval(), torch.randn(4, 3, 224, 224)
    bw.prepare(model, bw.rules(bits) + bw.topology(model, x))
    bw.calibrate(model, [x]).eval()
    if reproducible:
        bw.make_reproducible(model)
    bw.snap_biases(model, x[:2])
    return bw.export(model, path, x[:2]).size_bytes


def measure(bits: str, runs: int, folder: Path) -> dict:
    """One row."""
    paths = [folder / f"{kind}.onnx" for kind in ("plain", "reproducible")]
    sizes = [export(bits, i == 1, path) for i, path in enumerate(paths)]
    sessions = [session(path, 1, None)[0] for path in paths]
    x = {"input": np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)}
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
    row = ["ViT-tiny 224", bits, *medians, *(f"{r:.2f}" for r in (middle, lower, upper)), *sizes]
    return dict(zip(FIELDS, row, strict=True))


def main() -> None:
    """Both widths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reproducible.csv"))
    parser.add_argument("--runs", type=int, default=101)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, given.out.open("w", newline="") as table:
        writer = csv.DictWriter(table, FIELDS)
        writer.writeheader()
        for bits in ("w8a8", "w4a4"):
            writer.writerow(measure(bits, given.runs, Path(folder)))
    print(given.out.read_text())


if __name__ == "__main__":
    main()
