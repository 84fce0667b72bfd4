"""What all tests share: one thread, no network, a maker of calibrated quantizers."""

import functools
import gc
import logging
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable

import pytest
import torch

from bitwright.quantizer import Quantizer
from making import make_quantizer


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def make() -> Callable[..., Quantizer]:
    """`make_quantizer(grid, bits, data, ...)`."""
    return make_quantizer


# Compilers log every node there, and pytest would keep all of it for a failure's report.
logging.getLogger("torch.__trace").disabled = True


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not walk through it in every export."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # else libraries complain at exit that their objects leaked


@pytest.fixture(autouse=True)
def _one_registry() -> None:
    """torch reads the sources of all its ONNX operators anew in every export, a third of a small network's: once here.

    What imports them takes seconds too, so tests that export nothing are spared it.
    """
    registration = sys.modules.get("torch.onnx._internal.exporter._registration")
    if registration is not None and not hasattr(registration.ONNXRegistry.from_torchlib, "cache_info"):
        cached = functools.cache(registration.ONNXRegistry.from_torchlib)
        registration.ONNXRegistry.from_torchlib = staticmethod(cached)
