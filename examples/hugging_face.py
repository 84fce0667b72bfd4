"""Quantization-aware training of a Hugging Face model: a BERT at 8 bits, a plain loop, an ONNX file that is checked.

    python examples/hugging_face.py

The weights here are random and the data is noise; put `from_pretrained` and your own batches in their place. The lines
marked (bitwright) are all that is new. Needs transformers and torchvision.
"""

from pathlib import Path

import torch

import bitwright as bw  # (bitwright)
from bitwright.training.vision import import_torchvision

import_torchvision()  # which transformers imports
from transformers import BertConfig, BertForSequenceClassification  # noqa: E402


def main(file: str | Path = "bert.onnx", batches: int = 20, layers: int = 2) -> bool:
    """Train on `batches` batches of noise, write `file`; whether it is the network that was trained."""
    sizes = {"hidden_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 128}
    model = BertForSequenceClassification(BertConfig(vocab_size=200, max_position_embeddings=32, **sizes))
    data = []
    for length in torch.randint(8, 16, (batches,)).tolist():  # each batch as long as its longest text
        words, mask = torch.randint(5, 200, (8, length)), torch.ones(8, length, dtype=torch.long)
        mask[:4, 6:] = 0
        data.append({"input_ids": words, "attention_mask": mask, "labels": torch.randint(2, (8,))})

    bw.prepare(model, bw.rules("w8a8"))  # (bitwright)
    bw.calibrate(model, data[:4])  # (bitwright)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()
    for batch in data:
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    bw.snap_biases(model, data[0])  # (bitwright)
    bw.export(model, file, data[0])  # (bitwright)
    return bw.verify(model, file, data).ok  # (bitwright)


if __name__ == "__main__":
    print("the file is the network" if main() else "the file differs")
