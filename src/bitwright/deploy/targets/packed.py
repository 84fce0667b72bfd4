"""Target `packed`: a safetensors checkpoint in which every weight has its own width; loads back into PyTorch.

Keeps 1 to 8 bits, mixed per layer; convolutions, linear layers, embeddings, sums and quantized outputs. Norms are
folded, so that what is stored is what runs. The products of quantized attention are refused: the loader replaces
layers, not the forward passes of attention.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bitwright.batches import Inputs, outputs_of
from bitwright.deploy.attention import IntMultiheadAttention, IntProducts
from bitwright.deploy.compact import Stream, fixed, floating, whole
from bitwright.deploy.files import ExportReport, replacing
from bitwright.deploy.freeze import freeze
from bitwright.deploy.integer import InputCodes, IntAdd, IntConv, IntLayer
from bitwright.deploy.lower import LayerFile
from bitwright.deploy.phases import IntConvTranspose, PhaseConv
from bitwright.deploy.targets import packed_loader
from bitwright.deploy.targets.opened import Network, float_twin
from bitwright.errors import BitwrightError
from bitwright.layers.output import OUTPUT


def decimals(t: Tensor) -> list[float]:
    """float32 numbers by their shortest decimals, which come back as the same float32."""
    return [float(str(x)) for x in t.numpy()]


def fields_of(codes: InputCodes | None) -> dict[str, Any] | None:
    """A quantizer as JSON."""
    if codes is None:
        return None
    numbers = {"scale": decimals(codes.scale), "zero": decimals(codes.zero)}
    return {"bits": codes.bits, "lo": codes.lo, "hi": codes.hi, "axis": codes.axis, **numbers}


def packed_layer(layer: IntLayer) -> tuple[dict[str, Any], dict[str, Tensor], list[Tensor]]:
    """(fields, tensors, words) of one layer, as the loader wants them."""
    fields: dict[str, Any] = {"shape": list(layer.numbers.shape), "input": fields_of(layer.input_quantizer)}
    tensors, words = {}, []

    def add(part: str, made: Stream | None, name: str, values: Tensor) -> None:
        if made is None:
            tensors[name] = values
        else:
            fields[part] = list(made.about)
            words.append(packed_loader.pack(torch.from_numpy(made.codes), made.about[1]))

    if layer.packed is None:
        tensors["weight"] = layer.values
    else:
        times = layer.packed.multiple
        fields |= {"bits": layer.bits, "step": times * layer.packed.step, "offset": times * layer.packed.offset}
        words.append(packed_loader.pack(layer.packed.stored, layer.bits))
        add("scale", floating(layer.packed.scale.numpy()), "scale", layer.packed.scale)
    if isinstance(layer, IntConv) and layer.same:
        fields["same"] = True
    if layer.bias_codes is not None:
        add("bias", whole(layer.bias_codes.numpy()), "bias_codes", layer.bias_codes.int())
    elif layer.bias is not None:
        add("bias", fixed(layer.bias.numpy()), "bias", layer.bias)
    return fields, tensors, words


def refuse_attention(frozen: nn.Module) -> None:
    """Raise BitwrightError if the network has attention whose forward pass the loader cannot replace."""
    for name, module in frozen.named_modules():
        products = isinstance(module, IntProducts) and any(child is not None for child in module._modules.values())
        if products or isinstance(module, IntMultiheadAttention) or hasattr(module, "attend"):
            raise BitwrightError(
                f"{name.removesuffix('.products')}: target packed keeps no quantized attention; "
                "give the attention layer a rule with weight, input and attention None, or use target onnx"
            )


def contents(model: nn.Module, frozen: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor], list[LayerFile]]:
    """(network, tensors, report) of a packed checkpoint."""
    refuse_attention(frozen)
    network: dict[str, Any] = {"layers": {}, "sums": {}, "outputs": {}, "norms": []}
    tensors: dict[str, Tensor] = {}
    files, ours, words, newer = [], set(), [], False
    for name, module in frozen.named_modules():
        if isinstance(module, IntLayer | IntAdd | InputCodes):
            ours |= {id(t) for t in module.buffers()}
        if isinstance(module, IntConvTranspose):
            newer, layer = True, module.convolution.stored()
        else:
            layer = module if isinstance(module, IntLayer) and not isinstance(module, PhaseConv) else None
        if layer is not None:
            newer |= isinstance(layer, IntConv) and len(layer.kernel_size) == 3
            network["layers"][name], own, rows = packed_layer(layer)
            words += rows
            tensors |= {f"{name}.{part}" if name else part: tensor for part, tensor in own.items()}
            packing, held = ("float32", own["weight"]) if "weight" in own else ("int32 words", rows[0])
            files.append(LayerFile(name, layer.bits, packing, layer.numbers.numel(), held.nbytes))
        elif isinstance(module, IntAdd):
            network["sums"][name] = [fields_of(module.input_quantizer), fields_of(module.other_quantizer)]
        codes = getattr(module._modules.get(OUTPUT), "codes", None)
        if codes is not None:
            network["outputs"][name] = fields_of(codes)
    kept = dict(frozen.named_modules())
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    if newer:
        network["version"] = packed_loader.NEWER
    network["norms"] = [
        n for n, m in model.named_modules() if isinstance(m, norms) and not isinstance(kept.get(n), norms)
    ]
    rest = frozen.state_dict(keep_vars=True)
    tensors |= {name: tensor.detach() for name, tensor in rest.items() if id(tensor) not in ours}
    if words:
        tensors["words"] = torch.cat(words)
    return network, {name: t.clone().contiguous() for name, t in tensors.items()}, files


def export_packed(model: nn.Module, path: Path, example: Inputs) -> ExportReport:
    """Write the checkpoint; see `bitwright.deploy.export`."""
    frozen = freeze(model, example)
    network, tensors, files = contents(model, frozen)
    about = {"format": packed_loader.FORMAT, "version": network.pop("version", packed_loader.VERSION)}
    with replacing(path) as new:
        save_file(tensors, str(new), metadata={**about, "network": json.dumps(network, separators=(",", ":"))})
        loaded = load_packed(new, float_twin(model))
        with torch.no_grad():
            example.run(loaded)
        size = new.stat().st_size
    return ExportReport(path, size, sum(f.size_bytes for f in files if f.bits <= 8), True, tuple(files), "packed")


def load_packed(path: str | Path, model: nn.Module) -> nn.Module:
    """The network of a packed checkpoint, in place of the float `model` of the same architecture.

    It predicts what the frozen integer form predicts, to the last bit, at the speed of a reference: on the CPU, in
    evaluation mode, without gradients. `bitwright/deploy/targets/packed_loader.py` alone does the same elsewhere.

    Args:
        path: written by `export(..., target="packed")`.
        model: as it was before `prepare`; its weights do not matter.

    Raises:
        BitwrightError: the file is missing, damaged, of another kind, version or architecture.
    """
    try:
        return packed_loader.load(path, model)
    except ValueError as error:
        raise BitwrightError(str(error)) from error


class PackedFile:
    """The checkpoint loaded into a float copy of the network."""

    def __init__(self, path: Path, network: Network):
        self.model = load_packed(path, float_twin(network.training))
        modules = dict(self.model.named_modules())
        self.weights, self.biases = {}, {}
        self.codes: dict[str, list[Tensor]] = {}
        for name, layer in network.layers.items():
            made: Any = modules[name]
            weight, bias = made.values(), None
            if layer.bias is not None:
                bias = made.bias
                if bias is None:
                    bias = (made.bias_codes * (made.input_quantizer.scale.double() * made.scale.double())).float()
            if isinstance(layer, PhaseConv):
                weight, bias = layer.spread(weight, bias)
            self.weights[name] = weight
            if bias is not None:
                self.biases[name] = bias
        for name, module in modules.items():
            if isinstance(module, packed_loader.Codes):
                module.register_forward_hook(self.hook(name))

    def hook(self, name: str) -> Any:
        """Keeps the codes of one quantizer."""

        def keep(codes: Any, args: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
            numbers, factor = output
            along = lambda t: codes.along_axis(t, numbers.ndim).double()  # noqa: E731
            steps = numbers if factor.equal(codes.scale.double()) else numbers / along(codes.scale)
            self.codes.setdefault(name, []).append((steps + along(codes.zero)).round().to(torch.int16))

        return keep

    def run(self, x: Inputs) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        self.codes = {}
        with torch.no_grad():
            return list(outputs_of(x.run(self.model), "verify").values()), self.codes
