"""Hardswish of codes, as `bitwright.deploy.hard` writes it, by one table of 256."""

import numpy as np
from onnx import NodeProto, TensorProto

from bitwright.runtime import reference
from bitwright.runtime.ops import Codes, Table
from bitwright.runtime.patterns import grid_of, limits, quantizer_of
from bitwright.runtime.planner import Planner, Value


def hardswish(plan: Planner, node: NodeProto) -> bool:
    """A Clip of codes whose value is multiplied with that of the same codes, unclipped, in front of a quantizer."""
    graph, x = plan.graph, plan.values.get(node.input[0])
    bounds, gate = limits(graph, node), graph.sole_reader(node.output[0])
    if x is None or x.codes is None or x.kind != TensorProto.UINT8 or bounds is None or gate is None:
        return False
    product = graph.sole_reader(gate.output[0]) if gate.op_type == "DequantizeLinear" else None
    if product is None or product.op_type != "Mul":
        return False
    whole = graph.producer.get(next((name for name in product.input if name != gate.output[0]), ""))
    last = graph.sole_reader(product.output[0])
    found = None if last is None else quantizer_of(graph, last)
    if whole is None or whole.op_type != "DequantizeLinear" or whole.input[0] != node.input[0] or found is None:
        return False
    grids, (codes, name) = [grid_of(graph, n) for n in (whole, gate)], found
    if grids[0] is None or grids[1] is None:
        return False
    numbers = np.arange(256)
    products = (numbers - grids[0].zero) * (np.clip(numbers, *bounds) - grids[1].zero)
    ratio = np.float32(grids[0].scale) * np.float32(grids[1].scale) / np.float32(codes.scale)
    table = reference.rounded(products.astype(np.float32) * ratio, codes)
    reached = table[x.codes.lo : x.codes.hi + 1]
    codes = Codes(codes.scale, codes.zero, int(reached.min()), int(reached.max()))
    plan.take([node, gate, product, graph.producer[name], *([last] if last is not None else [])])
    plan.emit(Table(table), [x], name, Value(name, codes, x.image, TensorProto.UINT8), node.output[0])
    return True
