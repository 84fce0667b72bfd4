"""Target `executorch`: a .pte file whose network ExecuTorch's XNNPACK delegate runs, one image at a time.

Keeps inputs and outputs of 8 bits and weights of 1 to 8 bits, in bytes. Every convolution and product runs on an
integer kernel but the one that writes the network's output.
"""

import copy
import importlib
import importlib.metadata
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitwright.batches import Inputs, one_tensor
from bitwright.deploy.capture import ATEN, PASSED, first_line, owner_of, quiet_export
from bitwright.deploy.files import ExportReport, replacing
from bitwright.deploy.freeze import freeze
from bitwright.deploy.integer import InputCodes
from bitwright.deploy.targets.executorch_form import (
    LO,
    Int8Form,
    Int8Layer,
    refuse_bias,
    refuse_several_outputs,
    refuse_what_is_lost,
)
from bitwright.deploy.targets.opened import Network
from bitwright.errors import BitwrightError

OLDEST = (1, 5)
MARK = "bitwright"  # the name of a method of our files, which returns their version
PRODUCTS = ("convolution", "conv1d", "conv2d", "linear", "addmm", "mm", "bmm")


@contextmanager
def quiet() -> Iterator[None]:
    """ExecuTorch and torchao warn and log about their own internals; none of it is the user's doing."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with quiet_export():
            yield
    finally:
        logging.disable(before)


def parts() -> tuple[Any, Any, Any]:
    """(executorch.exir, its XNNPACK partitioner's module, executorch.runtime).

    Raises:
        BitwrightError: the package is absent, too old or cannot be imported; the line names the extra that brings it.
    """
    try:
        version = importlib.metadata.version("executorch")
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            raise BitwrightError(
                f"target executorch: executorch {version} is too old: pip install -U 'bitwright[executorch]'"
            )
        with quiet():
            exir = importlib.import_module("executorch.exir")
            partitioner = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
            return exir, partitioner, importlib.import_module("executorch.runtime")
    except (importlib.metadata.PackageNotFoundError, ModuleNotFoundError) as error:
        line = 'target executorch: executorch is not installed: pip install "bitwright[executorch]"'
        raise BitwrightError(line) from error
    except ImportError as error:
        raise BitwrightError(f"target executorch: executorch cannot be imported: {first_line(error)}") from error


def tidy(graph: fx.Graph) -> None:
    """Drop quantizers that take the codes again that they are given, and give each reader a dequantizer of its own.

    With one for several readers the partitioner makes partitions that need each other, and fails.
    """
    ops: Any = torch.ops.quantized_decomposed
    quantize, dequantize = ops.quantize_per_tensor.default, ops.dequantize_per_tensor.default
    for node in list(graph.nodes):
        before = node.args[0] if node.target is quantize else None
        if isinstance(before, fx.Node) and before.target is dequantize and before.args[1:] == node.args[1:]:
            node.replace_all_uses_with(before.args[0])  # pyright: ignore
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        for user in list(node.users)[1:] if node.target is dequantize else ():
            with graph.inserting_after(node):
                twin = graph.create_node("call_function", node.target, node.args, node.kwargs)
            twin.meta = copy.copy(node.meta)
            user.replace_input_with(node, twin)


def is_product(node: fx.Node) -> bool:
    """Whether a node of a lowered graph is a convolution or a product of matrices."""
    name = getattr(node.target, "__name__", "").removeprefix("aten.").split(".")[0]
    return node.op == "call_function" and name in PRODUCTS


def kernels(graph: fx.GraphModule) -> dict[str, int]:
    """How many convolutions and products of a lowered network run on which kernels of XNNPACK: {"qs8": 9, "f32": 1}.

    Raises:
        BitwrightError: one of them was left outside of the delegate.
    """
    found: dict[str, int] = {}
    for node in graph.graph.nodes:
        if is_product(node):
            raise BitwrightError(
                f"{owner_of(node).removeprefix('network.0.')}: XNNPACK has no kernel for it, and target executorch "
                "would run it in float; change the layer, or use target onnx"
            )
        inner = getattr(getattr(graph, node.target, None), "original_module", None) if node.op == "get_attr" else None
        for product in () if inner is None else inner.graph.nodes:
            if is_product(product):
                quantized = any("dequantize_per_channel" in str(n.target) for n in product.all_input_nodes)
                kind = "qs8" if quantized else "f32"
                found[kind] = found.get(kind, 0) + 1
    return found


def quantize_outputs(graph: fx.Graph, layers: dict[str, Int8Layer]) -> None:
    """Put the quantizer that reads an integer layer right behind it, where XNNPACK wants it.

    Pooling and shapes in between commute with it. BitwrightError where no quantizer, or another reader, is there, or
    where the layer's bias cannot be kept; layers: by the name of the module in the exported network.
    """
    ops: Any = torch.ops.quantized_decomposed
    weights = [n for n in graph.nodes if n.target is ops.dequantize_per_channel.default]
    for node in (next(iter(w.users)) for w in weights):
        end = followed(node, (ATEN.relu, ATEN.relu_, ATEN.hardtanh, ATEN.hardtanh_))
        last = followed(end, PASSED)
        readers = list(last.users)
        if [r.target for r in readers] != [ops.quantize_per_tensor.default]:
            raise BitwrightError(
                f"{owner_of(node).removeprefix('network.0.')}: XNNPACK has no integer kernel with a float output; "
                "give it a quantizer (topology res8, or an output rule), or use target onnx"
            )
        refuse_bias(layers[owner_of(node)], readers[0].args[1])  # pyright: ignore
        if last is end:
            continue
        behind, about = next(iter(end.users)), readers[0].args[1:]
        with graph.inserting_after(end):
            codes = graph.create_node("call_function", ops.quantize_per_tensor.default, (end, *about))
        with graph.inserting_after(codes):
            values = graph.create_node("call_function", ops.dequantize_per_tensor.default, (codes, *about))
        codes.meta = {**end.meta, "val": end.meta["val"].to(torch.int8)}
        values.meta = copy.copy(end.meta)
        behind.replace_input_with(end, values)


def followed(node: fx.Node, kinds: Collection[Any]) -> fx.Node:
    """The last of the nodes behind `node` that each alone reads the one before and is of one of `kinds`."""
    while len(node.users) == 1 and getattr(next(iter(node.users)).target, "overloadpacket", None) in kinds:
        node = next(iter(node.users))
    return node


def lowered(form: Int8Form, example: Tensor) -> tuple[bytes, dict[str, int]]:
    """(the .pte of a network for `example`, one image; its kernels)."""
    exir, partitioner, _ = parts()
    # Registers the operators of quantized networks.
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    layers = {name: m for name, m in form.named_modules() if isinstance(m, Int8Layer)}
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(form, (example,), strict=False)
            quantize_outputs(program.graph_module.graph, layers)
            tidy(program.graph_module.graph)
            program.graph_module.recompile()
            edge = exir.to_edge_transform_and_lower(
                program, partitioner=[partitioner.XnnpackPartitioner()], constant_methods={MARK: 1}
            )
            found = kernels(edge.exported_program().graph_module)
            return bytes(edge.to_executorch().buffer), found
    except BitwrightError:
        raise
    except Exception as error:
        raise BitwrightError(f"target executorch: the network cannot be lowered: {first_line(error)}") from error


def opened(source: Path | bytes, path: Path) -> Any:
    """The network in ExecuTorch's runtime; BitwrightError if it refuses, or the file is not one of ours."""
    runtime = parts()[2]
    try:
        program = runtime.Runtime.get().load_program(source, verification=runtime.Verification.InternalConsistency)
        ours = MARK in program.method_names
        method = program.load_method("forward") if ours else None
    except Exception as error:
        raise BitwrightError(f"{path}: executorch cannot open it: {first_line(error)}") from error
    if not ours:
        raise BitwrightError(f"{path}: was not written by bitwright export")
    return program, method


def run(method: Any, image: Tensor, path: Path) -> list[Tensor]:
    """Outputs for one image (1, ...), copies; BitwrightError if the runtime refuses."""
    try:
        return [t.clone() for t in method.execute([image.contiguous()])]
    except Exception as error:
        raise BitwrightError(f"{path}: executorch cannot run it: {first_line(error)}") from error


def export_executorch(model: nn.Module, path: Path, example: Inputs) -> ExportReport:
    """Write the file; see `bitwright.deploy.export`."""
    parts()
    image = one_tensor(example, "export: target executorch")[:1]
    frozen = freeze(model, example)
    refuse_what_is_lost(frozen)
    refuse_several_outputs(frozen, image)
    form = Int8Form(frozen, image).eval()
    data, _ = lowered(form, image)
    files = [m.stored for m in form.modules() if isinstance(m, Int8Layer)]
    with replacing(path) as new:
        new.write_bytes(data)
        program, method = opened(new, path)
        run(method, image, path)
        del method, program
        size = new.stat().st_size
    packed = sum(f.size_bytes for f in files if f.packing == "int8")
    return ExportReport(path, size, packed, False, tuple(files), "executorch")


class ExecutorchFile:
    """The file in ExecuTorch's runtime: predictions from the file as it is.

    Nothing inside of a delegate can be seen. Codes come from a second program that is lowered from the network with
    every quantizer's codes as outputs; its logits must be the file's to the last bit, else the file has other numbers
    (`difference` then says so).
    """

    def __init__(self, path: Path, network: Network):
        self.path, self.network = path, network
        self.program, self.method = opened(path, path)
        self.weights: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        self.difference: str | None = None
        refuse_what_is_lost(network.frozen)
        image = one_tensor(network.example, "verify: target executorch")
        form = Int8Form(network.frozen, image, probe=True).eval()
        data, _ = lowered(form, image)
        with torch.no_grad():
            form(image)
        self.order: list[InputCodes] = [codes for codes, _ in form.taken.items]
        self.probe_program, self.probe = opened(data, path)

    def run(self, x: Inputs) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        logits, codes = [], [[] for _ in self.order]
        for image in one_tensor(x, "verify: target executorch").split(1):
            logits.append(run(self.method, image, self.path)[0])
            again, *found = run(self.probe, image, self.path)
            if not torch.equal(again, logits[-1]):
                self.difference = "output: the file's logits are not those of the same network lowered again"
            for kept, numbers in zip(codes, found, strict=True):
                kept.append(numbers)
        by_name: dict[str, list[Tensor]] = {}
        for quantizer, numbers in zip(self.order, codes, strict=True):
            by_name.setdefault(quantizer.name, []).append(torch.cat(numbers).short() - LO + quantizer.lo)
        return [torch.cat(logits)], by_name
