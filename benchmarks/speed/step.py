"""Price of a quantization-aware training step: ratios to the float step of the same network, in the same process.

    python benchmarks/speed/step.py --model resnet20 --batch 128 --repeats 15 --out benchmarks/speed/step-resnet20.csv

Cases alternate, so a busy machine slows all of them alike; the time is the process's CPU time on one thread. A ratio
is that of one round's two times; the table gives its median and quartiles over the rounds. `saved` is the bytes kept
for the backward pass, counted by saved-tensor hooks (parameters left out), as a ratio to the float step's.
"""

import argparse
import contextlib
import copy
import csv
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import bitwright as bw
from bitwright import kernels
from bitwright.training.models import build_model

SIZES = {"resnet8": 32, "resnet20": 32, "torchvision/resnet18": 224, "timm/vit_tiny_patch16_224": 224}


def quantized(model: nn.Module, bits: str, x: torch.Tensor) -> nn.Module:
    """A prepared and calibrated copy of `model`."""
    made = bw.prepare(copy.deepcopy(model), bw.rules(bits))
    return bw.calibrate(made, [x[:16]])


def make_step(model: nn.Module, methods: list[bw.Method] | None = None, compiled: bool = False) -> bw.Step:
    """A `Step` with plain SGD in training mode."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    run = torch.compile(model) if compiled else model
    return bw.Step(run, F.cross_entropy, optimizer, methods or [])


def saved_bytes(step: bw.Step, x: torch.Tensor, y: torch.Tensor) -> int:
    """Bytes of distinct storages saved by one forward pass, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*step.model.parameters(), *step.model.buffers())}
    seen: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step.forward_loss(bw.Batch(x, y))
    return sum(seen.values())


def cases(model: nn.Module, bits: str, x: torch.Tensor, wanted: list[str]) -> dict[str, Callable[[], bw.Step]]:
    """Builders by name."""

    def bwrf(sample: bool) -> bw.Step:
        from bitwright.methods.bwrf import BWRF

        student = quantized(model, bits, x)
        return make_step(student, [BWRF(student, copy.deepcopy(model), sample=sample)])

    def kd() -> bw.Step:
        return make_step(quantized(model, bits, x), [bw.KD(copy.deepcopy(model))])

    found: dict[str, Callable[[], bw.Step]] = {
        "float": lambda: make_step(copy.deepcopy(model)),
        "lsq": lambda: make_step(quantized(model, bits, x)),
        "lsq-reference": lambda: make_step(quantized(model, bits, x)),
        "float-compiled": lambda: make_step(copy.deepcopy(model), compiled=True),
        "lsq-compiled": lambda: make_step(quantized(model, bits, x), compiled=True),
        "kd": kd,
        "bwrf": lambda: bwrf(False),
        "bwrf-sampled": lambda: bwrf(True),
    }
    return {k: found[k] for k in ["float", *[w for w in wanted if w != "float"]]}


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SIZES), default="resnet20")
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--cases", nargs="+", default=["lsq", "lsq-reference", "kd", "bwrf", "bwrf-sampled"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    size = SIZES[args.model]
    model = build_model(args.model, num_classes=10, in_channels=3, image_size=size)
    x, y = torch.randn(args.batch, 3, size, size), torch.randint(0, 10, (args.batch,))
    steps = {name: build() for name, build in cases(model, args.bits, x, args.cases).items()}
    contexts = {name: kernels.reference_only if "reference" in name else contextlib.nullcontext for name in steps}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats + 2):
        for name, step in steps.items():
            with contexts[name]():
                start = time.process_time()
                step(x, y)
                times[name].append(time.process_time() - start)
    rows = []
    base = times["float"][2:]
    memory = {}
    for name, step in steps.items():
        with contexts[name]():
            memory[name] = saved_bytes(step, x, y)
    for name in steps:
        ratios = [a / b for a, b in zip(times[name][2:], base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "model": args.model,
                "bits": args.bits,
                "batch": args.batch,
                "case": name,
                "ratio_median": round(middle, 3),
                "ratio_q1": round(low, 3),
                "ratio_q3": round(high, 3),
                "saved": round(memory[name] / memory["float"], 3),
                "ms": round(1000 * statistics.median(times[name][2:]), 1),
                "rounds": args.repeats,
                "torch": torch.__version__,
                "cpu": platform.processor() or platform.machine(),
            }
        )
        print({k: rows[-1][k] for k in ("case", "ratio_median", "ratio_q1", "ratio_q3", "saved", "ms")})
    if args.out:
        with args.out.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
