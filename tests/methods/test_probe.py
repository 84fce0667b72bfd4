"""The fast forward pass is the same function, also for networks that refuse another layout."""

import pytest
import torch
from torch import nn

from bitwright.batches import inputs_of
from bitwright.methods.probe import forward_fast
from methods.nets import data


class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 2, 3), nn.Linear(72, 2)

    def forward(self, x):
        y = self.conv(x)
        return self.fc(y.view(len(y), -1))


@pytest.mark.parametrize("build", [Views, lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 2))])
def test_the_layout_changes_no_value(build):
    torch.manual_seed(0)
    net, x = build(), data()[0]
    torch.testing.assert_close(forward_fast(net, inputs_of(x, "test")), net(x), rtol=1e-5, atol=1e-5)


def test_other_errors_are_the_callers():
    with pytest.raises(RuntimeError, match="mat1"):
        forward_fast(nn.Linear(5, 2), inputs_of(data()[0], "test"))
