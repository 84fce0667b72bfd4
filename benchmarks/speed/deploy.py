"""Latency of exported files, by topology: ratios to the float network in onnxruntime, one thread, one process.

    python benchmarks/speed/deploy.py --out benchmarks/speed/deploy-resnet18.csv

Networks keep the weights that they are initialized with, calibrated on random data: latency does not depend on values.
The float network and all files alternate, so a busy machine slows all of them alike; each runs twice and the second
run's CPU time counts.
A ratio is that of one round's two times; the table gives its median and quartiles over the rounds.
"""

import argparse
import copy
import platform
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import onnxruntime
import torch
from measure import write
from torch import nn

import bitwright as bw
from bitwright.deploy.bench import FLOAT, INTEGER, float_onnx, session
from bitwright.topology import TOPOLOGIES
from bitwright.training.models import build_model


def exported(model: nn.Module, bits: str, kind: str, x: torch.Tensor, path: Path) -> bool:
    """Write the file of `model` at `bits` in a topology; returns whether it gives the network's predictions."""
    made, rules = copy.deepcopy(model), bw.rules(bits)
    bw.prepare(made, rules + bw.topology(made, x, kind, rules=rules))  # pyright: ignore[reportArgumentType]
    bw.calibrate(made, [torch.randn(4, *x.shape[1:])]).eval()
    bw.snap_biases(made, x)
    bw.export(made, path, x)
    return bw.verify(made, path, [x]).ok


def main() -> None:
    """Parse, export, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="torchvision/resnet18")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--bits", nargs="+", default=["w4a4", "w8a8"])
    parser.add_argument("--topologies", nargs="+", default=list(TOPOLOGIES))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_model(args.model, num_classes=1000, in_channels=3, image_size=args.size).train()
    with torch.no_grad():  # norms that fit their inputs, so that codes are spread as in a trained network
        for _ in range(2):
            model(torch.randn(8, 3, min(args.size, 64), min(args.size, 64)))
    x = torch.randn(1, 3, args.size, args.size)
    sessions, kernels, ok = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        float_file = Path(folder) / "float.onnx"
        float_file.write_bytes(float_onnx(model, x))
        sessions["float", ""], _ = session(float_file, 1, None)
        for bits in args.bits:
            for kind in args.topologies:
                path = Path(folder) / f"{bits}-{kind}.onnx"
                ok[bits, kind] = exported(model.eval(), bits, kind, x, path)
                sessions[bits, kind], graph = session(path, 1, Path(folder) / "optimized.onnx")
                assert graph is not None
                kernels[bits, kind] = Counter(node.op_type for node in graph.graph.node)
        times: dict[tuple[str, str], list[float]] = {key: [] for key in sessions}
        for turn in range(args.rounds + 3):
            for key, each in sessions.items():
                each.run(None, {"input": x.numpy()})  # weights into the cache, where a network that serves has them
                start = time.process_time()
                each.run(None, {"input": x.numpy()})
                if turn >= 3:
                    times[key].append(time.process_time() - start)
    rows = []
    for (bits, kind), found in kernels.items():
        ratios = [a / b for a, b in zip(times[bits, kind], times["float", ""], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "model": args.model,
                "size": args.size,
                "bits": bits,
                "topology": kind,
                "ratio_median": round(middle, 3),
                "ratio_q1": round(low, 3),
                "ratio_q3": round(high, 3),
                "ms": round(1000 * statistics.median(times[bits, kind]), 2),
                "float_ms": round(1000 * statistics.median(times["float", ""]), 2),
                "integer_kernels": sum(found[k] for k in INTEGER),
                "float_kernels": sum(found[k] for k in FLOAT),
                "verified": ok[bits, kind],
                "rounds": args.rounds,
                "onnxruntime": onnxruntime.__version__,
                "cpu": platform.processor() or platform.machine(),
            }
        )
        print({k: v for k, v in rows[-1].items() if k not in ("model", "size", "rounds", "onnxruntime", "cpu")})
    write(rows, args.out)


if __name__ == "__main__":
    main()
