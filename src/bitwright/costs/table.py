"""The cost of a model, layer by layer and in total."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from bitwright.costs.bitops import FLOAT_BITS, bitops
from bitwright.costs.latency import LatencyTable, entry_for
from bitwright.costs.macs import Macs, count_macs
from bitwright.costs.size import FLOAT_BYTES, size_bytes
from bitwright.layers import QuantLayer, multiplies, quantizer_in
from bitwright.prepare import quantizers
from bitwright.quantizer import Quantizer
from bitwright.rules import weight_layers

# The operands of the two products of an attention layer, in the order in which they are computed.
PRODUCTS = (("scores", "key_quantizer", "query_quantizer"), ("values", "value_quantizer", "attention_quantizer"))


@dataclass(frozen=True)
class CostRow:
    """One layer, or one product of an attention layer (`LAYER.scores`, `LAYER.values`; without weights).

    macs: of one sample. weights: how many. weight_bits, input_bits: of the operands, 32 where they are float; for a
    product: of its right and left operand. bitops: macs * weight_bits * input_bits. size_bytes: of the weights; 0
    for weights that an earlier row has counted (tied layers). stored_bits: of the weights in a file; where channels
    have bits of their own, the largest of them, and weight_bits the mean.
    """

    name: str
    kind: str
    macs: int
    weights: int
    weight_bits: float
    input_bits: float
    bitops: float
    size_bytes: float
    stored_bits: int


@dataclass(frozen=True)
class CostTable:
    """Rows in the order of definition, and totals.

    float_parameters: biases, norms and other parameters in 32 bits, not in any row. scales: of all quantizers.
    classifier_float: whether the last layer was counted at 32 bits. latencies: what layers take, where it was measured.
    """

    rows: tuple[CostRow, ...]
    float_parameters: int
    scales: int
    classifier_float: bool
    latencies: LatencyTable | None = None

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        return sum(row.macs for row in self.rows)

    @property
    def bitops(self) -> float:
        """BitOPs of one sample."""
        return sum(row.bitops for row in self.rows)

    @property
    def size_bytes(self) -> float:
        """Bytes of all weights at the width at which files hold them, other parameters and scales in 32 bits."""
        return sum(row.size_bytes for row in self.rows) + FLOAT_BYTES * (self.float_parameters + self.scales)

    @property
    def latency(self) -> float | None:
        """Milliseconds by `latencies`: layers at their bits, and the rest. None where nothing was measured."""
        if self.latencies is None:
            return None
        rows = [row for row in self.rows if FLOAT_BITS not in (row.weight_bits, row.input_bits)]
        found = [(self.latencies.layers.get(row.name), row) for row in rows]
        return self.latencies.rest + sum(entry_for(e, row.stored_bits, round(row.input_bits)) for e, row in found if e)

    def as_dict(self) -> dict[str, Any]:
        """Totals and rows as plain values, ready for JSON."""
        totals = {name: getattr(self, name) for name in ("bitops", "size_bytes", "macs")}
        if self.latencies is not None:
            totals["latency"] = self.latency
        rest = {name: getattr(self, name) for name in ("float_parameters", "scales", "classifier_float")}
        return totals | rest | {"rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows] + [5])
        head = (
            f"{'layer':{width}}  {'kind':18} {'MACs':>14} {'weights':>12} {'W':>3} {'A':>3} {'MBitOPs':>12} {'KB':>10}"
        )
        lines = [
            f"{r.name:{width}}  {r.kind[:18]:18} {r.macs:14,} {r.weights:12,} {r.weight_bits:3.4g} {r.input_bits:3} "
            f"{r.bitops / 1e6:12,.1f} {r.size_bytes / 1000:10,.1f}"
            for r in self.rows
        ]
        rest = FLOAT_BYTES * (self.float_parameters + self.scales) / 1000
        total = (
            f"total: {self.macs:,} MACs, {self.bitops / 1e9:.4g} G BitOPs, {self.size_bytes / 1000:,.1f} KB "
            f"({rest:,.1f} KB of it biases, norms and scales)"
        )
        if self.latencies is not None:
            total += f", {self.latency:.4g} ms ({self.latencies.rest:.4g} ms of it outside of layers)"
        return "\n".join([head, *lines, total])


def cost_table(
    model: nn.Module, example: Any, *, classifier_float: bool = False, latencies: LatencyTable | None = None
) -> CostTable:
    """BitOPs and size of `model` at its present bits.

    Whatever multiplies is in a row; tensors without a quantizer count as 32 bits. The usual convention counts the
    ends at the bits they have (8); papers that keep the classifier in float count it at 32.

    Args:
        model: float or prepared; it need not be calibrated. It runs once, on one sample.
        example: an input batch; its first sample is used.
        classifier_float: count the last convolution or linear layer at 32 bits, weights and input.
        latencies: of the network's layers on some device (`bitwright.measure_latencies`, or a file of one's own).
    """
    found = count_macs(model, example)
    last = weight_layers(model)[-1:] if classifier_float else []
    rows: list[CostRow] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        macs = found.get(name, Macs())
        weights = {id(w): w.numel() for w in main_weights(module)}
        fresh = sum(n for key, n in weights.items() if key not in seen)
        seen |= weights.keys()
        if macs.weighted or weights:
            w, a = (FLOAT_BITS, FLOAT_BITS) if name in last else layer_bits(module)
            held = FLOAT_BITS if name in last else stored_bits(module)
            count = sum(weights.values())
            cost = bitops(macs.weighted, w, a)
            size = float(size_bytes(fresh, held))
            rows.append(CostRow(name, kind_of(module), macs.weighted, count, w, a, cost, size, held))
        rows.extend(product_rows(name, module, macs.products))
    parameters = {id(p): p.numel() for n, p in model.named_parameters() if not is_grid(n, model)}
    rest = sum(n for key, n in parameters.items() if key not in seen)
    scales = sum(q.shape.channels for q in quantizers(model).values())
    return CostTable(tuple(rows), rest, scales, classifier_float, latencies)


def is_grid(parameter: str, model: nn.Module) -> bool:
    """Whether the parameter of that name belongs to a quantizer."""
    owner = parameter.split(".")
    return any(isinstance(model.get_submodule(".".join(owner[:i])), Quantizer) for i in range(1, len(owner)))


def main_weights(module: nn.Module) -> Iterator[Tensor]:
    """The matrices that a layer multiplies with, or looks up: not its bias, nor tokens and position tables."""
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    elif isinstance(
        module, nn.modules.conv._ConvNd | nn.Linear | nn.Bilinear | nn.Embedding | nn.EmbeddingBag
    ) or multiplies(module):
        names = ("weight",)
    else:
        names = ()
    yield from (w for n in names if isinstance(w := getattr(module, n, None), Tensor))


def layer_bits(module: nn.Module) -> tuple[float, float]:
    """Bits of the weight and of the input of a layer, 32 where they are float; see `slot_bits`."""
    return slot_bits(module, "weight_quantizer"), slot_bits(module, "input_quantizer")


def slot_bits(module: nn.Module, slot: str) -> float:
    """Bits of the quantizer in `slot`, 32 without one; the mean where channels have their own."""
    quantizer = quantizer_in(module, slot) if isinstance(module, QuantLayer) else None
    return FLOAT_BITS if quantizer is None else quantizer.mean_bits


def stored_bits(module: nn.Module) -> int:
    """Bits of the weight of a layer in a file: those of its widest channel, as a tensor there has one type."""
    quantizer = quantizer_in(module, "weight_quantizer") if isinstance(module, QuantLayer) else None
    return FLOAT_BITS if quantizer is None else quantizer.most_bits


def product_rows(name: str, module: nn.Module, products: list[int]) -> Iterator[CostRow]:
    """Rows of the products of two activations in one module."""
    for index, macs in enumerate(products):
        if index < len(PRODUCTS):
            label, right, left = PRODUCTS[index]
        else:
            label, right, left = f"product{index}", "", ""
        w, a = slot_bits(module, right), slot_bits(module, left)
        row_name = f"{name}.{label}" if name else label
        yield CostRow(row_name, f"{kind_of(module)} product", macs, 0, w, a, bitops(macs, w, a), 0.0, FLOAT_BITS)


def kind_of(module: nn.Module) -> str:
    """Class name of a layer, without the prefix of the quantized form."""
    return type(module).__name__.removeprefix("Quant") if isinstance(module, QuantLayer) else type(module).__name__
