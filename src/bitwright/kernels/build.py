"""Compile C sources once per machine and load them; training does without where there is no compiler."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bitwright.cache import cache_folder

# Each includes the next.
NAMES = ("products.c", "gelu.c", "norm.c", "statistics.c", "fused.c", "floats.c")
SOURCES = [Path(__file__).with_name(name) for name in NAMES]
# Errno and trapping semantics keep rintf and selects out of vector code; neither changes a value.
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]

logger = logging.getLogger("bitwright")


def machine_key(sources: Sequence[Path], flags: Sequence[str]) -> str:
    """What a compiled file is valid for: sources, flags and this processor's features."""
    features = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    texts = "".join(source.read_text() for source in sources)
    return hashlib.sha256((texts + " ".join(flags) + features).encode()).hexdigest()[:16]


def compile_to(target: Path, source: Path, flags: Sequence[str]) -> str | None:
    """Compile into `target` atomically; the reason why not, or None on success."""
    compiler = os.environ.get("CC", "cc")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        reason = "no attempt"
        # A compiler without OpenMP still gives the single-threaded kernel.
        for openmp in (["-fopenmp"], []):
            command = [compiler, *flags, *openmp, "-o", str(made), str(source), "-lm"]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            except (OSError, subprocess.TimeoutExpired) as error:
                return f"{compiler}: {error}"
            if done.returncode == 0:
                os.replace(made, target)
                return None
            reason = (done.stderr.strip().splitlines() or ["compiler failed"])[0]
        return reason


def load(name: str, sources: Sequence[Path], flags: Sequence[str]) -> ctypes.CDLL | str:
    """The library compiled from `sources[0]`, which may include the others; else why there is none, in one line."""
    try:
        path = cache_folder() / f"{name}-{machine_key(sources, flags)}.so"
        reason = None if path.exists() else compile_to(path, sources[0], flags)
        return ctypes.CDLL(str(path)) if reason is None else reason
    except OSError as error:
        return str(error)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, built on first use; None where they cannot be built (said once, in the log).

    `BITWRIGHT_KERNELS=reference` switches them off.
    """
    if os.environ.get("BITWRIGHT_KERNELS", "") == "reference":
        return None
    found = load("fused", SOURCES, FLAGS)
    if isinstance(found, ctypes.CDLL):
        return found
    logger.warning("fused kernels are off, training is slower but the same: %s", found)
    return None
