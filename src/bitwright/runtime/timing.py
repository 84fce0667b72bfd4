"""How long every layer takes in the native runtime at several bits: the table of a latency budget."""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from bitwright.costs.latency import LatencyTable
from bitwright.deploy.export import export
from bitwright.errors import BitwrightError
from bitwright.prepare import quant_layers
from bitwright.runtime.session import load
from bitwright.spec import MAX_BITS, MIN_BITS

# The runtime's kernels differ at 4 bits: Winograd's operands fit a byte from there down.
PAIRS = ((8, 8), (4, 4))

K = TypeVar("K")


def measure_latencies(
    model: nn.Module, example: Tensor, *, pairs: Sequence[tuple[int, int]] = PAIRS, runs: int = 30
) -> LatencyTable:
    """Times each layer and the whole network with every layer at each pair of bits, in `bitwright.runtime`.

    One thread, in processor time, which other load on the machine moves least; layers and networks alternate. A layer
    alone finds its operands in the cache, so that the rest, what the network takes beyond the sum of its layers,
    has the memory's share as well.

    Args:
        model: prepared and calibrated (its weights do not matter); it is not changed.
        example: one input batch, of the size to be timed.
        pairs: (weight bits, input bits) to measure. Default 8/8 and 4/4, between which the runtime's kernels change.
        runs: timed runs of everything, at least 1, after one that warms up.

    Raises:
        BitwrightError: a pair is no pair of bit-widths, the model cannot be exported, or nothing of it runs on
            kernels of the native runtime.
    """
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(b, int) and MIN_BITS <= b <= MAX_BITS for b in pair):
            raise BitwrightError(f"latencies: pairs={pair!r} is not accepted; use two bit-widths, 1 to 8")
    names = list(quant_layers(model))
    calls: dict[tuple[str | None, tuple[int, int]], Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for pair in pairs:
            path = Path(folder) / f"{pair[0]}-{pair[1]}.onnx"
            export(at_bits(model, *pair), path, example)
            session, x = load(path), example.cpu().numpy()
            calls[None, pair] = lambda session=session, x=x: session.run(x)
            native = {row["layer"] for row in session.describe() if row["op"] == "Conv"}
            for name in names:
                if name in native:
                    calls[name, pair] = session.step_alone(x, name)
        times = processor_times(calls, runs)
    found = {name: {pair: t for (n, pair), t in times.items() if n == name} for name in names}
    layers = {name: entries for name, entries in found.items() if entries}
    if not layers:
        raise BitwrightError("latencies: no layer of this network runs on a kernel of the native runtime")
    beyond = [times[None, pair] - sum(entries.get(pair, 0.0) for entries in layers.values()) for pair in pairs]
    return LatencyTable(layers, max(statistics.mean(beyond), 0.0))


def at_bits(model: nn.Module, weight_bits: int, input_bits: int) -> nn.Module:
    """A copy of `model` with all layers at these bits; quantizers of outputs keep theirs."""
    model = copy.deepcopy(model).eval()
    for layer in quant_layers(model).values():
        for slots, bits in ((layer.weight_slots, weight_bits), (layer.input_slots, input_bits)):
            for quantizer in (layer.quantizers().get(slot) for slot in slots):
                if quantizer is not None:
                    quantizer.set_bits(bits)
    return model


def processor_times(calls: dict[K, Callable[[], object]], runs: int) -> dict[K, float]:
    """Milliseconds of processor time a call: medians over `runs` rounds in which all take turns."""
    times: dict[K, list[float]] = {key: [] for key in calls}
    for _ in range(runs + 1):
        for key, call in calls.items():
            start = time.process_time()
            call()
            times[key].append(1000 * (time.process_time() - start))
    return {key: statistics.median(each[1:]) for key, each in times.items()}
