"""Two ranks with different data: what a method decides is the same on both, and so is the network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RANK = """
import sys, copy
sys.path[:0] = sys.argv[4:]
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from bitwright import AMED, BWRF, CAGE, CSQ, GAQAT, HGQ, KD, SAQ, AdaQAT, Allocation, Constrained, EWGSDelta
from bitwright import ChannelBits, PEGECurriculum, Relational, quantizers
from bitwright.costs import cost_table
from methods.nets import data, float_net, make_step, quantized
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
for name in sys.argv[3].split(","):
    partner = float_net()
    model = quantized(partner, bits=4, estimator=name if name in ("ewgs", "pege") else "clipped_ste")
    costs = cost_table(model, data()[0][:1])
    method = {
        "adaqat": lambda: AdaQAT(model, 100, every=1, warmup_steps=0, eta=2.0, lam=0.01),
        "allocation": lambda: Allocation(model, costs, {"bitops": 0.6 * costs.bitops}, steps=2),
        "amed": lambda: AMED(model, 6, costs, every=1, freeze_at=1.0),
        "bwrf": lambda: BWRF(model, partner, sample=True),
        "cage": lambda: CAGE(model, 6, lam=1.0, silence=0.1),
        "channel_bits": lambda: ChannelBits(model, shares=[0.25], steps=2),
        "constrained": lambda: Constrained(model, torch.nn.functional.cross_entropy, rate=1.0),
        "csq": lambda: CSQ(model, 6, costs, {"bitops": 0.8 * costs.bitops}, mask_lr=3.0),
        "ewgs": lambda: EWGSDelta(model, torch.nn.functional.cross_entropy, lambda: [data(seed=50 + rank)], every=1),
        "gaqat": lambda: GAQAT(model, rho=0.2, window=2, threshold=0.6),
        "hgq": lambda: HGQ(model, 6, costs, {"bitops": 0.6 * costs.bitops}, warmup_steps=0, freeze_at=1.0),
        "kd": lambda: KD(partner),
        "pege": lambda: PEGECurriculum(model, 8),
        "relational": lambda: Relational(model, partner),
        "saq": lambda: SAQ(model, rho=0.2),
    }[name]()
    wrapped = DistributedDataParallel(model)
    step = make_step(wrapped, [method])
    for i in range(6):
        step(*data(seed=10 * i + rank))
        if i == 2:
            step.end_epoch({})
            if name == "ewgs":  # now: the next forward pass has DistributedDataParallel take them from the first rank
                deltas = [q.estimator.delta.clone() for q in quantizers(model).values()]
    values = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    if name == "ewgs":
        values = torch.cat([values, *deltas])
    sums = [v.hex() for v in (values.sum().item(), values.square().sum().item())]
    bits = [q.bits.int().tolist() for q in quantizers(model).values()]
    print("RESULT", name, sums, bits, step.result.loss.item())
dist.destroy_process_group()
"""


METHODS = ["adaqat", "allocation", "amed", "bwrf", "cage", "constrained", "csq", "ewgs", "gaqat", "hgq", "kd", "pege"]
METHODS += ["relational", "saq", "channel_bits"]


@pytest.mark.slow
def test_ranks_agree(tmp_path):
    here = str(Path(__file__).parents[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(r), f"file://{tmp_path}/meet", ",".join(METHODS), here],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for r in (0, 1)
    ]
    lines = [p.communicate(timeout=300)[0].splitlines() for p in ranks]
    found = [[line.split(" ", 2)[1:] for line in out if line.startswith("RESULT ")] for out in lines]
    # By method: (sums of parameters, bits) and the loss of the last step, which differs with the ranks' data.
    one, two = ({name: rest.rpartition("] ")[::2] for name, rest in rank} for rank in found)
    assert [*one] == [*two] == METHODS
    assert [name for name in METHODS if one[name][0] != two[name][0]] == []
    assert [name for name in METHODS if one[name][1] == two[name][1]] == []
    learned = ("adaqat", "allocation", "amed", "csq", "hgq")
    assert [name for name in learned if "4, 4, 4, 4, 4, 4" in one[name][0]] == []
