"""Weights at their own width: packing is exact, exactly b/8 bytes a weight, and the runtime unpacks it."""

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from bitwright.deploy.integer import DOMAIN
from bitwright.deploy.packing import (
    BIAS,
    OPSET,
    bias_function,
    field_widths,
    function_name,
    pack_fields,
    pack_int4,
    unpack_function,
)


@given(st.integers(1, 8), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_fields_hold_the_bits(bits, count, seed):
    stored = np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint8)
    whole = np.zeros(-(-count // 8) * 8, np.int64)
    for width, packed in zip(field_widths(bits), pack_fields(stored, bits), strict=True):
        lowest_first = np.unpackbits(packed.reshape(-1), bitorder="little").reshape(-1, width)
        whole = (whole << width) | (lowest_first << np.arange(width)).sum(1)
    assert whole[:count].tolist() == stored.tolist()
    assert sum(p.nbytes for p in pack_fields(stored, bits)) == whole.size * bits // 8


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=20))
def test_int4_is_onnx_own_layout(values):
    numbers = np.array(values, np.int8)
    tensor = helper.make_tensor("w", TensorProto.INT4, [len(values)], pack_int4(numbers), raw=True)
    assert numpy_helper.to_array(tensor).astype(np.int8).tolist() == values


@pytest.mark.parametrize("target", [TensorProto.INT8, TensorProto.FLOAT])
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_runtime_unpacks(bits, target):
    shape, step, offset = (3, 5, 3), 1 if target == TensorProto.INT8 else 2, -(2 ** (bits - 1))
    stored = np.random.default_rng(bits).integers(0, 2**bits, shape).astype(np.uint8)
    fields = [numpy_helper.from_array(f, f"f{i}") for i, f in enumerate(pack_fields(stored, bits))]
    others = {"shape": np.array(shape, np.int64), "step": np.int32(step), "offset": np.int32(offset)}
    constants = [*fields, *(numpy_helper.from_array(np.array(v), k) for k, v in others.items())]
    node = helper.make_node(function_name(bits, target), [c.name for c in constants], ["w"], domain=DOMAIN)
    graph = helper.make_graph([node], "g", [], [helper.make_tensor_value_info("w", target, shape)], constants)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, functions=[unpack_function(bits, target)], opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    (out,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {})
    assert np.array_equal(out, step * stored.astype(np.int32) + offset)


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("dtype", [np.int16, np.int32])
def test_the_runtime_scales_biases_by_the_product_of_two_scales_rounded_once(dtype, channels):
    generator = np.random.default_rng(channels)
    ends = np.iinfo(dtype)
    codes = np.array([ends.min, -1, 0, 7, 2**20 if dtype == np.int32 else ends.max], dtype)
    input_scale = np.float32(generator.random())
    weight_scale = generator.random(channels).astype(np.float32) if channels > 1 else np.float32(0.0137)
    given = {"codes": codes, "input_scale": input_scale, "weight_scale": weight_scale}
    constants = [numpy_helper.from_array(np.array(v), k) for k, v in given.items()]
    node = helper.make_node(BIAS, list(given), ["bias"], domain=DOMAIN)
    graph = helper.make_graph(
        [node], "g", [], [helper.make_tensor_value_info("bias", TensorProto.FLOAT, [5])], constants
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, functions=[bias_function()], opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    (out,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {})
    step = (np.float64(input_scale) * np.asarray(weight_scale, np.float64)).astype(np.float32)
    assert np.array_equal(out, codes.astype(np.float32) * step)
