"""Small networks with everything that deployment must get right, and one that was really trained."""

import tempfile
from collections.abc import Sequence
from functools import cache
from itertools import cycle
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import bitwright as bw
from bitwright.deploy import export, snap_biases, verify
from bitwright.deploy.comparison import VerifyReport
from bitwright.layers import Add
from bitwright.training.models.resnet import CifarResNet


class MixedNet(nn.Module):
    """Convolutions plain, depth-wise, strided, dilated, reflect-padded; a residual; every kind of norm; two linears."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.depthwise_norm = nn.BatchNorm2d(8)
        self.add = Add()
        self.reflect = nn.Conv2d(8, 12, 3, stride=2, padding=2, dilation=2, padding_mode="reflect")
        self.point = nn.Conv2d(12, 12, 1)
        self.point_norm = nn.BatchNorm2d(12, affine=False)
        self.last = nn.Conv2d(12, 12, 3, padding=1)
        self.fc = nn.Linear(12, 16)
        self.fc_norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = torch.relu(self.add(x, self.depthwise_norm(self.depthwise(x))))
        x = nn.functional.hardswish(self.reflect(x))
        x = torch.relu(self.last(torch.relu(self.point_norm(self.point(x)))))
        return self.head(torch.relu(self.fc_norm(self.fc(x.mean((2, 3))))))


def settle(model: nn.Module, *shape: int) -> nn.Module:
    """Norm statistics from data, gains of both signs."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(*shape))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine:
                module.weight.normal_()
                module.bias.normal_(0, 0.5)
    return model.eval()


def mixed_net(grid: str, bits: int) -> nn.Module:
    """A calibrated `MixedNet` with an all-zero filter, a zero gain and negative gains."""
    return mixed_kinds([(grid, bits)])


def mixed_kinds(kinds: Sequence[tuple[str, int]]) -> nn.Module:
    """`mixed_net` whose layers take the (grid, bits) of `kinds` in turn; the sum takes the first."""
    model = MixedNet()
    settle(model, 16, 3, 8, 8)
    with torch.no_grad():
        model.depthwise.weight[3] = 0
        model.stem_norm.weight[2] = 0
        model.depthwise_norm.weight[1] = -0.7
    specs = [bw.QuantizerSpec.model_validate({"bits": bits, "grid": grid}) for grid, bits in kinds]
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    rules = [bw.Rule(match=("*",), weight=specs[0], input=specs[0], residual=specs[0])]
    for name, spec in zip(layers, cycle(specs), strict=False):
        rules.append(bw.Rule(match=(name,), weight=spec, input=spec))
    bw.prepare(model, rules)
    return bw.calibrate(model, [torch.randn(64, 3, 8, 8)]).eval()


@cache
def exported(grid: str, bits: int) -> tuple[nn.Module, bytes]:
    """A snapped `mixed_net` and its file, made once; tests must not change the model."""
    torch.manual_seed(bits)
    model = mixed_net(grid, bits)
    snap_biases(model, torch.randn(2, 3, 8, 8))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        export(model, path, torch.randn(2, 3, 8, 8))
        return model, path.read_bytes()


def quantized(model: nn.Module, bits: str, data: Tensor, **kwargs) -> nn.Module:
    """`model` prepared by `rules(bits)` and calibrated on `data`."""
    bw.prepare(model.eval(), bw.rules(bits, **kwargs))
    return bw.calibrate(model, [data]).eval()


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits: (1797, 1, 8, 8) in [0, 1], labels."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


@cache
def trained_resnet(bits: str, steps: int = 60) -> tuple[nn.Module, Tensor]:
    """A ResNet-8 trained on digits, float first and then at `bits`; returns it with images it has not seen."""
    x, y = digits()
    model = CifarResNet(8, 10, 1, width=8)
    for phase in ("float", bits):
        if phase != "float":
            quantized(model, bits, x[:256])
        optimizer = torch.optim.Adam(model.parameters(), 5e-3 if phase == "float" else 2e-3)
        model.train()
        for step in range(steps):
            rows = torch.arange(step * 64, step * 64 + 64) % 1200
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval(), x[1200:]


def shipped(model: nn.Module, path, x: Tensor) -> VerifyReport:
    """Export and verify."""
    export(model, path, x[:2])
    return verify(model, path, x.split(64))
