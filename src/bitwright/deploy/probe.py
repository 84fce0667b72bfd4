"""A file in its runtime: opened as users open it, and once more with its integer tensors as outputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from torch import Tensor

from bitwright.batches import Inputs
from bitwright.deploy.capture import first_line
from bitwright.deploy.exact_conv import shown
from bitwright.deploy.fold import unfold
from bitwright.deploy.integer import DOMAIN, IntEmbedding, IntLayer, IntLinear
from bitwright.deploy.names import spelled_out
from bitwright.deploy.split import SPLIT, unsplit
from bitwright.errors import BitwrightError

# What onnxruntime 1.31 takes at most.
NEWEST_IR, NEWEST_OPSET = 13, 26


def refuse_version(proto: onnx.ModelProto, path: Path) -> None:
    """Raise BitwrightError for a file of a newer format than runtimes know; theirs is a page of C++."""
    opset = max((o.version for o in proto.opset_import if not o.domain), default=0)
    for what, version, newest in (("IR", proto.ir_version, NEWEST_IR), ("opset", opset, NEWEST_OPSET)):
        if version > newest:
            raise BitwrightError(
                f"{path}: is of {what} version {version}, this bitwright reads up to {newest}; "
                "export it again, or upgrade bitwright and the runtime"
            )


def read(path: Path) -> onnx.ModelProto:
    """The file as a graph, names spelled out.

    Raises:
        BitwrightError: it is missing, damaged, of a newer format or not written by `export`.
    """
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise BitwrightError(f"{path}: cannot be read: {error.strerror or first_line(error)}") from error
    except Exception as error:
        raise BitwrightError(f"{path}: is damaged or no ONNX file: {first_line(error)}") from error
    refuse_version(proto, path)
    if proto.producer_name != DOMAIN:
        raise BitwrightError(f"{path}: was not written by bitwright export (its producer is {proto.producer_name!r})")
    return spelled_out(unfold(proto))


def open_session(source: str | bytes, path: Path, providers: Sequence[str]) -> onnxruntime.InferenceSession:
    """A session at default settings; BitwrightError if the runtime refuses."""
    try:
        return onnxruntime.InferenceSession(source, providers=list(providers))
    except Exception as error:
        raise BitwrightError(f"{path}: onnxruntime cannot open it: {first_line(error)}") from error


def fed(session: onnxruntime.InferenceSession, path: Path, x: Inputs) -> dict[str, np.ndarray]:
    """A batch by the names of the file's inputs; BitwrightError where it has others."""
    wanted = [i.name for i in session.get_inputs()]
    named = {k: v for k, v in x.kwargs.items() if isinstance(v, Tensor)}
    rest = [name for name in wanted if name not in named]
    if len(rest) != len(x.args) or not named.keys() <= set(wanted):
        given = ", ".join(["a tensor"] * len(x.args) + list(named))
        raise BitwrightError(f"{path}: the file reads {', '.join(wanted)}; the batch has {given}")
    return {k: v.numpy() for k, v in {**dict(zip(rest, x.args, strict=True)), **named}.items()}


def run_session(
    session: onnxruntime.InferenceSession, path: Path, names: list[str] | None, x: Inputs
) -> list[np.ndarray]:
    """Outputs for one batch (all outputs where `names` is None); BitwrightError if the runtime refuses."""
    feed = fed(session, path, x)
    try:
        out: list[Any] = list(session.run(names, feed))
    except Exception as error:
        raise BitwrightError(f"{path}: onnxruntime cannot run it: {first_line(error)}") from error
    return out


def tensor_names(proto: onnx.ModelProto) -> set[str]:
    """Names of all tensors that a graph makes or holds."""
    return {out for node in proto.graph.node for out in node.output} | {t.name for t in proto.graph.initializer}


def code_tensors(calls: dict[str, int]) -> list[str]:
    """Names of the tensors that hold the codes of quantizers (by label) which run `calls` times."""
    return [f"{name}:{i}.codes" if i else f"{name}.codes" for name, count in calls.items() for i in range(count)]


@dataclass(frozen=True)
class ProbeGraph:
    """A copy of the graph in which codes, dequantized weights and biases are outputs too.

    codes, wanted: names of the integer tensors, and of weights and biases. biases: of these, the bias of each layer.
    """

    proto: onnx.ModelProto
    codes: list[str]
    wanted: list[str]
    biases: dict[str, str]


def probe_graph(proto: onnx.ModelProto, path: Path, layers: dict[str, IntLayer], calls: dict[str, int]) -> ProbeGraph:
    """The graph whose tensors `verify` looks at.

    Args:
        layers: of the frozen form, by name. calls: how often each input quantizer runs, by label.

    Raises:
        BitwrightError: a tensor of the frozen form is missing: the file is of another network.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for name, layer in layers.items():
        if isinstance(layer, IntEmbedding) and layer.packed is not None:
            # The file scales rows after they were gathered; here the whole table is dequantized.
            cast = helper.make_node("Cast", [f"{name}.codes"], [f"{name}.all"], to=TensorProto.FLOAT)
            scale = helper.make_node("Mul", [f"{name}.all", f"{name}.table_scale"], [f"{name}.weight"])
            copy.graph.node.extend([cast, scale])
    split = {node.output[0].removesuffix(SPLIT): node for node in proto.graph.node if node.output[0].endswith(SPLIT)}
    copy.graph.node.extend(unsplit(node, name) for name, node in split.items())
    copy.graph.node.extend(shown(proto.graph, layers))
    present = tensor_names(copy)
    biases = {
        name: f"{name}.negative_bias" if f"{name}.negative_bias" in present else f"{name}.bias"
        for name, layer in layers.items()
        if layer.bias is not None
    }
    codes, wanted = code_tensors(calls), [*(f"{name}.weight" for name in layers), *biases.values()]
    for kind, names in ((TensorProto.UINT8, codes), (TensorProto.FLOAT, wanted)):
        for name in names:
            if name not in present:
                raise BitwrightError(f"{path}: is of another network: it has no tensor {name!r}")
            copy.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    return ProbeGraph(copy, codes, wanted, biases)


def frozen_weights(
    graph: ProbeGraph, layers: dict[str, IntLayer], constants: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights, biases) by layer, in the layout of the frozen form, of constants as the file names them."""
    turned = {n: constants[f"{n}.weight"] for n in layers}
    weights = {n: w.T if isinstance(layers[n], IntLinear) else w for n, w in turned.items()}
    signed = {n: -constants[t] if t.endswith(".negative_bias") else constants[t] for n, t in graph.biases.items()}
    return weights, {n: bias.reshape(-1) for n, bias in signed.items()}
