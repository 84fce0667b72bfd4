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


def clock(device: str = "cpu") -> float:
    """Seconds: of the process's CPU time; on a GPU of the wall's, after all work given to it is done."""
    if torch.device(device).type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def alternate(
    runs: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds (`clock`) of each run in each round; runs alternate: other work on the machine meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + warmup):
        for name, run in runs.items():
            start = clock(device)
            run()
            if i >= warmup:
                times[name].append(clock(device) - start)
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


def machine(device: str = "cpu") -> dict[str, str]:
    """Columns that say where a row comes from; `cpu` holds the GPU's name for figures of a GPU."""
    if torch.device(device).type != "cpu":
        return {"torch": torch.__version__, "cpu": torch.cuda.get_device_name(device)}
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
