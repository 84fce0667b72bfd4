"""The CIFAR ResNets (He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2).

A 3×3 stem, three stages of `(depth - 2) / 6` basic blocks with `width`, `2·width` and `4·width` channels at full,
half and quarter resolution, global average pooling, one linear layer. Every relu, pooling and addition is a module
of its own, so that hooks and graph captures see each of them once.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.errors import BitwrightError
from bitwright.layers import Add

SHORTCUTS = ("A", "B")


class PadShortcut(nn.Module):
    """Option A: every second row and column, new channels zero, half of them on each side; no parameters.

    (N, C, H, W) -> (N, C + extra, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, stride: int, extra: int) -> None:
        super().__init__()
        self.stride = stride
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        before = self.extra // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, extra={self.extra}"


class BasicBlock(nn.Module):
    """conv-bn-relu-conv-bn, plus the shortcut, then relu."""

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride, shortcut)
        self.add = Add()
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(self.add(y, self.shortcut(x)))


def _shortcut(in_channels: int, channels: int, stride: int, kind: str) -> nn.Module:
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    if kind == "A":
        return PadShortcut(stride, channels - in_channels)
    conv = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


class CifarResNet(nn.Module):
    """(N, in_channels, H, W) float -> (N, num_classes) logits, for any H and W (made for 32).

    depth: 6n + 2 (8, 20, 32, 56, …). width: channels of the first stage, 16 in the paper. shortcut: "A", the
    paper's parameter-free one (ResNet-20: 0.27 M parameters, 40.55 M MACs at 32×32), or "B", a strided 1×1
    convolution with BatchNorm (40.81 M MACs). Convolutions start from He et al.'s fan-in normal distribution.

    Raises: BitwrightError for a depth, width or shortcut that the family does not have.
    """

    def __init__(
        self, depth: int, num_classes: int, in_channels: int = 3, *, width: int = 16, shortcut: str = "A"
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise BitwrightError(f"resnet depth {depth}: accepted are 6n + 2 (8, 14, 20, …)")
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise BitwrightError(f"resnet width {width!r}: accepted is a whole number of channels, at least 1")
        if shortcut not in SHORTCUTS:
            raise BitwrightError(f"resnet shortcut {shortcut!r}: accepted are {', '.join(SHORTCUTS)}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = _stage(width, width, blocks, 1, shortcut)
        self.layer2 = _stage(width, 2 * width, blocks, 2, shortcut)
        self.layer3 = _stage(2 * width, 4 * width, blocks, 2, shortcut)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(4 * width, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.flatten(self.pool(x)))


def _stage(in_channels: int, channels: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride, shortcut)
    rest = [BasicBlock(channels, channels, 1, shortcut) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def init_weights(model: nn.Module) -> None:
    """He et al. 2015: weights normal with variance gain² / fan-in (gain √2 before relu, 1 for the classifier)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
