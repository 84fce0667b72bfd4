"""What distributed ranks must agree on."""

import torch
from torch import Tensor


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of `values` over all distributed ranks, or `values` where there is one; the same shape on every rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    values = values.clone()
    torch.distributed.all_reduce(values)
    return values / torch.distributed.get_world_size()
