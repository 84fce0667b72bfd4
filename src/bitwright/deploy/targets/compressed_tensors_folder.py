"""Target `compressed-tensors`: a folder for LLM servers, weights of linear layers packed, everything else as it was.

`model.safetensors` and `config.json` with a `quantization_config` of format "pack-quantized", symmetric, a scale per
output channel; 2 to 8 bits, mixed per layer. Servers run such layers on float inputs, so quantizers on anything but
linear weights are refused. To serve it, add the model's own configuration to `config.json`.
"""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bitwright.batches import Inputs, outputs_of
from bitwright.deploy.capture import first_line
from bitwright.deploy.files import ExportReport, replacing, size_of
from bitwright.deploy.freeze import freeze
from bitwright.deploy.integer import IntLinear
from bitwright.deploy.lower import LayerFile
from bitwright.deploy.targets.opened import Network, float_twin
from bitwright.deploy.targets.packed_loader import WORD, pack
from bitwright.errors import BitwrightError
from bitwright.layers import QuantLinear
from bitwright.layers.fold import Weight, integer_weight
from bitwright.prepare import quant_layers, quantizers

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
MODEL, CONFIG = "model.safetensors", "config.json"


def runtime() -> Any:
    """The compressed_tensors package; BitwrightError, naming the extra that brings it, where it cannot be imported."""
    try:
        return importlib.import_module("compressed_tensors")
    except ModuleNotFoundError as error:
        if error.name == "compressed_tensors":
            line = 'the package is not installed: pip install "bitwright[compressed-tensors]"'
        else:
            line = f"the package cannot be imported: {first_line(error)}"
        raise BitwrightError(f"target compressed-tensors: {line}") from error


def linear_weights(model: nn.Module, frozen: nn.Module) -> dict[str, Weight]:
    """The integer weights by layer; BitwrightError where the model has anything that the target does not keep."""
    layers = quant_layers(model)
    for name in quantizers(model):
        owner, _, slot = name.rpartition(".")
        if not isinstance(layers.get(owner), QuantLinear) or slot != "weight_quantizer":
            raise BitwrightError(
                f"{name}: target compressed-tensors keeps quantized weights of linear layers only; "
                "drop it from the rules, or use target onnx"
            )
    found = {}
    folded = {m.name: m for m in frozen.modules() if isinstance(m, IntLinear)}
    for name, layer in layers.items():
        if layer.weight_quantizer is None:
            continue
        weight = integer_weight(layer.weight_quantizer, layer.weight_of("weight_quantizer"), name)
        if weight.step != 1 or weight.offset != -(2 ** (weight.bits - 1)) or weight.numbers.dtype != torch.int8:
            raise BitwrightError(
                f"{name}: target compressed-tensors keeps weights of codes -2^(bits-1) to 2^(bits-1)-1 only, "
                "not 1 bit or grids without a 0"
            )
        if not torch.equal(folded[name].values, weight.values()):
            raise BitwrightError(f"{name}: target compressed-tensors keeps no BatchNorm behind a linear layer")
        found[name] = weight
    return found


def packed_rows(weight: Weight) -> Tensor:
    """(out, ceil(in * bits / 32)) int32: each row packed by itself, as `pack_to_int32` does."""
    rows, columns = weight.numbers.shape
    wide = F.pad(weight.stored, (0, -columns % WORD))
    words = pack(wide, weight.bits).view(rows, -1)
    return words[:, : math.ceil(columns * weight.bits / WORD)].contiguous()


def quantization_config(weights: dict[str, Weight], linears: list[str]) -> dict[str, Any]:
    """What servers read: one group per bit-width, the layers left float ignored."""
    groups: dict[str, Any] = {}
    widths = sorted({w.bits for w in weights.values()})
    for bits in widths:
        about = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
        targets = ["Linear"] if len(widths) == 1 else [n for n, w in weights.items() if w.bits == bits]
        groups[f"group_{bits}"] = {"targets": targets, "weights": about, "format": FORMAT}
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in linears if name not in weights],
    }


def export_compressed_tensors(model: nn.Module, path: Path, example: Inputs) -> ExportReport:
    """Write the folder; see `bitwright.deploy.export`."""
    weights = linear_weights(model, freeze(model, example))
    runtime()
    if path.is_dir():
        read_config(path)  # another's folder is never replaced
    twin = float_twin(model)
    tensors: dict[str, Tensor] = dict(twin.state_dict())
    files = []
    for name, weight in weights.items():
        prefix = f"{name}." if name else ""
        del tensors[f"{prefix}weight"]
        words = packed_rows(weight)
        tensors[f"{prefix}weight_packed"] = words
        tensors[f"{prefix}weight_scale"] = weight.scale.expand(weight.numbers.shape[0])[:, None]
        tensors[f"{prefix}weight_shape"] = torch.tensor(weight.numbers.shape)
        files.append(LayerFile(name, weight.bits, "int32 words", weight.numbers.numel(), words.nbytes))
    linears = [n for n, m in twin.named_modules() if isinstance(m, nn.Linear)]
    config = {"architectures": [type(twin).__name__], "quantization_config": quantization_config(weights, linears)}
    with replacing(path) as new:
        new.mkdir()
        save_file({n: t.clone().contiguous() for n, t in tensors.items()}, str(new / MODEL), metadata={"format": "pt"})
        (new / CONFIG).write_text(json.dumps(config, indent=2))
        with torch.no_grad():
            example.run(load(new, twin))
        size = size_of(new)
    packed = sum(f.size_bytes for f in files)
    return ExportReport(path, size, packed, True, tuple(files), METHOD)


def read_config(path: Path) -> dict[str, Any]:
    """The quantization_config of a folder; BitwrightError where it has none of ours."""
    try:
        config = json.loads((path / CONFIG).read_text())["quantization_config"]
        known = config["quant_method"] == METHOD and config["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise BitwrightError(f"{path}: is a folder without a {CONFIG} of a {FORMAT} {METHOD} model")
    return config


def load(path: Path, model: nn.Module) -> nn.Module:
    """The float `model` filled from the folder by the compressed_tensors package; BitwrightError where it cannot."""
    config = read_config(path)
    library = runtime()
    quantization = importlib.import_module("compressed_tensors.quantization")
    try:
        tensors = load_file(str(path / MODEL))
        quantization.apply_quantization_config(model, quantization.QuantizationConfig(**config), show_progress=False)
        compressor = library.ModelCompressor(quantization.QuantizationConfig(**config))
        compressor.compress_model(model)
        model.load_state_dict(tensors)
        compressor.decompress_model(model)
    except Exception as error:
        raise BitwrightError(f"{path}: compressed_tensors cannot load it: {first_line(error)}") from error
    return model.eval()


class CompressedTensorsFolder:
    """The folder loaded by the compressed_tensors package into a float copy of the network."""

    def __init__(self, path: Path, network: Network):
        self.model = load(path, float_twin(network.training))
        modules: dict[str, Any] = dict(self.model.named_modules())
        self.weights = {name: modules[name].weight.detach() for name in network.layers}
        self.biases = {n: modules[n].bias.detach() for n, layer in network.layers.items() if layer.bias is not None}

    def run(self, x: Inputs) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        with torch.no_grad():
            return list(outputs_of(x.run(self.model), "verify").values()), {}
