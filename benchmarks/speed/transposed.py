"""Transposed convolutions as export writes them against two other ways, in onnxruntime, one thread, W8A8.

    python benchmarks/speed/transposed.py --out benchmarks/speed/transposed.csv

`phases`: an integer convolution of all phases and DepthToSpace, from a file of `bw.export`. `float`: ConvTranspose of
dequantized numbers. `stuffed`: zeros between the pixels' codes and an integer convolution. All quantize their input and
their output to 8 bits. They alternate in one process; CPU time of the second of two runs in a row.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from measure import write
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import bitwright as bw
from bitwright.deploy.bench import session

# in, out channels, kernel, stride, padding, image size
LAYERS = {
    "U-Net": (64, 32, 2, 2, 0, 32),
    "U-Net, deep": (256, 128, 2, 2, 0, 16),
    "autoencoder": (64, 32, 3, 2, 1, 32),
    "generator": (64, 32, 4, 2, 1, 32),
    "generator, deep": (256, 128, 4, 2, 1, 16),
}


def by_hand(kind: str, inputs: int, out: int, kernel: int, stride: int, padding: int, size: int) -> bytes:
    """The file of one of the other ways, with random weights."""
    weight = np.random.default_rng(0).integers(-127, 127, (inputs, out, kernel, kernel)).astype(np.int8)
    numbers = {"s": np.float32(0.02), "z": np.uint8(128), "w": weight, "ws": np.full(out, 0.01, np.float32)}
    nodes = [("QuantizeLinear", ["input", "s", "z"], "q", {})]
    window, kept = {"strides": [stride] * 2, "pads": [padding] * 4}, "q"
    if kind == "stuffed":
        numbers["w"] = np.ascontiguousarray(weight.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1])
        numbers["apart"] = np.array([0, inputs, size, 1, size, 1])
        numbers["zeros"] = np.array([0] * 9 + [stride - 1, 0, stride - 1])
        numbers["wide"] = np.array([0, inputs, size * stride, size * stride])
        nodes += [("Reshape", ["q", "apart"], "a", {}), ("Pad", ["a", "zeros", "z"], "b", {})]
        nodes.append(("Reshape", ["b", "wide"], "c", {}))
        ends = kernel - 1 - padding
        window, kept = {"pads": [ends, ends, ends - stride + 1, ends - stride + 1]}, "c"
    nodes.append(("DequantizeLinear", [kept, "s", "z"], "x", {}))
    nodes.append(("DequantizeLinear", ["w", "ws"], "values", {"axis": 0 if kind == "stuffed" else 1}))
    nodes.append(("Conv" if kind == "stuffed" else "ConvTranspose", ["x", "values"], "sums", window))
    nodes.append(("QuantizeLinear", ["sums", "s", "z"], "codes", {}))
    nodes.append(("DequantizeLinear", ["codes", "s", "z"], "logits", {}))
    graph = helper.make_graph(
        [helper.make_node(op, given, [made], **more) for op, given, made, more in nodes],
        "layer",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", inputs, size, size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in numbers.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def exported(path: Path, inputs: int, out: int, kernel: int, stride: int, padding: int, x: torch.Tensor) -> None:
    """The file of export."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(inputs, out, kernel, stride, padding, bias=False)).eval()
    spec = bw.QuantizerSpec(bits=8)
    bw.prepare(model, [*bw.rules("w8a8"), bw.Rule(match="0", output=spec)])
    bw.calibrate(model, [x])
    bw.export(model, path, x)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, (inputs, out, kernel, stride, padding, size) in LAYERS.items():
        x = torch.randn(1, inputs, size, size)
        times: dict[str, list[float]] = {"phases": [], "float": [], "stuffed": []}
        with tempfile.TemporaryDirectory() as folder:
            paths = {kind: Path(folder) / f"{kind}.onnx" for kind in times}
            exported(paths["phases"], inputs, out, kernel, stride, padding, x)
            for kind in ("float", "stuffed"):
                paths[kind].write_bytes(by_hand(kind, inputs, out, kernel, stride, padding, size))
            sessions = {kind: session(path, 1, None)[0] for kind, path in paths.items()}
            for _ in range(args.rounds):
                for kind, each in sessions.items():
                    each.run(None, {"input": x.numpy()})
                    start = time.process_time()
                    each.run(None, {"input": x.numpy()})
                    times[kind].append(time.process_time() - start)
        row = {"layer": name, "channels": f"{inputs} to {out}", "kernel": kernel, "stride": stride, "size": size}
        for kind in ("float", "stuffed"):
            ratios = [a / b for a, b in zip(times["phases"], times[kind], strict=True)]
            row[f"to_{kind}"] = round(statistics.median(ratios), 3)
        row |= {f"{kind}_us": round(1e6 * statistics.median(each), 1) for kind, each in times.items()}
        rows.append({**row, "rounds": args.rounds, "onnxruntime": onnxruntime.__version__})
        print(rows[-1], flush=True)
    write(rows, args.out)


if __name__ == "__main__":
    main()
