"""The compiled kernels: one library for every processor of an architecture, the path chosen when it runs."""

import ctypes
import functools
import logging
import os
from pathlib import Path

from bitwright.errors import BitwrightError
from bitwright.kernels.build import load
from bitwright.runtime.native import NativeOp

SOURCES = sorted(Path(__file__).with_name("native").glob("*.[ch]"), key=lambda p: (p.suffix, p.name))
# Contraction would turn a product and a sum into one rounding; the rule has two.
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-shared", "-fPIC"]
PATHS = ("plain", "avx2", "vnni")

logger = logging.getLogger("bitwright")


@functools.cache
def library() -> ctypes.CDLL | str:
    """The kernels, compiled on first use; else why there are none."""
    found = load("runtime", SOURCES, FLAGS)
    if isinstance(found, ctypes.CDLL):
        found.bw_op_size.restype = ctypes.c_int64
        found.bw_run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        found.bw_run.restype = None
        if found.bw_op_size() != ctypes.sizeof(NativeOp):
            return "the compiler lays structures out in its own way"
    return found


@functools.cache
def available() -> tuple[str, ...]:
    """Names of the paths that this machine can run, best first; "reference" (numpy) is the last and always there."""
    found = library()
    if isinstance(found, str):
        logger.warning("native kernels are off, the numpy reference is slow but the same: %s", found)
    best = found.bw_best_path() if isinstance(found, ctypes.CDLL) else -1
    return (*reversed(PATHS[: best + 1]), "reference")


def choose(path: str | None) -> str:
    """`path`, else `$BITWRIGHT_RUNTIME`, else the best one; BitwrightError if it is not available here."""
    path = path or os.environ.get("BITWRIGHT_RUNTIME") or None
    found = available()
    if path is None:
        return found[0]
    if path not in found:
        raise BitwrightError(f"runtime path {path!r} is not available on this machine; use {', '.join(found)}")
    return path


def run(ops: ctypes.Array[NativeOp], path: str) -> None:
    """Run bound operators in order; the buffers that they point to must be alive."""
    found = library()
    assert isinstance(found, ctypes.CDLL)
    found.bw_run(ctypes.addressof(ops), len(ops), PATHS.index(path))
