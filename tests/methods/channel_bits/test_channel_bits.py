import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitwright import (
    CAGE,
    HGQ,
    KD,
    SAQ,
    BitwrightError,
    ChannelBits,
    PEGECurriculum,
    QuantizerSpec,
    Rule,
    Step,
    calibrate,
    export,
    prepare,
    quantizers,
    snap_biases,
    verify,
)
from bitwright.channels import ChannelQuantizer
from bitwright.costs import cost_table
from bitwright.kernels import reference_only
from bitwright.training.ema import Ema
from bitwright.training.models.resnet import CifarResNet
from methods.nets import data, make_step, quantized, resumed, run, same_state


def outlying(width=10):
    """A float network of 10, 20 and 40 channels, in which every tenth channel of the inner weights has outliers."""
    torch.manual_seed(0)
    net = CifarResNet(8, 4, width=width)
    with torch.no_grad():
        for name, layer in net.named_modules():
            if isinstance(layer, nn.Conv2d) and name != "conv1":
                layer.weight[::10] *= 0.5
                layer.weight[::10, 0, 0, 0] = 30 * layer.weight.std()
    for _ in range(3):
        net(torch.randn(16, 3, 8, 8) + 0.3)
    return net.eval()


def built(bits=3, estimator="clipped_ste", **options):
    model = quantized(outlying(), bits=bits, estimator=estimator)
    return model, ChannelBits(model, **{"steps": 2, **options})


def test_channels_with_outliers_get_a_bit_more_and_the_mean_stays():
    model, method = built()
    step = make_step(model, [method], lr=1e-6)
    run(step, 0, 1)
    assert all(bool(p.quantizer.bits.eq(3).all()) for p in method.places.values())
    run(step, 1, 2)
    assert set(method.places) == {f"layer{i}.0.conv{j}" for i in (1, 2, 3) for j in (1, 2)}
    told, moved = method.summary(), 0
    for name, place in method.places.items():
        bits, channels = place.quantizer.bits, len(place.layer.weight)
        assert bits.mean() == 3
        assert place.counts == [0, channels // 10]
        least = min(told["errors"][name], key=told["errors"][name].get)
        assert told["channels"][name].get("4", 0) == int(least)
        if least != "0":
            moved += 2 * int(least)
            assert (bits == 4).nonzero().flatten().tolist() == list(range(0, channels, 10))
    assert moved > 0
    metrics = {}
    method.after_epoch(metrics)
    assert metrics["channel_bits/moved"] == pytest.approx(moved / 140)
    after = copy.deepcopy(model.state_dict())
    run(step, 2, 3)
    assert all(torch.equal(after[k], v) for k, v in model.state_dict().items() if k.endswith(".bits"))


def test_more_shares_are_tried_and_equal_ones_once():
    _, method = built(shares=[0.3, 0.1, 0.05, 0.12])
    counts = {len(p.layer.weight): p.counts for p in method.places.values()}
    assert counts == {10: [0, 1, 3], 20: [0, 1, 2, 6], 40: [0, 2, 4, 12]}


def test_measuring_leaves_training_as_it_is():
    """Until bits move, training is that of a model without the method."""
    model, method = built(steps=4)
    plain = quantized(outlying(), bits=3)
    run(make_step(model, [method]), 0, 3)
    run(make_step(plain), 0, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("options", [{}, {"amp_dtype": torch.bfloat16}, {"accumulate": 2}], ids=["", "bf16", "micro"])
@pytest.mark.parametrize("stop", [1, 5])
def test_a_resumed_run_ends_bit_identical(stop, options):
    def fresh():
        model, method = built()
        return model, make_step(model, [method], lr=0.005, **options)

    whole, step = fresh()
    run(step, 0, 8)
    assert torch.isfinite(step.result.loss)
    assert any(len(q.kinds) > 1 for q in quantizers(whole).values() if isinstance(q, ChannelQuantizer))
    assert same_state(whole, resumed(fresh, stop, 8))


@pytest.mark.parametrize("name", ["kd", "pege", "cage", "saq"])
def test_it_goes_with_what_sets_no_bits(name):
    model, method = built(estimator="pege" if name == "pege" else "clipped_ste")
    other = {
        "kd": lambda: KD(outlying()),
        "pege": lambda: PEGECurriculum(model, 8),
        "cage": lambda: CAGE(model, 8, silence=0.0),
        "saq": lambda: SAQ(model, 0.1),
    }[name]()
    step, metrics = make_step(model, [method, other]), {}
    run(step, 0, 5)
    step.end_epoch(metrics)
    assert torch.isfinite(step.result.loss)
    assert metrics["channel_bits/moved"] > 0


def test_the_file_is_what_was_trained(tmp_path):
    model, method = built(bits=2)
    run(make_step(model, [method], lr=0.01), 0, 6)
    averaged = Ema(model, 0.5)
    averaged.update(model)
    assert any(len(p.quantizer.kinds) == 3 for p in method.places.values())
    plain, x = quantized(outlying(), bits=2), data(count=32)[0]
    plain.load_state_dict(model.state_dict())
    snap_biases(plain.eval(), x)
    export(plain, tmp_path / "net.onnx", x[:1])
    assert verify(plain, tmp_path / "net.onnx", [x]).ok
    averaged.model.load_state_dict(averaged.model.state_dict())
    assert averaged.model.layer1[0].conv1.weight_quantizer.kinds == model.layer1[0].conv1.weight_quantizer.kinds


@pytest.mark.slow
def test_compiled_training_is_that_of_the_eager_model():
    """Bits that were chosen are other code: compiled anew, once."""
    found = []
    for backend in (None, "aot_eager"):
        torch._dynamo.reset()
        model = quantized(outlying(), bits=3).double()
        method = ChannelBits(model, steps=2)
        step = make_step(model, [method], lr=0.005, compiled=backend)
        with reference_only():
            for i in range(5):
                x, y = data(seed=i)
                step(x.double(), y)
        assert any(len(p.quantizer.kinds) == 3 for p in method.places.values())
        found.append(model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-6, atol=1e-8, msg=name)


def test_methods_that_set_bits_too():
    model, method = built()
    costs = cost_table(model, data()[0][:1])
    words = r"hgq: the weight of layer1\.0\.conv1 has bits per channel, which are chosen already; start from a model"
    with pytest.raises(BitwrightError, match=words):
        HGQ(model, 20, costs, {"bitops": costs.bitops})
    deep = quantized(outlying(), bits=6)
    hgq = HGQ(deep, 20, costs, {"bitops": costs.bitops})
    with pytest.raises(BitwrightError, match="methods: hgq and channel_bits both set bit-widths; use one of them"):
        Step(deep, F.cross_entropy, torch.optim.SGD(deep.parameters(), 0.1), [hgq, ChannelBits(deep)])
    del method


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shares": []}, r"channel_bits: shares=\[\] is not accepted; use fractions above 0 to 0.5"),
        ({"shares": [0.6]}, r"channel_bits: shares=\[0.6\] is not accepted"),
        ({"shares": [0.01]}, r"channel_bits: all layers are fixed, or too narrow for shares=\[0.01\]"),
        ({"steps": 0}, "channel_bits: steps=0 is not accepted; use a whole number >= 1"),
        ({"fixed": ["layer9"]}, "channel_bits: fixed: 'layer9' names no layer of the model"),
        (
            {"fixed": []},
            "channel_bits: conv1 has 8 bits, which cannot be one less and one more; use rules",
        ),
        ({"bits": 1}, r"channel_bits: layer1\.0\.conv1 has 1 bits, which cannot be one less and one more"),
    ],
)
def test_what_is_not_accepted(options, words):
    with pytest.raises(BitwrightError, match=words):
        built(**options)


def test_a_scale_for_all_channels_is_refused():
    model = outlying()
    spec = QuantizerSpec(bits=3, per_channel=False)
    prepare(model, [Rule(match="*", weight=spec, input=QuantizerSpec(bits=3))])
    calibrate(model, [data(count=32)])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BitwrightError, match=r"channels of layer1\.0\.conv1 share one scale, and so one bit-width"):
        ChannelBits(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_checkpoint_of_other_layers_is_refused():
    _, method = built()
    _, other = built(shares=[0.1, 0.3])
    with pytest.raises(BitwrightError, match="channel_bits: the checkpoint was measured for other layers or shares"):
        other.load_state_dict(method.state_dict())
