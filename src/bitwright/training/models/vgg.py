"""VGG-small, the quantization literature's CIFAR network (as in Zhang et al. 2018, "LQ-Nets").

Six 3×3 convolutions, 128-128-pool-256-256-pool-512-512-pool, each with BatchNorm and relu, then one linear layer.
"""

from torch import Tensor, nn

from bitwright.errors import BitwrightError
from bitwright.training.models.resnet import init_weights


class VGGSmall(nn.Module):
    """(N, in_channels, image_size, image_size) float -> (N, num_classes) logits.

    image_size: fixes the linear layer's input, (4·width) · (image_size // 8)²; at least 8. width: channels of the
    first pair, 128 in the literature.

    Raises: BitwrightError for an image or width that is too small.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, image_size: int = 32, *, width: int = 128) -> None:
        super().__init__()
        if image_size < 8:
            raise BitwrightError(f"vgg_small at image size {image_size}: three poolings need at least 8")
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise BitwrightError(f"vgg_small width {width!r}: accepted is a whole number of channels, at least 1")
        layers: list[nn.Module] = []
        for channels in (width, 2 * width, 4 * width):
            layers += [*_unit(in_channels, channels), *_unit(channels, channels), nn.MaxPool2d(2)]
            in_channels = channels
        self.features = nn.Sequential(*layers)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(4 * width * (image_size // 8) ** 2, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.features(x)))


def _unit(in_channels: int, channels: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
