"""Target `onnx`: standard ONNX for onnxruntime; keeps everything that the integer form has."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bitwright.batches import Inputs, exportable, outputs_of
from bitwright.deploy.attention import IntProducts
from bitwright.deploy.capture import first_line, quiet_export
from bitwright.deploy.files import ExportReport, replacing
from bitwright.deploy.fold import fold
from bitwright.deploy.freeze import freeze
from bitwright.deploy.hard import hard_on_integers
from bitwright.deploy.integer import InputCodes, IntLayer
from bitwright.deploy.lower import LayerFile, lower
from bitwright.deploy.names import rename, shorten
from bitwright.deploy.outline import outline
from bitwright.deploy.packing import OPSET
from bitwright.deploy.probe import fed, frozen_weights, open_session, probe_graph, read, run_session, tensor_names
from bitwright.deploy.reproducible_lowering import ReproducibleLowering, name_all, stand_for
from bitwright.deploy.targets.opened import Network, frozen_codes
from bitwright.errors import BitwrightError
from bitwright.layers.reproducible import Reproducible

OUTPUT_NUMBER = "bitwright_output_"  # what outputs are called while a graph is exported


@torch.no_grad()
def output_of(frozen: nn.Module, example: Inputs) -> Any:
    """What the frozen form puts out; BitwrightError if it does not run."""
    try:
        return example.run(frozen)
    except RuntimeError as error:
        raise BitwrightError(
            f"{type(frozen).__name__}: its frozen form does not run ({first_line(error)}); a layer's weight that other "
            "code multiplies too cannot be deployed, bitwright.coverage(model, example).notes names it"
        ) from error


def placeholder_graph(frozen: nn.Module, example: Inputs) -> onnx.ModelProto:
    """The frozen form as torch exports it, one node of our own domain per layer and per lone quantizer.

    The input is called `input` where it is one tensor by position, else as `forward` calls its inputs.
    """
    parts = [m for m in frozen.modules() if isinstance(m, InputCodes | IntLayer | IntProducts)]
    functions = [m for m in frozen.modules() if isinstance(m, Reproducible)]
    names = list(outputs_of(output_of(frozen, example), "export"))
    # A batch of one would be taken for a constant by torch.export.
    rows = example.by_row(lambda t: torch.cat([t, t])) if example.rows == 1 else example
    for part in parts:
        part.placeholder = True
    name_all(frozen)
    for function in functions:
        function.symbol = stand_for
    try:
        with quiet_export(), torch.no_grad(), exportable(frozen, rows) as given:
            program = torch.onnx.export(
                frozen,
                given.args,
                kwargs=given.kwargs,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=free_axes(frozen, given),
                input_names=["input"] if len(given.args) == 1 and not given.kwargs else None,
                output_names=[f"{OUTPUT_NUMBER}{i}" for i in range(len(names))],
                verbose=False,
            )
    except Exception as error:
        reason = first_line(error.__cause__ or error)
        raise BitwrightError(f"{type(frozen).__name__}: torch.onnx.export failed: {reason}") from error
    finally:
        for part in parts:
            part.placeholder = False
        for function in functions:
            function.symbol = None
    assert program is not None
    model = program.model_proto
    if len(model.graph.output) != len(names):
        raise BitwrightError(
            f"{type(frozen).__name__} has {len(model.graph.output)} outputs in its graph, and gives {len(names)}"
        )
    name_outputs(model.graph, names)
    return model


def name_outputs(graph: onnx.GraphProto, names: list[str]) -> None:
    """Call the outputs so, in place; tensors that have such a name already get another."""
    made = {name for node in graph.node for name in node.output}
    for value in graph.output:
        if value.name not in made:  # a constant or the input itself
            value.name, source = f"{OUTPUT_NUMBER}of_{value.name}", value.name
            graph.node.append(onnx.helper.make_node("Identity", [source], [value.name]))
    taken = made | {tensor.name for tensor in graph.initializer}
    new = {name: f"{name}__inner" for name in names if name in taken}
    new |= {value.name: name for value, name in zip(graph.output, names, strict=True)}
    rename(graph, new)
    for value, name in zip(graph.output, names, strict=True):
        value.name = name


def free_axes(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The axes that a file leaves free where the network can, as `torch.export` takes them: samples, and tokens."""
    rows = inputs.rows

    def axes(t: Tensor) -> dict[int, Any] | None:
        tokens = t.ndim == 2 and not t.is_floating_point()  # indices of words, and their masks
        count = (2 if tokens else 1) if t.ndim and len(t) == rows else 0
        return {i: torch.export.Dim.AUTO for i in range(count)} or None

    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments
    return tree_map(lambda t: axes(t) if isinstance(t, Tensor) else None, dict(bound))


def report(path: Path, size: int, proto: onnx.ModelProto, layers: list[LayerFile], target: str) -> ExportReport:
    """The report of a file that holds `proto`."""
    packed = sum(layer.size_bytes for layer in layers if layer.packing != "float32")
    dynamic = any(bool(d.dim_param) for i in proto.graph.input for d in i.type.tensor_type.shape.dim[:1])
    return ExportReport(path, size, packed, dynamic, tuple(layers), target)


def write(proto: onnx.ModelProto, path: Path, example: Inputs) -> int:
    """Write, check, open, run, then move to `path`; returns the size in bytes."""
    with replacing(path) as new:
        new.write_bytes(proto.SerializeToString())
        onnx.checker.check_model(str(new), full_check=True)
        session = onnxruntime.InferenceSession(str(new), providers=["CPUExecutionProvider"])
        session.run(None, fed(session, path, example))
        return new.stat().st_size


def export_onnx(model: nn.Module, path: Path, example: Inputs) -> ExportReport:
    """Write the file; see `bitwright.deploy.export`."""
    frozen = freeze(model, example)
    proto, layers = lower(placeholder_graph(frozen, example), frozen, ReproducibleLowering)
    hard_on_integers(proto)
    outline(proto)
    shorten(proto)
    fold(proto)
    return report(path, write(proto, path, example), proto, layers, "onnx")


class OnnxFile:
    """The file in onnxruntime at default settings: predictions from the file as it is, codes and weights from a
    second session on a copy in memory whose integer tensors are outputs as well.
    """

    def __init__(self, path: Path, network: Network, providers: Sequence[str] = ("CPUExecutionProvider",)):
        proto = read(path)
        self.path, self.network = path, network.within(tensor_names(proto))
        network = self.network
        self.session = open_session(str(path), path, providers)
        self.graph = probe_graph(proto, path, network.layers, network.labels)
        self.probe = open_session(self.graph.proto.SerializeToString(), path, providers)
        wanted = self.graph.wanted
        values = run_session(self.probe, path, wanted, network.example) if wanted else []
        constants = {name: torch.from_numpy(np.array(v)) for name, v in zip(wanted, values, strict=True)}
        self.weights, self.biases = frozen_weights(self.graph, network.layers, constants)

    def run(self, x: Inputs) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        outputs = [torch.from_numpy(y) for y in run_session(self.session, self.path, None, x)]
        names = self.graph.codes
        out = run_session(self.probe, self.path, names, x) if names else []
        return outputs, frozen_codes(self.network, dict(zip(names, out, strict=True)))
