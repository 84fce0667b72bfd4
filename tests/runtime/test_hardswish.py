"""Hardswish of codes in the own runtime: one table, and what onnxruntime computes."""

import numpy as np
import onnxruntime
import pytest

import bitwright as bw
from bitwright.runtime import load
from hard_net import hard_net, pictures


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_hardswish_is_a_table(tmp_path, bits):
    model, path, x = hard_net(bits, "act8"), tmp_path / "net.onnx", pictures(100).numpy()
    bw.export(model, path, pictures(4))
    ours = load(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    theirs = np.asarray(session.run(None, {"input": x})[0])
    assert abs(ours.run(x) - theirs).max() <= 1e-6 * abs(theirs).max()
    products = [row["kernel"] for row in ours.describe() if "onnxruntime" in row["kernel"] and "Mul" in row["kernel"]]
    assert len(products) == 1  # the gate's
    assert bw.verify(model, path, [pictures(100)], runtime="native").ok
