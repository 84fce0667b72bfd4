"""Tensors that wait for their reader: a quantizer then does what came before it and quantization in one pass.

In training some layers give a `Deferred`, a tensor without memory that knows what it would hold. A quantizer reads
what that is computed from; anything else that touches it, in Python or in C++, gets its values, computed then and
kept. What waits, and how a quantizer reads it, is a `Pending`: batch norms (`deferred_norm`), GELU
(`deferred_gelu`) and, for layers that multiply integers, quantized tensors (`codes`).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bitwright.errors import BitwrightError
from bitwright.kernels.twice import runs_twice

aten = torch.ops.aten


class Pending:
    """What a deferred tensor holds; `value` once somebody has read it. Abstract.

    x: what the values are shaped, laid out and, unless there is a `dtype`, typed as, and computed from. tracked:
    whether gradients reach what they are computed from. Made without, a tensor may still get a history later: as the
    output of somebody's Function.
    """

    dtype: torch.dtype | None = None

    def __init__(self, x: Tensor):
        self.x = x
        self.tracked = torch.is_grad_enabled()
        self.value: Tensor | None = None
        self.note_versions()

    def sources(self) -> list[Tensor]:
        """What the values, or their gradients, are computed from."""
        return [t for t in (self.x, self.value) if t is not None]

    def note_versions(self) -> None:
        """From now on nothing may be written to the sources."""
        self.versions = [t._version for t in self.sources()]

    def check(self) -> None:
        """Raise BitwrightError where something was; autograd refuses that as well."""
        if [t._version for t in self.sources()] != self.versions:
            raise BitwrightError("a tensor that a deferred tensor is computed from was changed in place")

    def read(self) -> Tensor:
        """The values."""
        if self.value is None:
            self.check()
            self.value = self.compute()
            self.note_versions()
        return self.value

    def compute(self) -> Tensor:
        """The values, computed anew."""
        raise NotImplementedError

    def quantize(self, t: "Deferred", *quantizer: Any) -> Tensor | None:
        """`t`, which holds this, quantized; None where its values are needed in themselves.

        quantizer: the arguments of `bitwright::fake_quantize` behind its first; one scale.
        """
        raise NotImplementedError

    def relu(self, t: "Deferred") -> Tensor | None:
        """Relu of `t`, where that can wait; else None. So the others."""

    def relu_(self, t: "Deferred") -> Tensor | None:
        """The same in place."""

    def add(self, t: "Deferred", other: Tensor) -> Tensor | None:
        """`t` + `other`, which is shaped, laid out and typed as `t`."""

    def add_(self, t: "Deferred", other: Tensor) -> Tensor | None:
        """The same in place."""


class Deferred(Tensor):
    """A tensor of `pending`'s shape and type without memory of its own; see the module's text."""

    pending: Pending

    @staticmethod
    def __new__(cls, pending: Pending) -> "Deferred":
        x = pending.x
        dtype = pending.dtype or x.dtype
        made = Tensor._make_wrapper_subclass(cls, x.shape, strides=x.stride(), dtype=dtype, device=x.device)
        made.pending = pending
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Above autograd: relu, whose own node would keep the values."""
        with torch._C.DisableTorchFunctionSubclass():
            waits = func in RELUS and not runs_twice() and (args[0].pending.tracked or not args[0].requires_grad)
            relu = getattr(args[0].pending, RELUS[func])(args[0]) if waits else None
            return func(*args, **(kwargs or {})) if relu is None else relu

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Below autograd: everything else."""
        waiting = WAITING[func](*args, **(kwargs or {})) if func in WAITING else None
        if waiting is not None:
            return waiting
        read = tree_map_only(Deferred, plain, args)
        if func._schema.is_mutable:
            torch.autograd.graph.increment_version(read[0])
        return func(*read, **tree_map_only(Deferred, plain, kwargs or {}))

    def detach(self) -> Tensor:
        return self.pending.read().detach()

    def numpy(self, *, force: bool = False) -> Any:
        return super().numpy(force=force) if self.requires_grad and not force else self.detach().numpy()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.detach().untyped_storage()

    def data_ptr(self) -> int:
        return self.detach().data_ptr()

    def __repr__(self, **options: Any) -> str:
        return repr(self.detach())


def values(t: Any) -> Any:
    """`t`, or its values if it is deferred; compilers that meet one leave this to eager code."""
    return t.pending.read() if isinstance(t, Deferred) else t


plain: Callable[[Any], Any] = torch.compiler.disable(values)  # pyright: ignore[reportAssignmentType]


def watched(t: Deferred) -> bool:
    """Whether somebody wants the gradient of `t` as it is now."""
    return bool(t._backward_hooks) or t.retains_grad


def differentiable(t: Deferred) -> bool:
    """Whether what is made of `t` now has a gradient; without one `t` is a constant, whatever made it."""
    return torch.is_grad_enabled() and t.requires_grad


def alike(t: Any, other: Any) -> bool:
    """Whether `t` is deferred and `other` a tensor of the same kind."""
    if not isinstance(t, Deferred) or not isinstance(other, Tensor):
        return False
    return (other.shape, other.stride(), other.dtype, other.device) == (t.shape, t.stride(), t.dtype, t.device)


def add(a: Any, b: Any, *, alpha: float = 1) -> Tensor | None:
    """a + b where one of them can wait for it; else None."""
    for t, other in ((a, b), (b, a)):
        made = t.pending.add(t, other) if alpha == 1 and alike(t, other) and not runs_twice() else None
        if made is not None:
            return made
    return None


def add_(a: Any, b: Any, *, alpha: float = 1) -> Tensor | None:
    """The same in place of `a`."""
    return a.pending.add_(a, b) if alpha == 1 and alike(a, b) and not runs_twice() else None


# By the names of `Pending`'s methods.
RELUS = {
    **dict.fromkeys((torch.relu, Tensor.relu, F.relu), "relu"),
    **dict.fromkeys((torch.relu_, Tensor.relu_), "relu_"),
}
WAITING = {
    aten.add.Tensor: add,
    aten.add_.Tensor: add_,
    aten.detach.default: lambda t: Deferred(t.pending),  # how autograd keeps a node's output
}


def quantize(t: Deferred, scale: Tensor, *rest: Any) -> Tensor | None:
    """`t` quantized in one pass with what it waits for; None where its values are needed in themselves.

    scale and rest: the arguments of `bitwright::fake_quantize` behind its first.
    """
    p = t.pending
    if p.value is not None or scale.numel() > 1 or runs_twice():
        return None
    p.check()
    if torch.is_grad_enabled() and (watched(t) or not t.requires_grad or not p.tracked):
        return None
    return p.quantize(t, scale, *rest)
