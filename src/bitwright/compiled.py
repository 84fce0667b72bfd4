"""`compile_model`: torch.compile, with a limit on what is kept for the backward pass."""

from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
from torch import nn

from bitwright.errors import BitwrightError


def compile_model(
    model: nn.Module, *, activation_memory: float = 1.0, backend: str = "inductor", **options: Any
) -> Any:
    """`torch.compile(model)` that keeps at most a share of the activations and computes the others again.

    Bits, mixing rates, strengths and switches of quantizers are buffers: their change does not compile anew.

    Args:
        model: prepared or float; its parameters stay its own, and methods hook it as before.
        activation_memory: share of what compiled code keeps for the backward pass by default, 0 to 1. 1.0 (default)
            recomputes only what costs nothing; 0.3 kept 0.37 to 0.58 of the bytes of eager float training on the
            networks of `benchmarks/speed/lean-*.csv`, at 0.90 to 1.21 of its time; 0 keeps inputs only.
        backend: of torch.compile; one that splits the graph by torch's min-cut partitioner.
        options: further keywords of `torch.compile` (`fullgraph=True` and so on).

    Returns:
        The compiled module.

    Raises:
        BitwrightError: activation_memory is not between 0 and 1.
    """
    if isinstance(activation_memory, bool) or not 0.0 <= activation_memory <= 1.0:
        raise BitwrightError(f"activation_memory={activation_memory!r} is not accepted; use 0 to 1")
    if activation_memory == 1.0:
        return torch.compile(model, backend=backend, **options)
    return torch.compile(model, backend=Budget(activation_memory, backend), **options)


class Budget:
    """A backend of torch.compile that plans with a share of the activations; no setting outlives its calls."""

    def __init__(self, share: float, backend: str):
        self.share = share
        self.inner: Callable[..., Any] = torch._dynamo.lookup_backend(backend)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        # The split into forward and backward is made within this call, whenever the backward is compiled later.
        with torch._functorch.config.patch(activation_memory_budget=self.share):
            return self.inner(graph, inputs, **options)
