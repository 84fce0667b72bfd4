"""Methods together: compiled, in bfloat16, resumed."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from bitwright import CAGE, KD, SAQ, ChannelBits, Relational, quantizers
from bitwright.kernels import reference_only
from bitwright.methods.adaqat import AdaQAT
from bitwright.methods.bwrf import BWRF
from bitwright.methods.pege import PEGECurriculum
from methods.nets import data, float_net, make_step, quantized, resumed, run, same_state

NAMES = ("bwrf", "pege", "adaqat", "kd")
SUBSETS = [c for n in (1, 2, 4) for c in itertools.combinations(NAMES, n)]
SUBSETS += [("cage", "saq"), ("pege", "cage"), ("bwrf", "saq"), ("adaqat", "cage", "saq")]
SUBSETS += [("relational",), ("kd", "relational"), ("bwrf", "pege", "relational"), ("relational", "saq")]
SUBSETS += [("channel_bits", "kd", "relational"), ("bwrf", "pege", "channel_bits"), ("channel_bits", "cage", "saq")]


def build(names, compiled=None, double=False, **options):
    partner = float_net()
    model = quantized(partner, bits=3, estimator="pege" if "pege" in names else "clipped_ste")
    if double:
        model, partner = model.double(), partner.double()
    makers = {
        "bwrf": lambda: BWRF(model, partner, sample="adaqat" in names, backbone_kd="kd" not in names),
        "pege": lambda: PEGECurriculum(model, total_steps=10),
        "adaqat": lambda: AdaQAT(model, 10, every=1, warmup_steps=1, eta=1.0, lam=0.3, granularity="layer"),
        "kd": lambda: KD(partner),
        "relational": lambda: Relational(model, partner),
        "channel_bits": lambda: ChannelBits(model, shares=[0.25], steps=2),
        "cage": lambda: CAGE(model, 10, lam=1.0, silence=0.1),
        "saq": lambda: SAQ(model, 0.2),
    }
    return model, make_step(model, [makers[n]() for n in names], compiled=compiled, **options)


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_resumed_run_ends_bit_identical(names, amp):
    whole, step = build(names, amp_dtype=amp)
    run(step, 0, 6)
    assert torch.isfinite(step.result.loss)
    rest = resumed(lambda: build(names, amp_dtype=amp), 3, 6)
    assert same_state(whole, rest)
    if "adaqat" in names:
        assert {int(q.bits) for q in quantizers(whole).values()} != {8}


@pytest.mark.slow
@pytest.mark.parametrize("names", [("bwrf",), ("pege",), ("adaqat",), ("kd", "relational"), NAMES], ids="+".join)
def test_a_compiled_model_trains_as_the_eager_one(names):
    def double(seed):
        x, y = data(seed)
        return x.double(), y

    states = []
    counter = CompileCounterWithBackend("aot_eager")
    for compiled in (None, counter):
        torch._dynamo.reset()
        model, step = build(names, compiled, double=True)
        with reference_only():
            for i in range(5):
                torch.manual_seed(100 + i)
                step(*double(i))
        states.append(model.state_dict())
    # Bits, rates and strengths are buffers: one graph to train, one more for probes without gradient.
    assert counter.frame_count == (2 if "adaqat" in names else 1)
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's own compiler on import
def test_branches_and_partial_replacement_train_under_the_real_compiler():
    torch._dynamo.reset()
    _, step = build(("bwrf", "pege", "kd"), "inductor", amp_dtype=torch.bfloat16)
    run(step, 0, 6)
    assert torch.isfinite(step.result.loss)
    assert {"task", "kd", "bwrf_branches"} == step.result.losses.keys()
