"""Quantization-aware training in a loop of your own: a torchvision ResNet-18 at 4 bits, its two ends and its sums at 8.

    python examples/own_loop.py

The data here is noise; put your own batches in its place. The lines marked (bitwright) are all that is new.
"""

import torch
from torch import nn

import bitwright as bw  # (bitwright)
from bitwright.training.vision import import_torchvision


def main(batches: int = 20, size: int = 64) -> float:
    """Train on `batches` batches of noise, `size` pixels square; the last loss."""
    data = [(torch.randn(8, 3, size, size), torch.randint(0, 10, (8,))) for _ in range(batches)]
    model = import_torchvision().models.resnet18(num_classes=10)

    bw.prepare(model, bw.rules("w4a4") + bw.topology(model, data[0][0]))  # (bitwright)
    bw.calibrate(model, data[:2])  # (bitwright)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loss = torch.zeros(())
    for x, y in data:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert bw.coverage(model, data[0]).complete  # (bitwright)
    return loss.item()


if __name__ == "__main__":
    print(f"last loss {main():.3f}")
