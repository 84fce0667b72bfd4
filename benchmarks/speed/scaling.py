"""How the price of quantization grows with the work: LSQ step over float step against width, batch and depth.

    python benchmarks/speed/scaling.py --out benchmarks/speed/scaling.csv

CIFAR ResNets at W4A4, one thread, alternating. Width 16, 32, 64 (of the first stage) at 20 layers; batch 16 to 128;
20, 38, 74 layers (3, 6, 12 blocks a stage) at width 16.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch
from measure import alternate, machine, ratio, write
from step import make_step, quantized

from bitwright.training.memory import keep_freed_memory
from bitwright.training.models.resnet import CifarResNet

CASES = [
    *(("width", {"depth": 20, "width": 16 * k, "batch": 32}) for k in (1, 2, 4)),
    *(("batch", {"depth": 20, "width": 16, "batch": 16 * k}) for k in (1, 2, 4, 8)),
    *(("depth", {"depth": 18 * k + 2, "width": 16, "batch": 32}) for k in (1, 2, 4)),
]


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []
    for axis, case in CASES:
        torch.manual_seed(0)
        model = CifarResNet(case["depth"], 10, width=case["width"])
        x, y = torch.randn(case["batch"], 3, 32, 32), torch.randint(0, 10, (case["batch"],))
        steps = {"lsq": make_step(quantized(model, args.bits, x)), "float": make_step(model)}
        times = alternate({name: partial(step, x, y) for name, step in steps.items()}, args.rounds)
        price = ratio(times["lsq"], times["float"])
        milliseconds = round(1000 * statistics.median(times["float"]), 1)
        rows.append({"axis": axis, **case, "bits": args.bits, **price, "float_ms": milliseconds, "rounds": args.rounds})
        rows[-1].update(machine())
        print({k: rows[-1][k] for k in ("axis", *case, "ratio_median", "ratio_q1", "ratio_q3", "float_ms")})
    write(rows, args.out)


if __name__ == "__main__":
    main()
