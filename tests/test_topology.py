"""Where topologies put quantizers, checked by hand on nets small enough to see through."""

import copy

import pytest
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.training.models.resnet import CifarResNet
from bitwright.training.models.vgg import VGGSmall
from bitwright.training.vision import import_timm, import_torchvision
from hard_net import HardNet


def found(model: nn.Module, *shape: int) -> list[str]:
    """The modules that `res8` names."""
    rules = bw.topology(model, torch.randn(1, *shape))
    return [name for rule in rules for name in rule.match]


class Functional(nn.Module):
    """Functions in place of modules, one relu for all, in place; a constant and a linear layer added."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.position = nn.Parameter(torch.randn(4, 1, 1))
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x) + self.position)
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += x
        x = self.relu(y).mean((2, 3))
        return self.fc2(x + self.fc1(x))


def test_functions_are_seen_where_modules_say_nothing():
    # stem: its output meets a constant in float. conv1: read by conv2's input alone. norm2: feeds the sum. The sum
    # itself has no module: its relu runs three times, and the model's own output is something else.
    assert found(Functional(), 3, 6, 6) == ["stem", "norm2"]


def test_hard_activations_get_grids_of_their_own_and_outputs():
    model, x = HardNet(), torch.randn(1, 3, 10, 10)
    plain = bw.topology(model, x)
    assert [(rule.match, rule.output and rule.output.grid) for rule in plain] == [
        (("norm1", "norm2", "squeeze.up", "norm3"), "lsq")
    ]
    # act1 and the gate's product are read by one convolution each; act2 is averaged and scaled, act3 averaged.
    hard = bw.topology(model, x, "act8")
    assert [(rule.match, rule.output and (rule.output.grid, rule.output.signed)) for rule in hard] == [
        (("act2", "act3"), ("lsq", None)),
        (("norm1", "norm2", "squeeze.up", "norm3"), ("hard", True)),
    ]


def test_without_hard_activations_act8_is_res8():
    model, x = CifarResNet(8, 10, 1, width=4), torch.randn(1, 1, 8, 8)
    assert bw.topology(model, x, "act8") == bw.topology(model, x)


def test_our_resnet():
    assert found(CifarResNet(8, 10, 1, width=4), 1, 8, 8) == [
        *("relu", "layer1.0.bn2", "layer1.0.relu2"),
        *("layer2.0.bn2", "layer2.0.relu2", "layer3.0.bn2", "layer3.0.relu2"),
    ]
    names = found(CifarResNet(8, 10, 1, width=4, shortcut="B"), 1, 8, 8)
    assert [n for n in names if "shortcut" in n] == ["layer2.0.shortcut.1", "layer3.0.shortcut.1"]


def test_torchvision_resnet18():
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    expected = ["maxpool", *blocks, *(f"{b}.bn2" for b in blocks), *(f"layer{i}.0.downsample.1" for i in (2, 3, 4))]
    names = found(import_torchvision().models.resnet18(num_classes=4), 3, 32, 32)
    assert sorted(names) == sorted(expected)
    assert names[:4] == ["maxpool", "layer1.0.bn2", "layer1.0", "layer1.1.bn2"]


def test_torchvision_mobilenet_v2():
    names = found(import_torchvision().models.mobilenet_v2(num_classes=4), 3, 32, 32)
    # Blocks 3, 5, 6, 8-10, 12, 13, 15, 16 have a shortcut. A sum that the next block's convolution alone reads needs
    # nothing, nor does a projection before a block without shortcut; the last features are averaged.
    shortcut = {3, 5, 6, 8, 9, 10, 12, 13, 15, 16}
    projections = {i for i in range(2, 18) if i in shortcut or i + 1 in shortcut}
    sums = {i for i in shortcut if i + 1 in shortcut}
    expected = {f"features.{i}.conv.3" for i in projections} | {f"features.{i}" for i in sums} | {"features.18.2"}
    assert set(names) == expected


def test_timm_norms_with_activations_inside():
    net = import_timm().create_model("resnet10t", num_classes=4)
    blocks = [
        *("layer1.0.bn2", "layer1.0.act2"),
        *(f"layer{i}.0.{n}" for i in (2, 3, 4) for n in ("bn2", "downsample.2", "act2")),
    ]
    assert found(net, 3, 32, 32) == ["maxpool", *blocks]
    lite = found(import_timm().create_model("tf_efficientnet_lite0", num_classes=4), 3, 32, 32)
    assert [n for n in lite if n.startswith(("blocks.1", "bn"))] == ["blocks.1.0.bn3", "blocks.1.1.bn3", "bn2.act"]


def test_attention_and_plain_nets_need_little():
    vit = import_timm().create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=4)
    assert found(vit, 3, 32, 32) == ["patch_embed.proj"]
    convnext = import_timm().create_model("convnext_atto", num_classes=4, depths=(1, 1, 1, 1), conv_mlp=False)
    names = found(convnext, 3, 32, 32)
    assert names[:3] == ["stem.0", "stages.0.blocks.0.conv_dw", "stages.1.downsample.1"]
    assert not any("mlp" in n for n in names)  # products of matrices need no quantizer behind them
    assert found(VGGSmall(4, 1, 8, width=2), 1, 8, 8) == []


def test_logits_of_a_convolution_are_not_quantized_in_another_shape_either():
    first = (nn.Conv2d(3, 4, 3), nn.ReLU())
    heads = {
        "flattened": (nn.Conv2d(4, 5, 4), nn.Flatten()),
        "squeezed": (nn.Conv2d(4, 5, 4), nn.Flatten(2), nn.Flatten()),
        "a map": (nn.Conv2d(4, 5, 1),),
        "a mask at the picture's size": (nn.Conv2d(4, 5, 1), nn.Upsample(scale_factor=2, mode="bilinear")),
        "a super-resolved picture": (nn.Conv2d(4, 12, 1), nn.PixelShuffle(2)),
        "a generated picture": (nn.ConvTranspose2d(4, 3, 2, 2), nn.Tanh()),
        "probabilities": (nn.Conv2d(4, 5, 1), nn.Softmax(1)),
    }
    for name, head in heads.items():
        assert found(nn.Sequential(*first, *head), 3, 6, 6) == [], name
    # A picture that one convolution goes on reading, quantized, is quantized once.
    assert found(nn.Sequential(*first, nn.Conv2d(4, 12, 1), nn.PixelShuffle(2), nn.Conv2d(3, 2, 1)), 3, 6, 6) == []
    # Pooled logits are means of codes.
    assert found(nn.Sequential(*first, nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 3, 6, 6) == ["2"]


def test_fpres_places_nothing():
    assert bw.topology(Functional(), torch.randn(1, 3, 6, 6), "fpres") == []


def test_the_model_stays_as_it_was():
    model = CifarResNet(8, 10, 1, width=4).train()
    state, hooks = copy.deepcopy(model.state_dict()), [len(m._forward_hooks) for m in model.modules()]
    bw.topology(model, torch.randn(2, 1, 8, 8))
    assert all(m.training for m in model.modules())
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("bad", ["int", "RES8", None])
def test_an_unknown_topology_is_refused(bad):
    with pytest.raises(bw.BitwrightError, match="is not accepted; use fpres, res8"):
        bw.topology(nn.Conv2d(1, 1, 1), torch.randn(1, 1, 2, 2), bad)


def test_a_prepared_model_is_refused():
    model = bw.prepare(CifarResNet(8, 10, 1, width=4), bw.rules("w4a4"))
    with pytest.raises(bw.BitwrightError, match="prepared already"):
        bw.topology(model, torch.randn(1, 1, 8, 8))
