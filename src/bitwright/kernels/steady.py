"""Parameters whose memory may be gone when their values are wanted."""

import torch
from torch import Tensor


def steady(parameter: Tensor) -> Tensor:
    """`parameter`, or a copy without history where several processes train.

    FSDP frees the memory of a module's parameters behind its forward pass. A norm that waits, and what is quantized
    again in the backward pass of another module, would read them after that.
    """
    shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    return parameter.detach().clone() if shared else parameter
