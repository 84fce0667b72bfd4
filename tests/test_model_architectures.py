"""Models of torchvision and timm, unchanged: load, prepare, calibrate, cover, train a step, export, verify."""

import copy

import pytest
import torch
import torch.nn.functional as F

import bitwright as bw
from bitwright.deploy import export, snap_biases, verify
from bitwright.training.vision import import_timm, import_torchvision
from making import efficientnet_lite


def vision(name, **options):
    """A model of torchvision by the name of its function, or its class where the depth is cut."""
    return getattr(import_torchvision().models, name)(num_classes=5, **options)


def timm(name, **options):
    return import_timm().create_model(name, num_classes=5, **options)


def swin_v2():
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

    return vision("SwinTransformer", **SWIN, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)


def mobilenet_v3():
    """Both activations, with squeeze and excitation and without, kernels of 3 and 5, a block that adds its input."""
    config = import_torchvision().models.mobilenetv3.InvertedResidualConfig
    blocks = [(16, 3, 16, 16, True, "RE", 2), (16, 3, 72, 16, False, "RE", 1)]
    blocks += [(16, 5, 96, 40, True, "HS", 2), (40, 5, 240, 40, True, "HS", 1)]
    return vision("MobileNetV3", inverted_residual_setting=[config(*b, 1, 1.0) for b in blocks], last_channel=128)


def efficientnet():
    config = import_torchvision().models.efficientnet.MBConvConfig
    stages = [config(1, 3, 1, 32, 16, 1), config(6, 3, 2, 16, 24, 2), config(6, 5, 2, 24, 40, 2)]
    return vision("EfficientNet", inverted_residual_setting=stages, dropout=0.2)


def regnet_y():
    params = import_torchvision().models.regnet.BlockParams
    return vision("RegNet", block_params=params([1, 2], [48, 104], [8, 8], [1.0, 1.0], [2, 2], se_ratio=0.25))


def vgg():
    """Three of VGG's convolutions, and 64 features in the place of twice 4096, which are 0.5 GB."""
    models = import_torchvision().models.vgg
    features = models.make_layers([64, "M", 128, "M", 512, "M"], batch_norm=True)
    model = models.VGG(features, init_weights=False)
    wide, relu, dropout = model.classifier[:3]
    model.classifier = torch.nn.Sequential(torch.nn.Linear(wide.in_features, 64), relu, dropout, torch.nn.Linear(64, 5))
    return model


def mixer():
    import_timm()
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(num_classes=5, img_size=64, patch_size=16, num_blocks=2, embed_dim=64)


SWIN = {"patch_size": [4, 4], "embed_dim": 24, "depths": [2, 1], "num_heads": [2, 4], "window_size": [4, 4]}
VIT = {"image_size": 32, "patch_size": 16, "num_layers": 2, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 96}

# (image size, maker); deep models are cut where that leaves every kind of layer in place.
MODELS = {
    "resnet18": (32, lambda: vision("resnet18")),
    "mobilenet_v2": (32, lambda: vision("mobilenet_v2", inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]])),
    "mobilenet_v3": (32, mobilenet_v3),
    "densenet": (32, lambda: vision("DenseNet", growth_rate=8, block_config=(2, 2), num_init_features=8)),
    "vit": (32, lambda: vision("VisionTransformer", **VIT)),
    "timm deit": (32, lambda: timm("deit_tiny_patch16_224", img_size=32, depth=1)),
    "timm convnext": (32, lambda: timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))),
    "timm mixer": (64, mixer),
    "timm resnetv2, standardized weights": (32, lambda: timm("resnetv2_50", layers=(1, 1), channels=(16, 32))),
}
SLOW = {
    "swin": (40, lambda: vision("SwinTransformer", **SWIN)),
    "swin_v2": (32, swin_v2),
    "timm swin": (56, lambda: timm("swin_tiny_patch4_window7_224", img_size=56, depths=(2, 1), num_heads=(3, 6))),
    "vgg_bn": (32, vgg),
    "efficientnet": (32, efficientnet),
    "regnet_y": (32, regnet_y),
    "shufflenet_v2": (
        64,
        lambda: vision("ShuffleNetV2", stages_repeats=[2, 1, 1], stages_out_channels=[24, 48, 96, 192, 256]),
    ),
    "timm efficientnet_lite": (32, lambda: efficientnet_lite(classes=5)),
}
# Layers that compute without a quantized form, and are said to: class by model.
FLOAT = {"timm swin": {"WindowAttention"}}
architectures = pytest.mark.parametrize("name", [*MODELS, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])


def build(name):
    """The float model with five classes, moved away from its symmetric start, and an input batch."""
    size, maker = (MODELS | SLOW)[name]
    model = maker()
    for module in model.modules():  # layer scale of 1e-6 and zero heads would hide everything behind them
        for own, parameter in module.named_parameters(recurse=False):
            if own == "gamma" or not parameter.abs().sum():
                torch.nn.init.normal_(parameter, std=0.2)
    return model, torch.randn(4, 3, size, size)


@architectures
def test_trains_and_ships_without_rewriting(name, tmp_path):
    model, x = build(name)
    checkpoint = copy.deepcopy(model.state_dict())
    bw.prepare(model, bw.rules("w4a4"))

    loaded = model.load_state_dict(checkpoint, strict=False)
    assert loaded.unexpected_keys == []
    owned = tuple(f"{q}." for q in bw.quantizers(model))
    assert loaded.missing_keys
    assert all(key.startswith(owned) for key in loaded.missing_keys)

    bw.calibrate(model, [x])
    found = bw.coverage(model, x)
    assert found.complete
    assert {type(model.get_submodule(layer)).__name__ for layer in found.float_layers} == FLOAT.get(name, set())
    assert set(found.notes) == set(found.float_layers)

    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step = bw.Step(model.train(), F.cross_entropy, Keep(model.parameters(), lr=1e-5))
    result = step(x, torch.tensor([0, 1, 2, 3]))
    assert torch.isfinite(result.loss)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    without = [n for n, p in trainable.items() if id(p) not in step.optimizer.kept]
    assert without == []
    broken = [n for n, p in trainable.items() if not torch.isfinite(step.optimizer.kept[id(p)]).all()]
    assert broken == []
    assert any(not torch.equal(before[n], p) for n, p in trainable.items())

    model.eval()
    bw.calibrate(model, [x])
    snap_biases(model, x)
    file = tmp_path / "model.onnx"
    export(model, file, x)
    report = verify(model, file, [x])
    assert report.ok, str(report)


class Keep(torch.optim.SGD):
    """SGD that keeps the gradients of its last step, which `Step` clears."""

    def step(self, closure=None):
        self.kept = {id(p): p.grad.clone() for g in self.param_groups for p in g["params"] if p.grad is not None}
        return super().step(closure)
