"""Multiply-accumulates of a model, counted below its modules, where a functional call cannot hide."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bitwright.batches import example_of
from bitwright.calibrate import evaluating
from bitwright.prepare import quantizers

aten = torch.ops.aten
BATCHED = (aten.bmm, aten.baddbmm)


@dataclass
class Macs:
    """Of one module, without its children.

    weighted: of convolutions and linear maps. products: one entry per kind of product of two activations, in the
    order in which a forward pass first comes to it (attention: scores, then values).
    """

    weighted: int = 0
    products: list[int] = field(default_factory=list)


class _Counter(TorchDispatchMode):
    """Adds up multiply-accumulates under the name of the innermost module that runs."""

    def __init__(self):
        super().__init__()
        self.found: dict[str, Macs] = {}
        self.stack: list[tuple[str, int]] = []  # (module, its products so far in this call)

    def enter(self, name: str) -> None:
        self.stack.append((name, 0))

    def leave(self) -> None:
        self.stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in flop_registry:
            name, product = self.stack.pop() if self.stack else ("", 0)
            own = self.found.setdefault(name, Macs())
            macs = int(flop_registry[packet](*args, **(kwargs or {}), out_val=out)) // 2
            if packet not in BATCHED:
                own.weighted += macs
            else:
                own.products.extend([0] * (product + 1 - len(own.products)))
                own.products[product] += macs
                product += 1
            self.stack.append((name, product))
        return out


def count_macs(model: nn.Module, example: Any) -> dict[str, Macs]:
    """Multiply-accumulates of one sample by the dotted name of the module that computes.

    The model runs once in evaluation mode with every quantizer bypassed, so it need not be calibrated; fused attention
    is taken apart. Products of batches of matrices count as products of activations, everything else as weighted.
    Recurrent layers count as nothing.

    Args:
        model: float or prepared. example: an input batch, of which the first sample is used.
    """
    counter = _Counter()
    hooks: list[Any] = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, n=name: counter.enter(n)))
        hooks.append(module.register_forward_hook(lambda *_: counter.leave()))
    bypassed = [(q, q.bypass) for q in quantizers(model).values()]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        for quantizer, _ in bypassed:
            quantizer.bypass = True
        torch.backends.mha.set_fastpath_enabled(False)
        eager = torch.compiler.set_stance("force_eager")
        with eager, evaluating(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            example_of(example, "cost").by_row(lambda t: t[:1]).run(model)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for quantizer, bypass in bypassed:
            quantizer.bypass = bypass
        for hook in hooks:
            hook.remove()
    return counter.found
