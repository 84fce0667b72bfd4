"""What `keep_freed_memory` is worth: steps in processes that keep what they free, and in ones that do not.

    python benchmarks/speed/memory.py --out benchmarks/speed/memory.csv

ResNet-20, batch 128, one thread, CPU time; processes alternate, since the setting is for good. `faults`: page faults a
step; `peak`: the process's largest resident size in MB.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from measure import machine, ratio, write
from step import builders

from bitwright.training.memory import keep_freed_memory
from bitwright.training.models import build_model

STEPS = 8


def measure(case: str, keep: bool) -> None:
    """Print seconds and page faults a step and the peak of this process as JSON."""
    if keep:
        keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))
    step = builders(build_model("resnet20", num_classes=10, in_channels=3, image_size=32), "w4a4", x)[case]()
    for _ in range(3):
        step(x, y)
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(STEPS):
        step(x, y)
    seconds, after = (time.process_time() - start) / STEPS, resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps([seconds, (after.ru_minflt - before) / STEPS, after.ru_maxrss / 1024]))


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", choices=["float", "lsq"], help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        measure(args.case, args.keep)
        return
    cases = [(case, keep) for case in ("float", "lsq") for keep in (False, True)]
    found: dict[tuple[str, bool], list[list[float]]] = {key: [] for key in cases}
    for _ in range(args.rounds):
        for case, keep in cases:
            command = [sys.executable, __file__, "--case", case, *(["--keep"] if keep else [])]
            found[case, keep].append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
    rows = []
    for case, keep in cases:
        seconds, faults, peak = (list(column) for column in zip(*found[case, keep], strict=True))
        row = {"case": case, "kept": keep, **ratio(seconds, [r[0] for r in found[case, False]])}
        row |= {"ms": round(1000 * statistics.median(seconds), 1), "faults": round(statistics.median(faults))}
        rows.append({**row, "peak": round(statistics.median(peak)), "rounds": args.rounds, **machine()})
        print(rows[-1])
    write(rows, args.out)


if __name__ == "__main__":
    main()
