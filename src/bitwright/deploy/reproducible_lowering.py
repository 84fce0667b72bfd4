"""`Lowering` for onnxruntime, with norms, softmax, GELU and convolutions that come out the same everywhere."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import NodeProto, helper
from torch import Tensor, nn

from bitwright.deploy.builder import container_zero
from bitwright.deploy.elementary import FUNCTIONS, GELU, GELU_CODES, NORM, POOL, SOFTMAX, gelu_runs
from bitwright.deploy.exact_conv import ExactConvLowering
from bitwright.deploy.integer import DOMAIN, InputCodes, symbol
from bitwright.layers.reproducible import (
    Reproducible,
    ReproducibleGELU,
    ReproducibleLayerNorm,
    ReproducibleLayerNorm2d,
    ReproduciblePool,
    ReproducibleTransformersGELU,
)

KINDS = {
    ReproducibleLayerNorm: NORM,
    ReproducibleLayerNorm2d: NORM,
    ReproducibleGELU: GELU,
    ReproducibleTransformersGELU: GELU,
    ReproduciblePool: POOL,
}


def stand_for(module: Any, x: Tensor) -> Tensor:
    """The node that stands for a norm, a GELU or a pooling in an exported graph."""
    kind = KINDS[type(module)]
    shape = (*x.shape[:2], 1, 1) if kind == POOL else x.shape
    return symbol(kind, x, shape, x.dtype, {"name": module.name})


@dataclass
class ReproducibleLowering(ExactConvLowering):
    """norms: by name. gelus: inputs of those whose output one node alone reads, by output."""

    norms: dict[str, ReproducibleLayerNorm] = field(default_factory=dict)
    gelus: dict[str, str] = field(default_factory=dict)

    def look_at(self, frozen: nn.Module) -> None:
        super().look_at(frozen)
        self.norms = {m.name: m for m in frozen.modules() if isinstance(m, ReproducibleLayerNorm)}

    def call_of(self, kind: str, inputs: list[str], output: str) -> str:
        """A call of one of `FUNCTIONS`."""
        self.functions.setdefault(kind, FUNCTIONS[kind]())
        return self.node(kind, inputs, output, domain=DOMAIN)

    def replace(self, node: NodeProto) -> None:
        x, y = node.input[0], node.output[0]
        if node.op_type == NORM:
            name = next(helper.get_attribute_value(a) for a in node.attribute if a.name == "name").decode()
            self.norm(self.norms[name], x, y)
        elif node.op_type in (SOFTMAX, POOL):
            self.call_of(node.op_type, [x], y)
        elif node.op_type == GELU:
            self.call_of(GELU, [x], y)
            if y in self.read_once:
                self.gelus[y] = x
        else:
            super().replace(node)

    def norm(self, norm: ReproducibleLayerNorm, x: str, y: str) -> None:
        """The nodes of a norm; without gain or shift they are 1 and 0."""
        plain = {"gain": (norm.weight, 1.0), "shift": (norm.bias, 0.0)}
        inputs = [
            self.scalar(other, np.float32) if t is None else self.vector(f"{norm.name}.{what}", t.detach().numpy())
            for what, (t, other) in plain.items()
        ]
        self.call_of(NORM, [x, *inputs, self.scalar(norm.eps, np.float64)], y)

    def quantized(
        self, codes: InputCodes, x: str, *, integer: bool = True, pads: list[int] | None = None, mode: str = ""
    ) -> str:
        """As ever; codes of a GELU that nothing else reads come from a table."""
        if x not in self.gelus or codes.shared or not codes.integer or not integer or pads is not None:
            return super().quantized(codes, x, integer=integer, pads=pads, mode=mode)
        at, base = self.call(codes.label), container_zero(codes)
        self.absorbed.add(x)
        starts, values = gelu_runs(codes, base)
        table = [self.constant(f"{at}.starts", starts), self.constant(f"{at}.values", values)]
        k = self.call_of(GELU_CODES, [self.gelus[x], *table], f"{at}.codes")
        return self.node("DequantizeLinear", [k, self.input_scale(codes), self.zero_point(codes, base)], f"{at}.x")


def name_all(frozen: nn.Module) -> None:
    """Tell norms and GELUs of a frozen network their names."""
    for name, module in frozen.named_modules():
        if isinstance(module, Reproducible):
            module.name = name
