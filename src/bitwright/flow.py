"""What flows where in a float model: one forward pass, seen by hooks on its modules and on torch's functions."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bitwright.batches import device_of, example_of
from bitwright.calibrate import evaluating


@dataclass(eq=False)
class Value:
    """A tensor between two functions of a forward pass.

    kind: name of the function that made it, without the underscore of in-place forms; "input" for the model's input.
    owner: name of the innermost module that called the function. inputs: the values that it read, in order.
    modules: names of the modules whose output it is, innermost first. readers: the values made from it. leaves:
    whether it is an output of the model.
    """

    kind: str
    owner: str
    inputs: tuple["Value", ...]
    modules: list[str] = field(default_factory=list)
    readers: list["Value"] = field(default_factory=list)
    leaves: bool = False


class Flow(TorchFunctionMode):
    """The values of one forward pass.

    Attributes:
        values: in the order in which they were made. calls: how often each module ran.
    """

    def __init__(self):
        super().__init__()
        self.values: list[Value] = []
        self.calls: Counter[str] = Counter()
        self.stack: list[str] = [""]
        self._of: dict[int, Value] = {}
        self._alive: list[Tensor] = []  # an address is a name only while the tensor lives

    def add(self, tensor: Tensor, value: Value) -> None:
        """From now on `tensor` is `value`."""
        self._of[id(tensor)] = value
        self._alive.append(tensor)
        self.values.append(value)
        for source in value.inputs:
            source.readers.append(value)

    def of(self, tensor: Any) -> Value | None:
        """The value that `tensor` is now; None for parameters, constants and what is no tensor."""
        return self._of.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        given = tree_leaves((args, kwargs or {}))
        known = [(t, t._version) for t in given if self.of(t) is not None]
        out = func(*args, **(kwargs or {}))
        # dict: a tensor that is read twice by one function is one reader.
        inputs = tuple(dict.fromkeys(v for t, _ in known if (v := self.of(t)) is not None))
        if not inputs:
            return out
        before = {id(t): version for t, version in known}
        kind = getattr(func, "__name__", "")
        kind = kind if kind.startswith("__") else kind.removesuffix("_")
        for made in tree_leaves(out):
            # What comes out as it went in (dropout in evaluation, contiguous) is the same value.
            if isinstance(made, Tensor) and made._version != before.get(id(made)):
                self.add(made, Value(kind, self.stack[-1], inputs))
        return out

    def enter(self, name: str) -> None:
        """A module begins."""
        self.calls[name] += 1
        self.stack.append(name)

    def leave(self, name: str, output: Any) -> None:
        """A module is done."""
        self.stack.pop()
        value = self.of(output)
        if value is not None:
            value.modules.append(name)

    def once(self, value: Value) -> list[str]:
        """The modules whose output `value` is and that ran once, innermost first."""
        return [name for name in value.modules if self.calls[name] == 1]


def trace(model: nn.Module, example: Any) -> Flow:
    """The values of one forward pass in evaluation mode; the model is left as it was.

    Args:
        model: float. example: an input batch; its first sample is used.
    """
    flow = Flow()
    inputs = example_of(example, "topology").by_row(lambda t: t[:1])
    with torch.inference_mode(False):  # whose tensors do not say whether they were written to
        inputs = inputs.mapped(lambda t: t.to(device_of(model)).clone())
    for x in inputs.tensors:
        flow.add(x, Value("input", "", ()))
    hooks: list[Any] = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, n=name: flow.enter(n)))
        hooks.append(module.register_forward_hook(lambda _m, _a, out, n=name: flow.leave(n, out)))
    try:
        with evaluating(model), torch.inference_mode(False), torch.no_grad(), flow:
            out = model(*inputs.args, **inputs.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    for tensor in tree_leaves(out):
        value = flow.of(tensor)
        if value is not None:
            value.leaves = True
    return flow
