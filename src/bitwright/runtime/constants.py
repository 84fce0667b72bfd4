"""What a file says before any input: its graph, checked, and the values that depend on no input."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from bitwright.deploy.capture import first_line
from bitwright.deploy.fold import unfold
from bitwright.deploy.names import spelled_out
from bitwright.deploy.probe import refuse_version
from bitwright.errors import BitwrightError

# Types that numpy reads as they are; what is packed tighter is unpacked by nodes of the graph.
PLAIN = {
    *(TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8, TensorProto.INT32, TensorProto.INT64),
    TensorProto.BOOL,
}


def checked(path: Path) -> onnx.ModelProto:
    """The file, whole, without branches and functions of its own; BitwrightError if it is anything else."""
    damaged = f"{path}: is damaged or no ONNX file"
    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise BitwrightError(f"{path}: cannot be read: {error.strerror or first_line(error)}") from error
    except Exception as error:
        raise BitwrightError(f"{damaged}: {first_line(error)}") from error
    refuse_version(model, path)
    outside = next((t.name for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL), None)
    if outside is not None:
        raise BitwrightError(f"{path}: {outside} lies in another file; the runtime takes files that are whole")
    branch = next((n.op_type for n in model.graph.node for a in n.attribute if a.HasField("g") or a.graphs), None)
    if branch is not None:
        # Its nodes read values unseen, which would then be taken for free to change.
        raise BitwrightError(f"{path}: {branch} holds a graph of its own; the runtime takes straight networks")
    try:
        onnx.checker.check_model(model)
    except Exception as error:
        raise BitwrightError(f"{damaged}: {first_line(error)}") from error
    return onnx.inliner.inline_local_functions(spelled_out(unfold(model)))


class Graph:
    """A checked ONNX graph of one float32 input and one output.

    Attributes:
        nodes: in order of execution. readers: nodes by the value that they read. producer: node by its output.
        constant: names of values that depend on no input. shapes: of values, None for a free axis, where known.
    """

    def __init__(self, path: Path):
        self.path = path
        self.model = checked(path)
        graph = self.model.graph
        self.initializers = {t.name: t for t in graph.initializer}
        inputs = [v for v in graph.input if v.name not in self.initializers]
        floats = all(v.type.tensor_type.elem_type == TensorProto.FLOAT for v in inputs)
        if len(inputs) != 1 or len(graph.output) != 1 or not floats:
            raise BitwrightError(f"{path}: the runtime takes files of one float32 input and one output")
        self.input, self.output = inputs[0].name, graph.output[0].name
        self.nodes: list[NodeProto] = list(graph.node)
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        self.producer: dict[str, NodeProto] = {}
        self.constant = set(self.initializers)
        for node in self.nodes:
            self.producer |= {out: node for out in node.output}
            if all(name in self.constant for name in node.input if name):
                self.constant |= set(node.output)
            for name in node.input:
                self.readers[name].append(node)
        self.shapes = self.inferred()
        self.values: dict[str, NDArray] = {}
        self.fold()

    def inferred(self) -> dict[str, tuple[int | None, ...]]:
        """Shapes of values as far as they can be inferred."""
        try:
            known = onnx.shape_inference.infer_shapes(self.model, data_prop=True).graph
        except Exception:  # what is not known is treated as such
            known = self.model.graph
        found = {}
        for value in (*known.input, *known.value_info, *known.output):
            if value.type.tensor_type.HasField("shape"):
                dims = value.type.tensor_type.shape.dim
                found[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)
        return found

    def fold(self) -> None:
        """Compute every constant that a node outside the constants reads, and quantized weights before scaling."""
        wanted = []
        for node in self.nodes:
            if node.output[0] in self.constant:
                if node.op_type == "DequantizeLinear":
                    wanted += node.input
                continue
            for place, name in enumerate(node.input):
                made = self.producer.get(name)
                if name not in self.constant or (made is not None and made.op_type == "DequantizeLinear"):
                    continue
                scaled = made is not None and made.op_type == "Mul" and node.op_type == "Conv" and place == 1
                wanted += made.input if made is not None and scaled else [name]
        computed = []
        for name in dict.fromkeys(wanted):
            if name in self.initializers and self.initializers[name].data_type in PLAIN:
                self.values[name] = numpy_helper.to_array(self.initializers[name])
            elif name in self.producer:
                computed.append(name)
        if computed:
            values = self.session([], computed, "constants").run(None, {})
            self.values |= zip(computed, (np.asarray(v) for v in values), strict=True)

    def behind(self, names: list[str], stop: set[str]) -> list[NodeProto]:
        """The nodes that compute `names` from constants and from what is in `stop`, in order."""
        needed, todo = set(), list(names)
        while todo:
            name = todo.pop()
            node = self.producer.get(name)
            if name not in stop and node is not None and node.output[0] not in needed:
                needed.add(node.output[0])
                todo += [n for n in node.input if n]
        return [node for node in self.nodes if node.output[0] in needed]

    def computed(self, nodes: list[NodeProto]) -> list[TensorProto]:
        """The constants that `nodes` read and other nodes compute."""
        read = dict.fromkeys(name for node in nodes for name in node.input)
        names = [name for name in read if name in self.constant and name in self.producer]
        missing = [name for name in names if name not in self.values]
        found = self.session([], missing, "constants").run(None, {}) if missing else []
        values = self.values | dict(zip(missing, (np.asarray(v) for v in found), strict=True))
        return [numpy_helper.from_array(values[name], name) for name in names]

    def session(
        self, inputs: list[onnx.ValueInfoProto], outputs: list[str], what: str, nodes: list[NodeProto] | None = None
    ) -> onnxruntime.InferenceSession:
        """A session of onnxruntime on a part of the graph: `nodes`, or all that `outputs` need.

        What `nodes` read of constants are plain numbers there. A DequantizeLinear of a weight would tell onnxruntime to
        round the other operand too, where that is float here (MatMulNBits does, to 8 bits).
        """
        given = {value.name for value in inputs}
        numbers = [] if nodes is None else self.computed(nodes)
        nodes = self.behind(outputs, given) if nodes is None else nodes
        used = {name for node in nodes for name in node.input} - given
        part = helper.make_graph(
            nodes,
            "part",
            inputs,
            [onnx.ValueInfoProto(name=name) for name in outputs],
            [*(t for name, t in self.initializers.items() if name in used), *numbers],
        )
        model = helper.make_model(
            part,
            opset_imports=self.model.opset_import,
            ir_version=self.model.ir_version,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        try:
            return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BitwrightError(f"{self.path}: {what}: onnxruntime cannot run it: {first_line(error)}") from error

    def array(self, name: str) -> NDArray | None:
        """The value of a constant that was folded."""
        return self.values.get(name)

    def attributes(self, node: NodeProto) -> dict:
        """Attributes by name."""
        return {a.name: helper.get_attribute_value(a) for a in node.attribute}

    def sole_reader(self, name: str) -> NodeProto | None:
        """The one node that reads a value, if there is only one and it is no output."""
        found = self.readers[name]
        return found[0] if len(found) == 1 and name != self.output else None
