"""Models of torchvision and timm from prepare to verify, small pictures, weights as they are initialized.

In the default topology, every convolution and product runs on an integer kernel.
"""

from collections import Counter

import pytest
import torch
from test_export import optimized
from torch import nn

import bitwright as bw
from bitwright.deploy import export, snap_biases, verify
from bitwright.deploy.bench import FLOAT
from bitwright.training.vision import import_timm, import_torchvision
from making import efficientnet_lite


def resnet18() -> nn.Module:
    return import_torchvision().models.resnet18(num_classes=10)


def mobilenet() -> nn.Module:
    """Depth-wise convolutions, ReLU6, TensorFlow's padding, norms with an activation inside."""
    return efficientnet_lite(classes=10)


def torchvision_vit() -> nn.Module:
    return import_torchvision().models.VisionTransformer(64, 16, 2, 4, 64, 128, num_classes=10)


def timm_vit() -> nn.Module:
    return import_timm().create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=10)


def swin() -> nn.Module:
    return import_torchvision().models.SwinTransformer([4, 4], 16, [2], [2], [4, 4], num_classes=10)


def convnext() -> nn.Module:
    models = import_torchvision().models
    settings = [models.convnext.CNBlockConfig(16, 32, 1), models.convnext.CNBlockConfig(32, None, 1)]
    return models.ConvNeXt(settings, layer_scale=0.1, num_classes=10)


def swin_v2() -> nn.Module:
    swin = import_torchvision().models.swin_transformer
    kinds = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    return swin.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=10, **kinds)


def resnet_v2() -> nn.Module:
    """Its last layer is a convolution, whose output is flattened."""
    timm = import_timm()
    kinds = {"conv_layer": timm.layers.create_conv2d, "norm_layer": timm.layers.BatchNormAct2d}
    model = timm.models.ResNetV2([1, 1], channels=(32, 64), num_classes=10, stem_chs=16, **kinds)
    nn.init.normal_(model.head.fc.weight, std=0.3)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("make", [swin_v2, resnet_v2])
def test_codes_and_logits_of_the_native_runtime(make, tmp_path):
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(8, 3, 32, 32)
    bw.prepare(model, bw.rules("w4a4") + bw.topology(model, x))
    bw.calibrate(model, [x]).eval()
    snap_biases(model, x)
    path = tmp_path / "net.onnx"
    export(model, path, x)
    report = verify(model, path, [x], runtime="native")
    assert all(row["ok"] for row in report.rows()), report.first_difference
    assert report.clean_images > 0
    assert report.clean_logit_difference <= 1e-4 * report.largest_logit


@pytest.mark.slow
@pytest.mark.parametrize("make", [torchvision_vit, timm_vit, swin, convnext])
def test_reproducible_to_the_last_bit(make, tmp_path):
    images = torch.randn(16, 3, 64, 64)
    model = make().eval()
    bw.prepare(model, bw.rules("w8a8") + bw.topology(model, images))
    bw.calibrate(bw.make_reproducible(model), [images])
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(images).square().mean().backward()
        optimizer.step()
    snap_biases(model.eval(), images[:2])
    path = tmp_path / "net.onnx"
    export(model, path, images[:2])
    report = verify(model, path, torch.randn(32, 3, 64, 64).split(16))
    assert sum(row["different_frozen"] + row["different_file"] for row in report.rows()) == 0
    assert report.logit_difference == 0


@pytest.mark.slow
@pytest.mark.parametrize("make", [resnet18, mobilenet, torchvision_vit, timm_vit, swin])
def test_from_prepare_to_verify(make, tmp_path):
    model = make().train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 64, 64))
    images, rules = torch.randn(16, 3, 64, 64), bw.rules("w4a4")
    bw.prepare(model.eval(), rules + bw.topology(model, images))
    bw.calibrate(model, [images]).eval()
    x = torch.randn(32, 3, 64, 64)
    snap_biases(model, x[:2])
    path = tmp_path / "net.onnx"
    out = export(model, path, x[:2])
    assert out.dynamic_batch
    report = verify(model, path, x.split(16))
    assert all(row["different_file"] == 0 for row in report.rows() if row["what"] == "weight")
    assert all(row["ok"] for row in report.rows()), report.first_difference
    # Without training, logits are close together: a code that flips at a tie of float32 can turn a prediction.
    assert report.different_file <= report.images - report.clean_images
    assert report.clean_images > 0
    assert report.clean_logit_difference <= 1e-4 * report.largest_logit
    own = verify(model, path, x.split(16), runtime="native")
    assert own.different_file <= own.images - own.clean_images
    kinds = Counter(n.op_type for n in optimized(path, tmp_path).graph.node)
    assert kinds["MatMulIntegerToFloat"] >= sum(isinstance(m, nn.Linear) for m in model.modules())
    assert kinds["QLinearConv"] == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert not FLOAT & kinds.keys()
