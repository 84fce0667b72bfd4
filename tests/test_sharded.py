"""A network sharded by FSDP trains as one that is not, and its gathered state is deployed."""

import subprocess
import sys

SHARDED = """
import sys
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import bitwright as bw
from bitwright.training.models.resnet import CifarResNet

torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=sys.argv[1], rank=0, world_size=1)

def net(seed):
    torch.manual_seed(seed)
    model = CifarResNet(8, 4, width=4)
    return bw.prepare(model, bw.rules("w4a4"))

x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
plain, sharded = (bw.calibrate(net(0), x).train() for _ in range(2))
mesh = init_device_mesh("cpu", (1,))
for block in [m for m in sharded.modules() if type(m).__name__ == "BasicBlock"]:
    fully_shard(block, mesh=mesh)
fully_shard(sharded, mesh=mesh)
for _ in range(2):
    for model in (plain, sharded):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
    for (name, p), q in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad.full_tensor(), p.grad, rtol=1e-3, atol=1e-5, msg=name)
        p.data.add_(p if p.grad is None else p.grad, alpha=-0.1)
        q.data.add_(q if q.grad is None else q.grad, alpha=-0.1)
whole = net(1)
whole.load_state_dict(get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True)))
for (name, p), q in zip(plain.named_parameters(), whole.parameters(), strict=True):
    torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5, msg=name)
bw.coverage(whole, x)
dist.destroy_process_group()
print("blocks", sum(type(m).__name__ == "BasicBlock" for m in plain.modules()))
"""


def test_sharding_by_blocks_changes_nothing(tmp_path):
    """FSDP frees a block's parameters behind its forward pass, when the norm of its sum still waits for a reader."""
    run = subprocess.run(
        [sys.executable, "-c", SHARDED, f"file://{tmp_path}/meet"], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["blocks", "3"]
