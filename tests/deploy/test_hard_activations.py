"""Hard activations between integers: no float kernel is left in onnxruntime, and codes are the frozen form's."""

from collections import Counter

import pytest

import bitwright as bw
from bitwright.deploy.bench import session
from bitwright.deploy.probe import read
from bitwright.layers import detach_output
from hard_net import hard_net, pictures


def kinds(path, folder) -> Counter[str]:
    """Operators that onnxruntime runs."""
    _, graph = session(path, 1, folder / "optimized.onnx")
    assert graph is not None
    return Counter(node.op_type for node in graph.graph.node)


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_all_hard_activations_run_on_integers_and_agree(tmp_path, bits):
    model, path = hard_net(bits, "act8"), tmp_path / "net.onnx"
    bw.export(model, path, pictures(4))
    found = kinds(path, tmp_path)
    assert found["QLinearMul"] == 4
    assert found["QLinearGlobalAveragePool"] == 2
    assert not {"HardSigmoid", "HardSwish", "Mul", "ReduceMean"} & found.keys()
    report = bw.verify(model, path, [pictures(400)])
    assert report.ok, report
    assert report.different_file == 0


def test_other_scales_keep_float_activations(tmp_path):
    model, path = hard_net("w8a8", "res8"), tmp_path / "net.onnx"
    bw.export(model, path, pictures(4))
    operators = Counter(node.op_type for node in read(path).graph.node)
    assert (operators["HardSwish"], operators["HardSigmoid"], operators["GlobalAveragePool"]) == (3, 1, 0)
    assert "QLinearMul" not in kinds(path, tmp_path)


def test_a_hardswish_that_no_quantizer_reads_stays_float(tmp_path):
    model, path = hard_net("w8a8", "act8"), tmp_path / "net.onnx"
    detach_output(model.act3)  # pyright: ignore
    bw.export(model, path, pictures(4))
    operators = Counter(node.op_type for node in read(path).graph.node)
    assert (operators["HardSwish"], operators["HardSigmoid"], operators["GlobalAveragePool"]) == (1, 0, 1)
    assert bw.verify(model, path, [pictures(100)]).ok
