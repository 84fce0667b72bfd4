import pytest
import torch

from bitwright import BitwrightError, quantizers
from bitwright.methods.gaqat import GAQAT, disorder
from bitwright.methods.saq import SAQ
from methods.nets import data, float_net, make_step, quantized, resumed, run, same_state


def test_the_disorder_of_constant_alternating_and_vanishing_gradients():
    steps = torch.arange(6)
    signs = torch.stack([torch.ones(6), (-1.0) ** steps, torch.zeros(6), (-1.0) ** (steps // 2)], 1)
    assert disorder(signs).tolist() == pytest.approx([0.0, 1.0, 0.0, 2 / 5])


def scale_gradients(model, methods, batch):
    """Gradients of all learned scales on one batch, which the optimizer does not get."""
    step = make_step(model, methods)
    step.optimizer.step = lambda: kept.extend(p.grad.clone() for p in learned)
    learned = [p for q in quantizers(model).values() for p in q.parameters() if p.requires_grad]
    kept: list[torch.Tensor] = []
    step(*batch)
    return kept


def test_open_gates_add_the_task_gradient_and_closed_ones_leave_it_out():
    plain, flat, routed = (quantized(float_net(), bits=3) for _ in range(3))
    method = GAQAT(routed, rho=0.3)
    first = next(iter(method.gates))
    method.gates[first].zero_()
    task = scale_gradients(plain, [], data())
    smooth = scale_gradients(flat, [SAQ(flat, 0.3)], data())
    got = scale_gradients(routed, [method], data())
    for name, g, t, s in zip(method.gates, got, task, smooth, strict=True):
        torch.testing.assert_close(g, s if name == first else s + t, msg=name)
    others = [n for n, p in routed.named_parameters() if p.requires_grad and n not in method.gates]
    assert others


def test_gates_follow_the_disorder_of_each_window():
    model = quantized(float_net(), bits=3)
    method = GAQAT(model, window=4, threshold=0.5)
    steady, turning = list(method.gates)[:2]

    def window(flips):
        for i in range(4):
            method.present = {n: torch.ones_like(g) for n, g in method.gates.items()}
            method.present[turning] *= (-1.0) ** i if flips else 1.0
            method.after_step(None)

    window(flips=True)
    assert not method.gates[steady].any()
    assert method.gates[turning].all()
    metrics = {}
    method.after_epoch(metrics)
    count = {n: g.numel() for n, g in method.gates.items()}
    assert metrics["gaqat/frozen"] == pytest.approx(1 - count[turning] / sum(count.values()))
    window(flips=False)
    assert not method.gates[turning].any()
    window(flips=True)
    assert method.gates[turning].all()


def test_accumulated_batches_count_as_one_step():
    model = quantized(float_net(), bits=3)
    method = GAQAT(model, window=3)
    step = make_step(model, [method], accumulate=2)
    run(step, 0, 3)
    assert len(method.signs) == 1
    assert method.present.keys() == method.gates.keys()


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_resumed_run_ends_bit_identical(stop):
    def fresh():
        model = quantized(float_net(), bits=3)
        return model, make_step(model, [GAQAT(model, rho=0.3, window=3, threshold=0.6)])

    whole, step = fresh()
    run(step, 0, 7)
    assert any((g == 0).any() for g in step.methods[0].gates.values())
    rest = resumed(fresh, stop, 7)
    assert same_state(whole, rest)


@pytest.mark.parametrize("options", [{"rho": -1.0}, {"window": 1}, {"threshold": 1.5}])
def test_values_that_are_not_accepted(options):
    ((key, value),) = options.items()
    with pytest.raises(BitwrightError, match=f"{key}={value}"):
        GAQAT(quantized(float_net()), **options)


def test_grids_that_learn_nothing_and_a_second_owner_are_refused():
    with pytest.raises(BitwrightError, match="no grid of the model learns"):
        GAQAT(quantized(float_net(), grid="dorefa"))
    model = quantized(float_net())
    with pytest.raises(BitwrightError, match="both own the backward pass"):
        make_step(model, [SAQ(model), GAQAT(model)])
