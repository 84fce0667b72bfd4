"""The native runtime beside onnxruntime, one thread: single 3x3 convolutions and a whole ResNet-18 at 224x224, W4A4.

    python benchmarks/speed/runtime.py --rounds 31 --out benchmarks/speed/runtime.csv

Cases alternate, so a busy machine slows all of them alike; the time is the process's CPU time. A ratio is that of one
round's two times; the table gives medians, and quartiles of the ratios. `float` and `int8` are onnxruntime: a float
convolution and QLinearConv, the float network and the same quantized file. Outputs are compared before any timing.
"""

import argparse
import csv
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

import bitwright as bw
from bitwright.deploy.bench import float_onnx
from bitwright.runtime import load
from bitwright.runtime.build import choose
from bitwright.training.models import build_model

LAYERS = ((64, 56), (128, 28), (256, 14), (512, 7))
INPUT, WEIGHT, OUTPUT = np.float32(0.1), np.float32(0.01), np.float32(0.37)


def onnx_session(model: bytes) -> Callable[[np.ndarray], np.ndarray]:
    """A one-threaded session of onnxruntime as a function."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: np.asarray(session.run(None, {name: x})[0])


def layer_model(weight: np.ndarray, size: int, kind: str) -> bytes:
    """A convolution: "float", "int8" (codes in and out), or "file" (floats in and out, as `export` writes it)."""
    out, inside = weight.shape[:2]
    constants = {"xs": INPUT, "ws": np.full(out, WEIGHT), "ys": OUTPUT, "z": np.uint8(0), "wz": np.zeros(out, np.int8)}
    constants |= {"w": weight if kind != "float" else weight.astype(np.float32), "hi": np.uint8(15)}
    element = TensorProto.UINT8 if kind == "int8" else TensorProto.FLOAT
    if kind == "float":
        nodes = [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)]
    elif kind == "int8":
        inputs = ["x", "xs", "z", "w", "ws", "wz", "ys", "z"]
        nodes = [helper.make_node("QLinearConv", inputs, ["y"], pads=[1] * 4)]
    else:
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "xs", "z"], ["q"]),
            helper.make_node("Clip", ["q", "", "hi"], ["k"]),
            helper.make_node("DequantizeLinear", ["k", "xs", "z"], ["d"]),
            helper.make_node("DequantizeLinear", ["w", "ws"], ["dw"], axis=0),
            helper.make_node("Conv", ["d", "dw"], ["c"], pads=[1] * 4),
            helper.make_node("QuantizeLinear", ["c", "ys", "z"], ["cq"]),
            helper.make_node("DequantizeLinear", ["cq", "ys", "z"], ["y"]),
        ]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", element, [1, inside, size, size])],
        [helper.make_tensor_value_info("y", element, [1, out, size, size])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def layer_cases(channels: int, size: int, folder: Path) -> dict[str, Callable[[], object]]:
    """The convolution alone: its operator with Winograd and without, QLinearConv, a float convolution."""
    rng = np.random.default_rng(channels)
    weight = rng.integers(-8, 8, (channels, channels, 3, 3)).astype(np.int8)
    codes = rng.integers(0, 16, (1, channels, size, size)).astype(np.uint8)
    floats = codes.astype(np.float32) * INPUT
    path = folder / "layer.onnx"
    path.write_bytes(layer_model(weight, size, "file"))
    int8, single = onnx_session(layer_model(weight, size, "int8")), onnx_session(layer_model(weight, size, "float"))
    found: dict[str, Callable[[], object]] = {}
    for name, winograd in (("ours", True), ("ours-direct", False)):
        session = load(path, winograd=winograd)
        out = np.rint(session.run(floats) / OUTPUT).astype(np.uint8)
        np.testing.assert_array_equal(out, int8(codes))
        found[name] = session.step_alone(floats, "c")
    return found | {"int8": lambda: int8(codes), "float": lambda: single(floats)}


def network_cases(folder: Path) -> dict[str, Callable[[], object]]:
    """ResNet-18 with every sum and convolution on integers; untrained, calibrated on noise."""
    torch.manual_seed(0)
    model = build_model("torchvision/resnet18", num_classes=1000, in_channels=3, image_size=224)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        model.train()(x)
    single = onnx_session(float_onnx(model.eval(), x[:1]))
    bw.prepare(model, [*bw.rules("w4a4"), *bw.topology(model, x)])
    bw.calibrate(model, [x]).eval()
    bw.snap_biases(model, x)
    path = folder / "network.onnx"
    bw.export(model, path, x)
    int8, one = onnx_session(path.read_bytes()), x[:1].numpy()
    found: dict[str, Callable[[], object]] = {}
    for name, winograd in (("ours", True), ("ours-direct", False)):
        session = load(path, winograd=winograd)
        if session.run(one).argmax() != int8(one).argmax():
            raise SystemExit("the runtimes disagree")
        found[name] = lambda session=session: session.run(one)
    return found | {"int8": lambda: int8(one), "float": lambda: single(one)}


def measure(cases: dict[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Microseconds a call, CPU time; cases alternate, two rounds warm up."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 2):
        for name, call in cases.items():
            start = time.process_time()
            for _ in range(repeats):
                call()
            times[name].append(1e6 * (time.process_time() - start) / repeats)
    return {name: log[2:] for name, log in times.items()}


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--no-network", action="store_true", help="single convolutions only")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in (*LAYERS, *([] if args.no_network else [None])):
            if size is None:
                what, cases, repeats = "resnet18 224x224", network_cases(Path(folder)), 1
            else:
                what, cases, repeats = f"conv {size[0]}@{size[1]}x{size[1]}", layer_cases(*size, Path(folder)), 10
            times = measure(cases, args.rounds, repeats)
            for name in ("ours", "ours-direct"):
                row: dict[str, object] = {"what": what, "case": name, "us": round(statistics.median(times[name]), 1)}
                for base in ("int8", "float"):
                    ratios = [a / b for a, b in zip(times[name], times[base], strict=True)]
                    low, middle, high = (round(q, 3) for q in statistics.quantiles(ratios, n=4))
                    row[f"{base}_us"] = round(statistics.median(times[base]), 1)
                    row |= {f"to_{base}": middle, f"to_{base}_q1": low, f"to_{base}_q3": high}
                rows.append({**row, "rounds": args.rounds, "kernels": choose(None)})
                print(rows[-1], flush=True)
    for row in rows:
        row |= {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__, "cpu": cpu_name()}
    if args.out:
        with args.out.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
