"""What `verify` needs of a target: the network to compare with, and the file in its runtime."""

import copy
from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from bitwright.batches import Inputs
from bitwright.deploy.builder import container_zero
from bitwright.deploy.integer import InputCodes, IntLayer
from bitwright.deploy.probe import code_tensors
from bitwright.layers import QuantLayer, unswap
from bitwright.layers.output import detach_output


@dataclass(frozen=True)
class Network:
    """The network that a file should be.

    training: the model as trained. frozen: its integer form. example: one sample. layers: weight layers of the frozen
    form, by name, as it executes them. calls: how often each input quantizer runs. codes: those quantizers.
    unread: layers and quantizers without effect on any output, which a file may lack.
    """

    training: nn.Module
    frozen: nn.Module
    example: Inputs
    layers: dict[str, IntLayer]
    calls: dict[str, int]
    codes: dict[str, InputCodes]
    unread: frozenset[str] = frozenset()

    def within(self, tensors: Container[str]) -> "Network":
        """Without what is unread and not among the `tensors` of a file."""

        weights = (".weight", ".codes", ".split_weight")
        gone = {n for n in self.layers if n in self.unread and not any(f"{n}{end}" in tensors for end in weights)}
        gone |= {n for n in self.calls if n in self.unread and f"{self.codes[n].label}.codes" not in tensors}
        layers, calls = ({n: v for n, v in d.items() if n not in gone} for d in (self.layers, self.calls))
        return replace(self, layers=layers, calls=calls)

    @property
    def labels(self) -> dict[str, int]:
        """`calls` by what a file calls the quantizers."""
        return {self.codes[name].label: count for name, count in self.calls.items()}


class Opened(Protocol):
    """A file in its runtime at default settings.

    weights, biases: by layer, float32, as the runtime holds them and in the layout of the frozen form; a target
    leaves out what its runtime does not show.
    """

    weights: dict[str, Tensor]
    biases: dict[str, Tensor]

    def run(self, x: Inputs) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """(outputs in order, codes by quantizer and call; quantizers whose codes cannot be seen are left out)."""
        ...


def float_twin(model: nn.Module) -> nn.Module:
    """A float copy of a prepared model, on the CPU in evaluation mode: the architecture that a loader fills."""
    twin = copy.deepcopy(model).cpu().eval()
    for module in list(twin.modules()):
        detach_output(module)
        if isinstance(module, QuantLayer):
            unswap(module, next(kind for kind in type(module).__mro__ if not issubclass(kind, QuantLayer)))
    return twin


def frozen_codes(network: Network, found: dict[str, np.ndarray]) -> dict[str, list[Tensor]]:
    """Codes by quantizer and call, int16 as in the frozen form, of tensors as a file of ours names and holds them."""
    tensors = {name: torch.from_numpy(k.astype(np.int16)) for name, k in found.items()}
    return {
        name: [tensors[at] - container_zero(q) for at in code_tensors({q.label: count})]
        for name, count in network.calls.items()
        for q in (network.codes[name],)
    }
