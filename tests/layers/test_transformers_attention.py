"""Attention of Hugging Face's transformers: its products are quantized, whatever the model."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.batches import outputs_of
from bitwright.errors import BitwrightError
from bitwright.prepare import set_bypass
from bitwright.training.vision import import_torchvision

transformers: Any = pytest.importorskip("transformers")
import_torchvision()  # which transformers imports

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
IDS = torch.randint(2, 50, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(3, 7, dtype=torch.long)
MASK[1, 4:] = 0
TEXT = {"input_ids": IDS, "attention_mask": MASK}


def bert(**more: Any) -> nn.Module:
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, num_labels=3, **SMALL, **more)
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    ends = {"bos_token_id": 1, "eos_token_id": 1}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, **ends)
    )


def llama() -> nn.Module:
    sizes = SMALL | {"num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, **sizes))


def t5_encoder() -> nn.Module:
    return transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    )


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16, patch_size=8, **SMALL))


MODELS = {
    "bert": (bert, TEXT),
    "bert-eager": (lambda: bert(attn_implementation="eager"), TEXT),
    "gpt2": (gpt2, TEXT),
    "gpt2-no-mask": (gpt2, {"input_ids": IDS}),
    "llama": (llama, TEXT),
    "t5": (t5_encoder, TEXT),
    "vit": (vit, {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))}),
}


def made(name: str, bits: str = "w8a8") -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """(prepared and calibrated, the same float, a batch)."""
    torch.manual_seed(0)
    make, batch = MODELS[name]
    model = make().eval()
    plain = copy.deepcopy(model)
    return bw.calibrate(bw.prepare(model, bw.rules(bits)), [batch]), plain, batch


@pytest.mark.parametrize("name", MODELS)
def test_products_are_quantized_and_else_the_model_is_what_it_was(name: str) -> None:
    model, plain, batch = made(name)
    found = bw.coverage(model, batch)
    assert set(found.missed) <= {"shared.weight_quantizer"}  # T5's second name for its table
    assert not found.float_layers
    operands = [n for n in found.ran if n.endswith(("query_quantizer", "attention_quantizer"))]
    assert len(operands) == 2
    with torch.no_grad():
        expected = outputs_of(plain(**batch), "test")["logits"]
        quantized = outputs_of(model(**batch), "test")["logits"]
        set_bypass(bw.quantizers(model).values(), True)
        float_again = outputs_of(model(**batch), "test")["logits"]
    kept = batch.get("attention_mask", torch.ones(3, 1)).bool() if expected.ndim == 3 else slice(None)
    if isinstance(kept, Tensor) and kept.shape[1] != expected.shape[1]:
        kept = slice(None)
    torch.testing.assert_close(float_again[kept], expected[kept], atol=1e-5, rtol=1e-4)
    assert 0 < (quantized[kept] - expected[kept]).abs().max() < 0.2 * expected[kept].abs().max()


def test_it_learns() -> None:
    model, _, batch = made("llama", "w4a4")
    loss = model.train()(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    scales = [p for n, p in model.named_parameters() if "_quantizer" in n and "self_attn.query_q" in n]
    assert scales
    assert all(p.grad is not None and bool(p.grad.any()) for p in scales)
    assert math.isfinite(loss.item())


def test_copies_and_pickles_are_the_same_network() -> None:
    model, _, batch = made("bert")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        expected = model(**batch).logits
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(other(**batch).logits, expected)
            assert len(bw.quantizers(other)) == len(bw.quantizers(model))


def test_a_rule_leaves_the_products_float_and_a_failure_leaves_the_model() -> None:
    model = bert()
    kinds = [type(m) for m in model.modules()]
    spec = bw.QuantizerSpec(bits=4, per_channel=True)
    with pytest.raises(BitwrightError, match="attention products take one scale"):
        bw.prepare(model, [bw.Rule(match="*", weight=bw.QuantizerSpec(bits=4), attention=spec)])
    assert [type(m) for m in model.modules()] == kinds
    bw.prepare(model, [*bw.rules("w4a4"), bw.Rule(match="type:BertSelfAttention", attention=None)])
    assert not [n for n in bw.quantizers(model) if n.endswith("attention_quantizer")]
    bw.calibrate(model, [TEXT])
    assert [n.rpartition(".")[2] for n in bw.coverage(model, TEXT).float_layers] == ["self"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"softcap": 30.0},
            r"BertSelfAttention: its products with softcap .*Rule\(match='type:BertSelfAttention', att",
        ),
        (
            {"attention_mask": MASK},
            r"masks of flash attention are not accepted; load it with attn_implementation='sdpa'",
        ),
    ],
)
def test_what_has_no_quantized_form_is_said(arguments: dict[str, Any], said: str) -> None:
    model, _, _ = made("bert")
    layer = model.get_submodule("bert.encoder.layer.0.attention.self")
    with pytest.raises(BitwrightError, match=said):
        layer(torch.randn(3, 7, 16), **arguments)


def test_whisper_asks_the_table_of_positions_how_long_it_is() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    config = transformers.WhisperConfig(**sizes, num_mel_bins=4, max_source_positions=8)
    model = transformers.models.whisper.modeling_whisper.WhisperEncoder(config).eval()
    batch = {"input_features": torch.randn(2, 4, 16)}
    bw.calibrate(bw.prepare(model, bw.rules("w8a8")), [batch])
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        torch.testing.assert_close(bw.freeze(model, batch)(**batch).last_hidden_state, expected)


@pytest.mark.parametrize("reproducible", [False, True])
def test_bert_is_deployed(reproducible: bool, tmp_path) -> None:
    model, _, batch = made("bert")
    if reproducible:
        bw.make_reproducible(model)
    bw.snap_biases(model, batch)
    bw.export(model, tmp_path / "bert.onnx", batch)
    shorter = {k: v[:, :5] for k, v in batch.items()} | {"labels": torch.zeros(3, dtype=torch.long)}
    report = bw.verify(model, tmp_path / "bert.onnx", [batch, shorter])
    assert report.ok, report.first_difference
    names = {row["name"] for row in report.rows()}
    assert {f"bert.encoder.layer.0.attention.self.{part}" for part in ("query", "query_quantizer")} <= names
    if reproducible:
        assert report.logit_difference < 1e-5
        assert report.clean_images == 6
