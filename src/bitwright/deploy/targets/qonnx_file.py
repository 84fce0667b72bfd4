"""Target `qonnx`: `Quant` nodes, the format of FPGA tools; checked with the executor of the qonnx package.

Keeps any bits, mixed per layer, inputs, weights, sums and outputs. Weights are float32 numbers in front of a `Quant`
node, as the format wants them. Quantizers with whole zero points only, and one scale per input.
"""

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, helper
from torch import Tensor, nn

from bitwright.batches import Inputs, one_tensor
from bitwright.deploy.capture import first_line
from bitwright.deploy.files import ExportReport, replacing
from bitwright.deploy.freeze import freeze
from bitwright.deploy.integer import InputCodes, IntEmbedding, IntLayer
from bitwright.deploy.lower import LayerFile, Lowering, lower
from bitwright.deploy.phases import PhaseConv
from bitwright.deploy.probe import code_tensors, frozen_weights, probe_graph, read, tensor_names
from bitwright.deploy.targets.onnx_file import placeholder_graph, report
from bitwright.deploy.targets.opened import Network
from bitwright.errors import BitwrightError

QUANT_DOMAIN = "qonnx.custom_op.general"


def runtime() -> ModuleType:
    """The qonnx executor; BitwrightError, naming the extra that brings it, where it is absent."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its dependencies' own
            importlib.import_module("qonnx.transformation.infer_shapes")
            importlib.import_module("qonnx.core.modelwrapper")
            return importlib.import_module("qonnx.core.onnx_exec")
    except ImportError as error:
        raise BitwrightError('target qonnx: qonnx is not installed: pip install "bitwright[qonnx]"') from error


class QonnxLowering(Lowering):
    """As for onnxruntime, but every quantized tensor is one `Quant` node."""

    def quant(self, x: str, out: str, scale: np.ndarray, zero: float, bits: int, signed: bool) -> str:
        """A `Quant` node; its executor rounds ties to even, as training does."""
        inputs = [x, self.constant(f"{out}.scale", scale), self.scalar(zero, np.float32)]
        inputs.append(self.scalar(float(bits), np.float32))
        about = {"signed": int(signed), "narrow": 0, "rounding_mode": "ROUND"}
        return self.node("Quant", inputs, out, domain=QUANT_DOMAIN, **about)

    def quantized(
        self, codes: InputCodes, x: str, *, integer: bool = True, pads: list[int] | None = None, mode: str = ""
    ) -> str:
        del integer
        name = codes.label
        at = self.call(name)
        if not codes.shared:
            x = self.quant(x, f"{at}.codes", codes.scale.numpy(), float(codes.zero[0]), codes.bits, codes.lo < 0)
        return x if pads is None else self.padded(x, pads, mode, at)

    def weight(self, layer: IntLayer, transpose: bool = False) -> str:
        name, out = layer.name, f"{layer.name}.weight"
        if name in self.files:
            return out
        values, weight = layer.values.numpy(), layer.packed
        self.files[name] = LayerFile(name, layer.bits, "float32", values.size, values.nbytes)
        if weight is None:
            return self.constant(out, values.T if transpose else values)
        if isinstance(layer, PhaseConv) and weight.step == 2 and bool((weight.numbers == 0).any()):
            raise BitwrightError(
                f"{name}: target qonnx has no 0 for the pixels that a transposed convolution skips; use a grid "
                "with one, or a kernel that is a multiple of the stride"
            )
        stored = self.constant(f"{name}.weight_values", values.T if transpose else values)
        shape = [1] * values.ndim
        shape[1 if transpose else 0] = -1
        silent = weight.scale.numpy() == 0  # behind a norm with zero gain; the executor divides by the scale
        if silent.any() and weight.step == 2:
            raise BitwrightError(f"{name}: target qonnx has no 0 for a channel whose scale is 0; use a grid with one")
        scale = np.where(silent, np.float32(1), weight.scale.numpy() * np.float32(weight.multiple)).reshape(shape)
        if weight.bits == 1 and weight.step == 2:
            inputs = [stored, self.constant(f"{out}.scale", np.abs(scale))]
            return self.node("BipolarQuant", inputs, out, domain=QUANT_DOMAIN)
        signed = weight.bits > 1  # the executor takes signed 1-bit codes for -1 and +1
        zero = -(weight.offset / weight.step) - signed * 2 ** (weight.bits - 1)
        return self.quant(stored, out, scale * np.float32(weight.step), zero, weight.bits, signed)

    def integer_bias(self, layer: IntLayer) -> str:
        assert layer.bias is not None
        return self.constant(f"{layer.name}.bias", layer.bias.numpy())

    def embedding(self, layer: IntEmbedding, at: str, x: str, y: str) -> None:
        self.nodes.append(helper.make_node("Gather", [self.weight(layer), x], [y], name=at))

    def replace(self, node: NodeProto) -> None:
        if node.op_type != "Quantize":
            super().replace(node)
            return
        name = next(helper.get_attribute_value(a) for a in node.attribute if a.name == "name").decode()
        codes = self.quantized(self.quantizers[name], node.input[0])
        self.node("Identity", [codes], node.output[0])


def refuse_what_is_lost(frozen: nn.Module) -> None:
    """Raise BitwrightError for zero points between codes and for scales per input channel."""
    for module in frozen.modules():
        if isinstance(module, InputCodes) and not (module.whole and module.per_tensor):
            what = "scales per channel" if module.whole else "a zero point that is no whole code"
            raise BitwrightError(
                f"{module.name}: target qonnx keeps no input with {what}; use another grid, or target onnx"
            )


def export_qonnx(model: nn.Module, path: Path, example: Inputs) -> ExportReport:
    """Write the file; see `bitwright.deploy.export`."""
    runtime()
    x = one_tensor(example, "export: target qonnx")
    frozen = freeze(model, example)
    refuse_what_is_lost(frozen)
    proto, files = lower(placeholder_graph(frozen, example), frozen, QonnxLowering)
    proto.opset_import.append(helper.make_opsetid(QUANT_DOMAIN, 1))
    onnx.helper.set_model_props(proto, {"target": "qonnx"})
    with replacing(path) as new:
        new.write_bytes(proto.SerializeToString())
        Executor(onnx.load(str(new)), path).run(x)
        size = new.stat().st_size
    return report(path, size, proto, files, "qonnx")


@contextmanager
def runnable_nodes(onnx_exec: Any, ir_version: int) -> Iterator[None]:
    """The executor wraps each node in a model of onnx's newest IR version, which onnxruntime may not know yet."""
    make = onnx_exec.qonnx_make_model
    onnx_exec.qonnx_make_model = partial(make, ir_version=ir_version)
    try:
        yield
    finally:
        onnx_exec.qonnx_make_model = make


class Executor:
    """The file in qonnx's executor, which wants every shape fixed: the graph is made anew for each batch size."""

    def __init__(self, proto: onnx.ModelProto, path: Path):
        self.onnx_exec, self.proto, self.path = runtime(), proto, path
        self.models: dict[int, Any] = {}

    def model(self, images: int) -> Any:
        """The network for batches of `images`."""
        if images not in self.models:
            wrapper = importlib.import_module("qonnx.core.modelwrapper").ModelWrapper
            shapes = importlib.import_module("qonnx.transformation.infer_shapes").InferShapes
            fixed = onnx.ModelProto()
            fixed.CopyFrom(self.proto)
            for value in (*fixed.graph.input, *fixed.graph.output):
                dims = value.type.tensor_type.shape.dim
                if dims and dims[0].dim_param:
                    dims[0].dim_value = images
            self.models[images] = wrapper(fixed).transform(shapes())
        return self.models[images]

    def run(self, x: Tensor) -> dict[str, np.ndarray]:
        """Every tensor of the graph by name; BitwrightError if the executor refuses."""
        try:
            with warnings.catch_warnings(), runnable_nodes(self.onnx_exec, self.proto.ir_version):
                warnings.simplefilter("ignore")
                return self.onnx_exec.execute_onnx(self.model(x.shape[0]), {"input": x.numpy()}, True)
        except Exception as error:
            raise BitwrightError(f"{self.path}: qonnx cannot run it: {first_line(error)}") from error


class QonnxFile:
    """The file in qonnx's executor; every tensor of it can be seen."""

    def __init__(self, path: Path, network: Network):
        runtime()
        proto = read(path)
        self.network, self.executor = network.within(tensor_names(proto)), Executor(proto, path)
        network = self.network
        graph = probe_graph(proto, path, network.layers, network.labels)
        found = self.executor.run(one_tensor(network.example, "verify: target qonnx"))
        constants = {name: torch.from_numpy(np.array(found[name])) for name in graph.wanted}
        self.weights, self.biases = frozen_weights(graph, network.layers, constants)

    def run(self, x: Inputs) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        found = self.executor.run(one_tensor(x, "verify: target qonnx"))
        codes = {}
        for name, count in self.network.calls.items():
            q = self.network.codes[name]
            values = [torch.from_numpy(found[at]).double() for at in code_tensors({q.label: count})]
            codes[name] = [(v / q.scale.double() + q.zero.double()).round().to(torch.int16) for v in values]
        names = [value.name for value in self.executor.proto.graph.output]
        return [torch.from_numpy(found[name].copy()) for name in names], codes
