"""What a network keeps for its backward pass."""

import torch
from torch import Tensor, nn


def kept_bytes(net: nn.Module, x: Tensor) -> int:
    """Bytes of all storages that one forward pass saves, without those of parameters and buffers."""
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net(x)
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    return sum(size for at, size in sizes.items() if at not in own)
