"""What BWRF's frozen partner takes of a ResNet-20's step, and how much of that its convolutions alone.

    python benchmarks/speed/partner.py --out benchmarks/speed/partner.csv

Passes alternate in one process; CPU time on one thread. `teacher`: the pass without gradient; `branches`: the forward
pass of all branches and its backward pass down to the blocks' outputs. `convolutions` is counted in a pass of its own,
operator by operator. float32 with contiguous images, and the recipes' setting: bfloat16, channels last.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import alternate, machine, write
from torch.utils._python_dispatch import TorchDispatchMode

from bitwright.methods.bwrf.partner import Partner
from bitwright.training.memory import keep_freed_memory
from bitwright.training.models import build_model

CONVOLUTIONS = ("aten::convolution", "aten::convolution_backward")


class Convolutions(TorchDispatchMode):
    """Counts the CPU seconds of convolutions, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.process_time()
        made = func(*args, **(kwargs or {}))
        self.seconds += (time.process_time() - start) * (func.name() in CONVOLUTIONS)
        return made


def passes(dtype: torch.dtype, batch: int) -> dict[str, Callable[[], object]]:
    """The partner's two passes by name."""
    torch.manual_seed(0)
    layout = torch.contiguous_format if dtype == torch.float32 else torch.channels_last
    x = torch.randn(batch, 3, 32, 32).to(memory_format=layout)
    partner = Partner(
        build_model("resnet20", num_classes=10, in_channels=3, image_size=32), ["layer1", "layer2", "layer3"]
    )
    partner.slim(x[:2])
    blocks = partner.plain(x)[1][:2]
    features = {k: h.to(dtype).contiguous(memory_format=layout).requires_grad_() for k, h in enumerate(blocks)}

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)

    def teacher() -> None:
        with autocast():
            partner.plain(x)

    def branches() -> None:
        with autocast():
            logits = partner.branches(x[:1], features)[1]
        torch.autograd.grad(torch.cat(list(logits.values())).float().square().sum(), list(features.values()))

    return {"teacher": teacher, "branches": branches}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        runs = passes(dtype, args.batch)
        times = alternate(runs, args.rounds)
        for name, run in runs.items():
            counted = []
            for _ in range(args.rounds):
                with Convolutions() as mode:
                    run()
                counted.append(mode.seconds)
            ms = {"ms": times[name], "convolutions_ms": counted}
            found = {k: round(1000 * statistics.median(v), 1) for k, v in ms.items()}
            rows.append({"dtype": str(dtype)[6:], "pass": name, **found, "rounds": args.rounds, **machine()})
            print(rows[-1], flush=True)
    write(rows, args.out)


if __name__ == "__main__":
    main()
