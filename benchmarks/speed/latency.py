"""Is a latency budget met? What the table of single layers says of networks at mixed widths, and what they take.

    python benchmarks/speed/latency.py --rounds 31 --out benchmarks/speed/latency.csv

The native runtime, one thread, one image, processor time. Every layer is timed alone at 8/8 and 4/4 bits
(`bitwright.measure_latencies`); budgets lie between the networks with 4 and with 8 bits everywhere. Inside each
as many layers as may have 8 bits get them (`bitwright.costs.assignment.solve`, all layers worth the same), and the
networks are timed, alternating. `to_8`: of the network of 8 bits, as predicted and as measured; the milliseconds of
both are from different minutes, between which a busy machine changes its speed.
"""

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from measure import alternate, machine, ratio, write

import bitwright as bw
from bitwright.costs import cost_table
from bitwright.costs.assignment import make_rows, solve, total
from bitwright.runtime.timing import at_bits
from bitwright.training.models import build_model

NETS = {"vgg_small": 32, "torchvision/resnet18": 224}
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
CHOICES = [(4, 4), (8, 8)]


def network(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """Untrained, calibrated on noise, every sum on integers."""
    torch.manual_seed(0)
    size = NETS[name]
    model = build_model(name, num_classes=10, in_channels=3, image_size=size)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        model.train()(x)
    rules = bw.rules("w8a8")
    bw.prepare(model.eval(), [*rules, *bw.topology(model, x, rules=rules)])
    return bw.calibrate(model, [x]).eval(), x[:1]


def mixed(model: torch.nn.Module, pairs: dict[str, tuple[int, int]]) -> torch.nn.Module:
    """A copy with these (weight bits, input bits) by layer."""
    made = at_bits(model, 8, 8)
    for name, (w, a) in pairs.items():
        layer = made.get_submodule(name)
        layer.weight_quantizer.set_bits(w)  # pyright: ignore
        layer.input_quantizer.set_bits(a)  # pyright: ignore
    return made


def rows_of(name: str, rounds: int, folder: Path) -> list[dict[str, object]]:
    """One row per budget."""
    model, x = network(name)
    latencies = bw.measure_latencies(model, x, runs=rounds)
    layers = list(latencies.layers)
    rows = make_rows(
        cost_table(model, x, latencies=latencies), model, {n: i for i, n in enumerate(layers)}, "benchmark"
    )
    low, high = (total(rows, "latency", [pair] * len(layers)) for pair in CHOICES)
    sessions, predicted, eights = {}, {}, {}
    for share in SHARES:
        budget = {"latency": (low + share * (high - low)) * (1 + 1e-6)}
        pairs = solve(rows, [CHOICES] * len(layers), [[1.0, 0.0]] * len(layers), budget)
        assert pairs is not None
        path = folder / f"{share}.onnx"
        bw.export(mixed(model, dict(zip(layers, pairs, strict=True))), path, x)
        sessions[share] = bw.runtime.load(path)
        predicted[share], eights[share] = total(rows, "latency", pairs), pairs.count((8, 8))
    images = x.numpy()
    times = alternate({share: partial(s.run, images) for share, s in sessions.items()}, rounds)
    found = []
    for share in SHARES:
        measured = 1000 * statistics.median(times[share])
        row = {
            "network": name,
            "share": share,
            "layers": len(layers),
            "layers_of_8_bits": eights[share],
            "predicted_ms": round(predicted[share], 3),
            "measured_ms": round(measured, 3),
            "predicted_to_8": round(predicted[share] / predicted[SHARES[-1]], 3),
            **ratio(times[share], times[SHARES[-1]], "to_8"),
            "rounds": rounds,
            **machine(),
        }
        print({key: row[key] for key in list(row)[:8]}, flush=True)
        found.append(row)
    return found


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write([row for name in NETS for row in rows_of(name, args.rounds, Path(folder))], args.out)


if __name__ == "__main__":
    main()
