"""Compiled operators are the reference to the last bit, on every path of this machine."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import PATHS, run_native

from bitwright.errors import BitwrightError
from bitwright.runtime import packing, reference
from bitwright.runtime.build import available, choose
from bitwright.runtime.ops import Add, AddFloat, Codes, Conv, Dequantize, MaxPool, Mean, Quantize, Table, Window

QUICK = settings(max_examples=25, deadline=None)


@st.composite
def code_ranges(draw, most_bits=8):
    """Codes of 1 to `most_bits` bits, unsigned or signed around 128, sometimes with an odd zero point."""
    bits = draw(st.integers(1, most_bits))
    scale = draw(st.floats(2**-6, 3.0, width=32))
    if draw(st.booleans()):
        zero = draw(st.integers(0, 2**bits - 1))
        return Codes(scale, zero, 0, 2**bits - 1)
    return Codes(scale, 128, 128 - 2 ** (bits - 1), 127 + 2 ** (bits - 1))


def numbers(draw) -> np.random.Generator:
    return np.random.default_rng(draw(st.integers(0, 2**32)))


def codes_of(rng: np.random.Generator, codes: Codes, *shape: int) -> np.ndarray:
    return rng.integers(codes.lo, codes.hi + 1, shape).astype(np.uint8)


@st.composite
def convs(draw, winograd=False):
    """A convolution with its input: every size, width, padding, stride and grouping that is legal."""
    rng = numbers(draw)
    x = draw(code_ranges(5 if winograd else 8))
    out, inside = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    groups, k, strides, dilations = 1, (3, 3), (1, 1), (1, 1)
    if winograd:
        out, inside = max(out, 32), max(inside, 32)
        pads = tuple(draw(st.tuples(*[st.integers(0, 1)] * 4)))
    else:
        groups = draw(st.sampled_from([1, 1, 2, 3, inside]))
        out, inside = -(-out // groups) * groups, -(-inside // groups) * groups
        out = inside if draw(st.booleans()) else out
        k, strides, dilations = (draw(st.tuples(*[st.integers(1, n)] * 2)) for n in (4, 3, 2))
        pads = tuple(draw(st.tuples(*[st.integers(0, 3)] * 4)))
    bits = draw(st.integers(1, 4 if winograd else 8))
    weight = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (out, inside // groups, *k)).astype(np.int8)
    bias = rng.integers(-1000, 1000, out).astype(np.int32)
    to = draw(st.none() | code_ranges())
    # Multipliers that spread the sums over the codes that come out, ties among them.
    typical = max(1.0, float(np.abs(weight.astype(int)).sum() / out) * max(x.span[1], -x.span[0]) / 64)
    multiplier = (2.0 ** rng.integers(-2, 2, out) / 2.0 ** round(np.log2(typical))).astype(np.float32)
    late = rng.standard_normal(out).astype(np.float32) if to is None and draw(st.booleans()) else None
    window = Window(k, strides, pads, dilations)
    conv = Conv("layer", weight, bias, multiplier, x, window, to, groups, late, to is None and draw(st.booleans()))
    rows, columns = (
        n + d * (m - 1) for n, d, m in zip(draw(st.tuples(*[st.integers(1, 17)] * 2)), dilations, k, strict=True)
    )
    return conv, codes_of(rng, x, draw(st.integers(1, 2)), rows, columns, inside)


@pytest.mark.parametrize("path", PATHS)
@QUICK
@given(case=convs())
def test_convolution(path, case):
    conv, x = case
    np.testing.assert_array_equal(run_native(conv, x, path=path), reference.run(conv, x))


@pytest.mark.parametrize("path", PATHS)
@QUICK
@given(case=convs(winograd=True))
def test_winograd(path, case):
    conv, x = case
    assert packing.kernel(conv) == "winograd"
    np.testing.assert_array_equal(run_native(conv, x, path=path), reference.run(conv, x))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("x", "code"), [(Codes(1.0, 0, 0, 31), 31), (Codes(1.0, 128, 112, 143), 112)])
@pytest.mark.parametrize("weight", [-8, 7])
def test_winograd_at_its_bounds(path, x, code, weight):
    """4-bit weights and 5-bit inputs at their ends, patterns that every transform takes to its largest value."""
    rng = np.random.default_rng(0)
    signs = np.stack([np.outer(a, b) for a in ((1, 1, 1), (1, -1, 1)) for b in ((1, 1, 1), (1, -1, 1))])
    kernels = np.where(signs > 0, weight, -8 - weight + 7)  # the other end where the sign turns
    conv_weight = kernels[rng.integers(0, 4, (32, 64))].astype(np.int8)
    conv = Conv("l", conv_weight, np.zeros(32, np.int32), np.ones(32, np.float32), x, Window((3, 3), pads=(1, 1, 1, 1)))
    image = np.where(rng.random((1, 9, 9, 64)) < 0.8, code, x.hi + x.lo - code).astype(np.uint8)
    assert packing.kernel(conv) == "winograd"
    np.testing.assert_array_equal(run_native(conv, image, path=path), reference.run(conv, image))


def test_sums_by_hand():
    """The reference's own sums: a convolution worked out in Python integers."""
    rng = np.random.default_rng(1)
    x, weight = rng.integers(0, 256, (1, 5, 6, 4)), rng.integers(-128, 128, (6, 2, 3, 2))
    bias = rng.integers(-99, 99, 6)
    window = Window((3, 2), (2, 1), (1, 0, 0, 2), (1, 2))
    conv = Conv(
        "l", weight.astype(np.int8), bias.astype(np.int32), np.ones(6, np.float32), Codes(1.0, 7), window, None, 2
    )
    out = reference.conv_sums(conv, x.astype(np.uint8))
    assert out.shape == (1, 2, 6, 6)
    for y, column, o in ((0, 0, 0), (1, 5, 5), (0, 4, 3), (1, 1, 2)):
        total = int(bias[o])
        for i in range(3):
            for j in range(2):
                row, at = 2 * y - 1 + i, column + 2 * j
                if 0 <= row < 5 and 0 <= at < 6:
                    total += sum(int(x[0, row, at, o // 3 * 2 + c] - 7) * int(weight[o, c, i, j]) for c in range(2))
        assert out[0, y, column, o] == total


def test_what_winograd_takes():
    """4 x 5 bits always; 8-bit inputs or weights, strides and dilations never."""

    def conv(weight: int, x: Codes, window: Window, groups: int = 1) -> str:
        full = np.full((32, 32 // groups, 3, 3), weight, np.int8)
        zeros = np.zeros(32, np.int32)
        return packing.kernel(Conv("l", full, zeros, zeros.astype(np.float32), x, window, None, groups))

    same = Window((3, 3), pads=(1, 1, 1, 1))
    five = Codes(1.0, 0, 0, 31)
    assert conv(-8, five, same) == conv(7, Codes(1.0, 128, 112, 143), same) == "winograd"
    assert conv(-8, Codes(1.0, 0), same) == conv(-128, five, same) == "direct"
    assert conv(1, five, Window((3, 3), (2, 2))) == conv(1, five, Window((3, 3), dilations=(2, 2))) == "direct"
    assert conv(1, five, same, groups=32) == "depthwise"


def test_sums_beyond_32_bits_are_refused():
    weight = np.full((1, 70000, 1, 1), -128, np.int8)
    with pytest.raises(BitwrightError, match=r"big: its sums do not fit 32 bits"):
        Conv("big", weight, np.zeros(1, np.int32), np.ones(1, np.float32), Codes(1.0, 0), Window((1, 1)))


@pytest.mark.parametrize("path", PATHS)
@QUICK
@given(data=st.data())
def test_elementwise(path, data):
    rng = numbers(data.draw)
    a, b, to = (data.draw(code_ranges()) for _ in range(3))
    shape = tuple(data.draw(st.tuples(*[st.integers(1, 6)] * 3, st.integers(1, 40))))
    x, other = codes_of(rng, a, *shape), codes_of(rng, b, *shape)
    floats = (rng.standard_normal(shape) * 3).astype(np.float32)
    floats.flat[0] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf, 3e38, 0.5 * to.scale]))
    finite = np.nan_to_num(floats)
    window = Window(*data.draw(st.tuples(*[st.tuples(st.integers(1, 3), st.integers(1, 3))] * 2)), (1, 0, 1, 1))
    cases = [
        (Quantize(to), floats),
        (Quantize(to, planar=True), floats),
        (Dequantize(a), x),
        (Table(rng.integers(0, 256, 256).astype(np.uint8)), x),
        (Add(a, b, to), x, other),
        (AddFloat(relu=data.draw(st.booleans())), finite, finite[::-1].copy()),
        (Mean(a), x),
        (Mean(None), floats),
    ]
    if window.kernel[0] <= shape[1] + 2 and window.kernel[1] <= shape[2] + 1 and min(window.kernel) > 1:
        cases += [(MaxPool(window), x), (MaxPool(window, floats=True), finite)]
    for op, *inputs in cases:
        with np.errstate(invalid="ignore", over="ignore"):
            want = reference.run(op, *inputs)
        np.testing.assert_array_equal(run_native(op, *inputs, path=path), want, err_msg=str(op))


def test_the_path_is_chosen_by_name(monkeypatch):
    assert choose(None) == available()[0]
    monkeypatch.setenv("BITWRIGHT_RUNTIME", "reference")
    assert choose(None) == "reference"
    assert choose(available()[0]) == available()[0]


def test_an_unknown_path_is_refused():
    with pytest.raises(BitwrightError, match=r"runtime path 'sse' is not available on this machine; use "):
        choose("sse")
