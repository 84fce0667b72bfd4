"""Our training step beside other libraries', all against the float step of the same network in the same process.

    python -m venv peers-env && peers-env/bin/pip install -r benchmarks/speed/peers.txt -e .
    peers-env/bin/python benchmarks/speed/peers.py --out benchmarks/speed/peers-resnet20.csv

W4A4 (fixed cost whatever the bits), one scale per output channel of weights and one per input tensor, one thread,
alternating, CPU time. Each peer as it trains fastest: calibrated and past its phase of collecting statistics, eager
(the same peers compiled were slower or broke); `--compiled` adds ours and the float network compiled by Inductor.

    modelopt   nvidia-modelopt: max calibration, weights axis 0; the gradient is straight-through, scales stay fixed
    brevitas   drop-in layers, weights scaled by their maximum, learned input scales
    pt2e       torchao's prepare_qat_pt2e with the X86 Inductor quantizer (convolution and norm simulated as folded)
    torchao    QATConfig on linear layers (it has none for convolutions, so only where a network has many)
"""

import argparse
import copy
import dataclasses
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measure import alternate, machine, ratio, saved_bytes, write
from step import SIZES, make_step, quantized
from torch import nn

import bitwright as bw
from bitwright.training.memory import keep_freed_memory
from bitwright.training.models import build_model


def modelopt(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """W4A4 by nvidia-modelopt."""
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    for entry in config["quant_cfg"]:
        if "cfg" in entry:
            entry["cfg"]["num_bits"] = 4
    return mtq.quantize(model, config, lambda m: m(x[:16]))


def brevitas(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """W4A4 by Brevitas' layers in place of torch's."""
    import brevitas.nn as qnn
    from brevitas.quant import Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    options = {
        "weight_quant": Int8WeightPerChannelFloat,
        "weight_bit_width": 4,
        "input_quant": Uint8ActPerTensorFloat,
        "input_bit_width": 4,
        "input_collect_stats_steps": 1,
        "return_quant_tensor": False,
    }
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            bias = getattr(child, "bias", None) is not None
            if type(child) is nn.Conv2d:
                sizes = (child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding)
                made = qnn.QuantConv2d(*sizes, groups=child.groups, bias=bias, **options)
            elif type(child) is nn.Linear:
                made = qnn.QuantLinear(child.in_features, child.out_features, bias=bias, **options)
            else:
                continue
            made.weight = child.weight
            made.bias = child.bias
            setattr(parent, name, made)
    return model


def pt2e(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """W4A4 by graph capture and torchao's PT2E."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    config = x86.get_default_x86_inductor_quantization_config(is_qat=True)
    narrow = {"input_activation": (0, 15), "weight": (-8, 7)}
    specs = {k: dataclasses.replace(getattr(config, k), quant_min=lo, quant_max=hi) for k, (lo, hi) in narrow.items()}
    quantizer = x86.X86InductorQuantizer().set_global(dataclasses.replace(config, **specs))
    graph = torch.export.export(model.train(), (x,)).module()
    return move_exported_model_to_train(prepare_qat_pt2e(graph, quantizer))


def torchao(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """W4A4 linear layers by torchao's QATConfig."""
    from torchao.quantization import quantize_
    from torchao.quantization.granularity import PerAxis, PerToken
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    inputs = IntxFakeQuantizeConfig(torch.int4, granularity=PerToken(), is_symmetric=True)
    weights = IntxFakeQuantizeConfig(torch.int4, granularity=PerAxis(0))
    quantize_(model, QATConfig(activation_config=inputs, weight_config=weights, step="prepare"))
    return model


PEERS = {"modelopt": modelopt, "brevitas": brevitas, "pt2e": pt2e, "torchao": torchao}


def build(name: str, model: nn.Module, x: torch.Tensor) -> bw.Step:
    """The training step of a peer on a copy of `model`; past the steps in which it collects statistics."""
    made = PEERS[name](copy.deepcopy(model), x)
    if name == "pt2e":  # an exported graph has no mode to switch
        optimizer = torch.optim.SGD(made.parameters(), lr=1e-3)
        return bw.Step(made, nn.functional.cross_entropy, optimizer)
    return make_step(made)


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SIZES), default="resnet20")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peers", nargs="+", choices=sorted(PEERS), default=["modelopt", "brevitas", "pt2e"])
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.manual_seed(0)
    size = SIZES[args.model]
    model = build_model(args.model, num_classes=10, in_channels=3, image_size=size)
    x, y = torch.randn(args.batch, 3, size, size), torch.randint(0, 10, (args.batch,))
    known: dict[str, Callable[[], bw.Step]] = {
        "float": lambda: make_step(copy.deepcopy(model)),
        "bitwright": lambda: make_step(quantized(model, "w4a4", x)),
    }
    if args.compiled:
        known["float-compiled"] = lambda: make_step(copy.deepcopy(model), compiled={})
        known["bitwright-compiled"] = lambda: make_step(quantized(model, "w4a4", x), compiled={})
    known |= {name: partial(build, name, model, x) for name in args.peers}
    steps = {}
    for name, make in known.items():
        try:
            steps[name] = make()
        except ImportError as error:
            print(f"{name}: left out ({error}); see benchmarks/speed/peers.txt")
    times = alternate({name: partial(step, x, y) for name, step in steps.items()}, args.rounds)
    peers = [name for name in args.peers if name in steps]
    best = min(peers, key=lambda name: statistics.median(times[name]), default="float")
    saved = {name: saved_bytes(step, x, y) for name, step in steps.items()}
    rows = []
    for name in steps:
        prices = {**ratio(times[name], times["float"]), **ratio(times[name], times[best], "to_best_peer")}
        kept = round(saved[name] / saved["float"], 3)
        row = {"model": args.model, "batch": args.batch, "case": name, **prices, "best_peer": best, "saved": kept}
        milliseconds = round(1000 * statistics.median(times[name]), 1)
        rows.append({**row, "ms": milliseconds, "rounds": args.rounds, **machine()})
        print({k: rows[-1][k] for k in ("case", "ratio_median", "to_best_peer_median", "best_peer", "saved", "ms")})
    write(rows, args.out)


if __name__ == "__main__":
    main()
