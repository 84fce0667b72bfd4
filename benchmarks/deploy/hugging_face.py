"""Hugging Face's models from `prepare` to `verify`: what is quantized, and is the file the network?

    python benchmarks/deploy/hugging_face.py --out benchmarks/deploy/hugging_face.csv

Small models of random weights (2 layers, 64 features), a few training steps on noise, then the file against the network
on fresh noise, texts of two lengths. `float_layers`: of those that coverage names. `codes_differ`: between frozen form
and file. Kernels: convolutions and products of the graph that onnxruntime makes of the file. Needs transformers and
torchvision.
"""

import argparse
import csv
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.batches import output_of
from bitwright.deploy.bench import in_onnxruntime
from bitwright.deploy.comparison import InputRow
from bitwright.training.vision import import_torchvision

import_torchvision()  # which transformers imports
import transformers as hf  # noqa: E402

BATCH, WORDS = 16, 200
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TEXT = {"vocab_size": WORDS, "max_position_embeddings": 64}
ENDS = {"bos_token_id": 1, "eos_token_id": 1}
WHISPER = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128}
WAVES = {"conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 4), "num_feat_extract_layers": 2}
QUIET = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}


class LastState(nn.Module):
    """A model of two outputs as one of one."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.inner(pixel_values=pixel_values).last_hidden_state


def whisper_encoder() -> nn.Module:
    """The encoder of a Whisper."""
    config = hf.WhisperConfig(num_mel_bins=16, max_source_positions=32, **WHISPER)
    return hf.models.whisper.modeling_whisper.WhisperEncoder(config)


def texts(length: int) -> dict[str, Tensor]:
    """Words, and a mask that hides the end of half of them."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[BATCH // 2 :, length - 3 :] = 0
    return {"input_ids": torch.randint(5, WORDS, (BATCH, length)), "attention_mask": mask}


def noise(name: str, *shape: int) -> Callable[[int], dict[str, Tensor]]:
    """Batches of normal numbers, whatever the length asked for."""
    return lambda _: {name: torch.randn(BATCH, *shape)}


PICTURES = noise("pixel_values", 3, 32, 32)
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Tensor]]]] = {
    "BERT": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT, **SIZES)), texts),
    "DistilBERT": (
        lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=128, **TEXT)
        ),
        texts,
    ),
    "RoBERTa": (lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**TEXT, **SIZES)), texts),
    "GPT-2": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=WORDS, n_positions=64, n_embd=64, n_layer=2, n_head=4, **ENDS)
        ),
        texts,
    ),
    "Llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=2, **TEXT, **SIZES)), texts),
    "Qwen2": (lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(num_key_value_heads=2, **TEXT, **SIZES)), texts),
    "T5 encoder": (
        lambda: hf.T5EncoderModel(
            hf.T5Config(vocab_size=WORDS, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
        ),
        texts,
    ),
    "ViT": (lambda: hf.ViTForImageClassification(hf.ViTConfig(image_size=32, patch_size=8, **SIZES)), PICTURES),
    "CLIP vision": (
        lambda: LastState(hf.CLIPVisionModel(hf.CLIPVisionConfig(image_size=32, patch_size=8, **SIZES))),
        PICTURES,
    ),
    "Whisper encoder": (whisper_encoder, noise("input_features", 16, 64)),
    "wav2vec2": (
        lambda: hf.Wav2Vec2ForSequenceClassification(hf.Wav2Vec2Config(**SIZES, **WAVES, **QUIET)),
        noise("input_values", 400),
    ),
}


def measured(name: str, bits: str, steps: int) -> dict[str, Any]:
    """One row: a model trained for a few steps, its file, and what differs."""
    torch.manual_seed(0)
    make, batch = MODELS[name]
    model = make()
    data = [batch(12) for _ in range(2)]
    bw.prepare(model, bw.rules(bits))
    bw.calibrate(model, data)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model.train()
    for _ in range(steps):
        loss = output_of(model(**batch(12)), "training").square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    bw.snap_biases(model, data[0])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        bw.export(model, file, data[0])
        kernels = in_onnxruntime(file, 1, Path(folder))
        report = bw.verify(model, file, [batch(12), batch(12), batch(9), batch(9)])
    inputs = [row for row in report.layers if isinstance(row, InputRow)]
    return {
        "model": name,
        "bits": bits,
        "quantizers": len(bw.quantizers(model)),
        "float_layers": len(bw.coverage(model, data[0]).float_layers),
        "integer_kernels": sum(kernels.integer_kernels.values()),
        "float_kernels": sum(kernels.float_kernels.values()),
        "samples": report.images,
        "predictions_differ": report.different_file,
        "codes": sum(row.file.codes for row in inputs),
        "codes_differ": sum(row.file.flips for row in inputs),
        "logit_difference": f"{report.logit_difference:.1e}",
        "ok": report.ok,
        "transformers": hf.__version__,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--bits", nargs="+", default=["w4a4"])
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for name in args.models:
        for bits in args.bits:
            rows.append(measured(name, bits, args.steps))
            print(*rows[-1].values(), flush=True)
            if args.out:
                with args.out.open("w", newline="") as file:
                    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(rows)


if __name__ == "__main__":
    main()
