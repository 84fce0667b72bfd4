"""A file in its runtime: opened as users open it, and once more with its integer tensors as outputs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor

from bitwright.deploy.builder import QUANTIZER
from bitwright.deploy.capture import first_line
from bitwright.deploy.integer import DOMAIN, IntEmbedding, IntLayer
from bitwright.errors import BitwrightError


def read(path: Path) -> onnx.ModelProto:
    """The file as a graph; BitwrightError if it is missing, damaged or not written by `export`."""
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise BitwrightError(f"{path}: cannot be read: {error.strerror or first_line(error)}") from error
    except Exception as error:
        raise BitwrightError(f"{path}: is damaged or no ONNX file: {first_line(error)}") from error
    if proto.producer_name != DOMAIN:
        raise BitwrightError(f"{path}: was not written by bitwright export (its producer is {proto.producer_name!r})")
    return proto


def open_session(source: str | bytes, path: Path, providers: Sequence[str]) -> onnxruntime.InferenceSession:
    """A session at default settings; BitwrightError if the runtime refuses."""
    try:
        return onnxruntime.InferenceSession(source, providers=list(providers))
    except Exception as error:
        raise BitwrightError(f"{path}: onnxruntime cannot open it: {first_line(error)}") from error


def run_session(
    session: onnxruntime.InferenceSession, path: Path, names: list[str] | None, x: Tensor
) -> list[np.ndarray]:
    """Outputs for one batch (all outputs where `names` is None); BitwrightError if the runtime refuses."""
    try:
        out: list[Any] = list(session.run(names, {"input": x.numpy()}))
    except Exception as error:
        raise BitwrightError(f"{path}: onnxruntime cannot run it: {first_line(error)}") from error
    return out


def code_tensors(calls: dict[str, int]) -> list[str]:
    """Names of the tensors that hold the codes of quantizers which run `calls` times."""
    bare = [(name.removesuffix(QUANTIZER), count) for name, count in calls.items()]
    return [f"{name}:{i}.codes" if i else f"{name}.codes" for name, count in bare for i in range(count)]


class Probe:
    """A session on a copy of the graph in which codes, dequantized weights and biases are outputs too.

    Args:
        layers: of the frozen form, by name. calls: how often each input quantizer runs.
        example: one input, on which the constants are read.

    Attributes:
        constants: weights and biases as the runtime dequantizes them, by tensor name.

    Raises:
        BitwrightError: a tensor of the frozen form is missing: the file is of another network.
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        path: Path,
        layers: dict[str, IntLayer],
        calls: dict[str, int],
        example: Tensor,
        providers: Sequence[str],
    ):
        self.path, self.codes = path, code_tensors(calls)
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        for name, layer in layers.items():
            if isinstance(layer, IntEmbedding) and layer.packed is not None:
                # The file scales rows after they were gathered; here the whole table is dequantized.
                cast = helper.make_node("Cast", [f"{name}.codes"], [f"{name}.all"], to=TensorProto.FLOAT)
                scale = helper.make_node("Mul", [f"{name}.all", f"{name}.weight_scale"], [f"{name}.weight"])
                copy.graph.node.extend([cast, scale])
        present = {out for node in copy.graph.node for out in node.output}
        present |= {t.name for t in copy.graph.initializer}
        self.biases = {
            name: f"{name}.negative_bias" if f"{name}.negative_bias" in present else f"{name}.bias"
            for name, layer in layers.items()
            if layer.bias is not None
        }
        wanted = [*(f"{name}.weight" for name in layers), *self.biases.values()]
        for kind, names in ((TensorProto.UINT8, self.codes), (TensorProto.FLOAT, wanted)):
            for name in names:
                if name not in present:
                    raise BitwrightError(f"{path}: is of another network: it has no tensor {name!r}")
                copy.graph.output.append(helper.make_tensor_value_info(name, kind, None))
        self.session = open_session(copy.SerializeToString(), path, providers)
        values = run_session(self.session, path, wanted, example) if wanted else []
        self.constants = {name: torch.from_numpy(np.array(v)) for name, v in zip(wanted, values, strict=True)}

    def bias(self, name: str) -> Tensor:
        """The bias of a layer that has one."""
        tensor = self.biases[name]
        return -self.constants[tensor] if tensor.endswith(".negative_bias") else self.constants[tensor]

    def run(self, x: Tensor) -> dict[str, Tensor]:
        """Codes of one batch by tensor name, int16, as they lie in their container."""
        out = run_session(self.session, self.path, self.codes, x) if self.codes else []
        return {name: torch.from_numpy(k.astype(np.int16)) for name, k in zip(self.codes, out, strict=True)}
