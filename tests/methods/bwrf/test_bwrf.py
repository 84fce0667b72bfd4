import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from bitwright import KD, BitwrightError
from bitwright.methods.base import Batch
from bitwright.methods.bwrf import BWRF, branch_weights, fade_factor
from bitwright.methods.kd import kd_loss
from methods.nets import data, float_net, make_step, quantized, run, same_state

STAGES = ["layer1", "layer2", "layer3"]


def pair(bits=2):
    partner = float_net()
    return quantized(partner, bits), partner


def assemble(net, low, high, k, order):
    """A network of which blocks up to k come from one net and the rest from the other (the modules themselves)."""
    mixed = copy.deepcopy(net)
    first, second = (low, high) if order == "prefix" else (high, low)
    for names, source in ((["conv1", "bn1", *STAGES[:k]], first), ([*STAGES[k:], "fc"], second)):
        for name in names:
            setattr(mixed, name, getattr(source, name))
    return mixed


@pytest.mark.parametrize("branch_loss", ["both", "ce", "kd"])
@pytest.mark.parametrize("order", ["prefix", "suffix"])
def test_losses_and_gradients_are_those_of_explicitly_assembled_mixed_models(order, branch_loss):
    model, partner = pair()
    model, partner = model.double(), partner.double()
    x, y = data()[0].double(), data()[1]
    other = copy.deepcopy(model)
    method = BWRF(model, partner, order=order, branch_loss=branch_loss, alpha=0.7, beta=1.3, temperature=3.0)
    outputs = model(x)
    losses = method.losses(Batch(x, y), outputs)
    torch.stack([F.cross_entropy(outputs, y), *losses.values()]).sum().backward()

    with torch.no_grad():
        teacher = partner(x)
    z = other(x)
    expected = F.cross_entropy(z, y) + 0.7 * kd_loss(z, teacher, 3.0)
    for k, weight in ((1, 1.3 / 4), (2, 1.3 / 2)):
        z_k = assemble(other, other, partner, k, order)(x)
        if branch_loss != "kd":
            expected = expected + weight * F.cross_entropy(z_k, y)
        if branch_loss != "ce":
            expected = expected + weight * 0.7 * kd_loss(z_k, teacher, 3.0)
    expected.backward()

    total = F.cross_entropy(outputs, y) + sum(losses.values())
    # Distillation and sums of losses are taken in float32.
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_branches_teach_the_model_and_learn_nothing_from_it():
    """teach * sum_k w_k KD(z_Q, z_k), whose gradient is that of distillation from fixed logits."""
    grads = []
    for teach in (0.0, 0.6):
        model, partner = pair()
        method = BWRF(model.double(), partner.double(), beta=1.3, temperature=3.0, teach=teach)
        batch = Batch(data()[0].double(), data()[1])
        outputs = model(batch.x)
        fixed = {k: method.taps[k].output.detach() for k in (0, 1)}
        losses = method.losses(batch, outputs)
        _, logits = method.partner.branches(batch.x[:1], fixed)
        expected = 0.6 * sum(w * kd_loss(outputs, logits[k], 3.0) for k, w in ((0, 1.3 / 4), (1, 1.3 / 2)))
        if teach:
            assert losses["bwrf_teach"].item() == pytest.approx(expected.item(), rel=1e-6)
        else:
            losses["by hand"] = expected
        torch.stack(list(losses.values())).sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("granularity", ["stage", "block"])
def test_branch_logits_are_those_of_the_assembled_models(granularity):
    partner = float_net()
    model = quantized(partner)
    method = BWRF(model, partner, granularity=granularity)
    x, y = data()
    reference = copy.deepcopy(model)
    outputs = model(x)
    features = [tap.output for tap in method.taps]
    method.losses(Batch(x, y), outputs)
    _, logits = method.partner.branches(x[:1], {0: features[0], 1: features[1]})
    for k in (1, 2):
        expected = assemble(reference, reference, partner, k, "prefix")(x)
        torch.testing.assert_close(logits[k - 1], expected, rtol=1e-5, atol=1e-5)


def test_one_pass_and_two_passes_of_the_partner_give_the_same_losses_and_gradients():
    grads = []
    for joint in (False, True):
        model, partner = pair()
        method = BWRF(model.double(), partner.double(), joint=joint)
        batch = Batch(data()[0].double(), data()[1])
        torch.stack(list(method.losses(batch, model(batch.x)).values())).sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_training_leaves_the_partner_as_it_was_and_runs_the_backbone_once_a_step():
    model, partner = pair()
    before = copy.deepcopy(partner.state_dict())
    runs = []
    model.conv1.register_forward_hook(lambda *_: runs.append(1))
    start = copy.deepcopy(model.state_dict())
    step = make_step(model, [BWRF(model, partner)])
    for i in range(4):
        partner.train()  # as a wrapper's train() would
        run(step, i, i + 1)
    assert len(runs) == 4
    assert all(torch.equal(before[k], v) for k, v in partner.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in partner.parameters())
    assert not all(torch.equal(start[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("order", ["prefix", "suffix"])
def test_norm_statistics_of_the_model_move_as_without_the_method(order):
    model, partner = pair()
    plain = copy.deepcopy(model)
    x, y = data()
    method = BWRF(model, partner, order=order)
    method.losses(Batch(x, y), model(x))
    plain(x)
    assert same_state(model, plain)


def test_nothing_of_the_method_is_in_the_model():
    model, partner = pair()
    plain = quantized(float_net())
    method = BWRF(model, partner)
    step = make_step(model, [method])
    run(step, 0, 1)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert len(pickle.dumps(model)) < 1.1 * len(pickle.dumps(plain))
    model(data()[0])  # leaves features with a graph behind, which a copy must not meet
    twin = copy.deepcopy(model)
    twin(data(seed=5)[0])
    assert all(tap.output is not None for tap in method.taps)
    exported = torch.export.export(model.eval(), (data()[0],))
    assert torch.equal(exported.module()(data()[0]), model(data()[0]))
    method.remove()
    assert not any(m._forward_hooks for m in (*model.modules(), *partner.modules()))


def test_evaluation_and_passes_without_gradient_record_nothing():
    model, partner = pair()
    method = BWRF(model, partner)
    with torch.no_grad():
        model(data()[0])
    model.eval()(data()[0])
    assert all(tap.output is None for tap in method.taps)


def test_with_no_weight_it_is_plain_training_to_the_last_bit():
    plain, partner = pair()
    other, _ = pair()
    run(make_step(plain), 0, 4)
    run(make_step(other, [BWRF(other, partner, beta=0.0, backbone_kd=False)]), 0, 4)
    assert same_state(plain, other)


def test_without_branches_it_is_distillation():
    gradients = []
    for make in (
        lambda model, partner: KD(partner, 0.5, 2.0),
        lambda model, partner: BWRF(model, partner, beta=0.0, alpha=0.5, temperature=2.0),
    ):
        model, partner = pair()
        model, partner = model.double(), partner.double()
        x, y = data()
        method = make(model, partner)
        outputs = model(x.double())
        (loss,) = method.losses(Batch(x.double(), y), outputs).values()
        gradients.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)  # the loss is taken in float32


def test_the_same_partner_may_be_a_teacher_too():
    model, partner = pair()
    x, y = data()
    method, kd = BWRF(model, partner, backbone_kd=False), KD(partner)
    outputs = model(x)
    both = kd.losses(Batch(x, y), outputs) | method.losses(Batch(x, y), outputs)
    with torch.no_grad():
        assert both["kd"].item() == kd_loss(outputs, partner(x), 4.0).item()


def test_weights():
    assert branch_weights(4, "geometric", 2.0) == [2 / 8, 2 / 4, 2 / 2]
    assert branch_weights(4, "uniform", 1.5) == [0.5, 0.5, 0.5]


def test_sampling_takes_one_branch_a_step_and_is_unbiased():
    model, partner = pair()
    method = BWRF(model, partner, sample=True, beta=1.2)
    counts = [0.0, 0.0]
    for _ in range(3000):
        ((k, weight),) = method.chosen().items()
        counts[k] += weight / 3000
    assert counts == pytest.approx(branch_weights(3, "geometric", 1.2), abs=0.03)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("none", [1.0, 1.0, 1.0, 1.0]), ("linear", [1.0, 0.75, 0.5, 0.0]), ("cosine", [1.0, 0.853553, 0.5, 0.0])],
)
def test_branches_fade_along_the_curve_that_is_asked_for(kind, expected):
    assert [fade_factor(kind, t) for t in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(expected, abs=1e-6)
    assert fade_factor(kind, 1.5) == pytest.approx(expected[-1])  # steps beyond the end


def test_a_fading_branch_weighs_what_its_step_says_and_ends_with_nothing():
    model, partner = pair()
    method = BWRF(model, partner, fade="linear", total_steps=4)
    step = make_step(model, [method])
    for done in range(4):
        assert method.chosen() == pytest.approx({0: 0.25 * (1 - done / 4), 1: 0.5 * (1 - done / 4)})
        run(step, done, done + 1)
    assert method.chosen() == {}
    run(step, 4, 5)
    assert "bwrf_branches" not in step.result.losses
    assert "bwrf_kd" in step.result.losses


def test_a_resumed_run_samples_the_same_branches():
    def fresh():
        model, partner = pair()
        method = BWRF(model, partner, sample=True, seed=5, fade="cosine", total_steps=10)
        return model, make_step(model, [method])

    whole, step = fresh()
    run(step, 0, 8)
    half, step = fresh()
    run(step, 0, 4)
    saved = copy.deepcopy((half.state_dict(), step.optimizer.state_dict(), step.state_dict()))
    rest, step = fresh()
    rest.load_state_dict(saved[0])
    step.optimizer.load_state_dict(saved[1])
    step.load_state_dict(saved[2])
    run(step, 4, 8)
    assert same_state(whole, rest)


def test_blocks_that_did_not_run_or_have_other_shapes_are_refused():
    model, partner = pair()
    method = BWRF(model, partner)
    with pytest.raises(BitwrightError, match="block 'layer1' did not run"):
        method.losses(Batch(*data()), torch.zeros(8, 4))
    torch.manual_seed(0)
    from bitwright.training.models.resnet import CifarResNet

    wide = CifarResNet(8, 4, width=8).eval()
    method = BWRF(model, wide)
    with pytest.raises(BitwrightError, match=r"shape \(4, 8, 8\) in the model and \(8, 8, 8\) in the partner"):
        method.losses(Batch(*data()), model(data()[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": ["layer1", "layer9"]}, "has no module 'layer9'"),
        ({"blocks": ["layer1"]}, "at least two"),
        ({"granularity": "layer"}, "granularity"),
        ({"order": "middle"}, "order"),
        ({"branch_loss": "mse"}, "branch_loss"),
        ({"weights": "linear"}, "weights"),
        ({"temperature": 0.0}, "temperature"),
        ({"alpha": -1.0}, "alpha"),
        ({"beta": -1.0}, "beta"),
        ({"teach": -1.0}, "teach"),
        ({"alpha": 0.0, "branch_loss": "kd"}, "alpha"),
        ({"fade": "step", "total_steps": 9}, "fade"),
        ({"fade": "linear"}, "total_steps"),
    ],
)
def test_bad_values_are_refused_in_one_line(options, message):
    model, partner = pair()
    with pytest.raises(BitwrightError, match=message) as caught:
        BWRF(model, partner, **options)
    assert "\n" not in str(caught.value)


def test_a_partner_that_is_quantized_or_shares_parameters_is_refused():
    model, partner = pair()
    follows = copy.deepcopy(partner)
    follows.load_state_dict(model.state_dict(), strict=False, assign=True)  # other parameters, over the same memory
    for shared in (model, follows):
        with pytest.raises(BitwrightError, match="share parameters"):
            BWRF(model, shared)
    with pytest.raises(BitwrightError, match="quantized"):
        BWRF(model, quantized(partner))
