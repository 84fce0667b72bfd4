"""What is each layer's bit worth? The loss with one layer's weights or inputs at 2, 3, 4 or 5 bits, else as trained.

    python benchmarks/accuracy/bit_sensitivity.py RUN --data-dir DIR --out benchmarks/accuracy/bit_sensitivity.csv

Differences to the trained widths over the same training images, with the standard error over batches: what a probe of
AdaQAT sees, which takes one batch or a part of it.
"""

import argparse
import csv
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from bitwright.methods.probe import untouched
from bitwright.prepare import quant_layers
from bitwright.quantizer import Quantizer
from bitwright.training.folder import load_run

BITS = (2, 3, 4, 5)
FIELDS = ["layer", "of", "scales", "trained_bits", "bits", "loss_change", "standard_error"]


def keep_bound(quantizer: Quantizer, bits: int) -> None:
    """Change the bits with the upper clipping bound as it was, of an LSQ quantizer."""
    scale, top = quantizer.grid.scale.detach().clone(), quantizer.code_hi - quantizer.codes.zero
    quantizer.set_bits(bits)
    quantizer.grid.scale.copy_(scale * top / (quantizer.code_hi - quantizer.codes.zero))


# How scales follow a change of bits: as the library has it, or with the clipping bound of weights kept, too.
SCALES = {"follow": Quantizer.set_bits, "keep bound": keep_bound}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_run(args.run, data_dir=args.data_dir)
    model = loaded.model.train()  # norms take the batch's statistics, as in a probe
    drawn = loaded.dataset.train_batches(epoch=0, seed=0, batch_size=args.batch_size, device="cpu")
    batches = [batch for batch, _ in zip(drawn, range(args.batches), strict=False)]

    @torch.no_grad()
    def losses(change: Callable[[Quantizer, int], None] | None, found: list[Quantizer], bits: int) -> list[float]:
        with untouched(model):
            for quantizer in found if change else []:
                change(quantizer, bits)
            return [torch.nn.functional.cross_entropy(model(x), y).item() for x, y in batches]

    base = losses(None, [], 0)
    print(f"loss {statistics.mean(base):.4f} over {args.batches * args.batch_size} images")
    rows = []

    def measure(name: str, of: str, scales: str, found: list[Quantizer]) -> None:
        for bits in BITS:
            gaps = [a - b for a, b in zip(losses(SCALES[scales], found, bits), base, strict=True)]
            error = statistics.stdev(gaps) / len(gaps) ** 0.5
            trained = "/".join(str(b) for b in sorted({int(q.bits.item()) for q in found}))
            line = [name, of, scales, trained, bits, f"{statistics.mean(gaps):.5f}", f"{error:.5f}"]
            rows.append(dict(zip(FIELDS, line, strict=True)))
        print(name, of, scales, *(f"{r['bits']}: {r['loss_change']}" for r in rows[-len(BITS) :]), flush=True)

    layers = {n: m.quantizers() for n, m in quant_layers(model).items()}
    inner = list(layers.values())[1:-1]
    for of in ("weight", "input"):
        for scales in SCALES:
            measure("all but first and last", of, scales, [q for m in inner for s, q in m.items() if s.startswith(of)])
    for name, slots in layers.items():
        for slot, quantizer in slots.items():
            measure(name, slot.removesuffix("_quantizer"), "follow", [quantizer])
    if args.out:
        with args.out.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
