"""Operators dispatched per quantizer, forward and backward: what bounds small networks on a GPU, countable without one.

    python benchmarks/speed/operators.py --out benchmarks/speed/operators.csv

Counted by a TorchDispatchMode on a convolution's weight (per channel) and input (per tensor), 4 bits, learned grid.
`fused`: operators with kernels for CPUs (C) and GPUs (Triton). `reference`: plain torch, on every other device.
"""

import argparse
import contextlib
from pathlib import Path

import torch
from measure import write
from torch.utils._python_dispatch import TorchDispatchMode

import bitwright as bw
from bitwright import kernels
from bitwright.estimators import ESTIMATORS
from bitwright.grids import GRIDS


class Count(TorchDispatchMode):
    """Counts every operator that is dispatched; `detach` does no work and is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.total += func is not torch.ops.aten.detach.default
        return func(*args, **(kwargs or {}))


def count(grid: str, estimator: str, role: str) -> tuple[int, int]:
    """(forward, backward) operators of one quantizer in training mode."""
    layer = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3))
    spec = {"bits": 4, "grid": grid, "estimator": estimator, "learn": True}
    options = {"rate": 0.5} if estimator == "pege" else {}
    bw.prepare(layer, [bw.Rule(match="*", weight=spec, input={**spec, "estimator_options": options})])
    x = torch.randn(2, 8, 16, 16)
    bw.calibrate(layer, [x])
    quantizer = getattr(layer[1], f"{role}_quantizer").train()
    leaf = (layer[1].weight.detach() if role == "weight" else x.relu()).requires_grad_()
    with Count() as forward:
        y = quantizer(leaf)
    g = torch.ones_like(y)
    wanted = [leaf, *quantizer.grid.parameters()]
    with Count() as backward:
        torch.autograd.grad(y, wanted, g)
    return forward.total, backward.total


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    pairs = [(g, "clipped_ste") for g in GRIDS] + [("lsq", e) for e in ESTIMATORS if e != "clipped_ste"]
    for grid, estimator in pairs:
        for role in ("weight", "input"):
            for home, context in (("fused", contextlib.nullcontext), ("reference", kernels.reference_only)):
                with context():
                    forward, backward = count(grid, estimator, role)
                row = {"grid": grid, "estimator": estimator, "role": role, "home": home}
                rows.append({**row, "forward": forward, "backward": backward, "both": forward + backward})
                print(rows[-1])
    write(rows, args.out)


if __name__ == "__main__":
    main()
