"""The table of latencies that a recipe's budget names, measured on this machine."""

import copy
from pathlib import Path

from torch import nn

from bitwright.calibrate import calibrate
from bitwright.costs import LatencyTable
from bitwright.errors import BitwrightError
from bitwright.prepare import quantizers
from bitwright.training.checkpoint import write_atomic
from bitwright.training.data import Dataset


def write_latencies(model: nn.Module, dataset: Dataset, path: Path) -> LatencyTable:
    """Measure (`bitwright.measure_latencies`, one image) and write the table as CSV; returns it.

    Args:
        model: prepared; calibrated here, on a copy, where it is not.

    Raises:
        BitwrightError: the model has no quantizers or cannot be exported, or the file cannot be written.
    """
    from bitwright.runtime.timing import measure_latencies

    found = quantizers(model)
    if not found:
        raise BitwrightError("--latencies: the network is float; give a recipe with bits")
    model = copy.deepcopy(model).cpu().eval()
    if not all(bool(q.calibrated) for q in found.values()):
        calibrate(model, dataset.calibration_batches(seed=0, batch_size=32, count=2, device="cpu"))
    example = next(iter(dataset.test_batches(batch_size=1, device="cpu")))[0]
    table = measure_latencies(model, example)
    write_atomic(path, table.to_csv())
    return table
