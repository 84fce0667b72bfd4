"""Costs against figures from the literature and against counts by hand."""

import json

import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.costs import bitops, cost_table, count_macs, size_bytes
from bitwright.rules import Rule
from bitwright.training.models.resnet import CifarResNet
from bitwright.training.vision import import_timm, import_torchvision


@pytest.mark.parametrize(("shortcut", "macs", "expected"), [("A", 40.55e6, 0.5096e9), ("B", 40.81e6, 0.5128e9)])
def test_resnet20_on_cifar_at_w3a4(shortcut, macs, expected):
    model = bw.prepare(CifarResNet(20, 10, shortcut=shortcut), bw.rules("w3a4"))
    table = cost_table(model, torch.zeros(1, 3, 32, 32))
    assert table.macs == pytest.approx(macs, rel=2e-4)
    assert table.bitops == pytest.approx(expected, rel=2e-4)
    assert round(table.bitops / 1e9, 2) == 0.51


def test_resnet18_on_imagenet_at_w4a4_in_both_conventions():
    model = import_torchvision().models.resnet18()
    example = torch.zeros(1, 3, 224, 224)
    full = cost_table(model, example)
    assert full.macs == pytest.approx(1.814e9, rel=1e-3)
    assert full.bitops == full.macs * 32 * 32
    assert full.size_bytes == 4 * sum(p.numel() for p in model.parameters())
    bw.prepare(model, bw.rules("w4a4"))
    ends, classifier = cost_table(model, example), cost_table(model, example, classifier_float=True)
    assert ends.bitops == pytest.approx(34.7e9, rel=1e-3)
    assert classifier.bitops == pytest.approx(35.21e9, rel=1e-3)
    low = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n != "conv1")
    weights = low / 2 + 64 * 3 * 49 + 512 * 1000
    norms = sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    scales = sum(q.shape.channels for q in bw.quantizers(model).values())
    assert ends.size_bytes == weights + 4 * (norms + 1000 + scales)
    assert classifier.size_bytes == ends.size_bytes + 3 * 512 * 1000


def test_macs_of_every_kind_of_layer_by_hand():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, groups=4, padding=1),  # 8x8 -> 4x4
        nn.ConvTranspose2d(8, 2, 2, stride=2),  # 4x4 -> 8x8
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    found = count_macs(model, torch.zeros(5, 4, 8, 8))
    assert {n: m.weighted for n, m in found.items()} == {"0": 16 * 8 * 9, "1": 16 * 8 * 2 * 4, "3": 1280}
    model = nn.Sequential(nn.Conv1d(3, 6, 5), nn.Flatten(), nn.Embedding(7, 2))
    assert count_macs(model[:2], torch.zeros(1, 3, 20))["0"].weighted == 16 * 6 * 3 * 5
    table = cost_table(nn.Embedding(7, 2), torch.zeros(1, 4, dtype=torch.long))
    assert (table.macs, table.rows[0].weights, table.size_bytes) == (0, 14, 56)


ATTENTION = 2 * (5 * 5 * 8)  # 5 tokens, 8 features, two products


@pytest.mark.parametrize("quantized", [False, True])
def test_attention_products_of_torch(quantized):
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    if quantized:
        bw.prepare(model, bw.rules("w3a4", ends=None))
    table = cost_table(model, torch.zeros(3, 5, 8))
    projections = 5 * (4 * 8 * 8 + 2 * 8 * 16)
    assert table.macs == projections + ATTENTION
    bits = (3 * 4, 4 * 4) if quantized else (1024, 1024)
    assert table.bitops == projections * bits[0] + ATTENTION * bits[1]
    products = [r for r in table.rows if r.name.startswith("self_attn.") and not r.weights]
    assert [(r.name, r.macs) for r in products] == [("self_attn.scores", 200), ("self_attn.values", 200)]


@pytest.mark.parametrize("quantized", [False, True])
def test_attention_products_of_timm_and_of_functional_torchvision(quantized):
    vit = import_timm().create_model("vit_tiny_patch16_224", img_size=32, num_classes=3)
    swin = import_torchvision().models.swin_t(num_classes=3)
    size = {id(vit): 5, id(swin): 49}
    expected = {
        id(vit): 12 * (2 * 5 * 5 * 192),
        id(swin): sum(
            depth * 2 * windows * 49 * 49 * dim
            for depth, windows, dim in ((2, 64, 96), (2, 16, 192), (6, 4, 384), (2, 1, 768))
        ),
    }
    for model, image in ((vit, 32), (swin, 224)):
        before = cost_table(model, torch.zeros(1, 3, image, image))
        if quantized:
            bw.prepare(model, bw.rules("w4a4"))
        table = cost_table(model, torch.zeros(1, 3, image, image))
        products = [r for r in table.rows if not r.weights and r.name.endswith((".scores", ".values"))]
        assert sum(r.macs for r in products) == expected[id(model)], size
        assert table.macs == before.macs, "quantization changes no count"
        assert {(r.weight_bits, r.input_bits) for r in products} == {(4, 4) if quantized else (32, 32)}


def test_mixed_bits_float_layers_and_a_change_of_bits():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4), nn.Linear(4, 2))
    rules = [*bw.rules("w2a3", ends=None), Rule(match="1", weight=None), Rule(match="2", weight=None, input=None)]
    bw.prepare(model, rules)
    table = cost_table(model, torch.zeros(1, 8))
    assert [(r.weight_bits, r.input_bits) for r in table.rows] == [(2, 3), (32, 3), (32, 32)]
    assert table.bitops == 64 * 6 + 32 * 96 + 8 * 1024
    scales = 8 + 1 + 1
    assert table.size_bytes == 16 + 4 * 32 + 4 * 8 + 4 * (4 + 2) + 4 * scales
    model[0].weight_quantizer.set_bits(5)
    assert cost_table(model, torch.zeros(1, 8)).rows[0].bitops == 64 * 15


def test_tied_weights_are_stored_once():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    table = cost_table(model, torch.zeros(1, 6))
    assert table.macs == 72
    assert table.size_bytes == 36 * 4


def test_counting_leaves_no_trace():
    model = bw.prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), bw.rules("w4a4"))
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    cost_table(model, torch.randn(2, 3, 8, 8))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training
    assert not any(q.bypass for q in bw.quantizers(model).values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_table_as_json_and_as_text():
    table = cost_table(bw.prepare(nn.Sequential(nn.Linear(8, 4)), bw.rules("w4a4")), torch.zeros(1, 8))
    again = json.loads(json.dumps(table.as_dict()))
    assert again["bitops"] == table.bitops == 32 * 64
    assert again["rows"][0]["name"] == "0"
    assert again["size_bytes"] == table.size_bytes
    assert "total: 32 MACs" in str(table)


def test_functions_pass_gradients_to_the_bits():
    w, a = (torch.tensor([3.0, 4.5], requires_grad=True) for _ in range(2))
    macs, weights = torch.tensor([10.0, 20.0]), torch.tensor([100.0, 200.0])
    bitops(macs, w, a).sum().backward()
    assert w.grad.tolist() == [30.0, 90.0]
    assert a.grad.tolist() == [30.0, 90.0]
    w.grad = None
    size_bytes(weights, w, float_parameters=3, scales=2).sum().backward()
    assert w.grad.tolist() == [12.5, 25.0]
    assert bitops(10, 4, 8) == 320
    assert size_bytes(80, 3, 2, 1) == 30 + 12
