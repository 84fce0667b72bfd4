"""The native runtime as `verify` sees a file's runtime."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitwright.batches import Inputs, one_tensor
from bitwright.deploy.builder import container_zero
from bitwright.deploy.integer import IntLinear
from bitwright.deploy.probe import code_tensors
from bitwright.deploy.targets.opened import Network
from bitwright.runtime.constants import Graph
from bitwright.runtime.patterns import weight_of
from bitwright.runtime.session import load


class NativeFile:
    """An `onnx` file in the native runtime: an `Opened` (see `bitwright.deploy.targets.opened`).

    Codes come from the run itself. Left out are quantizers inside the parts that onnxruntime computes, and the
    weights of layers there and of split convolutions; biases are in the sums, which the codes show.
    """

    def __init__(self, path: Path, network: Network):
        self.network, self.session = network, load(path)
        self.biases: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        graph = Graph(path)
        native = {step.layer for step in self.session.program.steps}
        for name, layer in network.layers.items():
            weight = weight_of(graph, f"{name}.weight") if name in native else None
            if weight is not None:
                shape = [1] * weight.numbers.ndim
                shape[weight.axis if weight.scale.size > 1 else 0] = weight.scale.size
                values = torch.from_numpy(weight.numbers.astype(np.float32) * weight.scale.reshape(shape))
                self.weights[name] = values.T if isinstance(layer, IntLinear) else values

    def run(self, x: Inputs) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """(the output, codes by quantizer and call)."""
        values = self.session.values(one_tensor(x, "verify: the native runtime").numpy())
        codes = {}
        for name, count in self.network.calls.items():
            tensors = code_tensors({self.network.codes[name].label: count})
            if all(t in values for t in tensors):
                zero = container_zero(self.network.codes[name])
                codes[name] = [torch.from_numpy(values[t].astype(np.int16)) - zero for t in tensors]
        return [torch.from_numpy(values[self.session.output])], codes
