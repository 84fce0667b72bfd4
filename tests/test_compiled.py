"""The switch for compiled activation memory: fewer bytes, the same gradients, one compilation."""

import copy

import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.compiled import compile_model
from bitwright.errors import BitwrightError

# The partitioner that the budget speaks to, without the seconds of code generation.
BACKEND = "aot_eager_decomp_partition"
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")


def make_net(estimator):
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(2)]
    net = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(8 * 64, 3)).double()
    x = torch.randn(6, 8, 8, 8, dtype=torch.float64)
    bw.prepare(net, bw.rules("w4a4", estimator=estimator))
    return bw.calibrate(net, [x]).train(), x


def gradients(run, net, x, seed=0):
    """(bytes saved for the backward pass beyond parameters and buffers, gradients)."""
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers(), x)}
    seen = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    net.zero_grad()
    torch.manual_seed(seed)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = run(x).square().mean()
    loss.backward()
    return sum(seen.values()), [p.grad.clone() for p in net.parameters() if p.grad is not None]


def test_less_is_kept_and_the_gradients_are_the_same():
    torch.compiler.reset()
    net, x = make_net("ewgs")
    lean, full = copy.deepcopy(net), copy.deepcopy(net)
    _, want = gradients(net, net, x)
    much, _ = gradients(compile_model(full, backend=BACKEND, fullgraph=True), full, x)
    little, got = gradients(compile_model(lean, activation_memory=0.5, backend=BACKEND, fullgraph=True), lean, x)
    assert little < 0.8 * much
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    assert torch._functorch.config.activation_memory_budget == 1.0


def test_bits_rates_and_strengths_move_without_compiling_again():
    torch.compiler.reset()
    net, x = make_net("pege")
    estimators = [q.estimator for q in bw.quantizers(net).values()]
    run = compile_model(net, activation_memory=0.5, backend=BACKEND, fullgraph=True)
    outputs = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for bits, rate, strength in ((8, 0.0, 0.0), (4, 0.5, 0.1), (2, 1.0, 0.3)):
            for quantizer in bw.quantizers(net).values():
                quantizer.set_bits(bits)
            for estimator in estimators:
                estimator.rate.fill_(rate)
                estimator.strength.fill_(strength)
            gradients(run, net, x)
            outputs.append(run(x).detach())
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("share", [-0.1, 1.5, True])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(BitwrightError, match="activation_memory"):
        compile_model(nn.Linear(1, 1), activation_memory=share)
