"""Networks of convolutions over three axes: files of export against the float network, in onnxruntime, one thread.

    python benchmarks/speed/video.py --out benchmarks/speed/video.csv

torchvision's video networks at W8A8, default topology, weights as initialized, one clip of 8 frames of 64 x 64. Files
alternate in one process; CPU time.
"""

import argparse
import copy
import statistics
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import onnxruntime
import torch
from measure import alternate, machine, ratio, write

import bitwright as bw
from bitwright.deploy.bench import float_onnx, session
from bitwright.training.vision import import_torchvision

NETWORKS = ("r3d_18", "mc3_18", "r2plus1d_18")


def measure(name: str, rounds: int, folder: Path) -> dict:
    """One row."""
    torch.manual_seed(0)
    model = getattr(import_torchvision().models.video, name)().eval()
    clips = torch.randn(2, 3, 8, 64, 64)
    paths = {kind: folder / f"{kind}.onnx" for kind in ("integer", "float")}
    paths["float"].write_bytes(float_onnx(copy.deepcopy(model), clips[:1]))
    bw.prepare(model, bw.rules("w8a8") + bw.topology(model, clips))
    bw.calibrate(model, [clips]).eval()
    bw.snap_biases(model, clips)
    bw.export(model, paths["integer"], clips)
    found = bw.verify(model, paths["integer"], [clips])
    made, graph = session(paths["integer"], 1, folder / "run.onnx")
    assert graph is not None
    kinds = Counter(node.op_type for node in graph.graph.node)
    sessions = {"integer": made, "float": session(paths["float"], 1, None)[0]}
    feed = {"input": clips[:1].numpy()}
    times = alternate({kind: partial(each.run, None, feed) for kind, each in sessions.items()}, rounds)
    return {
        "network": name,
        **ratio(times["integer"], times["float"]),
        **{f"{kind}_ms": round(1000 * statistics.median(spent), 1) for kind, spent in times.items()},
        "integer_kernels": kinds["QLinearConv"] + kinds["MatMulIntegerToFloat"],
        "float_kernels": kinds["Conv"] + kinds["FusedConv"] + kinds["MatMul"] + kinds["Gemm"],
        "verified": found.ok,
        "rounds": rounds,
        "onnxruntime": onnxruntime.__version__,
        **machine("cpu"),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, args.rounds, Path(folder)))
        print(rows[-1], flush=True)
    write(rows, args.out)


if __name__ == "__main__":
    main()
