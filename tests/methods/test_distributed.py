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
from bitwright import AMED, BWRF, CAGE, CSQ, GAQAT, HGQ, KD, SAQ, AdaQAT, Allocation, Constrained, quantizers
from bitwright.costs import cost_table
from methods.nets import data, float_net, make_step, quantized
rank, name = int(sys.argv[1]), sys.argv[3]
dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
partner = float_net()
model = quantized(partner, bits=4)
costs = cost_table(model, data()[0][:1])
method = {
    "adaqat": lambda: AdaQAT(model, 100, every=1, warmup_steps=0, eta=2.0, lam=0.01),
    "allocation": lambda: Allocation(model, costs, {"bitops": 0.6 * costs.bitops}, steps=2),
    "amed": lambda: AMED(model, 6, costs, every=1, freeze_at=1.0),
    "bwrf": lambda: BWRF(model, partner, sample=True),
    "cage": lambda: CAGE(model, 6, lam=1.0, silence=0.1),
    "constrained": lambda: Constrained(model, torch.nn.functional.cross_entropy, rate=1.0),
    "csq": lambda: CSQ(model, 6, costs, {"bitops": 0.8 * costs.bitops}, mask_lr=3.0),
    "gaqat": lambda: GAQAT(model, rho=0.2, window=2, threshold=0.6),
    "hgq": lambda: HGQ(model, 6, costs, {"bitops": 0.6 * costs.bitops}, warmup_steps=0, freeze_at=1.0),
    "kd": lambda: KD(partner),
    "saq": lambda: SAQ(model, rho=0.2),
}[name]()
wrapped = DistributedDataParallel(model)
step = make_step(wrapped, [method])
for i in range(6):
    step(*data(seed=10 * i + rank))
    if i == 2:
        step.end_epoch({})
values = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
bits = [int(q.bits) for q in quantizers(model).values()]
print("RESULT", [v.hex() for v in (values.sum().item(), values.square().sum().item())], bits, step.result.loss.item())
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["adaqat", "allocation", "amed", "bwrf", "cage", "constrained", "csq", "gaqat", "hgq", "kd", "saq"]
)
def test_ranks_agree(tmp_path, name):
    here = str(Path(__file__).parents[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(r), f"file://{tmp_path}/meet", name, here],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for r in (0, 1)
    ]
    one, two = (p.communicate(timeout=300)[0].partition("RESULT ")[2].strip().rpartition("] ") for p in ranks)
    assert one[0] == two[0] != ""
    assert one[2] != two[2]
    if name in ("adaqat", "allocation", "amed", "csq", "hgq"):
        assert "4, 4, 4, 4, 4, 4" not in one[0]
