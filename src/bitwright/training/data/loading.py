"""Batches from sets whose samples are loaded one by one, maybe by worker processes."""

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import data

from bitwright.errors import BitwrightError
from bitwright.training.data.dataset import Batch, generator
from bitwright.training.machine import cores

# What a worker is asked for: a tensor or array and its class, or the message of the error that it met. A message,
# because an exception that crosses the process border comes back with a traceback as its text.
Sample = tuple[Any, int] | str


def default_workers() -> int:
    """One a core that this process may use, at most 8."""
    return min(8, cores())


def load_batches(
    samples: data.Dataset[Sample], index: Sequence[Tensor], workers: int, device: torch.device | str
) -> Iterator[Batch]:
    """Stacked samples and labels on the device, one batch for every tensor of indices.

    Raises: BitwrightError with a sample's message.
    """
    device = torch.device(device)
    loader = data.DataLoader(
        samples,
        batch_sampler=[batch.tolist() for batch in index],
        num_workers=min(workers, len(index)),
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_interrupts_to_the_parent,
        generator=generator("loader"),  # otherwise it draws from, and so moves, the global state
    )
    for found in loader:
        if isinstance(found, str):
            raise BitwrightError(found)
        x, y = (t.to(device, non_blocking=True) for t in found)
        yield x, y


def _collate(samples: list[Sample]) -> tuple[Tensor, Tensor] | str:
    pairs = []
    for sample in samples:
        if isinstance(sample, str):
            return sample
        pairs.append(sample)
    x, labels = zip(*pairs, strict=True)
    stacked = torch.stack(x) if isinstance(x[0], Tensor) else torch.from_numpy(np.stack(x))
    return stacked, torch.tensor(labels)


def _leave_interrupts_to_the_parent(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
