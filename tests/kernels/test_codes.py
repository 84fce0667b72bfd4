"""Quantized tensors as bytes: the integers of the float values, to the last bit, and none where they do not fit."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fused import needs_compiler
from torch import nn

from bitwright.kernels.codes import asking, held
from bitwright.kernels.sources import integers, noted
from bitwright.layers.waiting import QuantBatchNorm2d, QuantGELU
from making import make_quantizer

pytestmark = needs_compiler

BEFORE = {
    "nothing": nn.Identity,
    "norm": lambda: QuantBatchNorm2d(6),
    "norm, relu": lambda: nn.Sequential(QuantBatchNorm2d(6), nn.ReLU()),
    "gelu": QuantGELU,
}


def values(held_codes):
    """What bytes stand for, by one multiplication."""
    step = held_codes.step.view(-1, *[1] * (held_codes.numbers.ndim - 1))
    return (held_codes.numbers.float() - held_codes.offset) * step


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    before=st.sampled_from(sorted(BEFORE)),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    grid=st.sampled_from(["lsq", "seq", "tqt"]),
    bits=st.integers(1, 8),
    signed=st.booleans(),
    threads=st.integers(1, 2),
)
def test_inputs(seed, before, layout, grid, bits, signed, threads):
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    x = (torch.randn(3, 6, 5, 40) * 2).contiguous(memory_format=layout).requires_grad_()
    quantizer = make_quantizer(grid, bits, x.detach(), role="input", signed=signed)
    wanted = quantizer(BEFORE[before]()(x))
    torch.manual_seed(seed)
    with asking(torch.uint8, 128.0):
        y = quantizer(BEFORE[before]()(x))
    found = held(y)
    source = noted(y)
    assert found is not None
    assert source is not None
    assert found.numbers.dtype == torch.uint8
    assert found.numbers.stride() == x.stride()
    assert torch.equal(values(found), wanted)
    assert torch.equal(integers(source).float(), found.numbers.float() - found.offset)
    assert torch.equal(y, wanted)
    g = torch.randn_like(wanted)
    assert torch.equal(*(torch.autograd.grad(t, x, g)[0] for t in (y, wanted)))


@pytest.mark.parametrize("bits", range(2, 9))
def test_inputs_whose_zero_point_is_a_tensor(bits):
    x = torch.rand(4, 6, 5, 5) - 0.3
    quantizer = make_quantizer("minmax", bits, x, role="input", signed=False)
    with asking(torch.uint8, 128.0):
        y = quantizer(x)
    found, source = held(y), noted(y)
    assert found is not None
    assert source is not None
    assert torch.equal(values(found), quantizer(x))
    assert torch.equal(integers(source).float(), found.numbers.float() - found.offset)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.parametrize("grid", ["lsq", "seq", "minmax"])
def test_weights(grid, channels, bits):
    w = nn.Parameter(torch.randn(8, 6, 3, 3))
    quantizer = make_quantizer(grid, bits, w.detach(), role="weight", channels=channels)
    with asking(torch.int8):
        y = quantizer(w)
    found = held(y)
    assert found is not None
    assert found.numbers.dtype == torch.int8
    assert found.offset == 0
    assert torch.equal(values(found), quantizer(w))


def test_no_bytes_for_a_zero_point_that_is_no_number_of_codes():
    x = torch.randn(4, 6, 5, 5)
    quantizer = make_quantizer("lsq+", 4, x, role="input")
    with asking(torch.uint8, 128.0):
        assert held(quantizer(x)) is None


def test_no_bytes_where_only_a_share_is_quantized(make):
    x = torch.randn(4, 6, 5, 5)
    for rate, found in ((0.5, False), (1.0, True)):
        quantizer = make("lsq", 4, x, estimator="pege")
        quantizer.estimator.rate.fill_(rate)
        with asking(torch.uint8, 128.0):
            assert (held(quantizer(x)) is not None) == found


def test_no_bytes_for_distances_beyond_a_byte():
    w = torch.randn(8, 6)
    for bits, found in ((7, True), (8, False)):  # -127 to 127 in steps of 2, and -255 to 255
        quantizer = make_quantizer("dorefa", bits, w)
        with asking(torch.int8):
            assert (held(quantizer(w)) is not None) == found


def test_signed_codes_without_an_offset():
    x = torch.randn(4, 6, 5, 5)
    with asking(torch.uint8):
        assert held(make_quantizer("lsq", 4, x, role="input", signed=True)(x)) is None
        assert held(make_quantizer("lsq", 4, x, role="input", signed=False)(x)) is not None


def test_nobody_asked(make):
    x = torch.randn(4, 6, 5, 5)
    quantizer = make("lsq", 4, x)
    assert held(quantizer(x)) is None
    with asking(torch.uint8, 128.0), asking(None):
        assert held(quantizer(x)) is None
    with asking(torch.uint8, 128.0):
        assert held(quantizer(x)) is not None


def test_each_thread_asks_for_itself(make):
    x, found = torch.randn(4, 6, 5, 5), []
    quantizer = make("lsq", 4, x)
    with asking(torch.uint8, 128.0):
        other = threading.Thread(target=lambda: found.append(held(quantizer(x))))
        other.start()
        other.join()
        found.append(held(quantizer(x)))
    assert found[0] is None
    assert found[1] is not None


def test_who_has_seen_the_values_may_have_changed_them(make):
    x = torch.randn(4, 6)
    with asking(torch.uint8, 128.0):
        y = make("lsq", 4, x)(x)
    assert held(y) is not None
    y.mul_(2)
    assert held(y) is None
    assert torch.equal(y, 2 * make("lsq", 4, x)(x))


@pytest.mark.parametrize("before", sorted(BEFORE))
def test_a_nan_is_not_lost(before, make):
    x = torch.randn(3, 6, 5, 5)
    quantizer, layer = make("lsq", 4, x), BEFORE[before]()
    with asking(torch.uint8, 128.0):
        assert not bool(quantizer(layer(x)).isnan().any())
        x[1, 2, 3, 4] = float("nan")
        assert bool(quantizer(layer(x)).isnan().all())


def test_infinity_is_clipped(make):
    x = torch.randn(3, 6)
    quantizer = make("lsq", 4, x)
    x[0, 0], x[0, 1] = float("inf"), -float("inf")
    with asking(torch.uint8, 128.0):
        assert torch.equal(quantizer(x), quantizer(x.clamp(-1e30, 1e30)))


def test_the_default_type_and_device_do_not_matter(make):
    x = torch.randn(3, 6)
    quantizer = make("lsq", 4, x)
    wanted = quantizer(x)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), asking(torch.uint8, 128.0):
            y = quantizer(x)
            assert held(y) is not None
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(y, wanted)
