"""`load`: an exported file as something that runs."""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import BitwrightError
from bitwright.runtime import build, packing, reference
from bitwright.runtime.constants import Graph
from bitwright.runtime.handlers import plan
from bitwright.runtime.ops import Conv, Dequantize, Shape
from bitwright.runtime.program import Compiled, Host

SHAPES_KEPT = 4  # bindings for the input shapes seen last


class Session:
    """A network that runs. Made by `load`.

    Attributes:
        input, output: names in the file. path: "vnni", "avx2", "plain" or "reference". threads: of a run.
    """

    def __init__(self, graph: Graph, path: str, threads: int, winograd: bool):
        self.input, self.output, self.path, self.threads = graph.input, graph.output, path, threads
        self.shape = graph.shapes.get(graph.input)
        self.program = plan(graph, winograd)
        self.file = graph.path
        self.compiled: OrderedDict[tuple[Shape, int], Compiled] = OrderedDict()
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def run(self, x: NDArray) -> NDArray:
        """The output for a batch; any number of rows where the file leaves it free.

        Raises:
            BitwrightError: the shape is not the file's, or does not fit the network.
        """
        x = self.checked(x)
        if self.path == "reference":
            return self.program.interpret(x)[self.program.output]
        if self.pool is None or x.shape[0] < 2:
            return self.bound(x.shape, 0).run(x)
        parts = [part for part in np.array_split(x, min(self.threads, x.shape[0]))]
        jobs = [self.bound(part.shape, i) for i, part in enumerate(parts)]
        return np.concatenate(list(self.pool.map(lambda job, part: job.run(part), jobs, parts)))

    def values(self, x: NDArray) -> dict[str, NDArray]:
        """What a run on `x` computes, by name in the file and in the file's layout: codes (uint8) and floats.

        Tensors that became part of an operator are missing; so are those inside the parts that onnxruntime computes.
        """
        x = self.checked(x)
        if self.path == "reference":
            found = self.program.interpret(x)
        else:
            compiled = Compiled(self.program, x.shape, self.path, keep=True)
            compiled.run(x)
            found = compiled.arrays
        values = found | {n: reference.run(Dequantize(codes), found[n]) for n, codes in self.program.kept.items()}
        values = {n: np.moveaxis(v, 3, 1) if n in self.program.images else v for n, v in values.items()}
        return values | {self.output: found[self.program.output]}

    def checked(self, x: NDArray) -> NDArray[np.float32]:
        """The input as contiguous float32 of a shape that the file accepts."""
        wanted = self.shape or x.shape
        if x.ndim != len(wanted) or any(w is not None and w != n for w, n in zip(wanted, x.shape, strict=True)):
            shown = " x ".join("any" if n is None else str(n) for n in wanted)
            raise BitwrightError(f"{self.file}: the input is {' x '.join(map(str, x.shape))}; {shown} is accepted")
        if 0 in x.shape:
            raise BitwrightError(f"{self.file}: the input is empty")
        return np.ascontiguousarray(x, np.float32)

    def bound(self, shape: Shape, thread: int) -> Compiled:
        """The program with buffers for one input shape and thread."""
        key = (shape, thread)
        if key not in self.compiled:
            self.compiled[key] = Compiled(self.program, shape, self.path)
        self.compiled.move_to_end(key)
        while len(self.compiled) > SHAPES_KEPT * self.threads:
            self.compiled.popitem(last=False)
        return self.compiled[key]

    def step_alone(self, x: NDArray, layer: str) -> Callable[[], None]:
        """A function that runs one native step again and again on what a run on `x` gave it; for benchmarks.

        Raises:
            BitwrightError: no native step has that name, or the session runs the reference.
        """
        if self.path == "reference":
            raise BitwrightError("a step alone needs compiled kernels; this session runs the reference")
        compiled = self.bound(self.checked(x).shape, 0)
        compiled.run(self.checked(x))
        return compiled.step_alone(layer)

    def describe(self) -> list[dict[str, Any]]:
        """One row per step: `layer`, `op`, `kernel` ("winograd", "direct", "depthwise", "native" or what runs it)."""
        rows = []
        for step in self.program.steps:
            kind = "host" if isinstance(step.op, Host) else type(step.op).__name__
            kernel = step.op.what if isinstance(step.op, Host) else "native"
            if isinstance(step.op, Conv):
                kernel = packing.kernel(step.op)
            rows.append({"layer": step.layer, "op": kind, "kernel": kernel})
        return rows


def load(path: str | Path, *, threads: int = 1, kernels: str | None = None, winograd: bool = True) -> Session:
    """Open a file written by `export` for the native runtime.

    Args:
        path: of the file.
        threads: rows of a batch are divided among them.
        kernels: "vnni", "avx2", "plain" or "reference" (numpy, exact and slow); default `$BITWRIGHT_RUNTIME`, else
            the best that this machine has.
        winograd: use it where it is exact and pays.

    Raises:
        BitwrightError: the file cannot be read or planned, or the kernels are not available here.
    """
    if threads < 1:
        raise BitwrightError(f"threads: {threads} is not accepted; use 1 or more")
    return Session(Graph(Path(path)), build.choose(kernels), threads, winograd)
