"""Short names and outlined groups: the same graph afterwards, and every name that is asked for comes back."""

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
from deploy_nets import exported
from onnx import TensorProto, helper, numpy_helper

from bitwright.deploy.integer import DOMAIN
from bitwright.deploy.names import base62, owner_of, shorten, spelled_out
from bitwright.deploy.outline import OFTEN, outline
from bitwright.deploy.packing import OPSET


def chain(layers: int, scale: float = 0.03) -> onnx.ModelProto:
    """Quantizers and products one after the other, as exported: layer `body.i` and the output of `body.i`."""
    generator = np.random.default_rng(0)
    nodes, constants = [], {"zero": np.uint8(128), "hi": np.uint8(143), "lo": np.uint8(112)}
    x = "input"

    def node(kind, inputs, output, **attributes):
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    for i in range(layers):
        at = f"body.{i}"
        constants |= {f"{at}.scale": np.float32(scale), f"{at}.codes": generator.integers(-9, 9, (4, 4), np.int8)}
        constants[f"{at}.weight_scale"] = generator.random(4).astype(np.float32)
        for name in (f"{at}.input", f"{at}.output"):
            q = node("QuantizeLinear", [x, f"{at}.scale", "zero"], f"{name}.q")
            q = node("Clip", [q, "lo", "hi"], f"{name}.codes")
            x = node("DequantizeLinear", [q, f"{at}.scale", "zero"], f"{name}.x")
            if name.endswith("input"):
                w = node("DequantizeLinear", [f"{at}.codes", f"{at}.weight_scale"], f"{at}.weight", axis=1)
                x = node("MatMul", [x, w], f"{at}.sum", name=at)
    node("Identity", [x], "logits")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("input", "logits")]
    initializers = [numpy_helper.from_array(np.array(v), k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def run(model: onnx.ModelProto, *names: str) -> list[np.ndarray]:
    """Outputs for one batch; `names` become outputs as well."""
    onnx.checker.check_model(model, full_check=True)
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    x = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    session = onnxruntime.InferenceSession(copy.SerializeToString())
    return [np.asarray(y) for y in session.run(["logits", *names], {"input": x})]


ASKED = [f"body.{i}.{end}" for i in range(5) for end in ("input.codes", "output.codes", "weight")]


def test_names_come_back_and_nothing_else_has_changed():
    model, expected = chain(5), run(chain(5), *ASKED)
    size = model.ByteSize()
    shorten(model)
    assert model.ByteSize() < size
    names = {name for node in model.graph.node for name in (*node.input, *node.output)}
    assert max(map(len, names - {"input", "logits"})) <= 3
    assert {n.name for n in model.graph.node if n.op_type == "MatMul"} == {f"body.{i}" for i in range(5)}
    assert np.array_equal(run(model)[0], expected[0])
    for found, wanted in zip(run(spelled_out(model), *ASKED), expected, strict=True):
        assert np.array_equal(found, wanted)
    assert not model.metadata_props
    again = model.SerializeToString()
    assert spelled_out(model).SerializeToString() == again


def test_files_whose_names_were_never_short_are_not_touched():
    """Layers called 0, 1, …: their names look like short ones."""
    model = chain(2)
    for node in model.graph.node:
        node.name = node.name.replace("body.", "")
        node.output[:] = [name.replace("body.1", "0").replace("body.0", "1") for name in node.output]
    before = model.SerializeToString()
    assert spelled_out(model).SerializeToString() == before


@pytest.mark.parametrize("short_too", [False, True])
def test_outlined_groups_do_the_same(short_too):
    model, expected = chain(5), run(chain(5), *ASKED)
    count = len(model.graph.node)
    outline(model)
    if short_too:
        shorten(model)
        spelled_out(model)
    calls = [node for node in model.graph.node if node.domain == DOMAIN]
    assert len(calls) == 10
    assert len(model.functions) == 1
    assert len(model.graph.node) == count - 2 * len(calls)
    for found, wanted in zip(run(model, *ASKED), expected, strict=True):
        assert np.array_equal(found, wanted)
    inlined = onnx.inliner.inline_local_functions(model)
    assert {n.op_type for n in inlined.graph.node} == {n.op_type for n in chain(1).graph.node}
    assert np.array_equal(run(inlined)[0], expected[0])


def halves(layers: int) -> onnx.ModelProto:
    """Quantizers with a zero point between two codes one after the other; something is added to each one's output."""
    vector = np.array([0.1, -0.2, 0.3, 0.4], np.float32)
    constants = {"unit": np.float32(1), "zero": np.float32(0.5), "base": np.uint8(128), "middle": np.float32(128.5)}
    constants |= {"top": np.uint8(129), "low": np.uint8(128), "vector": vector}
    nodes, x = [], "input"
    for i in range(layers):
        constants[f"scale{i}"] = np.float32(0.7 + i)
        for kind, inputs, output in (
            ("Div", [x, f"scale{i}"], "steps"),
            ("Add", [f"{i}.steps", "zero"], "shifted"),
            ("QuantizeLinear", [f"{i}.shifted", "unit", "base"], "q"),
            ("Clip", [f"{i}.q", "low", "top"], "input.codes"),
            ("Cast", [f"{i}.input.codes"], "number"),
            ("Sub", [f"{i}.number", "middle"], "centered"),
            ("Mul", [f"{i}.centered", f"scale{i}"], "x"),
            ("Add", [f"{i}.x", "vector"], "sum"),
        ):
            to = {"to": TensorProto.FLOAT} if kind == "Cast" else {}
            nodes.append(helper.make_node(kind, inputs, [f"{i}.{output}"], **to))
        x = f"{i}.sum"
    nodes.append(helper.make_node("Identity", [x], ["logits"]))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("input", "logits")]
    tensors = [numpy_helper.from_array(np.array(v), k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, "halves", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def test_quantizers_between_codes_are_outlined_without_what_is_added_around_them():
    model = halves(5)
    outline(model)
    assert [n.op_type for n in model.graph.node] == ["H", "Add"] * 5 + ["Identity"]
    assert np.array_equal(run(model)[0], run(halves(5))[0])


def test_what_comes_rarely_stays():
    model = chain(OFTEN // 2 - 1)
    before = model.SerializeToString()
    outline(model)
    assert model.SerializeToString() == before


def test_a_value_that_is_read_before_its_group_ends_keeps_the_group_apart():
    """The codes of every quantizer are read by a node in front of the DequantizeLinear."""
    model = chain(4)
    for i, node in reversed(list(enumerate(model.graph.node))):
        if node.op_type == "Clip":
            model.graph.node.insert(i + 1, helper.make_node("Identity", [node.output[0]], [f"{node.output[0]}.early"]))
    before = model.SerializeToString()
    outline(model)
    assert model.SerializeToString() == before


def test_numbers_in_base_62():
    digits = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names = [base62(i) for i in range(62 + 62 * 62)]
    assert names[:62] == list(digits)
    assert names[62:] == [a + b for a in digits for b in digits]


def test_the_longest_owner_counts():
    assert owner_of("a.b.input.codes", {"a", "a.b", "a.b.input.codes"}) == "a.b"
    assert owner_of("ab.codes", {"a"}) is None


@pytest.mark.parametrize("bits", [2, 8])
def test_a_file_without_its_functions_is_the_same_network(bits):
    """What the documentation tells users of tools that take no functions."""
    _, file = exported("lsq", bits)
    model = onnx.load_from_string(file)
    plain = onnx.inliner.inline_local_functions(model)
    onnx.checker.check_model(plain, full_check=True)
    assert model.functions
    assert not plain.functions
    x = np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32)
    outputs = []
    for each in (model, plain):
        session = onnxruntime.InferenceSession(each.SerializeToString())
        outputs.append(session.run(None, {session.get_inputs()[0].name: x})[0])
    assert np.array_equal(*outputs)
