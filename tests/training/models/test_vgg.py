import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bitwright.errors import BitwrightError
from bitwright.training.models.vgg import VGGSmall


def test_parameters_and_macs_are_those_of_the_description() -> None:
    pairs = [(3, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512)]
    sides = [32, 32, 16, 16, 8, 8]
    weights = [9 * a * b for a, b in pairs]
    parameters = sum(weights) + sum(2 * b for _, b in pairs) + 512 * 16 * 10 + 10
    macs = sum(w * s * s for w, s in zip(weights, sides, strict=True)) + 512 * 16 * 10
    model = VGGSmall(10).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert counter.get_total_flops() == 2 * macs
    kinds = [type(m) for m in model.features]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 2 + [nn.MaxPool2d] + kinds[7:]
    assert kinds == kinds[:7] * 3


@pytest.mark.parametrize("size", [8, 28, 32])
def test_image_sizes(size: int) -> None:
    model = VGGSmall(5, 1, size, width=4)
    assert model(torch.randn(2, 1, size, size)).shape == (2, 5)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(BitwrightError, match="vgg_small at image size 7: three poolings need at least 8"):
        VGGSmall(10, 3, 7)
    with pytest.raises(BitwrightError, match="vgg_small width 0"):
        VGGSmall(10, width=0)
