"""Gradient checkpoints: parts of a network that run once more in the backward pass."""

import torch


def runs_twice() -> bool:
    """Whether this is such a part. It keeps nothing and must find its inputs as they were: nothing waits there."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"
