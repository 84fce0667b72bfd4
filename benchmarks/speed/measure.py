"""What the speed benchmarks share: alternating runs in one process, ratios with quartiles, CSV."""

import contextlib
import csv
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import bitwright as bw


def alternate(runs: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """CPU seconds of each run in each round; runs alternate, so that other work on the machine meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + warmup):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if i >= warmup:
                times[name].append(time.process_time() - start)
    return times


def ratio(times: list[float], base: list[float], name: str = "ratio") -> dict[str, float]:
    """Median and quartiles of the rounds' ratios."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(times, base, strict=True)], n=4)
    return {f"{name}_median": round(middle, 3), f"{name}_q1": round(low, 3), f"{name}_q3": round(high, 3)}


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


def machine() -> dict[str, str]:
    """Columns that say where a row comes from."""
    name = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return {"torch": torch.__version__, "cpu": name}


def write(rows: list[dict[str, Any]], path: Path | None) -> None:
    """Rows as CSV, where a file was asked for."""
    if path:
        with path.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
