"""Networks that cannot be cut at the blocks' ends are refused, by what the partner itself says."""

import copy

import pytest
import torch
from torch import nn

from bitwright import BitwrightError
from bitwright.methods.base import Batch
from bitwright.methods.bwrf import BWRF
from bitwright.methods.bwrf.partner import Partner
from methods.nets import data


class Skipping(nn.Module):
    """A shortcut from the first block to the classifier, past the second block."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.fc = nn.Linear(3, 4)

    def forward(self, x):
        first = self.a(x)
        return self.fc((self.c(self.b(first)) + first).mean((2, 3)))


class Mixing(nn.Module):
    """Rows of a batch see each other behind the second block."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.fc = nn.Linear(3, 4)

    def forward(self, x):
        h = self.b(self.a(x))
        return self.fc(self.c(h - h.mean(0, keepdim=True)).mean((2, 3)))


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Tupled(Skipping):
    def __init__(self):
        super().__init__()
        self.b = Pair()

    def forward(self, x):
        return self.fc(self.c(self.b(self.a(x))[0]).mean((2, 3)))


class Flat(Skipping):
    """The second block puts out rows of another number."""

    def __init__(self):
        super().__init__()
        self.b = nn.Flatten(0, 1)

    def forward(self, x):
        return self.fc(self.c(self.b(self.a(x)).unflatten(0, (-1, 3))).mean((2, 3)))


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Skipping, "'b': the partner does not run|'b': the logits also depend on the input by another path"),
        (Mixing, "'a': the logits also depend on the input by another path, or the rows of a batch are mixed"),
        (Tupled, "'b': its output is not a single tensor"),
        (Flat, r"'b': its output of shape \(6, 8, 8\) has no batch axis 0"),
    ],
)
def test_a_network_that_cannot_be_cut_is_refused_with_the_reason(net, reason):
    torch.manual_seed(0)
    partner = net()
    model = copy.deepcopy(partner).train()
    method = BWRF(model, partner, blocks=["a", "b", "c"])
    x, y = data()
    outputs = model(x)
    with pytest.raises(BitwrightError, match=f"cannot be cut behind block {reason}") as caught:
        method.losses(Batch(x, y), outputs)
    assert "\n" not in str(caught.value)


def test_the_same_network_can_be_cut_where_there_is_only_the_trunk():
    torch.manual_seed(0)
    partner = Skipping()
    model = copy.deepcopy(partner).train()
    method = BWRF(model, partner, blocks=["a", "c"])
    x, y = data()
    assert method.losses(Batch(x, y), model(x)).keys() == {"bwrf_kd", "bwrf_branches"}


def test_features_join_in_the_layout_of_the_partner():
    """Rows in another layout give the same numbers; what leaves the block is laid out as the partner has it."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(5 * 16, 2))
    partner = Partner(net.to(memory_format=torch.channels_last), ["0", "1"])
    x = data()[0].contiguous(memory_format=torch.channels_last)
    rows = torch.randn(3, 4, 6, 6)
    seen = []
    net[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits = [partner.branches(x, {0: f})[1][0] for f in (rows, rows.contiguous(memory_format=torch.channels_last))]
    assert torch.equal(*logits)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in seen)
