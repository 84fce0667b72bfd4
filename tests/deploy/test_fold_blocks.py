"""Folded blocks: the same network in every runtime, the same names afterwards, and a smaller file."""

import itertools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import nn

import bitwright as bw
from bitwright.batches import example_of
from bitwright.deploy import export, freeze, snap_biases, verify
from bitwright.deploy.blocks import BLOCK, LONGEST, Graph, apart, is_block
from bitwright.deploy.fold import fold, unfold
from bitwright.deploy.lower import lower
from bitwright.deploy.names import shorten, spelled_out
from bitwright.deploy.outline import outline
from bitwright.deploy.packing import OPSET
from bitwright.deploy.probe import read
from bitwright.deploy.reproducible_lowering import ReproducibleLowering
from bitwright.deploy.targets.onnx_file import placeholder_graph


class Block(nn.Module):
    """A norm, two products and a sum, as in a transformer."""

    def __init__(self, features: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(features), nn.Linear(features, 48), nn.Linear(48, features)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


def network(bits: int) -> tuple[nn.Module, torch.Tensor]:
    """Five blocks, snapped, and images."""
    torch.manual_seed(bits)
    model = nn.Sequential(
        nn.Conv2d(3, 40, 2, 2), nn.Flatten(2), *(Block(16) for _ in range(5)), nn.Flatten(), nn.Linear(640, 4)
    )
    x = torch.randn(16, 3, 8, 8)
    bw.prepare(model.eval(), bw.rules(f"w{bits}a{bits}", ends=None))
    bw.calibrate(model, [x]).eval()
    snap_biases(model, x[:2])
    return model, x


def plain(model: nn.Module, x: torch.Tensor) -> onnx.ModelProto:
    """The file before it is folded."""
    frozen = freeze(model, x)
    proto, _ = lower(placeholder_graph(frozen, example_of(x, "test")), frozen, ReproducibleLowering)
    outline(proto)
    shorten(proto)
    return proto


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(model.SerializeToString())


def outputs(model: onnx.ModelProto, x: torch.Tensor) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return np.asarray(session.run(None, {"input": x.numpy()})[0])


def optimized(model: onnx.ModelProto, path) -> list[tuple]:
    """What onnxruntime makes of a file, node for node."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path), 3
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    nodes = onnx.load(str(path)).graph.node
    return [(n.domain, n.op_type, [a.SerializeToString() for a in n.attribute]) for n in nodes]


@pytest.mark.parametrize("bits", [1, 4, 7, 8])
def test_a_folded_file_is_the_same_network(bits, tmp_path):
    model, x = network(bits)
    before = plain(model, x[:2])
    after = copied(before)
    fold(after)
    calls = [node for node in after.graph.node if is_block(node)]
    assert len(calls) >= 5
    assert after.ByteSize() < before.ByteSize() - (300 if bits == 4 else 1000)
    assert np.array_equal(outputs(after, x), outputs(before, x))
    assert optimized(after, tmp_path / "after.onnx") == optimized(before, tmp_path / "before.onnx")
    kinds = {bits for bits in (model_input(after, name) for node in calls for name in node.input) if bits is not None}
    assert TensorProto.INT4 not in kinds, "onnxruntime's functions take none"


def model_input(model: onnx.ModelProto, name: str) -> int | None:
    """The type of a constant."""
    return next((t.data_type for t in model.graph.initializer if t.name == name), None)


def constants(model: onnx.ModelProto) -> list[list[tuple | None]]:
    """What every node reads of constants."""
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    read = [[tensors.get(name) for name in node.input] for node in model.graph.node]
    return [[None if t is None else (t.shape, str(t.dtype), t.tobytes()) for t in found] for found in read]


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_unfolded_files_have_every_name_and_node_again(bits):
    model, x = network(bits)
    before = plain(model, x[:2])
    after = copied(before)
    fold(after)
    unfold(after)
    assert not any(function.name.startswith(BLOCK) for function in after.functions)
    assert [n.op_type for n in after.graph.node] == [n.op_type for n in before.graph.node]
    assert constants(after) == constants(before)
    assert [n.name for n in after.graph.node if n.name] == [n.name for n in before.graph.node if n.name]
    spelled = [
        {name for node in spelled_out(m).graph.node for name in node.output if "." in name} for m in (before, after)
    ]
    assert "6.up.input.codes" in spelled[0]
    assert spelled[0] == spelled[1]
    assert np.array_equal(outputs(after, x), outputs(before, x))


def test_verify_and_the_native_runtime_see_through_blocks(tmp_path):
    model, x = network(2)
    export(model, tmp_path / "net.onnx", x[:2])
    raw = onnx.load(str(tmp_path / "net.onnx"))
    assert any(is_block(node) for node in raw.graph.node)
    assert not any(is_block(node) for node in read(tmp_path / "net.onnx").graph.node)
    for runtime in ("default", "native"):
        assert verify(model, tmp_path / "net.onnx", [x], runtime=runtime).ok
    wrong = next(f for f in raw.functions if f.name.startswith(BLOCK))
    product = next(n for n in wrong.node if n.op_type == "Sub")
    product.op_type = "Add"
    onnx.save(raw, str(tmp_path / "net.onnx"))
    assert not verify(model, tmp_path / "net.onnx", [x]).ok


def graph_of(nodes: list[NodeProto], outputs: list[str]) -> onnx.ModelProto:
    """A model of the input `input` (2, 2)."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in ("input", *outputs)]
    two = numpy_helper.from_array(np.float32([[1, 2], [3, 4]]), "two")
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [two])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def steps(count: int, early: int | None = None) -> list[NodeProto]:
    """Add, Mul, Sub, Neg, again and again; the sum of step `early` is an output of the network too."""
    nodes, x = [], "input"
    for i in range(count):
        for kind, name in (("Add", "a"), ("Mul", "b"), ("Sub", "c"), ("Neg", "d")):
            made = "early" if (i, name) == (early, "a") else f"{name}{i}"
            nodes.append(helper.make_node(kind, [x] if kind == "Neg" else [x, "two"], [made]))
            x = made
    nodes[-1].output[0] = "logits"
    return nodes


def test_a_tensor_that_is_read_outside_leaves_its_block():
    x = torch.randn(2, 2)
    for early in (None, 3):
        model = graph_of(steps(12, early), ["logits"] + ["early"] * (early is not None))
        expected = outputs(model, x)
        fold(model)
        calls = [node for node in model.graph.node if is_block(node)]
        assert len(calls) >= 2
        assert np.array_equal(outputs(model, x), expected)
        made = {name for node in model.graph.node for name in node.output}
        assert early is None or "early" in made


def test_what_saves_nothing_stays():
    model = graph_of(steps(2), ["logits"])
    before = model.SerializeToString()
    fold(model)
    assert model.SerializeToString() == before
    unfold(model)
    assert model.SerializeToString() == before


def test_runs_that_overlap_count_once():
    assert apart([0, 2, 4, 5, 9], 4) == [0, 4, 9]
    runs = Graph(graph_of(steps(12), ["logits"]).graph).best()
    assert all(a.end <= b.start for a, b in itertools.pairwise(runs))
    assert all(run.end - run.start <= LONGEST for run in runs)
