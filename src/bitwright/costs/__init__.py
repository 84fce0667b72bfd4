"""What an assignment of bits costs: BitOPs, size and latency, as functions of the bits and as a table of a model."""

from bitwright.costs.assignment import LayerCost
from bitwright.costs.bitops import bitops
from bitwright.costs.budget import parse_budget
from bitwright.costs.latency import LatencyTable, read_latencies
from bitwright.costs.macs import Macs, count_macs
from bitwright.costs.size import size_bytes
from bitwright.costs.table import CostRow, CostTable, cost_table

__all__ = [
    "CostRow",
    "CostTable",
    "LatencyTable",
    "LayerCost",
    "Macs",
    "bitops",
    "cost_table",
    "count_macs",
    "parse_budget",
    "read_latencies",
    "size_bytes",
]
