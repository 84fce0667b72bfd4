"""A small network of hard activations: two on whole pictures, and a squeeze-and-excitation gate."""

import torch
from torch import Tensor, nn

import bitwright as bw


class Squeeze(nn.Module):
    """x times a gate of its average."""

    def __init__(self, channels: int):
        super().__init__()
        self.pool, self.down, self.up = nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.relu, self.gate = nn.ReLU(), nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.up(self.relu(self.down(self.pool(x))))) * x


class HardNet(nn.Module):
    """The last Hardswish is averaged, the others are read by convolutions, one through the gate."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1, self.act1 = (
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.Hardswish(inplace=True),
        )
        self.conv2, self.norm2, self.act2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Hardswish()
        self.squeeze, self.conv3, self.norm3 = Squeeze(8), nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12)
        self.act3, self.pool, self.head = nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act2(self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x))))))
        return self.head(self.pool(self.act3(self.norm3(self.conv3(self.squeeze(x))))).flatten(1))


def hard_net(bits: str, topology: str) -> nn.Module:
    """Calibrated, with norms and gates that use their range; every input has `bits`."""
    torch.manual_seed(5)
    model, x, rules = HardNet().train(), pictures(32), bw.rules(bits, ends=None)
    with torch.no_grad():
        for norm in (model.norm1, model.norm2, model.norm3):
            norm.weight.mul_(2)
        model.squeeze.up.weight.mul_(8)
        for _ in range(3):
            model(x)
    bw.prepare(model, rules + bw.topology(model, x, topology, rules=rules))  # pyright: ignore[reportArgumentType]
    bw.calibrate(model, [x])
    bw.snap_biases(model.eval(), x)
    return model


def pictures(count: int) -> Tensor:
    """(count, 3, 10, 10), the same in every call."""
    return torch.randn(count, 3, 10, 10, generator=torch.Generator().manual_seed(2))
