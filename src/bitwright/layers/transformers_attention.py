"""transformers' attention with quantized products; imported only where a model has brought transformers.

Its attention layers, whatever their model, ask a table of functions for the one that computes the products, by the name
that their configuration has. A quantized layer finds a name of ours there; its forward stays what it was.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from bitwright.errors import BitwrightError
from bitwright.layers.attention import QuantAttentionBase, scaled_dot_product

NAME = "bitwright"
# What some models add to the products, by the argument that brings it.
FOREIGN = ("softcap", "s_aux", "head_mask")


class Redirected:
    """A layer's configuration in everything but the function that computes its products."""

    _attn_implementation = NAME

    def __init__(self, config: Any):
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_config"], name)


class QuantTransformersAttention(QuantAttentionBase):
    """What the quantized classes of transformers' attention layers share; `quantized_class` makes them.

    Projections are layers of their own, quantized as such. Deployed, `products` holds the integer form of the products.
    """

    through_interface = True
    float_class: type[nn.Module]

    @property
    def config(self) -> Any:
        """The configuration, with our function in it."""
        return Redirected(self.__dict__["config"])

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made while the program runs, so that copies and pickles name the float one.
        return fresh, (self.float_class,), *super().__reduce_ex__(protocol)[2:]


@functools.cache
def quantized_class(kind: type[nn.Module]) -> type[QuantTransformersAttention]:
    """The quantized class of an attention class of transformers."""
    return type(f"Quant{kind.__name__}", (QuantTransformersAttention, kind), {"float_class": kind})


def fresh(kind: type[nn.Module]) -> nn.Module:
    """An empty module of the quantized class of `kind`, to be filled."""
    made = quantized_class(kind)
    return made.__new__(made)


def additive(mask: Tensor | None, causal: bool, q: Tensor, k: Tensor) -> Tensor | None:
    """What is added to the scores. A mask of transformers is True where a query attends, or numbers, or absent: the
    function then hides what comes later where the attention is `causal`.

    Masked scores are the lowest number, not -inf: a row of padding may have nothing to attend to.
    """
    low = torch.finfo(q.dtype).min
    if mask is None:
        queries, keys = q.shape[-2], k.shape[-2]
        return q.new_full((queries, keys), low).triu(1) if causal and queries > 1 else None
    if mask.dtype == torch.bool:
        return q.new_zeros(mask.shape).masked_fill(~mask, low)
    return mask.to(q.dtype)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The function in transformers' table: (N, heads, tokens, d) to (N, tokens, heads, d), and the probabilities.

    Raises:
        BitwrightError: the model adds something to the products that has no quantized form, or its mask is for kernels
            that take none of ours.
    """
    kind = module.float_class.__name__
    added = next((name for name in FOREIGN if kwargs.get(name) is not None), None)
    if added is not None or not (attention_mask is None or isinstance(attention_mask, Tensor)):
        raise BitwrightError(
            f"{kind}: its products with {added or 'masks of flex attention'} have no quantized form; leave them float: "
            f"bitwright.Rule(match='type:{kind}', attention=None)"
        )
    if attention_mask is not None and attention_mask.ndim < 3:
        raise BitwrightError(
            f"{kind}: masks of flash attention are not accepted; load it with attn_implementation='sdpa'"
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for t in (key, value))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = additive(attention_mask, causal, query, key)
    if position_bias is not None:
        mask = position_bias if mask is None else position_bias + mask
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    products = getattr(module, "products", None)
    if products is not None:
        out, probabilities = products(query, key, value, mask, scaled=False)
    else:
        exact = module.reproducible and not module.training
        out, probabilities = scaled_dot_product(
            query, key, value, module.product_quantizers(), mask, dropout, scaled=False, reproducible=exact
        )
    return out.transpose(1, 2).contiguous(), probabilities


AttentionInterface.register(NAME, attend)
