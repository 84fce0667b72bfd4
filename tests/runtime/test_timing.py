"""`measure_latencies` times what it says, at the bits that it says; how long anything took is not asserted."""

import copy

import pytest
import torch
from deploy_nets import quantized, settle
from torch import nn

import bitwright as bw
from bitwright.errors import BitwrightError
from bitwright.runtime import available, load, timing
from bitwright.runtime.timing import at_bits, measure_latencies

needs_kernels = pytest.mark.skipif(
    available() == ("reference",), reason="no C compiler: the native runtime has no kernels"
)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
    model = settle(nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 64, 5)), 8, 3, 8, 8)
    return quantized(model, "w4a4", torch.randn(32, 3, 8, 8))


def test_all_layers_of_a_copy_get_the_bits(net):
    before = {n: int(q.bits) for n, q in bw.quantizers(net).items()}
    made = at_bits(net, 3, 5)
    assert {n: int(q.bits) for n, q in bw.quantizers(net).items()} == before
    for layer in bw.quant_layers(made).values():
        assert {s: int(q.bits) for s, q in layer.quantizers().items()} == {"weight_quantizer": 3, "input_quantizer": 5}


@needs_kernels
def test_every_layer_is_timed_by_the_kernel_of_its_bits(net, monkeypatch):
    kernels = []

    def opened(path):
        session = load(path)
        kernels.append({row["layer"]: row["kernel"] for row in session.describe()})
        return session

    monkeypatch.setattr(timing, "load", opened)
    state = copy.deepcopy(net.state_dict())
    table = measure_latencies(net, torch.randn(2, 3, 8, 8), runs=2)
    assert list(table.layers) == list(bw.quant_layers(net))
    assert all(set(each) == {(8, 8), (4, 4)} and min(each.values()) > 0 for each in table.layers.values())
    assert table.rest >= 0
    assert [each["3"] for each in kernels] == ["direct", "winograd"]
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


@needs_kernels
def test_the_rest_is_the_whole_without_its_layers(net, monkeypatch):
    monkeypatch.setattr(
        timing, "processor_times", lambda calls, runs: {k: 10.0 if k[0] is None else 2.0 for k in calls}
    )
    table = measure_latencies(net, torch.randn(2, 3, 8, 8), pairs=[(8, 8)], runs=2)
    assert table.layers == {name: {(8, 8): 2.0} for name in bw.quant_layers(net)}
    assert table.rest == 10.0 - 2.0 * len(table.layers)


def test_times_are_medians_after_one_that_warms_up(monkeypatch):
    clock = iter([0.0, 9.0, 10.0, 10.001, 20.0, 20.005, 30.0, 30.003])
    monkeypatch.setattr(timing.time, "process_time", lambda: next(clock))
    assert timing.processor_times({"a": lambda: None}, 3)["a"] == pytest.approx(3.0)


def test_what_is_no_pair_of_bits_is_refused(net):
    for pairs in ([(4,)], [(0, 4)], [(4, 9)], [(4, 2.5)]):
        with pytest.raises(BitwrightError, match=r"latencies: pairs=.* is not accepted; use two bit-widths, 1 to 8"):
            measure_latencies(net, torch.randn(2, 3, 8, 8), pairs=pairs)
