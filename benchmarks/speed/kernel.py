"""The fused kernels against the machine: their time over the time to move their bytes at the copy bandwidth.

    python benchmarks/speed/kernel.py --out benchmarks/speed/kernel.csv
    python benchmarks/speed/kernel.py --device cuda --sizes 524288 4194304 67108864 --out kernel-gpu.csv

One thread; each round measures a copy between two tensors of the same size in the same memory, then the kernels. The
forward kernel reads x and writes y, as a copy does; the backward kernel reads g and x and writes dx: one and a half
copies. `float32` and `bfloat16`, one scale or one per channel, sizes from the cache to the memory. On a GPU it is the
Triton kernels, a hundred in a row, as launches overlap with earlier work in training too.
"""

import argparse
import itertools
from functools import partial
from pathlib import Path

import torch
from measure import alternate, machine, ratio, write

from bitwright.estimators import DSQ, EWGS, PEGE, ClippedSTE
from bitwright.kernels import fused, fused_available
from bitwright.kernels.reference import draw_seed

ESTIMATORS = {
    "clipped_ste": ClippedSTE(),
    "ewgs": EWGS(0.1),
    "dsq": DSQ(),
    "pege rate 0.5": PEGE(rate=0.5),
    "pege rate 1": PEGE(),
}


def rows_of(
    size: int, dtype: torch.dtype, channels: int, name: str, rounds: int, device: str
) -> list[dict[str, object]]:
    """Forward and backward of one case."""
    x = torch.randn(channels, size // channels, device=device).relu().to(dtype)
    g, other = torch.randn_like(x), torch.empty_like(x)
    rule = ESTIMATORS[name].to(device).kernel_rule
    seed = None if rule.rate is None else draw_seed(x.device)
    tensors = (
        torch.full((channels,), 0.2, device=device),
        None,
        torch.zeros(1, device=device),
        torch.full((1,), 15.0, device=device),
        rule.strength,
        rule.rate,
        seed,
    )
    arguments = (*tensors, 0.0, 0, 100, fused.RULES[rule.name], rule.replaced_only)
    repeats = max(1, 4_000_000 // size) if device == "cpu" else 100

    def repeat(run):
        for _ in range(repeats):
            run()

    runs = {
        "copy": partial(repeat, lambda: other.copy_(x)),
        "forward": partial(repeat, lambda: torch.ops.bitwright.fake_quantize(x, *arguments)),
        "backward": partial(repeat, lambda: torch.ops.bitwright.fake_quantize_backward(g, x, *arguments)),
    }
    times = alternate(runs, rounds, device=device)
    rows = []
    for direction, copies in (("forward", 1.0), ("backward", 1.5)):
        row = {"direction": direction, "estimator": name, "elements": size, "dtype": str(dtype)[6:], "scales": channels}
        nanoseconds = sorted(times[direction])[rounds // 2] / repeats / size * 1e9
        moved = ratio(times[direction], [copies * t for t in times["copy"]], "to_copy")
        rows.append({**row, **moved, "ns_per_element": round(nanoseconds, 3), "rounds": rounds, **machine(device)})
        print({k: rows[-1][k] for k in (*row, "to_copy_median", "ns_per_element")})
    return rows


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1 << 16, 1 << 19, 1 << 21, 1 << 24])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not fused_available(args.device):
        parser.exit(1, f"there are no fused kernels for {args.device} on this machine\n")
    torch.set_num_threads(1)
    rows = []
    for size, channels in itertools.product(args.sizes, (1, 64)):
        rows += rows_of(size, torch.float32, channels, "clipped_ste", args.rounds, args.device)
    for name in ESTIMATORS:
        rows += rows_of(1 << 21, torch.float32, 1, name, args.rounds, args.device)
    rows += rows_of(1 << 21, torch.bfloat16, 1, "clipped_ste", args.rounds, args.device)
    write(rows, args.out)


if __name__ == "__main__":
    main()
