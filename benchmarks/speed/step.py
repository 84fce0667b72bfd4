"""Price of a quantization-aware training step: ratios to the float step of the same network, in the same process.

    python benchmarks/speed/step.py --out benchmarks/speed/step-resnet20.csv
    python benchmarks/speed/step.py --model torchvision/resnet18 --batch 8 --cases float-lean lsq-lean --out ...
    python benchmarks/speed/step.py --model timm/vit_tiny_patch16_224 --batch 8 --cases float-lean lsq-lean --out ...

Cases alternate, so a busy machine slows all of them alike; the time is the process's CPU time on one thread. A ratio
is that of one round's two times; the table gives its median and quartiles over the rounds: to the eager float step,
to the plain quantized one (`lsq`), and to the float step of the same mode. `saved` is the bytes kept for the backward
pass, counted by saved-tensor hooks (parameters left out), as a ratio to the eager float step's. One time of `adaqat`
is the mean of its 8 steps between two updates, probes included. Freed memory is kept, as `bitwright train` does
(`memory.py` measures that).

`-compiled`: Inductor; `-lean`: Inductor with `--activation-memory` (0.3).
`float-waiting`: the float step with norms that wait for relu and sums, as `bitwright train` trains float partners.
`-float-products`: layers multiply float values, not integers (`bitwright.kernels.integer`).
`-graphs`: Inductor with CUDA graphs (`mode="reduce-overhead"`), where kernels are shorter than their launches.
`-bf16-guide`: the partner or teacher alone computes in bfloat16 (`partner_dtype`, `teacher_dtype`).
`--bf16`: every case under bfloat16 autocast, for processors that have it (others emulate it, slowly).
`--device cuda`: on a GPU, where a time is the wall's over `--repeats` steps, launches and synchronisation included.
`--channels-last`: weights and images in that layout. `--topology`: of the `lsq` cases; the others have float sums.
"""

import argparse
import contextlib
import copy
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import alternate, machine, ratio, saved_bytes, write
from torch import nn

import bitwright as bw
from bitwright import kernels
from bitwright.costs import cost_table
from bitwright.kernels.integer import float_products
from bitwright.layers import let_wait
from bitwright.topology import Topology
from bitwright.training.memory import keep_freed_memory
from bitwright.training.models import build_model

SIZES = {"resnet8": 32, "resnet20": 32, "torchvision/resnet18": 224, "timm/vit_tiny_patch16_224": 224}
GRAPHS = {"mode": "reduce-overhead"}
METHODS = ["pege-0.5", "pege-1", "kd", "bwrf", "bwrf-sampled", "adaqat", "hgq", "constrained"]


def quantized(
    model: nn.Module, bits: str, x: torch.Tensor, topology: Topology = "fpres", **options: object
) -> nn.Module:
    """A prepared and calibrated copy of `model`; `options` of `bitwright.rules`."""
    rules = bw.rules(bits, **options)
    made = bw.prepare(copy.deepcopy(model), rules + bw.topology(model, x, topology, rules=rules))
    return bw.calibrate(made, [x[:16]])


def make_step(
    model: nn.Module, methods: list[bw.Method] | None = None, compiled: dict[str, Any] | None = None, **options
) -> bw.Step:
    """A `Step` with plain SGD in training mode, compiled if options of `compile_model` are given."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    run = model if compiled is None else bw.compile_model(model, **compiled)
    return bw.Step(run, F.cross_entropy, optimizer, methods or [], **options)


def builders(
    model: nn.Module, bits: str, x: torch.Tensor, topology: Topology = "fpres", lean: float = 0.3, **options
) -> dict[str, Callable[[], bw.Step]]:
    """What makes each case's step, by name; `lean` of the lean ones, `options` of `Step`."""

    def plain(compiled: dict[str, Any] | None = None) -> bw.Step:
        return make_step(copy.deepcopy(model), compiled=compiled, **options)

    def waiting() -> bw.Step:
        made = copy.deepcopy(model)
        let_wait(made)
        return make_step(made, **options)

    def lsq(compiled: dict[str, Any] | None = None) -> bw.Step:
        return make_step(quantized(model, bits, x, topology), compiled=compiled, **options)

    def pege(rate: float) -> bw.Step:
        made = quantized(model, bits, x, estimator="pege", estimator_options={"rate": rate})
        return make_step(made, **options)

    def kd(dtype: str | None) -> bw.Step:
        return make_step(quantized(model, bits, x), [bw.KD(copy.deepcopy(model), teacher_dtype=dtype)], **options)

    def bwrf(sample: bool, dtype: str | None) -> bw.Step:
        student, partner = quantized(model, bits, x), copy.deepcopy(model)
        return make_step(student, [bw.BWRF(student, partner, sample=sample, partner_dtype=dtype)], **options)

    def adaqat() -> bw.Step:
        student = quantized(model, "w8a8", x)
        return make_step(student, [bw.AdaQAT(student, 10**6, warmup_steps=0, eta=0.0)], **options)

    def hgq() -> bw.Step:
        student = quantized(model, bits, x)
        return make_step(student, [bw.HGQ(student, 10**6, cost_table(student, x), beta=1.0, eta=0.0)], **options)

    def constrained() -> bw.Step:
        student = quantized(model, bits, x)
        return make_step(student, [bw.Constrained(student, F.cross_entropy)], **options)

    return {
        "float": plain,
        "float-waiting": waiting,
        "lsq": lsq,
        "lsq-reference": lsq,
        "lsq-float-products": lsq,
        "float-compiled": partial(plain, {}),
        "lsq-compiled": partial(lsq, {}),
        "float-graphs": partial(plain, GRAPHS),
        "lsq-graphs": partial(lsq, GRAPHS),
        "float-lean": partial(plain, {"activation_memory": lean}),
        "lsq-lean": partial(lsq, {"activation_memory": lean}),
        "pege-0.5": partial(pege, 0.5),
        "pege-1": partial(pege, 1.0),
        "kd": partial(kd, None),
        "bwrf": partial(bwrf, False, None),
        "bwrf-sampled": partial(bwrf, True, None),
        "kd-bf16-guide": partial(kd, "bfloat16"),
        "bwrf-bf16-guide": partial(bwrf, False, "bfloat16"),
        "bwrf-sampled-bf16-guide": partial(bwrf, True, "bfloat16"),
        "adaqat": adaqat,
        "hgq": hgq,
        "constrained": constrained,
    }


def context(name: str) -> contextlib.AbstractContextManager[None]:
    """What a case's steps run in."""
    contexts = {"lsq-reference": kernels.reference_only, "lsq-float-products": float_products}
    return contexts.get(name, contextlib.nullcontext)()


def same_mode(name: str, names: list[str]) -> str:
    """The float case that runs as the case `name` does: eager, compiled, lean or by CUDA graphs."""
    mode = name.partition("-")[2]
    return f"float-{mode}" if f"float-{mode}" in names else "float"


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SIZES), default="resnet20")
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cases", nargs="+", default=["lsq-reference", *METHODS])
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--topology", choices=["fpres", "res8", "shared"], default="fpres")
    parser.add_argument("--activation-memory", type=float, default=0.3, help="of the -lean cases")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=1, help="steps a time; 20 and more on a GPU")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.manual_seed(0)
    size = SIZES[args.model]
    model = build_model(args.model, num_classes=10, in_channels=3, image_size=size)
    x, y = torch.randn(args.batch, 3, size, size), torch.randint(0, 10, (args.batch,))
    model, x, y = (t.to(args.device) for t in (model, x, y))
    if args.channels_last:
        model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    options = {"amp_dtype": torch.bfloat16} if args.bf16 else {}
    known = builders(model, args.bits, x, args.topology, args.activation_memory, **options)
    names = ["float", "lsq", *(c for c in args.cases if c not in ("float", "lsq"))]
    steps = {name: known[name]() for name in names}

    def repeats(name: str) -> int:
        return 8 * -(-args.repeats // 8) if name == "adaqat" else args.repeats

    def run(name: str) -> None:
        with context(name):
            for _ in range(repeats(name)):
                steps[name](x, y)

    times = alternate({name: partial(run, name) for name in names}, args.rounds, device=args.device)
    times = {name: [t / repeats(name) for t in spent] for name, spent in times.items()}
    rows = []
    for name in names:
        with context(name):
            saved = saved_bytes(steps[name], x, y)
        rows.append(
            {
                "model": args.model,
                "bits": args.bits,
                "batch": args.batch,
                "topology": args.topology,
                "layout": "channels_last" if args.channels_last else "contiguous",
                "amp": "bf16" if args.bf16 else "none",
                "case": name,
                **ratio(times[name], times["float"]),
                **ratio(times[name], times["lsq"], "to_lsq"),
                **ratio(times[name], times[same_mode(name, names)], "same_mode"),
                "saved": saved,
                "ms": round(1000 * statistics.median(times[name]), 2),
                "rounds": args.rounds,
                **machine(args.device),
            }
        )
        rows[-1]["saved"] = round(saved / rows[0]["saved"], 3) if rows[1:] else saved
        print({k: rows[-1][k] for k in ("case", "ratio_median", "to_lsq_median", "same_mode_median", "saved", "ms")})
    rows[0]["saved"] = 1.0
    write(rows, args.out)


if __name__ == "__main__":
    main()
