import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bitwright.errors import BitwrightError
from bitwright.layers import Add
from bitwright.training.models.resnet import CifarResNet, PadShortcut


def closed_form(depth: int, width: int, classes: int, size: int, shortcut: str) -> tuple[int, int]:
    """(parameters, MACs) from the paper's description: 3·2n + 1 convolutions, their BatchNorms, one linear layer."""
    n = (depth - 2) // 6
    parameters, macs = 3 * width * 9 + 2 * width, 3 * width * 9 * size**2
    fan_in = width
    for stage in range(3):
        channels, pixels = width * 2**stage, math.ceil(size / 2**stage) ** 2
        weights = 9 * (fan_in * channels + (2 * n - 1) * channels * channels)
        if shortcut == "B" and fan_in != channels:
            weights += fan_in * channels
            parameters += 2 * channels
        parameters += weights + 2 * n * 2 * channels
        macs += weights * pixels
        fan_in = channels
    return parameters + fan_in * classes + classes, macs + fan_in * classes


def measured(model: nn.Module, size: int) -> tuple[int, int]:
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


@pytest.mark.parametrize("depth", [8, 20, 32, 56])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_parameters_and_macs_are_those_of_the_description(depth: int, shortcut: str) -> None:
    for width, size in ((16, 32), (5, 28)):
        model = CifarResNet(depth, 10, width=width, shortcut=shortcut)
        assert measured(model, size) == closed_form(depth, width, 10, size, shortcut)


def test_resnet20_has_the_published_figures() -> None:
    assert measured(CifarResNet(20, 10, shortcut="A"), 32) == (269_722, 40_551_040)
    assert measured(CifarResNet(20, 10, shortcut="B"), 32)[1] == 40_813_184


@pytest.mark.parametrize("size", [8, 28, 32, 33])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_any_image_size_and_channel_count_gives_logits(size: int, shortcut: str) -> None:
    model = CifarResNet(8, 7, 1, width=4, shortcut=shortcut)
    logits = model(torch.randn(3, 1, size, size))
    assert logits.shape == (3, 7)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_option_a_subsamples_and_pads_with_zero_channels() -> None:
    x = torch.randn(2, 3, 5, 6)
    y = PadShortcut(2, 3)(x)
    assert y.shape == (2, 6, 3, 3)
    for c in range(6):
        for i in range(3):
            for j in range(3):
                expected = x[:, c - 1, 2 * i, 2 * j] if 1 <= c < 4 else torch.zeros(2)
                assert torch.equal(y[:, c, i, j], expected)


def test_every_activation_addition_and_pooling_is_its_own_module_and_runs_once() -> None:
    model = CifarResNet(20, 10, width=2)
    runs: dict[str, int] = {}
    for name, module in model.named_modules():
        if not list(module.children()):
            runs[name] = 0
            module.register_forward_hook(lambda *_, name=name: runs.__setitem__(name, runs[name] + 1))
    model(torch.randn(2, 3, 8, 8))
    assert set(runs.values()) == {1}
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(nn.ReLU) == 19
    assert kinds.count(Add) == 9
    assert kinds.count(nn.AdaptiveAvgPool2d) == 1


def test_convolutions_start_with_he_variance() -> None:
    torch.manual_seed(0)
    model = CifarResNet(20, 10)
    weight = model.layer3[2].conv2.weight  # pyright: ignore
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)
    assert abs(weight.mean().item()) < 1e-3
    assert not model.fc.bias.any()


@pytest.mark.parametrize(
    ("depth", "options", "message"),
    [
        (21, {}, r"resnet depth 21: accepted are 6n \+ 2"),
        (2, {}, r"resnet depth 2: accepted are 6n \+ 2"),
        (20, {"width": 0}, "resnet width 0: accepted is a whole number"),
        (20, {"width": 1.5}, "resnet width 1.5: accepted is a whole number"),
        (20, {"width": True}, "resnet width True: accepted is a whole number"),
        (20, {"shortcut": "C"}, "resnet shortcut 'C': accepted are A, B"),
    ],
)
def test_what_the_family_does_not_have_is_refused(depth: int, options: dict, message: str) -> None:
    with pytest.raises(BitwrightError, match=message):
        CifarResNet(depth, 10, **options)
