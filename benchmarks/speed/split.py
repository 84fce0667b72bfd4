"""First convolutions over blocks of pixels against the same ones as they are, in onnxruntime, one thread, W8A8.

    python benchmarks/speed/split.py --out benchmarks/speed/split.csv

Both files alternate in one process; CPU time of the second of two runs in a row. `written`: whether export splits it.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import onnx
import onnxruntime
import torch
from measure import write
from torch import nn

import bitwright as bw
from bitwright.deploy import split
from bitwright.deploy.bench import session

# out channels, kernel, stride, padding, image size
LAYERS = {
    "ResNet": (64, 7, 2, 3, 224),
    "MobileNet": (32, 3, 2, 1, 224),
    "ConvNeXt": (96, 4, 4, 0, 224),
    "ViT": (192, 16, 16, 0, 224),
    "small image": (16, 3, 2, 1, 32),
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, (out, kernel, stride, padding, size) in LAYERS.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, out, kernel, stride, padding), nn.ReLU(), nn.Conv2d(out, 8, 1)).eval()
        x = torch.randn(1, 3, size, size)
        bw.calibrate(bw.prepare(model, bw.rules("w8a8", ends=None)), [x]).eval()
        times: dict[str, list[float]] = {"blocks": [], "plain": []}
        with tempfile.TemporaryDirectory() as folder:
            paths = {kind: Path(folder) / f"{kind}.onnx" for kind in times}
            bw.export(model, paths["blocks"], x)
            written = "SpaceToDepth" in [n.op_type for n in onnx.load(str(paths["blocks"])).graph.node]
            with mock.patch.object(split, "LONG_ROW", 10**6):
                bw.export(model, paths["blocks"], x)
            with mock.patch.object(split, "FEW_CHANNELS", 0):
                bw.export(model, paths["plain"], x)
            sessions = {kind: session(path, 1, None)[0] for kind, path in paths.items()}
            for _ in range(args.rounds):
                for kind, each in sessions.items():
                    each.run(None, {"input": x.numpy()})
                    start = time.process_time()
                    each.run(None, {"input": x.numpy()})
                    times[kind].append(time.process_time() - start)
        ratios = [a / b for a, b in zip(times["blocks"], times["plain"], strict=True)]
        low, middle, high = (round(v, 3) for v in statistics.quantiles(ratios, n=4))
        shape = {"layer": name, "kernel": kernel, "stride": stride, "size": size, "written": written}
        found = {"ratio_median": middle, "ratio_q1": low, "ratio_q3": high}
        found |= {f"{kind}_us": round(1e6 * statistics.median(each), 1) for kind, each in times.items()}
        rows.append({**shape, **found, "rounds": args.rounds, "onnxruntime": onnxruntime.__version__})
        print(rows[-1], flush=True)
    write(rows, args.out)


if __name__ == "__main__":
    main()
