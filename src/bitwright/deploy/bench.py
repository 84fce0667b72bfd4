"""`bench`: how fast the file is beside the float model, in the same runtime, in one run."""

import copy
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from bitwright.deploy.capture import first_line, quiet_export
from bitwright.deploy.packing import OPSET
from bitwright.deploy.probe import read
from bitwright.errors import BitwrightError

INTEGER = {
    *("QLinearConv", "ConvInteger", "NhwcFusedQLinearConv"),
    *("MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger", "DynamicQuantizeMatMul", "QGemm"),
}
FLOAT = {"Conv", "FusedConv", "NhwcFusedConv", "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulNBits", "Attention"}


@dataclass(frozen=True)
class Latency:
    """Milliseconds a run: median and quartiles."""

    median: float
    lower: float
    upper: float

    @staticmethod
    def of(seconds: list[float]) -> "Latency":
        """Of at least two timings in seconds."""
        lower, median, upper = statistics.quantiles([1000 * s for s in seconds], n=4)
        return Latency(median, lower, upper)


@dataclass(frozen=True)
class BenchReport:
    """Latency of a file and of its float partner, batch and threads alike.

    ratio: median of file ÷ float over neighbouring runs, which other load on the machine moves least.
    integer_kernels, float_kernels: how many convolutions and products of the optimized graph run on which, by operator.
    """

    file: Latency
    float_model: Latency
    ratio: float
    batch: int
    threads: int
    runs: int
    integer_kernels: dict[str, int]
    float_kernels: dict[str, int]

    @property
    def integer_share(self) -> float:
        """Share of convolutions and products on integer kernels, in [0, 1]."""
        whole, rest = sum(self.integer_kernels.values()), sum(self.float_kernels.values())
        return whole / max(whole + rest, 1)

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**asdict(self), "integer_share": self.integer_share}


def bench(
    path: str | Path, float_model: nn.Module, example: Tensor, threads: int = 1, *, runs: int = 30
) -> BenchReport:
    """Time the file and the float model in onnxruntime, alternating, at default graph optimisation.

    Args:
        path: a file written by `export`.
        float_model: the model before `prepare` (or any other), exported here in evaluation mode.
        example: one input batch; its size is the batch size timed.
        threads: of the runtime.
        runs: timed runs of each, at least 2, after three that warm up.

    Raises:
        BitwrightError: the file cannot be read or run, the float model cannot be exported, or an argument is bad.
    """
    if threads < 1 or runs < 2:
        raise BitwrightError(f"bench: threads={threads}, runs={runs}; at least 1 thread and 2 runs are needed")
    path = Path(path)
    read(path)
    x = {"input": example.cpu().numpy()}
    with tempfile.TemporaryDirectory() as folder:
        partner = Path(folder) / "float.onnx"
        partner.write_bytes(float_onnx(float_model, example.cpu()))
        try:
            ours, optimized = session(path, threads, Path(folder) / "optimized.onnx")
            theirs, _ = session(partner, threads, None)
            for _ in range(3):
                ours.run(None, x)
                theirs.run(None, x)
        except Exception as error:
            raise BitwrightError(f"{path}: onnxruntime cannot run it on this input: {first_line(error)}") from error
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(runs):
            for log, each in zip(times, (ours, theirs), strict=True):
                start = time.perf_counter()
                each.run(None, x)
                log.append(time.perf_counter() - start)
    kinds = Counter(node.op_type for node in optimized.graph.node) if optimized else Counter()
    return BenchReport(
        Latency.of(times[0]),
        Latency.of(times[1]),
        statistics.median(a / b for a, b in zip(*times, strict=True)),
        example.shape[0],
        threads,
        runs,
        {k: kinds[k] for k in sorted(INTEGER & kinds.keys())},
        {k: kinds[k] for k in sorted(FLOAT & kinds.keys())},
    )


def session(
    path: Path, threads: int, optimized: Path | None
) -> tuple[onnxruntime.InferenceSession, onnx.ModelProto | None]:
    """A session, and the graph that it really runs where a place for it is given."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # saving the optimized graph warns that it belongs to this machine, which it does
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    made = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return made, onnx.load(str(optimized)) if optimized is not None else None


def float_onnx(model: nn.Module, example: Tensor) -> bytes:
    """The float model as an ONNX file."""
    twin = copy.deepcopy(model).cpu().eval()
    try:
        with quiet_export(), torch.no_grad():
            program = torch.onnx.export(
                twin,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["input"],
                verbose=False,
            )
    except Exception as error:
        reason = first_line(error.__cause__ or error)
        raise BitwrightError(f"{type(model).__name__}: torch.onnx.export failed: {reason}") from error
    assert program is not None
    return program.model_proto.SerializeToString()
