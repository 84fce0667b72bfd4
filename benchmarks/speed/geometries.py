"""Whether oneDNN's integer convolutions are right where layers use them (`bitwright.kernels.integer.trusts`).

    python benchmarks/speed/geometries.py --seconds 300
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI python benchmarks/speed/geometries.py   # as on a processor without AMX

Draws shapes, strides, paddings and threads, and compares with float64. Prints how many were drawn and how many of
them were wrong, and each wrong one; exits with 1 if there is one. Run it under `MALLOC_CHECK_=3`, so that writing
beyond memory ends the process.
"""

import argparse
import random
import sys
import time

import torch
import torch.nn.functional as F

from bitwright.kernels.codes import PendingCodes
from bitwright.kernels.integer import Operands, integer_convolution, trusts

CHANNELS = (1, 2, 3, 4, 6, 8, 12, 16, 17, 24, 32, 33, 48, 64, 96, 100, 256, 512, 1024)
SIZES = (7, 8, 14, 28, 56, 112)


def draw(rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Shapes of input and weight; stride and padding."""
    kernel = rng.choices((1, 3, 5, 7), k=2) if rng.random() < 0.3 else rng.choices((1, 3, 3, 3, 5, 7), k=1) * 2
    size = rng.choices(SIZES, k=1) * 2 if rng.random() < 0.3 else [rng.randint(1, 40) for _ in range(2)]
    stride = rng.choices((1, 2), k=2)
    padding = [rng.choice((0, (k - 1) // 2)) for k in kernel]
    ins, outs = rng.choices(CHANNELS, k=2)
    return (rng.randint(1, 6), ins, *size), (outs, ins, *kernel), (tuple(stride), tuple(padding))  # pyright: ignore


def wrong(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], stride: tuple[int, int], padding: tuple[int, int]
) -> bool:
    """Whether the integer convolution of random numbers is not float64's."""
    x = torch.randint(0, 256, x_shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    w = torch.randint(-128, 128, w_shape, dtype=torch.int8)
    x_step, w_step = torch.rand(1) + 0.1, torch.rand(len(w)) + 0.1
    operands = Operands(PendingCodes(x, 0.0, x_step), PendingCodes(w, 0.0, w_step))
    y = integer_convolution(operands, None, stride, padding, (1, 1), 1)
    exact = F.conv2d(x.double(), w.double(), None, stride, padding) * (x_step * w_step).double().view(-1, 1, 1)
    return not bool(((y - exact).abs() <= 1e-6 * (exact.abs() + 1)).all())


def main() -> None:
    """Parse, draw, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, stop, drawn, found = random.Random(args.seed), time.monotonic() + args.seconds, 0, []
    torch.manual_seed(args.seed)
    while time.monotonic() < stop:
        x_shape, w_shape, (stride, padding) = draw(rng)
        if not trusts(torch.empty(x_shape, device="meta"), w_shape[2:], stride, padding, (1, 1)):
            continue
        torch.set_num_threads(rng.choice((1, 2)))
        drawn += 1
        if wrong(x_shape, w_shape, stride, padding):
            found.append((x_shape, w_shape, stride, padding))
    print(f"{drawn} geometries, {len(found)} wrong", *found, sep="\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
