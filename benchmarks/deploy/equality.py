"""Is the file the network? Trains small networks at several widths and counts predictions that differ.

    python benchmarks/deploy/equality.py --data-dir DIR --work WORK --out benchmarks/deploy/equality.csv

Every row is a run of its own: `bitwright train`, `bitwright export`, `bitwright verify` over the test set of
CIFAR-10, and the number of convolutions and matrix products on integer kernels (`bitwright bench`). Training is short:
an undecided network has more near-ties, so this is the harder case. Finished runs and rows are kept and skipped.

`differ_frozen`, `differ_file`: images on which the training form's prediction is not the frozen form's, and not the
file's. `float32_near_ties`: images that the training form decides otherwise in float32 than in float64, which counts.
`codes_differ`: of all quantizers' codes for these images (`codes`), those that differ between training and frozen form,
and between that and the file. `reproducible` networks: see `bitwright.make_reproducible`.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

VIT = {"patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2}
NETS = {
    "ResNet-20": {"name": "resnet20", "options": {"width": 16, "shortcut": "A"}},
    "VGG-small": {"name": "vgg_small", "options": {"width": 32}},
    "MobileNetV2 x0.35": {"name": "torchvision/mobilenet_v2", "options": {"width_mult": 0.35}},
    "ViT-tiny": {"name": "timm/vit_tiny_patch16_224", "options": VIT},
    "ViT-tiny reproducible": {"name": "timm/vit_tiny_patch16_224", "options": VIT},
}
# Epochs of the float partner and of each quantized network: about two minutes a row on one core.
EPOCHS = {"ResNet-20": (3, 1), "VGG-small": (4, 2), "MobileNetV2 x0.35": (8, 2)}
EPOCHS |= dict.fromkeys(("ViT-tiny", "ViT-tiny reproducible"), (6, 1))
BITS = ("w8a8", "w4a4", "w3a3", "w2a2")
MIX = "AdaQAT mix"
FIELDS = ["network", "bits", "accuracy", "images", "float32_near_ties", "differ_frozen", "differ_file", "verified"]
FIELDS += ["integer_kernels", "float_kernels", "size_bytes", "codes", "codes_differ"]


def recipe(net: str, bits: str, subset: int) -> dict:
    """Two short trainings: a float partner, then the quantized network; the same for every width."""
    transformer = NETS[net]["name"].startswith("timm/vit")
    rate, kind = (1e-3, "adamw") if transformer else (0.05, "sgd")
    often = list(EPOCHS[net])
    if transformer or "mobilenet" in NETS[net]["name"]:  # harder to train where bits are few or move
        often[1] *= 2 if bits in ("w2a2", MIX) else 1
    before, after = ({"epochs": epochs, "batch_size": 64, "kind": "cosine"} for epochs in often)
    made = {
        "data": {"name": "cifar10", "options": {"subset": subset}},
        "model": NETS[net],
        "bits": "w4a4" if bits == MIX else bits,
        "optimizer": {"name": kind, "lr": rate / 2, "clip_norm": 1.0},
        "schedule": after,
        "partner": {"optimizer": {"name": kind, "lr": rate, "clip_norm": 1.0}, "schedule": before},
        "amp": "none" if "mobilenet" in NETS[net]["name"] else "bf16",  # depth-wise convolutions are slower in bf16
        "threads": 1,
        "channels_last": not transformer,
        "reproducible": net.endswith("reproducible"),
    }
    if bits == MIX:
        learned = {
            "granularity": "layer",
            "every": 2,
            "start": 5.0,
            "floor": 3,
            "eta": 0.5,
            "lam": 0.005,
            "freeze_at": 0.5,
        }
        made["methods"] = [{"adaqat": learned}]
    return made


def bitwright(*arguments: str) -> subprocess.CompletedProcess[str]:
    """One command of the library, on one thread."""
    line = [sys.executable, "-m", "bitwright", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})


def measure(net: str, bits: str, args: argparse.Namespace) -> dict:
    """One row."""
    run = args.work / f"{net}-{bits}".replace(" ", "_")
    run.parent.mkdir(parents=True, exist_ok=True)
    if not (run / "summary.json").exists():
        file = run.with_name(f"{run.name}.yaml")
        file.write_text(yaml.safe_dump(recipe(net, bits, args.subset)))
        line = ["train", str(file), "--out", str(run), "--overwrite", "--data-dir", str(args.data_dir)]
        done = bitwright(*line, "--cache", str(args.work / "cache"))
        if done.returncode:
            raise SystemExit(f"{net} {bits}: {done.stderr.strip()}")
    summary = json.loads((run / "summary.json").read_text())
    model = run / "model.onnx"
    done = bitwright("export", str(run), "--to", "onnx", "-o", str(model))
    if done.returncode:
        raise SystemExit(f"{net} {bits}: {done.stderr.strip()}")
    done = bitwright("verify", str(run), str(model), "--images", str(args.images), "--json")
    report = json.loads(done.stdout)
    codes = [row for row in report["layers"] if row["what"] != "weight"]
    kernels = json.loads(bitwright("bench", str(run), str(model), "--json", "--runs", "2").stdout)
    return {
        "network": net,
        "bits": bits,
        "accuracy": f"{summary['accuracy']:.4f}",
        "images": report["images"],
        "float32_near_ties": report["float32_differs"],
        "differ_frozen": report["different_frozen"],
        "differ_file": report["different_file"],
        "verified": report["ok"],
        "integer_kernels": sum(kernels["integer_kernels"].values()),
        "float_kernels": sum(kernels["float_kernels"].values()),
        "size_bytes": model.stat().st_size,
        "codes": sum(row["values"] for row in codes),
        "codes_differ": sum(row["different_frozen"] + row["different_file"] for row in codes),
    }


def main() -> None:
    """Every row that is not in the table yet; the table is rewritten after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where runs are kept")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--subset", type=int, default=20_000, help="training images")
    parser.add_argument("--nets", nargs="*", default=list(NETS))
    args = parser.parse_args()
    rows = list(csv.DictReader(args.out.open())) if args.out.exists() else []
    known = {(row["network"], row["bits"]) for row in rows}
    for net in args.nets:
        for bits in (*BITS, MIX):
            if (net, bits) in known:
                continue
            rows.append(measure(net, bits, args))
            print(*rows[-1].values(), sep="\t", flush=True)
            with args.out.open("w", newline="") as handle:
                writer = csv.DictWriter(handle, FIELDS)
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
