"""Whether two networks are one in part."""

from collections.abc import Iterable

from torch import Tensor, nn


def marks(tensor: Tensor) -> set[int]:
    """What tells that another tensor is this one: its identity, and where its values are, if they are in memory.

    `load_state_dict(..., assign=True)` makes parameters of other identities over the same memory.
    """
    held = type(tensor) in (Tensor, nn.Parameter) and tensor.numel() > 0
    return {id(tensor)} | ({-tensor.data_ptr()} if held and tensor.data_ptr() else set())


def share_memory(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """Whether a tensor of `some` is one of `others`, or lies where one of them lies."""
    found = set().union(*(marks(t) for t in some))
    return any(found & marks(t) for t in others)
