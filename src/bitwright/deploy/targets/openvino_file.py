"""Target `openvino`: an ONNX file as OpenVINO's CPU plugin wants it.

Keeps 1 to 8 bits, but stores widths other than 4 in bytes: OpenVINO has no operators that unpack the others. Sums must
be float: it moves quantizers that stand on them, and then computes another network. Zero points must be whole codes.
"""

import functools
import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from bitwright.batches import Inputs, one_tensor
from bitwright.deploy.capture import first_line
from bitwright.deploy.files import ExportReport, replacing
from bitwright.deploy.freeze import freeze
from bitwright.deploy.integer import DOMAIN, InputCodes, IntAdd, IntLayer, IntLinear
from bitwright.deploy.lower import LayerFile, lower
from bitwright.deploy.packing import BIAS
from bitwright.deploy.phases import PhaseConv
from bitwright.deploy.probe import frozen_weights, probe_graph, read, tensor_names
from bitwright.deploy.targets.onnx_file import placeholder_graph, report
from bitwright.deploy.targets.opened import Network, frozen_codes
from bitwright.errors import BitwrightError
from bitwright.layers.fold import Weight
from bitwright.layers.output import has_output

OLDEST = (2025, 0)
# Beginnings of its messages' lines that say where it was, or only that it was.
PLACES = ("Exception from", "Check '", "FrontEnd API failed", "While validating", "Model wasn't fully converted", "-- ")


def runtime() -> ModuleType:
    """The openvino module; BitwrightError, naming the extra that brings it, where it is absent or too old."""
    try:
        openvino = importlib.import_module("openvino")
    except ImportError as error:
        raise BitwrightError('target openvino: openvino is not installed: pip install "bitwright[openvino]"') from error
    version = tuple(int(part) for part in openvino.__version__.split(".")[:2])
    if version < OLDEST:
        raise BitwrightError(
            f"target openvino: openvino {openvino.__version__} is too old: pip install -U 'bitwright[openvino]'"
        )
    return openvino


def refuse_what_is_lost(frozen: nn.Module) -> None:
    """Raise BitwrightError if a sum or a module's output is quantized, or a zero point lies between two codes."""
    for name, module in frozen.named_modules():
        if isinstance(module, InputCodes) and not module.whole:
            raise BitwrightError(
                f"{module.name}: target openvino rounds zero points that are no whole codes; "
                "use a grid without an offset, or target onnx"
            )
        operands = isinstance(module, IntAdd) and any(m is not None for m in module._modules.values())
        if operands or has_output(module):
            raise BitwrightError(
                f"{name}: target openvino keeps float sums only, it would move this quantizer; "
                "train with topology fpres, or use target onnx"
            )


def in_bytes(proto: onnx.ModelProto, layers: dict[str, IntLayer], files: list[LayerFile]) -> list[LayerFile]:
    """Replace the calls that unpack weights by the integers themselves, in place; how each weight is stored now."""
    calls = {
        node.output[0].removesuffix(".codes").removesuffix(".taps"): node
        for node in proto.graph.node
        if node.domain == DOMAIN and node.op_type != BIAS
    }
    sizes = {}
    for name, node in calls.items():
        layer = layers[name]
        weight = layer.taps if isinstance(layer, PhaseConv) else layer.packed
        assert isinstance(weight, Weight)
        numbers = weight.numbers if weight.numbers.dtype == torch.int8 else weight.numbers.float()
        values = np.ascontiguousarray((numbers.T if isinstance(layer, IntLinear) else numbers).numpy())
        proto.graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
        proto.graph.node.remove(node)
        sizes[name] = ("int8" if values.dtype == np.int8 else "float32", values.nbytes)
    proto.CopyFrom(onnx.inliner.inline_local_functions(proto))
    read_names = {name for node in proto.graph.node for name in node.input}
    for tensor in [t for t in proto.graph.initializer if t.name not in read_names]:
        proto.graph.initializer.remove(tensor)
    for opset in [o for o in proto.opset_import if o.domain == DOMAIN]:
        proto.opset_import.remove(opset)
    return [replace(f, packing=sizes[f.name][0], size_bytes=sizes[f.name][1]) if f.name in sizes else f for f in files]


def export_openvino(model: nn.Module, path: Path, example: Inputs) -> ExportReport:
    """Write the file; see `bitwright.deploy.export`."""
    runtime()
    x = one_tensor(example, "export: target openvino")
    frozen = freeze(model, example)
    refuse_what_is_lost(frozen)
    proto, files = lower(placeholder_graph(frozen, example), frozen)
    layers = {m.name: m for m in frozen.modules() if isinstance(m, IntLayer)}
    files = in_bytes(proto, layers, files)
    onnx.helper.set_model_props(proto, {"target": "openvino"})
    with replacing(path) as new:
        new.write_bytes(proto.SerializeToString())
        onnx.checker.check_model(str(new), full_check=True)
        compiled(new.read_bytes(), path)([x.numpy()])
        size = new.stat().st_size
    return report(path, size, proto, files, "openvino")


# On processors with bfloat16 units OpenVINO computes what is not on integer kernels in bfloat16 unless told otherwise:
# codes behind a float layer are then off by several steps, and logits have three digits.
SETTINGS = {"INFERENCE_PRECISION_HINT": "f32"}


@functools.cache
def the_core() -> Any:
    """The process's one `openvino.Core`.

    On processors with AMX every core's CPU plugin gives the thread a stack for signal handlers and takes it back when
    the core goes. Of two cores, the one that goes last puts back the other's, which is freed by then: the next signal
    (a data loader's worker that ends) kills the process.
    """
    return runtime().Core()


def reason_of(error: Exception) -> str:
    """Why OpenVINO refused: what is unsupported, from which the rest follows; else the first line with a reason."""
    lines = [line.strip() for line in str(error).splitlines()]
    reasons = [line for line in lines if line and not line.startswith(PLACES)] or [first_line(error)]
    return next((line for line in reasons if line.startswith("Unsupported")), reasons[0])


def compiled(source: bytes, path: Path) -> Any:
    """The network on the CPU at default settings but `SETTINGS`; BitwrightError if OpenVINO refuses."""
    try:
        core = the_core()
        return core.compile_model(core.read_model(source), "CPU", SETTINGS)
    except Exception as error:
        raise BitwrightError(f"{path}: openvino cannot open it: {reason_of(error)}") from error


def kernels(network: Any) -> dict[str, int]:
    """How many convolutions and products of a compiled network run on which type: {"u8": 20, "f32": 1}, say."""
    found: dict[str, int] = {}
    for op in network.get_runtime_model().get_ops():
        about = op.get_rt_info()
        if "layerType" in about and about["layerType"].astype(str) in ("Convolution", "FullyConnected", "MatMul"):
            kind = about["runtimePrecision"].astype(str)
            found[kind] = found.get(kind, 0) + 1
    return found


class OpenVinoFile:
    """The file in OpenVINO: predictions from the file as it is, codes and weights from a copy with more outputs."""

    def __init__(self, path: Path, network: Network):
        runtime()
        proto = read(path)
        self.network = network = network.within(tensor_names(proto))
        self.graph = probe_graph(proto, path, network.layers, network.labels)
        self.model = compiled(path.read_bytes(), path)
        self.probe = compiled(self.graph.proto.SerializeToString(), path)
        found = self.outputs(one_tensor(network.example, "verify: target openvino"))
        constants = {name: torch.from_numpy(found[name]) for name in self.graph.wanted}
        self.weights, self.biases = frozen_weights(self.graph, network.layers, constants)

    def outputs(self, x: Tensor) -> dict[str, np.ndarray]:
        """All outputs of the copy, by name."""
        values = self.probe([x.numpy()])
        return {name: np.array(values[name]) for name in [*self.graph.codes, *self.graph.wanted]}

    def run(self, x: Inputs) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        image = one_tensor(x, "verify: target openvino")
        values = self.model([image.numpy()])
        outputs = [torch.from_numpy(np.array(values[i])) for i in range(len(self.model.outputs))]
        found = self.outputs(image)
        return outputs, frozen_codes(self.network, {name: found[name] for name in self.graph.codes})
