import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitwright import (
    KD,
    BitwrightError,
    QuantizerSpec,
    Relational,
    Rule,
    calibrate,
    export,
    prepare,
    snap_biases,
    verify,
)
from bitwright.methods.base import Batch
from bitwright.methods.relational import relation, relational_loss
from bitwright.training.models.resnet import CifarResNet
from methods.nets import data, float_net, make_step, quantized, resumed, run, same_state


def built(**options):
    partner = float_net()
    model = quantized(partner)
    return model, Relational(model, partner, **options)


def test_the_loss_is_that_of_the_formula():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5, 4, 2, requires_grad=True), torch.randn(3, 7, 4, 2)
    wanted = []
    for f, g in zip(student, teacher, strict=True):
        p, q = (
            torch.softmax(u.t() @ u, 1)
            for t in (f, g)
            for u in [t.reshape(len(t), 8) / t.reshape(len(t), 8).norm(dim=0)]
        )
        wanted.append((q * (q / p).log()).sum(1))
    loss = relational_loss(student, teacher)
    torch.testing.assert_close(loss, torch.stack(wanted).mean())
    assert loss > 0
    (gradient,) = torch.autograd.grad(loss, student)
    # Only directions count, so that no feature gains by growing.
    torch.testing.assert_close((gradient * student).sum(1), torch.zeros(3, 4, 2), rtol=0, atol=1e-7)
    assert gradient.abs().max() > 1e-4


def test_tokens_are_places():
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 6, 4, 5)
    tokens = maps.flatten(3).transpose(2, 3)
    torch.testing.assert_close(relation(tokens[0]), relation(maps[0]))
    torch.testing.assert_close(relational_loss(*tokens), relational_loss(*maps))
    assert relation(maps[0]).shape == (3, 20, 20)


def test_a_place_without_features_resembles_none_and_has_no_gradient():
    features = torch.randn(1, 4, 3, 3)
    features[..., 1, 1] = 0
    features.requires_grad_()
    found = relation(features)
    assert bool((found[0, 4] == 0).all())
    relational_loss(features, torch.randn(1, 4, 3, 3)).backward()
    assert bool(features.grad.isfinite().all())


def test_it_is_taken_in_every_second_step_times_its_weight():
    model, method = built(modules=["layer1", "layer3"])
    step = make_step(model, [method])
    found = [step(*data(seed=i)).losses.keys() for i in range(4)]
    assert ["relational" in keys for keys in found] == [True, False, True, False]
    kept = {}

    def keep(key):
        return lambda _module, _inputs, features: kept.update({key: features})

    names, (x, y) = ("layer1", "layer3"), data(seed=9)
    for role, net in (("student", model), ("teacher", method.teacher)):
        for name in names:
            net.get_submodule(name).register_forward_hook(keep((role, name)))
    outputs = model(x)
    students = [kept["student", name] for name in names]
    (loss,) = method.losses(Batch(x, y), outputs).values()
    each = [relational_loss(f, kept["teacher", name]) for f, name in zip(students, names, strict=True)]
    torch.testing.assert_close(loss, 100 * (each[0] + each[1]) / 2)


def test_the_last_stage_is_taken_and_its_loss_falls():
    model, method = built(every=1)
    assert method.modules == ["layer3"]
    step, batch = make_step(model, [method], lr=0.02), data(count=16)
    found = [step(*batch).losses["relational"].item() for _ in range(12)]
    assert found[-1] < 0.5 * found[0]


def test_a_teacher_may_have_other_channels():
    torch.manual_seed(1)
    model, wide = quantized(float_net()), CifarResNet(8, 4, width=6).eval()
    assert make_step(model, [Relational(model, wide)])(*data()).losses["relational"] > 0


class Tokens(nn.Module):
    """Linear layers over tokens, (N, T, 6) to 4 classes."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.relu(self.mix(torch.relu(self.embed(x)))).mean(1))


def test_networks_of_tokens_learn_relations():
    torch.manual_seed(0)
    teacher, x, y = Tokens().eval(), torch.randn(8, 5, 6), torch.randint(4, (8,))
    spec = QuantizerSpec(bits=3)
    model = prepare(copy.deepcopy(teacher), [Rule(match="*", weight=spec, input=spec)])
    calibrate(model, [x])
    step = make_step(model.train(), [Relational(model, teacher, modules=["mix"], every=1)], lr=0.02)
    found = [step(x, y).losses["relational"].item() for _ in range(30)]
    assert 0 < found[-1] < 0.8 * found[0]


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"amp_dtype": torch.bfloat16}], ids=["", "micro", "bf16"])
@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_ends_bit_identical(stop, options):
    def fresh():
        model, method = built(every=3)
        return model, make_step(model, [method], **options)

    whole, step = fresh()
    run(step, 0, 8)
    assert torch.isfinite(step.result.loss)
    assert same_state(whole, resumed(fresh, stop, 8))


def test_without_weight_it_is_plain_training_to_the_last_bit():
    plain, (other, method) = quantized(float_net()), built(weight=0.0)
    run(make_step(plain), 0, 4)
    run(make_step(other, [method]), 0, 4)
    assert same_state(plain, other)


def test_relations_are_float32_under_autocast():
    model, method = built(every=1)
    x, y = data(count=16)
    found = []
    for dtype in (None, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            features = torch.randn(4, 32, 5, 5, generator=torch.Generator().manual_seed(0))
            found.append(relational_loss(features, features.flip(0)))
    assert found[1].dtype == torch.float32
    assert torch.equal(*found)
    assert torch.isfinite(make_step(model, [method], amp_dtype=torch.bfloat16)(x, y).losses["relational"])


def test_the_partner_may_be_a_teacher_too_and_stays_as_it_was():
    model, method = built()
    before = copy.deepcopy(method.teacher.state_dict())
    step = make_step(model, [KD(method.teacher), method])
    run(step, 0, 3)
    assert all(torch.equal(v, before[k]) for k, v in method.teacher.state_dict().items())
    assert all(tap.output is None for tap in (*method.taps, *method.teacher_taps))
    with pytest.raises(BitwrightError, match="methods: relational: the optimizer trains parameters of the teacher"):
        make_step(model, [Relational(model, model)])


def test_nothing_of_it_is_in_the_model_or_in_its_file(tmp_path):
    model, method = built()
    plain = quantized(float_net())
    run(make_step(model, [method]), 0, 3)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert len(pickle.dumps(model)) < 1.1 * len(pickle.dumps(plain))
    x = data(count=16)[0]
    exported = torch.export.export(copy.deepcopy(model).eval(), (x,))
    assert torch.equal(exported.module()(x), copy.deepcopy(model).eval()(x))
    snap_biases(model.eval(), x)
    plain.load_state_dict(model.state_dict())
    sizes = [export(m.eval(), tmp_path / f"{i}.onnx", x[:1]).size_bytes for i, m in enumerate((model, plain))]
    assert sizes[0] == sizes[1]
    assert verify(model, tmp_path / "0.onnx", [x]).ok
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "1.onnx").read_bytes()
    F.cross_entropy(model(x), data(count=16)[1])
    assert all(tap.output is None for tap in method.taps)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight": -1.0}, "relational: weight=-1.0 is not accepted; use a number >= 0"),
        ({"every": 0}, "relational: every=0 is not accepted; use a whole number >= 1"),
        ({"modules": []}, r"relational: modules=\[\] is not accepted; use a list of names, or null"),
        ({"modules": ["layer9"]}, "relational: modules: the model has no module 'layer9'"),
        ({"teacher_dtype": "int8"}, "relational: teacher_dtype='int8' is not accepted; use bfloat16, or null"),
    ],
)
def test_options_that_are_not_accepted(options, words):
    with pytest.raises(BitwrightError, match=words):
        built(**options)


def test_modules_that_cannot_be_compared():
    model, partner = quantized(float_net()), float_net()
    with pytest.raises(
        BitwrightError, match=r"relational: modules: what 'fc' puts out in the model is of shape \(8, 4\)"
    ):
        make_step(model, [Relational(model, partner, modules=["fc"])])(*data())
    with pytest.raises(BitwrightError, match="relational: the stages of this Tokens are not known; give modules: "):
        Relational(Tokens(), Tokens())
    partner.conv1.stride = (2, 2)
    with pytest.raises(BitwrightError, match=r"'layer1' puts out .* only channels may differ in number"):
        make_step(model, [Relational(model, partner, modules=["layer1"])])(*data())
    idle = float_net()
    idle.unused = nn.Conv2d(3, 3, 1)
    other = quantized(float_net())
    other.unused = nn.Conv2d(3, 3, 1)
    with pytest.raises(BitwrightError, match="relational: modules: 'unused' did not run in the model's forward pass"):
        make_step(other, [Relational(other, idle, modules=["unused"])])(*data())
