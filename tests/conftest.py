"""What all tests share: one thread, no network, a maker of calibrated quantizers."""

import functools
import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable

import pytest
import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry

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

# torch reads the sources of all its ONNX operators anew in every export, which takes a third of a small network's.
ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))  # pyright: ignore
