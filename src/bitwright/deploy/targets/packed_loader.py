"""Loads a packed checkpoint into the float model that it was made of.

This file needs torch and safetensors alone: copied beside a model, it loads what bitwright packed on a machine that has
no bitwright. `load(path, model)` replaces each quantized layer by one that computes on its integers exactly.

The file: safetensors whose metadata has `format` and `version`, and as `network` a JSON object {"layers": {name:
fields}, "sums", "outputs", "norms"}. What a layer needs lies in one int32 tensor, `words`: layer after layer in the
order of the JSON object, and for each layer its weight, its scales and its bias, as far as `fields` has them. Each is a
row of unsigned codes of some bits, one after the other from the lowest bit upwards, and begins with a new word
(compressed-tensors' `pack_to_int32` of a flattened weight, codes less 2^(bits - 1)).

Weight: `bits`, `shape` (the layer's own), `step` and `offset`: (step * code + offset) * scale.
Scales, per output channel: `scale`: [count, bits, signs, m, first, k]: with p = code // signs + first the size is
(m + p % m) * 2^(p // m - k), negative where code % signs is 1.
Bias: `bias`: [count, bits, shift], integers code - shift on the grid input scale * scale; or [count, bits, shift, k]:
(code - shift) * 2^-k.

Scales and biases that are no such numbers are tensors: `NAME.scale`, float32, `NAME.bias_codes`, int32, and
`NAME.bias`, float32; a weight that is not quantized is `NAME.weight`, float32. Norms that followed a layer are folded
into it. Everything else is stored as it was, under its own name.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

FORMAT, VERSION = "bitwright-packed", "2"
NEWER = "3"  # of files with transposed convolutions, or over three axes, which earlier loaders do not know
WORD = 32
TRANSPOSES = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# By the number of axes.
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
# 2^-k, exact.
POWERS = [2.0**-k for k in range(64)]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes below 2^bits, any shape, as int32 words without gaps: ceil(n * bits / 32) of them."""
    groups = F.pad(codes.flatten().long(), (0, -codes.numel() % WORD)).view(-1, WORD)
    words = torch.zeros(groups.shape[0], bits + 1, dtype=torch.int64)
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        shifted = groups[:, i] << shift
        words[:, word] |= shifted & (2**WORD - 1)
        words[:, word + 1] |= shifted >> WORD
    flat = words[:, :bits].flatten()[: math.ceil(codes.numel() * bits / WORD)]
    return torch.where(flat < 2 ** (WORD - 1), flat, flat - 2**WORD).to(torch.int32)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of `pack`, int64."""
    groups = F.pad(words.long() & (2**WORD - 1), (0, -words.numel() % bits)).view(-1, bits)
    groups = F.pad(groups, (0, 1))
    codes = []
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        codes.append(((groups[:, word] | groups[:, word + 1] << WORD) >> shift) & (2**bits - 1))
    return torch.stack(codes, 1).flatten()[:count]


class Words:
    """Reads rows of codes of the file at `path`, one behind the other."""

    def __init__(self, path: str | Path, words: Tensor):
        self.path, self.words, self.at = path, words, 0

    def take(self, count: int, bits: int) -> Tensor:
        """The next `count` codes, int64; ValueError where the file ends before."""
        end = self.at + math.ceil(count * bits / WORD)
        if end > self.words.numel():
            raise ValueError(f"{self.path}: is damaged: its words end too early")
        part, self.at = self.words[self.at : end], end
        return unpack(part, bits, count)

    def scale(self, about: list[int]) -> Tensor:
        """Scales, float32, exact."""
        count, bits, signs, m, first, k = about
        code = self.take(count, bits)
        place = code // signs + first
        size = (m + place % m) * torch.tensor(POWERS, dtype=torch.float64)[k - place // m]
        return torch.where(code % signs == 1, -size, size).float()

    def bias(self, about: list[int]) -> dict[str, Tensor]:
        """{"bias_codes": integers} or {"bias": float32}."""
        count, bits, shift, *k = about
        number = self.take(count, bits) - shift
        return {"bias": (number * POWERS[k[0]]).float()} if k else {"bias_codes": number.int()}

    def layer(self, fields: dict[str, Any]) -> dict[str, Tensor]:
        """The tensors of a layer by the names of `Layer`'s buffers."""
        made = {}
        if "bits" in fields:
            codes = self.take(math.prod(fields["shape"]), fields["bits"])
            made["numbers"] = (codes * fields["step"] + fields["offset"]).to(torch.int16).view(fields["shape"])
        if "scale" in fields:
            made["scale"] = self.scale(fields["scale"])
        return made | (self.bias(fields["bias"]) if "bias" in fields else {})


class Codes(nn.Module):
    """A quantizer: x to (code - zero) and its factor; scale and zero point per tensor or along `axis`."""

    scale: Tensor
    zero: Tensor

    def __init__(self, fields: dict[str, Any]):
        super().__init__()
        self.lo, self.hi, self.axis = fields["lo"], fields["hi"], fields["axis"]
        self.register_buffer("scale", torch.tensor(fields["scale"], dtype=torch.float32))
        self.register_buffer("zero", torch.tensor(fields["zero"], dtype=torch.float32))

    def along_axis(self, t: Tensor, ndim: int) -> Tensor:
        return t if t.numel() == 1 else t.view(-1, *[1] * (-self.axis - 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v = x / self.along_axis(self.scale, x.ndim)
        if bool((self.zero != 0).any()):
            v = v + self.along_axis(self.zero, x.ndim)
        numbers = v.round().clamp(self.lo, self.hi).double() - self.along_axis(self.zero, x.ndim).double()
        if self.scale.numel() == 1 and self.zero.numel() == 1:
            return numbers, self.scale.double()
        return numbers * self.along_axis(self.scale, x.ndim).double(), torch.ones(1, dtype=torch.float64)


def operand(codes: Codes | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """(numbers, factor) of an operand that may be float."""
    return (x.double(), torch.ones(1, dtype=torch.float64)) if codes is None else codes(x)


class Layer(nn.Module):
    """A convolution (transposed or not), linear layer or embedding: sums in float64, exact, then one scaling."""

    numbers: Tensor
    scale: Tensor | None
    bias: Tensor | None
    bias_codes: Tensor | None

    def __init__(self, source: Any, fields: dict[str, Any], tensors: dict[str, Tensor]):
        super().__init__()
        self.register_buffer("numbers", tensors["numbers"] if "numbers" in tensors else tensors["weight"])
        for name in ("scale", "bias", "bias_codes"):
            self.register_buffer(name, tensors.get(name))
        self.input_quantizer = Codes(fields["input"]) if fields["input"] else None
        self.source, self.same = [source], fields.get("same", False)  # in a list: no submodule

    def values(self) -> Tensor:
        """The weight, float32."""
        if self.scale is None:
            return self.numbers
        source = self.source[0]
        if isinstance(source, TRANSPOSES) and self.scale.numel() > 1:  # output channels along axis 1, in groups
            along = self.scale.view(source.groups, 1, -1, *[1] * (self.numbers.ndim - 2))
            return (self.numbers.float().unflatten(0, (source.groups, -1)) * along).flatten(0, 1)
        return self.numbers.float() * self.scale.view(-1, *[1] * (self.numbers.ndim - 1))

    def padded(self, x: Tensor) -> Tensor:
        source = self.source[0]
        pads = list(source._reversed_padding_repeated_twice)
        if self.same:
            pads = []
            axes = zip(x.shape[2:], source.kernel_size, source.stride, source.dilation, strict=True)
            for size, k, s, d in reversed(list(axes)):
                total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
                pads += [total // 2, total - total // 2]
        mode = "constant" if source.padding_mode == "zeros" else source.padding_mode
        return F.pad(x, pads, mode=mode) if any(pads) else x

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        source, numbers = self.source[0], self.numbers
        if isinstance(source, nn.Embedding):
            return F.embedding(x, self.values())
        centered, factor = operand(self.input_quantizer, x)
        trailing = numbers.ndim - 2
        if isinstance(source, TRANSPOSES):
            about: Any = (source.stride, source.padding, source.kernel_size, trailing, source.dilation)
            extra: Any = source._output_padding(x, output_size, *about)
            transpose: Any = TRANSPOSE[trailing]
            where = (source.stride, source.padding, extra, source.groups, source.dilation)
            sums = transpose(centered, numbers.double(), None, *where)
        elif trailing:
            convolve = CONVOLVE[trailing]
            where = (source.stride, 0, source.dilation, source.groups)
            sums = convolve(self.padded(centered), numbers.double(), None, *where)
        else:
            sums = F.linear(centered, numbers.double())
        view = lambda t: t.double().view(-1, *[1] * trailing)  # noqa: E731
        if self.bias_codes is not None:
            sums = sums + view(self.bias_codes)
        y = sums * (factor if self.scale is None else factor * view(self.scale))
        return (y if self.bias is None else y + view(self.bias)).to(x.dtype)


class Sum(nn.Module):
    """A sum of two operands, each on its own grid."""

    def __init__(self, fields: list[dict[str, Any] | None]):
        super().__init__()
        self.input_quantizer, self.other_quantizer = (Codes(f) if f else None for f in fields)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        (x, x_factor), (y, y_factor) = operand(self.input_quantizer, a), operand(self.other_quantizer, b)
        return (x * x_factor + y * y_factor).to(a.dtype)


def quantize_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """The forward hook of a module whose output is on a grid."""
    numbers, factor = module.output_quantizer(output)  # pyright: ignore
    return (numbers * factor).to(output.dtype)


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(network, tensors) of a packed checkpoint; ValueError in one line for any other file."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: is no file")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        network = json.loads(metadata.get("network", "{}"))
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: is damaged or no safetensors file: {reason}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: is no packed checkpoint of bitwright")
    if metadata.get("version") not in (VERSION, NEWER):
        found = metadata.get("version")
        raise ValueError(f"{path}: is of version {found}; this loader reads {VERSION} and {NEWER}")
    return network, tensors


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """Turn the float `model` into the network of the file, in place; returns it, on the CPU in evaluation mode.

    Args:
        path: of a packed checkpoint.
        model: of the architecture that was packed, as it is before quantization; its weights do not matter.

    Raises:
        ValueError: in one line: the file is damaged, of another kind, version or architecture.
    """
    network, tensors = read(path)
    modules = dict(model.cpu().eval().named_modules())
    rest = dict(tensors)
    words = Words(path, rest.pop("words", torch.zeros(0, dtype=torch.int32)))
    made: dict[str, nn.Module] = {}
    try:
        for name, fields in network["layers"].items():
            prefix = f"{name}." if name else ""
            parts = ("weight", "scale", "bias", "bias_codes")
            own = {part: rest.pop(prefix + part) for part in parts if prefix + part in rest}
            shape = list(modules[name].weight.shape)  # pyright: ignore
            if type(modules[name]).__name__ == "Conv1D":  # transformers': a linear layer whose weight is (in, out)
                shape.reverse()
            if shape != fields["shape"]:
                raise ValueError(f"{path}: is of another network: {name}.weight has shape {fields['shape']}")
            made[name] = Layer(modules[name], fields, own | words.layer(fields))
        made |= {name: Sum(fields) for name, fields in network["sums"].items()}
        for name in network["norms"]:
            norm: Any = modules[name]
            made[name] = nn.Sequential(norm.drop, norm.act) if hasattr(norm, "act") else nn.Identity()
        by_id = {id(modules[name]): new for name, new in made.items()}
        holder = nn.ModuleList([model])
        for parent in list(holder.modules()):
            for key, child in parent._modules.items():
                parent._modules[key] = by_id.get(id(child), child)
        for name, fields in network["outputs"].items():
            target = made.get(name, modules[name])
            target.add_module("output_quantizer", Codes(fields))
            target.register_forward_hook(quantize_output)
    except KeyError as error:
        raise ValueError(f"{path}: is of another network: it has a part called {error} that the model lacks") from None
    loaded = holder[0]
    own_state = loaded.state_dict(keep_vars=True)
    ours = {id(t) for module in loaded.modules() if isinstance(module, Layer | Codes) for t in module.buffers()}
    expected = {name for name, tensor in own_state.items() if id(tensor) not in ours}
    different = sorted(expected ^ rest.keys())
    if different:
        raise ValueError(f"{path}: is of another network: only one of the two has {different[0]}")
    try:
        loaded.load_state_dict(rest, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path}: is of another network: {reason}") from None
    for parameter in loaded.parameters():
        parameter.requires_grad_(False)
    return loaded
