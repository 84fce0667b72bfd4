"""A network as a list of operators, and its execution with buffers planned once per input shape."""

import ctypes
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import BitwrightError
from bitwright.runtime import build, reference
from bitwright.runtime.native import Bound, NativeOp, bind, buffer
from bitwright.runtime.ops import Codes, Op, Shape, View, gives_floats


@dataclass(frozen=True, eq=False)
class Host:
    """Something that numpy or another engine computes. run: arrays in, arrays out."""

    run: Callable[..., Sequence[NDArray]]
    what: str


@dataclass(frozen=True)
class Step:
    """One operator between named values; `layer` is the name that the file gives it."""

    op: Op | Host
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layer: str


@dataclass(frozen=True)
class Program:
    """Steps in order of execution, from `input` (float32) to `output`.

    images: values kept channels last. kept: values kept as codes where the file has what these stand for.
    """

    steps: tuple[Step, ...]
    input: str
    output: str
    images: frozenset[str] = frozenset()
    kept: Mapping[str, Codes] = field(default_factory=dict)

    def roots(self) -> dict[str, str]:
        """The value whose memory each view shares."""
        found: dict[str, str] = {}
        for step in self.steps:
            if isinstance(step.op, View):
                found[step.outputs[0]] = found.get(step.inputs[0], step.inputs[0])
        return found

    def last_use(self) -> dict[str, int]:
        """The last step that reads each value or a view of it; the output is never free."""
        roots = self.roots()
        found = {roots.get(name, name): i for i, step in enumerate(self.steps) for name in step.inputs}
        return found | {roots.get(self.output, self.output): len(self.steps)}

    def interpret(self, x: NDArray[np.float32]) -> dict[str, NDArray]:
        """Every value, by the reference."""
        values: dict[str, NDArray] = {self.input: x}
        for step in self.steps:
            arrays = [values[name] for name in step.inputs]
            out = step.op.run(*arrays) if isinstance(step.op, Host) else [reference.run(step.op, *arrays)]
            values |= zip(step.outputs, out, strict=True)
        return values


class Pool:
    """Buffers that are handed out again once nothing reads them any more."""

    def __init__(self) -> None:
        self.all: list[NDArray[np.uint8]] = []
        self.free: list[NDArray[np.uint8]] = []

    def take(self, size: int) -> NDArray[np.uint8]:
        """The smallest free buffer that holds `size` bytes, else a new one."""
        fitting = [b for b in self.free if b.size >= size]
        if not fitting:
            self.all.append(buffer(size))
            return self.all[-1]
        best = min(fitting, key=lambda b: b.size)
        self.free = [b for b in self.free if b is not best]
        return best


class Compiled:
    """A program bound to one input shape, with its buffers; one call at a time.

    Attributes:
        arrays: every value; without `keep` a later one may overwrite it. bytes: of all buffers.
    """

    def __init__(self, program: Program, shape: Shape, path: str, keep: bool = False):
        self.program, self.path, self.lock, self.pool = program, path, threading.Lock(), Pool()
        self.arrays: dict[str, NDArray] = {program.input: np.zeros(shape, np.float32)}
        self.parts: list[ctypes.Array[NativeOp] | Step] = []
        self.readers: list[NativeOp] = []
        self.natives: dict[str, NativeOp] = {}
        self.bound: list[Bound] = []
        owner: dict[str, NDArray[np.uint8]] = {}
        roots, last = program.roots(), program.last_use()
        # A view, or a second operand, holds the address of the array that was bound: there the input is copied.
        self.copies = program.input in roots.values() or any(program.input in s.inputs[1:] for s in program.steps)
        run: list[tuple[Bound, Step]] = []
        for i, step in enumerate(program.steps):
            inputs = [self.arrays[name] for name in step.inputs]
            if isinstance(step.op, Host):
                self.close(run)
                for name, array in zip(step.outputs, step.op.run(*inputs), strict=True):
                    # In a buffer of ours, which has the slack that kernels need. Its content counts already now: it may
                    # be a shape, which the next step goes by.
                    self.arrays[name] = placed(buffer(array.nbytes), array.shape, array.dtype)
                    np.copyto(self.arrays[name], array)
                self.parts.append(step)
                continue
            out = step.outputs[0]
            shape = step.op.shape(*(a.shape for a in inputs))
            if isinstance(step.op, View):
                self.arrays[out] = inputs[0].reshape(shape)
                continue
            dtype = np.dtype(np.float32 if gives_floats(step.op) else np.uint8)
            owner[out] = self.pool.take(int(np.prod(shape)) * dtype.itemsize)
            self.arrays[out] = placed(owner[out], shape, dtype)
            run.append((bind(step.op, [a.shape for a in inputs]), step))
            for name in {roots.get(name, name) for name in step.inputs}:
                if last[name] == i and name in owner and not keep:
                    self.pool.free.append(owner[name])
        self.close(run)
        scratch = buffer(max((b.scratch for b in self.bound), default=0))
        self.pool.all.append(scratch)
        for part in self.parts:
            for op in () if isinstance(part, Step) else part:
                op.scratch = scratch.ctypes.data
        self.bytes = sum(b.size for b in self.pool.all)

    def close(self, run: list[tuple[Bound, Step]]) -> None:
        """Turn the operators collected so far into one call of the library."""
        if not run:
            return
        part = (NativeOp * len(run))()
        for i, (bound, step) in enumerate(run):
            first, *others = (self.arrays[name].ctypes.data for name in step.inputs)
            output = self.arrays[step.outputs[0]].ctypes.data
            part[i] = bound.native(first, others[0] if others else first, output, 0)
            if step.inputs[0] == self.program.input:
                self.readers.append(part[i])
            self.natives[step.layer] = part[i]
            self.bound.append(bound)
        self.parts.append(part)
        run.clear()

    def run(self, x: NDArray[np.float32]) -> NDArray:
        """The output for one batch of the shape that was bound; a copy."""
        with self.lock:
            if self.copies:
                np.copyto(self.arrays[self.program.input], x)
            else:
                self.arrays[self.program.input] = x
                for op in self.readers:
                    op.x = x.ctypes.data
            for part in self.parts:
                if isinstance(part, Step):
                    assert isinstance(part.op, Host)
                    made = part.op.run(*(self.arrays[name] for name in part.inputs))
                    for name, array in zip(part.outputs, made, strict=True):
                        self.store(name, array, part.layer)
                else:
                    build.run(part, self.path)
            return self.arrays[self.program.output].copy()

    def store(self, name: str, array: NDArray, layer: str) -> None:
        """Put what a `Host` gave into the buffer that was planned for it, which it must fit."""
        planned = self.arrays[name].shape
        if array.shape != planned:
            found = f"its output is {array.shape} for these numbers, {planned} for others"
            raise BitwrightError(f"{layer}: {found}; only fixed shapes are accepted")
        np.copyto(self.arrays[name], array)

    def step_alone(self, layer: str) -> Callable[[], None]:
        """One native step of a layer, on whatever its buffers hold."""
        found = self.natives.get(layer)
        if found is None:
            raise BitwrightError(f"no native step is called {layer!r}; there are {', '.join(self.natives)}")
        single = (NativeOp * 1)(found)
        return lambda: build.run(single, self.path)


def placed(raw: NDArray[np.uint8], shape: Shape, dtype: np.dtype) -> NDArray:
    """An array at the start of a buffer."""
    return raw[: int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)
