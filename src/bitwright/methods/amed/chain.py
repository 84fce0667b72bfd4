"""The chain: a Metropolis-Hastings step over a choice per row, and the scores that it follows."""

import math

import torch
from torch import Tensor


def score(loss: float, cost: float, alpha: float, beta: float) -> float:
    """log10 of (alpha + beta) / (alpha loss + beta cost): 0 at the references, positive for what is better.

    Args:
        loss, cost: relative to their references.
    """
    return math.log10((alpha + beta) / (alpha * loss + beta * cost))


def metropolis(scores: Tensor, present: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One step of every row's chain, whose stationary law is softmax(scores / temperature).

    A candidate is proposed uniformly and accepted with probability min(1, p(candidate) / p(present)).

    Args:
        scores: (rows, candidates), float64. present: (rows,), int64, the column of each row.

    Returns:
        (rows,), int64.
    """
    rows, count = scores.shape
    proposed = torch.randint(count, (rows,), generator=generator)
    gain = (scores.gather(1, proposed[:, None]) - scores.gather(1, present[:, None])).squeeze(1)
    accepted = torch.rand(rows, generator=generator, dtype=scores.dtype).log() < gain / temperature
    return torch.where(accepted, proposed, present)
