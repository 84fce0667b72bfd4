"""Streams of few bits: lossless, as narrow as the numbers allow, and read by onnxruntime to the last bit."""

import math
from fractions import Fraction

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from bitwright.deploy.compact import POWERS, WIDEST, fixed, floating, shortest, stream, whole
from bitwright.deploy.integer import DOMAIN
from bitwright.deploy.packing import OPSET, varints
from bitwright.deploy.streams import FIXED, FLOATING, WHOLE, functions_of


def codes_of(made) -> list[int]:
    """The stream as one big number, cut into codes by Python."""
    count, width, *_ = made.about
    whole_stream = int.from_bytes(made.packed.tobytes(), "little")
    return [(whole_stream >> (i * width)) & (2**width - 1) for i in range(count)]


def number(kind: str, code: int, about: tuple[int, ...]) -> Fraction:
    """What a code stands for, as the documentation of the streams says it."""
    if kind == "floating":
        _, _, signs, mantissas, first, k = about
        place = code // signs + first
        size = (mantissas + place % mantissas) * Fraction(2) ** (place // mantissas - k)
        return -size if code % signs else size
    _, _, shift, *k = about
    return Fraction(code - shift, 2 ** (k[0] if k else 0))


def in_onnxruntime(kind: str, made) -> np.ndarray:
    """The numbers as onnxruntime reads them."""
    constants = [numpy_helper.from_array(made.packed[:, None], "packed"), varints("about", made.about)]
    node = helper.make_node(kind, ["packed", "about"], ["y"], domain=DOMAIN)
    out = TensorProto.INT32 if kind == WHOLE else TensorProto.FLOAT
    graph = helper.make_graph([node], "g", [], [helper.make_tensor_value_info("y", out, [made.about[0]])], constants)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    functions = list(functions_of(kind).values())
    model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return np.asarray(onnxruntime.InferenceSession(model.SerializeToString()).run(None, {})[0])


def short_numbers(seed: int, bits: int, octaves: int, count: int, signs: bool) -> np.ndarray:
    """float32 numbers of `bits` significant bits over some octaves."""
    generator = np.random.default_rng(seed)
    mantissa = generator.integers(2 ** (bits - 1), 2**bits, count)
    values = np.ldexp(mantissa.astype(np.float64), generator.integers(-octaves, 1, count) - 20)
    return (values * generator.choice([-1, 1] if signs else [1], count)).astype(np.float32)


@given(st.integers(0, 999), st.integers(1, 24), st.integers(0, 6), st.integers(1, 40), st.booleans())
def test_scales_come_back_to_the_last_bit(seed, bits, octaves, count, signs):
    values = short_numbers(seed, bits, octaves, count, signs)
    made = floating(values)
    most = bits - 1 + math.ceil(math.log2(octaves + 1)) + signs
    if made is None:
        assert most > WIDEST
        return
    assert made.about[:2] == (count, made.about[1])
    assert made.about[1] <= max(most, 1)
    assert [number("floating", c, made.about) for c in codes_of(made)] == [Fraction(float(v)) for v in values]


@given(st.lists(st.integers(-(2**22), 2**22), min_size=1, max_size=40), st.integers(-8, 40))
def test_multiples_of_a_power_of_two_come_back(numbers, k):
    values = np.ldexp(np.array(numbers, np.float64), -k).astype(np.float32)
    made = fixed(values)
    if made is not None:
        assert [number("fixed", c, made.about) for c in codes_of(made)] == [Fraction(float(v)) for v in values]
        assert made.about[1] <= max((max(numbers) - min(*numbers, 0)).bit_length(), 1) + max(-k, 0)
    else:
        assert max(map(abs, numbers)) * 2 ** max(-k, 0) > 2**21


@given(st.lists(st.integers(-(2**31), 2**31), min_size=1, max_size=40))
def test_integers_come_back_at_their_least_width(numbers):
    made = whole(np.array(numbers))
    spread = max(numbers) - min(*numbers, 0)
    if made is None:
        assert spread.bit_length() > WIDEST
        return
    assert made.about[:2] == (len(numbers), max(spread.bit_length(), 1))
    assert [number("whole", c, made.about) for c in codes_of(made)] == numbers
    assert made.nbytes == len(made.packed) == -(-len(numbers) * made.about[1] // 8)


@pytest.mark.parametrize("bad", [0.0, -0.0, math.nan, math.inf, 1e-30, 1e-42])
def test_what_is_no_short_number_is_left_alone(bad):
    """0 has no place among octaves, and decoders know no power below 2^-63."""
    values = np.array([0.5, bad, 0.25], np.float32)
    assert floating(values) is None
    found = fixed(values)
    assert (found is None) == (bad != 0)
    assert shortest(values) is None or shortest(values)[0] == "fixed"


def test_the_shorter_of_two_forms_is_taken():
    assert shortest(np.array([1.0, 2.0**-20], np.float32))[0] == "floating"
    assert shortest(np.array([1.0, 2.0, 3.0, 0.0], np.float32))[0] == "fixed"


@pytest.mark.parametrize("width", [1, 2, 7, 11, WIDEST])
@pytest.mark.parametrize("count", [1, 5, 64])
def test_the_runtime_reads_integers(width, count):
    generator = np.random.default_rng(width)
    numbers = generator.integers(-(2 ** (width - 1)), 2 ** (width - 1), count)
    numbers[0] = -(2 ** (width - 1))
    made = whole(numbers)
    assert in_onnxruntime(WHOLE, made).tolist() == numbers.tolist()


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize(("bits", "octaves"), [(1, 0), (7, 3), (14, 5), (21, 2)])
def test_the_runtime_reads_scales(bits, octaves, signs):
    values = short_numbers(bits, bits, octaves, 50, signs)
    found = in_onnxruntime(FLOATING, floating(values))
    assert found.dtype == np.float32
    assert found.tolist() == values.tolist()


@pytest.mark.parametrize("k", [0, 5, POWERS - 1])
def test_the_runtime_reads_multiples(k):
    numbers = np.random.default_rng(k).integers(-(2**12), 2**12, 50)
    numbers[0] = 1
    values = np.ldexp(numbers.astype(np.float64), -k).astype(np.float32)
    made = fixed(values)
    assert made.about[3] == k
    assert in_onnxruntime(FIXED, made).tolist() == values.tolist()


def test_codes_wider_than_decoders_read_are_refused():
    assert stream(np.array([2**WIDEST])) is None
    assert stream(np.array([2**WIDEST - 1])).about == (1, WIDEST)
