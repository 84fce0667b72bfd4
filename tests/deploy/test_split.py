"""Strided convolutions over few channels, written over blocks of pixels: the same codes in both runtimes."""

import numpy as np
import onnx
import pytest
import torch
from deploy_nets import quantized
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bitwright as bw
from bitwright.deploy import export, snap_biases, verify
from bitwright.deploy.probe import read
from bitwright.deploy.split import split_axis


@given(st.integers(1, 40), st.integers(1, 9), st.integers(2, 5), st.integers(0, 4), st.integers(0, 4), st.data())
def test_the_sums_of_one_axis_are_those_of_the_strided_convolution(size, kernel, stride, begin, end, data):
    if size + begin + end < kernel:
        return
    found = split_axis(size, kernel, stride, (begin, end))
    if found is None:
        unread = (size + begin + end - kernel) % stride
        assert size % stride or unread
        return
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    x, w = generator.integers(-9, 9, size), generator.integers(-9, 9, kernel)
    padded = np.concatenate([np.zeros(begin, int), x, np.zeros(end, int)])
    starts = range(0, len(padded) - kernel + 1, stride)
    expected = [int(padded[i : i + kernel] @ w) for i in starts]
    blocks = np.concatenate([np.zeros((found.pads[0], stride), int), x.reshape(-1, stride)])
    blocks = np.concatenate([blocks, np.zeros((found.pads[1], stride), int)])
    wide = np.concatenate([np.zeros(found.before, int), w, np.zeros(found.after, int)]).reshape(found.taps, stride)
    got = [int((blocks[i : i + found.taps] * wide).sum()) for i in range(len(blocks) - found.taps + 1)]
    assert got == expected


def written(path):
    return [node.op_type for node in onnx.load(str(path)).graph.node]


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size", "split"),
    [
        (7, 2, 3, 16, True),
        (3, 2, 1, 8, True),
        (3, 2, 0, 8, True),
        (4, 4, 0, 8, True),  # a transformer's patches
        (5, 3, 2, 12, True),
        (16, 16, 0, 32, False),  # rows of a window that are long enough
        (3, 2, 1, 9, False),  # no whole number of blocks
        (3, 1, 1, 8, False),
    ],
)
def test_files_in_both_runtimes_are_the_network(bits, kernel, stride, padding, size, split, tmp_path):
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, kernel, stride, padding), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten()
    )
    x = torch.randn(8, 3, size, size)
    model = quantized(model.eval(), f"w{bits}a{max(bits, 2)}", x, ends=None)
    snap_biases(model, x[:2])
    path = tmp_path / "net.onnx"
    export(model, path, x[:2])
    assert ("SpaceToDepth" in written(path)) == split
    for runtime in ("default", "native"):
        found = verify(model, path, [x], **({} if runtime == "default" else {"runtime": runtime}))
        assert found.ok, (runtime, found.first_difference)
        assert found.different_file == 0
        if runtime == "default":
            rows = {(r["name"], r["what"]): r for r in found.rows()}
            assert rows["0", "weight"]["different_file"] == 0


def test_what_has_many_channels_groups_dilation_or_other_padding_stays(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1, padding_mode="reflect"),
        nn.Conv2d(6, 4, 3, 2, 1),
        nn.Conv2d(4, 4, 3, 2, 1, groups=2),
        nn.Conv2d(4, 4, 2, 2, dilation=2),
        nn.Flatten(),
    )
    x = torch.randn(4, 3, 32, 32)
    model = quantized(model.eval(), "w8a8", x, ends=None)
    bw.export(model, tmp_path / "net.onnx", x)
    assert "SpaceToDepth" not in written(tmp_path / "net.onnx")


def test_a_changed_weight_of_a_split_layer_is_found(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten())
    x = torch.randn(8, 3, 8, 8)
    model = quantized(model.eval(), "w8a8", x, ends=None)
    export(model, tmp_path / "net.onnx", x)
    proto = read(tmp_path / "net.onnx")
    codes = next(t for t in proto.graph.initializer if t.name == "0.codes")
    values = onnx.numpy_helper.to_array(codes).copy()
    values[5, 1, 2, 0] ^= 1
    codes.raw_data = values.tobytes()
    onnx.save(proto, str(tmp_path / "net.onnx"))
    found = verify(model, tmp_path / "net.onnx", [x])
    assert not found.ok
    assert "0" in found.first_difference
