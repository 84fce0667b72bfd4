"""Runs an hour when many small ones share a machine: one sweep, with one, two, ... runs at a time.

    python benchmarks/speed/side_by_side.py --jobs 1 2 --epochs 5 --rounds 2 --out benchmarks/speed/side-by-side.csv

Every row trains the same runs (`digits-w4a4`, shortened, a seed each) with `bitwright sweep`, from an empty folder and
a float partner that is trained before, and takes the wall time of the whole command, start of its processes included.
Rows alternate over the rounds. On a GPU, jobs are processes that share it.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from measure import write

FIELDS = ["device", "jobs", "runs", "runs_per_hour", "q1", "q3", "times_one_job", "rounds", "cores", "torch"]


def sweep(folder: Path, seeds: int, jobs: int, epochs: int, device: str) -> float:
    """Seconds of one sweep over `seeds` seeds."""
    file, out = folder / "sweep.yaml", folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    overrides = {"schedule.epochs": epochs, "device": device}
    made = {"recipe": "digits-w4a4", "overrides": overrides, "seeds": list(range(seeds)), "jobs": jobs}
    file.write_text(yaml.safe_dump(made))
    line = [sys.executable, "-m", "bitwright", "sweep", str(file), "--out", str(out)]
    caches = {**os.environ, "BITWRIGHT_CACHE": str(folder / "cache")}
    start = time.perf_counter()
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=caches)
    if done.returncode:
        raise SystemExit(done.stderr.strip() or done.stdout.strip())
    return time.perf_counter() - start


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rates: dict[int, list[float]] = {jobs: [] for jobs in args.jobs}
    with tempfile.TemporaryDirectory() as folder:
        sweep(Path(folder), 1, 1, args.epochs, args.device)  # trains the float partner
        for _ in range(args.rounds):
            for jobs in args.jobs:
                rates[jobs].append(3600 * args.runs / sweep(Path(folder), args.runs, jobs, args.epochs, args.device))
    rows = []
    for jobs, found in rates.items():
        low, middle, high = statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
        gain = statistics.median(found) / statistics.median(rates[args.jobs[0]])
        device = args.device if args.device == "cpu" else torch.cuda.get_device_name()
        numbers = [round(v, 1) for v in (middle, low, high)]
        about = [args.rounds, os.cpu_count(), torch.__version__]
        row = [device, jobs, args.runs, *numbers, round(gain, 2), *about]
        rows.append(dict(zip(FIELDS, row, strict=True)))
        print(rows[-1])
    write(rows, args.out)


if __name__ == "__main__":
    main()
