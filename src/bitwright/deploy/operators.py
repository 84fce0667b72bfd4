"""Where a file's time goes in its runtime, by operator."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import onnxruntime


def operator_shares(path: Path, inputs: dict[str, Any], threads: int, folder: Path, runs: int = 10) -> dict[str, float]:
    """Share of the run's time per operator of the optimized graph, largest first, summing to 1.

    The runtime's profiler slows every node by about a microsecond, so the sessions that are timed are others.

    Args:
        path: an ONNX file that runs. inputs: by name. threads: of the runtime.
        folder: where the profiler's file may lie. runs: profiled runs, after one that warms up and is left out.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for _ in range(runs + 1):
        session.run(None, inputs)
    events = json.loads(Path(session.end_profiling()).read_text())
    starts = [e["ts"] for e in events if e["name"] == "model_run"]
    since = sorted(starts)[1]
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= since:
            spent[event["args"]["op_name"]] += event["dur"]
    total = sum(spent.values())
    return {name: time / total for name, time in spent.most_common()} if total else {}
