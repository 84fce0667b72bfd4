"""Quantized classes for the user's own classes that derive from torch's layers and compute as these do."""

import functools
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from bitwright.layers.base import QuantLayer

# What decides what a layer computes. A class with one of its own would lose it.
COMPUTING = ("forward", "_conv_forward", "_output_padding", "__call__", "_call_impl", "__getattr__")


def made(quantized: type[QuantLayer], kind: type[nn.Module]) -> nn.Module:
    """An empty module of `derived_class(quantized, kind)`, to be filled."""
    cls = derived_class(quantized, kind)
    return cls.__new__(cls)


def parts(self: Any, protocol: Any) -> Any:
    """For copies and pickles, which name the two classes that this one, made while the program runs, consists of."""
    return made, (self.quantized_class, self.float_class), *object.__reduce_ex__(self, protocol)[2:]


@functools.cache
def derived_class(quantized: type[QuantLayer], kind: type[nn.Module]) -> type[QuantLayer]:
    """A class that is both: `quantized` in what it computes, `kind` in all else."""
    about = {"quantized_class": quantized, "float_class": kind, "__reduce_ex__": parts, "__module__": kind.__module__}
    return type(f"Quant{kind.__name__}", (quantized, kind), about)


def computes_as(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether `module`, of a class that derives from `base`, computes as a `base` does, on parameters of its own."""
    kind = type(module)
    same = all(getattr(kind, name, None) is getattr(base, name, None) for name in COMPUTING)
    return same and type(kind) is type and "weight" in module._parameters and not is_parametrized(module)
