import copy
import os

import pytest
import torch
from torch import nn

from bitwright import BitwrightError
from bitwright.methods.base import Batch
from bitwright.methods.bwrf import BWRF, find_blocks
from bitwright.training.models.vgg import VGGSmall
from bitwright.training.vision import import_timm, import_torchvision
from methods.nets import float_net

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def vision(name, **options):
    return import_torchvision().models.get_model(name, weights=None, num_classes=4, **options)


def timm(name, **options):
    return import_timm().create_model(name, pretrained=False, num_classes=4, **options)


def vgg():
    module = import_torchvision().models.vgg
    net = module.VGG(module.make_layers([8, "M", 8, 8, "M", 16, "M"], batch_norm=True), init_weights=False)
    net.classifier = nn.Linear(16 * 49, 4)
    return net


def vit():
    models = import_torchvision().models
    return models.VisionTransformer(16, 8, 6, 2, 16, 32, num_classes=4)


def convnext():
    module = import_torchvision().models.convnext
    setting = module.CNBlockConfig
    return module.ConvNeXt([setting(8, 16, 2), setting(16, 16, 2), setting(16, None, 1)], num_classes=4)


def rows(prefix, *names):
    return [f"{prefix}.{n}" for n in names]


LAYERS = ["layer1", "layer2", "layer3", "layer4"]
RESIDUAL = [f"{layer}.{i}" for layer in LAYERS for i in (0, 1)]
ENCODER = rows("encoder.layers", *(f"encoder_layer_{i}" for i in range(6)))
NETS = {
    "cifar resnet": (float_net, 8, LAYERS[:3], [f"{n}.0" for n in LAYERS[:3]]),
    "vgg small": (
        lambda: VGGSmall(4, image_size=8, width=4),
        8,
        rows("features", 6, 13, 20),
        rows("features", 2, 6, 9, 13, 16, 20),
    ),
    "torchvision resnet": (lambda: vision("resnet18"), 32, LAYERS, RESIDUAL),
    "torchvision vgg": (
        vgg,
        32,
        rows("features", 3, 10, 14),
        rows("features", 3, 6, 10, 14),
    ),
    "torchvision vit": (vit, 16, [ENCODER[i] for i in (0, 2, 3, 5)], ENCODER),
    "torchvision convnext": (
        convnext,
        64,
        rows("features", 1, 3, 5),
        rows("features", "1.0", "1.1", "3.0", "3.1", "5.0"),
    ),
    "timm resnet": (lambda: timm("resnet10t"), 32, LAYERS, [f"{n}.0" for n in LAYERS]),
    "timm vit": (
        lambda: timm("vit_tiny_patch16_224", img_size=32, depth=4, embed_dim=24),
        32,
        rows("blocks", 0, 1, 2, 3),
        rows("blocks", 0, 1, 2, 3),
    ),
    "timm convnext": (
        lambda: timm("convnext_atto", dims=(8, 8, 16, 16), depths=(1, 2, 1, 1)),
        64,
        rows("stages", 0, 1, 2, 3),
        rows("stages", "0.blocks.0", "1.blocks.0", "1.blocks.1", "2.blocks.0", "3.blocks.0"),
    ),
    "timm efficientnet": (
        lambda: timm("mobilenetv2_035"),
        32,
        rows("blocks", *range(7)),
        None,
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_known_networks_are_cut_at_their_stages_and_blocks(name):
    make, size, stages, blocks = NETS[name]
    torch.manual_seed(0)
    partner = make().eval()
    assert find_blocks(partner, "stage") == stages
    if blocks is not None:
        assert find_blocks(partner, "block") == blocks
    for granularity in ("stage", "block"):
        model = copy.deepcopy(partner).requires_grad_(True).train()
        method = BWRF(model, partner, granularity=granularity)
        x, y = torch.randn(4, 3, size, size), torch.arange(4)
        outputs = model(x)
        losses = method.losses(Batch(x, y), outputs)  # refuses a wrong cut
        torch.stack(list(losses.values())).sum().backward()
        assert all(torch.isfinite(v) for v in losses.values())
        method.remove()


def test_another_structure_asks_for_names():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    with pytest.raises(BitwrightError, match=r"give them as blocks: \[name, ...\]"):
        find_blocks(net)
