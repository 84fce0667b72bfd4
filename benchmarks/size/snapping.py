"""What does snapping cost a network of 1 bit? Accuracy before and after `snap_biases`, and predictions that change.

    python benchmarks/size/snapping.py --data-dir DIR --work WORK --out benchmarks/size/snapping.csv

Three networks on CIFAR-10 at 16 × 16 pixels, every weight and input at 1 bit. A short float training, then a short
quantized one, per seed; trained networks are kept in WORK. `scale_bits`: significant bits of scales in front of 1-bit
quantizers, "none" before snapping. `shared`: whether the channels of a layer that these alone read share one scale
(`bitwright.deploy.thresholds`). `snap_biases` takes 5 bits and shares; the other rows are there to compare. `differ`:
of 10,000 predictions, those that are others than before snapping.
"""

import argparse
import copy
import csv
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.deploy import snap
from bitwright.deploy.thresholds import only_step
from bitwright.layers import significant
from bitwright.training.data.cifar import CIFAR10, cifar
from bitwright.training.data.dataset import Dataset
from bitwright.training.models.resnet import CifarResNet
from bitwright.training.models.vgg import VGGSmall
from bitwright.training.vision import import_timm


def transformer() -> nn.Module:
    """A small vision transformer on 16 patches."""
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3, "num_classes": 10}
    return import_timm().create_model("vit_tiny_patch16_224", **sizes)


# How each is made, and its learning rate.
NETS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "ResNet-8": (lambda: CifarResNet(8, 10, 3), 2e-3),
    "VGG-small": (lambda: VGGSmall(10, 3, 16, width=24), 2e-3),
    "ViT": (transformer, 1e-3),
}
EPOCHS = (2, 2)
BATCH = 100
# Not snapped; then significant bits of a scale, and whether layers that 1-bit quantizers alone read share one.
WAYS: list[tuple[int | None, bool]] = [
    (None, False),
    (7, False),
    (5, False),
    (7, True),
    (5, True),
    (4, True),
    (3, True),
]
FIELDS = ["network", "seed", "scale_bits", "shared", "accuracy", "differ"]


def fit(model: nn.Module, data: Dataset, rate: float, epochs: Iterable[int], seed: int) -> None:
    """Train in place, with Adam and a rate that falls in a straight line."""
    epochs = list(epochs)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-4)
    steps = len(epochs) * data.steps_per_epoch(BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for epoch in epochs:
        for x, y in data.train_batches(epoch=epoch, seed=seed, batch_size=BATCH, device="cpu"):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def trained(net: str, seed: int, data: Dataset, work: Path) -> tuple[nn.Module, Tensor]:
    """(the quantized network, two images to capture it with), trained or found in `work`."""
    make, rate = NETS[net]
    torch.manual_seed(seed)
    model = make()
    x = next(iter(data.test_batches(batch_size=2, device="cpu")))[0]
    kept = work / f"{net}-{seed}.pt"
    if not kept.exists():
        fit(model, data, rate, range(EPOCHS[0]), seed)
    bw.prepare(model, bw.rules("w1a1", ends=None))
    if kept.exists():
        model.load_state_dict(torch.load(kept))
        return model.eval(), x
    bw.calibrate(model, [x for x, _ in data.calibration_batches(seed=seed, batch_size=BATCH, count=2, device="cpu")])
    fit(model, data, rate, range(EPOCHS[0], sum(EPOCHS)), seed)
    torch.save(model.state_dict(), kept)
    return model.eval(), x


@torch.no_grad()
def predictions(model: nn.Module, data: Dataset) -> Tensor:
    """(10000,) int64."""
    return torch.cat([model(x).argmax(1) for x, _ in data.test_batches(batch_size=500, device="cpu")])


def rows(net: str, seed: int, data: Dataset, work: Path) -> list[dict]:
    """One row before snapping, one for each number of significant bits."""
    model, x = trained(net, seed, data, work)
    labels = torch.cat([y for _, y in data.test_batches(batch_size=500, device="cpu")])
    before, found = predictions(model, data), []
    for bits, shared in WAYS:
        after = before
        if bits is not None:
            significant.ONE_BIT, snap.only_step = bits, only_step if shared else lambda plan: None
            snapped = copy.deepcopy(model)
            bw.snap_biases(snapped, x)
            after = predictions(snapped, data)
        accuracy = float((after == labels).float().mean())
        row = [net, seed, bits or "none", shared, f"{accuracy:.4f}", int((after != before).sum())]
        found.append(dict(zip(FIELDS, row, strict=True)))
        print(found[-1], flush=True)
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data-dir", required=True)
    arguments.add_argument("--work", type=Path, required=True)
    arguments.add_argument("--out", type=Path, default=Path("snapping.csv"))
    arguments.add_argument("--networks", nargs="*", default=list(NETS), choices=list(NETS))
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--subset", type=int, default=10_000)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    data = cifar(CIFAR10, data_dir=given.data_dir, image_size=16, subset=given.subset)
    table = []
    for net in given.networks:
        for seed in range(given.seeds):
            table += rows(net, seed, data, given.work)
            with given.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                writer.writeheader()
                writer.writerows(table)


if __name__ == "__main__":
    main()
