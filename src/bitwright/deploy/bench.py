"""`bench`: how fast the file is beside the float model and the runtime's own quantization of it, in one run."""

import contextlib
import copy
import functools
import importlib
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from bitwright.batches import example_of, one_tensor
from bitwright.deploy.capture import first_line, quiet_export
from bitwright.deploy.operators import operator_shares
from bitwright.deploy.packing import OPSET
from bitwright.deploy.probe import read
from bitwright.deploy.static import quantize
from bitwright.deploy.targets import target_of
from bitwright.deploy.verify import opener_of
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
    """Latency of a file, of its float partner and of the runtime's own 8-bit form of that, batch and threads alike.

    static: the float model after onnxruntime's static post-training quantization; None where that tool fails.
    ratio, static_ratio: median of file ÷ float and of file ÷ static over neighbouring runs, which other load on the
    machine moves least.
    operators: share of the file's time per operator, largest first.
    integer_kernels, float_kernels: how many convolutions and products of the optimized graph run on which, by operator.
    """

    file: Latency
    float_model: Latency
    static: Latency | None
    ratio: float
    static_ratio: float | None
    operators: dict[str, float]
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
    path: str | Path,
    float_model: nn.Module,
    example: Any,
    threads: int = 1,
    *,
    runs: int = 30,
    runtime: str = "default",
) -> BenchReport:
    """Time the file, the float model and its static quantization, alternating, at default settings.

    Args:
        path: a file written by `export`.
        float_model: the model before `prepare` (or any other), exported here in evaluation mode.
        example: one input batch; its size is the batch size timed.
        threads: of the runtime.
        runs: timed runs of each, at least 2, after three that warm up.
        runtime: what runs the file: "default", onnxruntime, or "native", `bitwright.runtime`, beside the other two in
            onnxruntime. The native one tells no time by operator.

    Raises:
        BitwrightError: `runtime` is unknown or cannot run the file; the file cannot be read or run, the float model
            cannot be exported, or an argument is bad.
    """
    if threads < 1 or runs < 2:
        raise BitwrightError(f"bench: threads={threads}, runs={runs}; at least 1 thread and 2 runs are needed")
    path = Path(path)
    opener_of(path, target_of(path), runtime)
    images = one_tensor(example_of(example, "bench"), "bench").cpu()
    x = {"input": images.numpy()}
    with tempfile.TemporaryDirectory() as folder:
        partner, static = Path(folder) / "float.onnx", Path(folder) / "static.onnx"
        partner.write_bytes(float_onnx(float_model, images))
        try:
            ours = native(path, threads) if runtime == "native" else in_onnxruntime(path, threads, Path(folder))
            calls = [functools.partial(ours.run, x["input"]), run_of(session(partner, threads, None)[0], x)]
            for call in calls:
                call()
        except BitwrightError:
            raise
        except Exception as error:
            raise BitwrightError(f"{path}: onnxruntime cannot run it on this input: {first_line(error)}") from error
        with contextlib.suppress(BitwrightError):
            quantize(partner, x["input"], static)
            calls.append(run_of(session(static, threads, None)[0], x))
        times = alternate(calls, runs)
        operators = {} if runtime == "native" else operator_shares(path, x, threads, Path(folder))
    return BenchReport(
        file=Latency.of(times[0]),
        float_model=Latency.of(times[1]),
        static=Latency.of(times[2]) if len(times) > 2 else None,
        ratio=middle(times[0], times[1]),
        static_ratio=middle(times[0], times[2]) if len(times) > 2 else None,
        operators=operators,
        batch=len(images),
        threads=threads,
        runs=runs,
        integer_kernels=ours.integer_kernels,
        float_kernels=ours.float_kernels,
    )


@dataclass(frozen=True)
class Timed:
    """A file that runs, and on what its convolutions and products do."""

    run: Callable[[np.ndarray], Any]
    integer_kernels: dict[str, int]
    float_kernels: dict[str, int]


def run_of(made: onnxruntime.InferenceSession, x: dict[str, np.ndarray]) -> Callable[[], Any]:
    """A run of a session."""
    return functools.partial(made.run, None, x)


def in_onnxruntime(path: Path, threads: int, folder: Path) -> Timed:
    """The file in onnxruntime; kernels are those of its optimized graph."""
    made, optimized = session(path, threads, folder / "optimized.onnx")
    kinds = kernels(optimized.graph) if optimized else Counter()
    return Timed(
        lambda x: made.run(None, {"input": x}),
        {k: kinds[k] for k in sorted(INTEGER & kinds.keys())},
        {k: kinds[k] for k in sorted(FLOAT & kinds.keys())},
    )


def kernels(graph: onnx.GraphProto) -> Counter[str]:
    """How many nodes of each kind; the depthwise 1×1 convolutions that onnxruntime makes of scalings do not count."""
    scales = {t.name for t in graph.initializer if len(t.dims) == 4 and all(n == 1 for n in t.dims[1:])}
    return Counter(n.op_type for n in graph.node if n.op_type != "Conv" or n.input[1] not in scales)


def native(path: Path, threads: int) -> Timed:
    """The file in the native runtime; what it leaves to onnxruntime counts by the file's own operators."""
    # The runtime reads files with this package's own functions, so it comes second.
    made = importlib.import_module("bitwright.runtime").load(path, threads=threads)
    own = Counter(row["kernel"] for row in made.describe() if row["op"] == "Conv")
    products = sum(node.op_type in ("Conv", "MatMul", "Gemm") for node in read(path).graph.node)
    rest = products - sum(own.values())
    return Timed(made.run, dict(own), {"onnxruntime": rest} if rest else {})


def alternate(calls: Sequence[Callable[[], Any]], runs: int, warm: int = 3) -> list[list[float]]:
    """Seconds of each call, `runs` times in turn; each is called `warm` times before."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(-warm, runs):
        for log, call in zip(times, calls, strict=True):
            start = time.perf_counter()
            call()
            if turn >= 0:
                log.append(time.perf_counter() - start)
    return times


def middle(a: list[float], b: list[float]) -> float:
    """Median of the ratios of neighbouring runs."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


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
