"""Memory for quantized tensors that live for a moment: taken again as soon as nobody holds it.

A quantized input lives for one convolution, and again for its backward. The system's allocator gives such large
blocks back and fetches them anew, page by page; that costs as much as the quantization itself.
"""

import sys
import threading

import torch
from torch import Tensor

SMALLEST = 1 << 18  # bytes; the allocator keeps smaller blocks by itself
KEPT = 3  # blocks kept per thread: as many as live at the same time


class Block:
    """`size` bytes, and whether anybody but this object holds, views or shares them."""

    def __init__(self, size: int):
        self.storage = torch.UntypedStorage(size)
        self.alone = self.holders()

    def holders(self) -> tuple[int, int]:
        """How many hold the storage: tensors of torch, and names of Python."""
        return torch._C._storage_Use_Count(self.storage._cdata), sys.getrefcount(self.storage)

    def free(self) -> bool:
        """Whether it can be written over."""
        return self.holders() == self.alone and not self.storage.is_shared()


class Pool(threading.local):
    """Up to `KEPT` blocks, the one used last at the end; each thread has its own."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []

    def take(self, size: int) -> Block:
        """A free block of `size` bytes."""
        # Exactly the size: a tensor that is kept for long must not hold more than it needs.
        found = next((b for b in self.blocks if b.storage.nbytes() == size and b.free()), None) or Block(size)
        self.blocks = [*(b for b in self.blocks if b is not found), found][-KEPT:]
        return found


POOL = Pool()


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised CPU tensor of `x`'s shape and strides, and type unless another is given; `x` is dense."""
    dtype = dtype or x.dtype
    size = x.numel() * dtype.itemsize
    if size < SMALLEST:
        return torch.empty_like(x, dtype=dtype)
    made = torch.empty(0, dtype=dtype)
    return made.set_(POOL.take(size).storage, 0, x.shape, x.stride())  # pyright: ignore[reportCallIssue]
