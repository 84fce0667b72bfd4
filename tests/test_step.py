"""`Step`: the loop one would write by hand, with the methods' hooks in their places; distillation."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitwright as bw
from bitwright.costs import cost_table
from bitwright.methods.kd import kd_loss
from bitwright.prepare import warn_once


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def data(n):
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(5, 4, dtype=torch.float64, generator=generator), torch.randint(0, 3, (5,), generator=generator))
        for _ in range(n)
    ]


def accelerated(batches):
    """An optimizer that carries what accelerate's does."""
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.1)
    optimizer.gradient_state = types.SimpleNamespace(num_steps=batches)
    return optimizer


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("clip", [None, 0.1])
def test_it_is_the_loop_by_hand(clip):
    mine, theirs = net(), net()
    optimizer = torch.optim.SGD(mine.parameters(), 0.1, momentum=0.9)
    other = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9)
    step = bw.Step(theirs, F.cross_entropy, other, clip_norm=clip)
    for x, y in data(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(mine(x), y)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(mine.parameters(), clip)
        optimizer.step()
        result = step(x, y)
        assert torch.equal(result.loss, loss.detach())
        assert result.losses == {"task": loss}
        assert not result.outputs.requires_grad
    assert step.steps == 4
    assert same(mine, theirs)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_that_another_loss_left_are_not_stepped_on(accumulate):
    """As of two networks that train each other: the loss of one leaves gradients in the other."""

    def maker():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4)).double()

    def judged(real, made, judge):
        return F.softplus(-judge(real)[:, 0]).mean() + F.softplus(judge(made)[:, 0]).mean()

    noise = torch.randn(6, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    reals = [x for x, _ in data(6)]
    mine, judge = maker(), net()
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (judge, mine)]
    for i, (real, z) in enumerate(zip(reals, noise, strict=True)):
        if i % accumulate == 0:
            optimizers[0].zero_grad()
        (judged(real, mine(z).detach(), judge) / accumulate).backward()
        if i % accumulate == accumulate - 1:
            optimizers[0].step()
            optimizers[1].zero_grad()
            F.softplus(-judge(mine(z))[:, 0]).mean().backward()
            optimizers[1].step()

    theirs, other = maker(), net()
    both = nn.ModuleDict({"maker": theirs, "judge": other})
    first = bw.Step(
        other,
        lambda out, rows: F.softplus(-out[:rows, 0]).mean() + F.softplus(out[rows:, 0]).mean(),
        torch.optim.SGD(other.parameters(), 0.1, momentum=0.9),
        accumulate=accumulate,
    )
    second = bw.Step(
        nn.Sequential(*both.values()),
        lambda out, _: F.softplus(-out[:, 0]).mean(),
        torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9),
    )
    for i, (real, z) in enumerate(zip(reals, noise, strict=True)):
        first(torch.cat([real, theirs(z).detach()]), len(real))
        if i % accumulate == accumulate - 1:
            second(z, None)
    for a, b in zip(
        [*mine.parameters(), *judge.parameters()], [*theirs.parameters(), *other.parameters()], strict=True
    ):
        torch.testing.assert_close(a, b)


def test_accumulated_batches_are_one_large_batch():
    whole, parts = net(), net()
    batches = data(4)
    step = bw.Step(parts, F.cross_entropy, torch.optim.SGD(parts.parameters(), 0.1), accumulate=4)
    for x, y in batches:
        step(x, y)
    assert step.steps == 1
    large = bw.Step(whole, F.cross_entropy, torch.optim.SGD(whole.parameters(), 0.1))
    large(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_batches_left_over_take_their_step_at_the_end_of_the_epoch():
    model = net()
    step = bw.Step(model, F.cross_entropy, torch.optim.SGD(model.parameters(), 0.1), accumulate=3)
    for x, y in data(4):
        step(x, y)
    before = copy.deepcopy(model)
    step.end_epoch({})
    assert step.steps == 2
    assert not same(before, model)
    assert all(p.grad is None for p in model.parameters()), "nothing is pending in a checkpoint"
    step.end_epoch({})
    assert step.steps == 2


class Recorder(bw.Method):
    name = "recorder"

    def __init__(self):
        self.calls = []

    def losses(self, batch, outputs):
        self.calls.append(("losses", batch.x.shape[0], outputs.requires_grad))
        return {"extra": outputs.square().mean()}

    def after_step(self, step):
        self.calls.append(("after_step", step.steps))

    def after_epoch(self, metrics):
        metrics["seen"] = len(self.calls)

    def state_dict(self):
        return {"calls": len(self.calls)}

    def load_state_dict(self, state):
        self.restored = state["calls"]


def test_hooks_run_in_their_places():
    model, method = net(), Recorder()
    step = bw.Step(model, F.cross_entropy, torch.optim.SGD(model.parameters(), 0.1), [method], accumulate=2)
    for x, y in data(2):
        result = step(x, y)
    assert method.calls == [("losses", 5, True), ("losses", 5, True), ("after_step", 1)]
    torch.testing.assert_close(result.loss, result.losses["task"] + result.losses["extra"])
    metrics = {}
    step.end_epoch(metrics)
    assert metrics == {"seen": 3}
    other = Recorder()
    again = bw.Step(model, F.cross_entropy, step.optimizer, [other], accumulate=2)
    again.load_state_dict(step.state_dict())
    assert (again.steps, other.restored) == (1, 3)
    with pytest.raises(bw.BitwrightError, match="state of 1 methods, the run has 0"):
        bw.Step(model, F.cross_entropy, step.optimizer).load_state_dict(step.state_dict())


def test_one_owner_of_the_backward_pass():
    class Owner(bw.Method):
        def backward(self, step):
            step.forward_loss(step.batch).mul(2).backward()

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(bw.BitwrightError, match="Owner and Owner both own the backward pass"):
        bw.Step(model, F.cross_entropy, optimizer, [Owner(), Owner()])
    plain = net()
    ((x, y),) = data(1)
    bw.Step(model, F.cross_entropy, optimizer, [Owner()])(x, y)
    bw.Step(plain, F.cross_entropy, torch.optim.SGD(plain.parameters(), 0.2))(x, y)
    assert same(model, plain)


def test_refusals():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(bw.BitwrightError, match="accumulate=0"):
        bw.Step(model, F.cross_entropy, optimizer, accumulate=0)
    step = bw.Step(model, F.cross_entropy, optimizer, [Recorder(), Recorder()])
    with pytest.raises(bw.BitwrightError, match="loss name 'extra' is used twice"):
        step(*data(1)[0])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_the_divergence_of_softened_outputs(temperature):
    student, teacher = torch.randn(2, 6, 5)
    student.requires_grad_()
    p, q = (F.softmax(t / temperature, -1) for t in (teacher, student))
    expected = temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()
    got = kd_loss(student, teacher, temperature)
    torch.testing.assert_close(got, expected)
    got.backward()
    torch.testing.assert_close(student.grad, temperature * (q - p).detach() / 6, rtol=1e-4, atol=1e-6)
    assert kd_loss(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-6)


def test_distillation_in_a_step_leaves_the_teacher_alone():
    teacher, model = net().train(), net()
    nn.init.normal_(model[0].weight)
    before = copy.deepcopy(teacher)
    step = bw.Step(model, F.cross_entropy, torch.optim.SGD(model.parameters(), 0.1), [bw.KD(teacher, weight=0.5)])
    ((x, y),) = data(1)
    task, kd = F.cross_entropy(model(x), y), 0.5 * kd_loss(model(x), teacher(x), 4.0)
    result = step(x, y)
    torch.testing.assert_close(result.losses["kd"], kd.detach())
    torch.testing.assert_close(result.loss.float(), (task + kd).detach().float())
    assert same(before, teacher)
    assert not teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    with pytest.raises(bw.BitwrightError, match="temperature=0"):
        bw.KD(teacher, temperature=0)


def test_a_teacher_is_nothing_that_is_trained():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    follows = net()  # other parameters, over the same memory
    follows.load_state_dict(model.state_dict(), assign=True)
    for teacher in (model, nn.Sequential(model[0], *net()[1:]), follows):
        with pytest.raises(bw.BitwrightError, match=r"^methods: kd: the optimizer trains parameters of the teacher"):
            bw.Step(model, F.cross_entropy, optimizer, [bw.KD(teacher)])
    assert all(p.requires_grad for p in model.parameters())
    assert model.training
    model[0].requires_grad_(False)  # what nobody trains may be in both
    bw.Step(model, F.cross_entropy, optimizer, [bw.KD(nn.Sequential(model[0], *net()[1:]))])


def test_a_teacher_inside_the_model_stays_in_evaluation_mode():
    """Its norms would take up the batch, as the `train()` of the whole reaches them."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = net()
            self.teacher = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).double()

        def forward(self, x):
            return self.student(x)

    both = Both()
    step = bw.Step(both, F.cross_entropy, torch.optim.SGD(both.student.parameters(), 0.1), [bw.KD(both.teacher)])
    before = copy.deepcopy(both.teacher)
    both.train()
    step(*data(1)[0])
    assert same(before, both.teacher)


def test_a_model_may_put_out_a_dict():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            return {"out": self.fc(x), "aux": 2 * self.fc(x), "step": 1}

    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = bw.Step(model, lambda out, y: F.mse_loss(out["out"], y) + 0.4 * F.mse_loss(out["aux"], y), optimizer)
    result = step(torch.randn(4, 3), torch.zeros(4, 2))
    assert result.outputs["aux"].shape == (4, 2)
    assert not result.outputs["aux"].requires_grad


class Pair(nn.Module):
    """Reads two tensors by name, as Hugging Face's models do, and gives logits among other things."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, left, right, labels=None):
        hidden = torch.relu(self.left(left)) + torch.relu(self.right(right))
        logits = self.head(hidden)
        return {
            "logits": logits,
            "hidden": hidden,
            **({} if labels is None else {"loss": F.cross_entropy(logits, labels)}),
        }


class Alone(Pair):
    """The same network with one tensor out."""

    def forward(self, left, right):
        return super().forward(left, right)["logits"]


@pytest.mark.parametrize("method", ["kd", "adaqat", "allocation", "constrained", "saq"])
def test_keywords_and_dicts_train_as_tensors_do(method):
    def trained(kind, given, loss_fn):
        torch.manual_seed(0)
        model, left, right, y = kind(), torch.randn(8, 6), torch.randn(8, 4), torch.arange(8) % 3
        teacher = copy.deepcopy(model)
        bw.calibrate(bw.prepare(model, bw.rules("w4a4", ends=None)), [((left, right), y)])
        costs = cost_table(model, ((left, right), y))
        methods = {
            "kd": lambda: bw.KD(teacher),
            "adaqat": lambda: bw.AdaQAT(model, 20, every=1, warmup_steps=0, probe_fraction=0.5),
            "allocation": lambda: bw.Allocation(model, costs, {"bitops": 0.9 * costs.bitops}, steps=2),
            "constrained": lambda: bw.Constrained(model, loss_fn),
            "saq": lambda: bw.SAQ(model, rho=0.1),
        }
        step = bw.Step(model, loss_fn, torch.optim.SGD(model.parameters(), 0.1), [methods[method]()])
        losses = [step(given(left, right, y), y).loss.item() for _ in range(4)]
        return losses, [q.bits.item() for q in bw.quantizers(model).values()]

    expected = trained(Alone, lambda a, b, _: (a, b), F.cross_entropy)
    by_name = trained(Pair, lambda a, b, _: {"right": b, "left": a}, lambda out, y: F.cross_entropy(out["logits"], y))
    with_labels = trained(Pair, lambda a, b, y: {"left": a, "right": b, "labels": y}, lambda out, _: out["loss"])
    assert by_name == with_labels == expected


def test_bwrf_reads_one_tensor():
    model = Pair()
    partner = copy.deepcopy(model)
    bw.prepare(model, bw.rules("w4a4"))
    batch = {"left": torch.randn(4, 6), "right": torch.randn(4, 4)}
    bw.calibrate(model, batch)
    method = bw.BWRF(model, partner, blocks=["left", "head"])
    step = bw.Step(model, lambda out, y: out["logits"].sum(), torch.optim.SGD(model.parameters(), 0.1), [method])
    with pytest.raises(bw.BitwrightError, match=r"^bwrf: takes models of one tensor in and one tensor out"):
        step(batch, None)


def test_an_optimizer_made_before_prepare_is_mentioned(caplog):
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(8, 4)
    early = torch.optim.SGD(model.parameters(), 0.1)
    bw.calibrate(bw.prepare(model, bw.rules("w4a4")), x)
    warn_once.cache_clear()
    bw.Step(model, F.cross_entropy, torch.optim.SGD(model.parameters(), 0.1))
    assert not caplog.records
    bw.Step(model, F.cross_entropy, early)
    assert "the optimizer holds 0 of 3 learned scales" in caplog.text


def test_a_run_resumed_without_its_methods_is_mentioned(caplog):
    """The curriculum would fall back to its beginning while all else goes on."""

    def made(state):
        torch.manual_seed(0)
        pege = bw.QuantizerSpec(bits=3, estimator="pege")
        model = bw.prepare(
            nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), [bw.Rule(match="*", weight=pege)]
        )
        bw.calibrate(model, torch.randn(8, 4))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        step = bw.Step(model, F.cross_entropy, optimizer, [bw.PEGECurriculum(model, 20)])
        for part, saved in zip((model, optimizer, step), state, strict=False):
            part.load_state_dict(saved)
        return model, optimizer, step

    x, y = torch.randn(8, 4), torch.arange(8) % 3
    warn_once.cache_clear()
    model, optimizer, step = made(())
    for _ in range(10):
        step(x, y)
    saved = copy.deepcopy([part.state_dict() for part in (model, optimizer, step)])
    made(saved)[2](x, y)
    assert not caplog.records
    made(saved[:2])[2](x, y)
    assert "the optimizer goes on from earlier steps, and pege from the beginning" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clip_norm": -1.0}, "step: clip_norm=-1.0"),  # torch would turn the gradient round
        ({"clip_norm": 0.0}, "step: clip_norm=0.0"),
        ({"accumulate": 2.5}, "accumulate=2.5"),  # would never step
        ({"amp_dtype": "bf16"}, "step: amp_dtype='bf16'"),
        ({"methods": ["kd"]}, r"step: methods=\['kd'\]"),
        ({"methods": Recorder()}, "step: methods=.*use a list of bitwright.Method"),
        ({"methods": [Recorder]}, "step: methods=.*use a list of bitwright.Method"),
        ({"optimizer": F.mse_loss}, "step: optimizer: function"),
        ({"optimizer": torch.optim.LBFGS([torch.zeros(1)])}, "step: LBFGS wants a closure"),
        ({"optimizer": accelerated(4)}, "step: accelerate's optimizer accumulates 4 batches by itself"),
    ],
)
def test_arguments_that_would_fail_later_or_train_wrongly(given, message):
    model = net()
    given = {"optimizer": torch.optim.SGD(model.parameters(), 0.1), **given}
    with pytest.raises(bw.BitwrightError, match=f"^{message}"):
        bw.Step(model, F.cross_entropy, **given)


def test_a_loss_of_many_numbers_is_refused():
    """Their sum would be trained on, at so many times the rate."""
    model = net()
    step = bw.Step(model, lambda out, y: F.cross_entropy(out, y, reduction="none"), torch.optim.SGD(model.parameters()))
    with pytest.raises(bw.BitwrightError, match=r"loss_fn gave a tensor of shape \(5,\); one number is expected"):
        step(*data(1)[0])


def test_a_checkpoint_of_other_methods_is_refused():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorded = bw.Step(model, F.cross_entropy, optimizer, [Recorder()])
    distilled = bw.Step(model, F.cross_entropy, optimizer, [bw.KD(net())])
    with pytest.raises(bw.BitwrightError, match="holds the state of recorder, the run has kd"):
        distilled.load_state_dict(recorded.state_dict())


def test_a_teacher_of_other_classes_is_refused():
    model, teacher = net(), nn.Linear(4, 7).double()
    step = bw.Step(model, F.cross_entropy, torch.optim.SGD(model.parameters(), 0.1), [bw.KD(teacher)])
    with pytest.raises(bw.BitwrightError, match=r"kd: the teacher puts out \(5, 7\), the model \(5, 3\)"):
        step(*data(1)[0])
