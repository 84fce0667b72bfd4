"""Batch norms that wait for their reader: a quantizer then does norm, addition, relu and quantization in one pass.

In training a batch norm gives a `Deferred`, a tensor without memory that knows what it would hold. Relu and the
addition of a tensor keep it waiting; a quantizer reads the norm's own input; anything else that touches it, in
Python or in C++, gets its values, computed then and kept. For autograd it is the output of one node (`Joined`) which
has the gradients of everything so far, and which a quantizer replaces by one with the quantized values as well.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from bitwright.errors import BitwrightError
from bitwright.kernels import norm as norms
from bitwright.kernels.norm import Norm
from bitwright.kernels.sources import NormSource, Source, remember

aten = torch.ops.aten


class Pending:
    """What a deferred tensor holds: norm(x), plus `other`, relu; `value` once somebody has read it.

    x: float32 or bfloat16 on the CPU, dense (`bitwright.kernels.norm.measure`). other: of the same kind, or None.
    """

    def __init__(self, x: Tensor, norm: Norm, other: Tensor | None = None, relu: bool = False):
        self.x, self.norm, self.other, self.relu = x, norm, other, relu
        self.value: Tensor | None = None
        self.note_versions()

    def sources(self) -> list[Tensor]:
        """What the values, or their gradients, are computed from."""
        return [t for t in (self.x, plain(self.other), self.value) if t is not None]

    def note_versions(self) -> None:
        """From now on nothing may be written to the sources."""
        self.versions = [t._version for t in self.sources()]

    def check(self) -> None:
        """Raise BitwrightError where something was; autograd refuses that as well."""
        if [t._version for t in self.sources()] != self.versions:
            raise BitwrightError("a tensor that a batch norm's output is computed from was changed in place")

    def read(self) -> Tensor:
        """The values."""
        if self.value is None:
            self.check()
            self.value, _ = norms.forward(self.x, self.norm, plain(self.other), self.relu, None, True)
            self.note_versions()
            assert self.value is not None
        return self.value

    def quantize(self, *quantizer: Any) -> Tensor:
        """The values quantized; arguments: of `bitwright::fake_quantize` behind its first."""
        # A sum has another reader nearly always; and its second operand need not be kept when its value is.
        keep = self.other is not None
        self.value, y = norms.forward(self.x, self.norm, plain(self.other), self.relu, quantizer, keep)
        self.note_versions()
        assert y is not None
        return y


class Deferred(Tensor):
    """A tensor of `pending`'s shape and type without memory of its own; see the module's text."""

    pending: Pending

    @staticmethod
    def __new__(cls, pending: Pending) -> "Deferred":
        x = pending.x
        made = Tensor._make_wrapper_subclass(cls, x.shape, strides=x.stride(), dtype=x.dtype, device=x.device)
        made.pending = pending
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Above autograd: relu, whose own node would keep the values."""
        with torch._C.DisableTorchFunctionSubclass():
            joined = RELUS[func](args[0]) if func in RELUS else None
            return func(*args, **(kwargs or {})) if joined is None else joined

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


def relu(t: Deferred) -> Tensor | None:
    """Relu of what waits; None where it does not."""
    p = t.pending
    if p.value is not None:
        return None
    made = Deferred(Pending(p.x, p.norm, p.other, True))
    return join(made) if differentiable(t) else made


def relu_(t: Deferred) -> Tensor | None:
    """The same in place."""
    if t.pending.value is not None or watched(t) or (t.requires_grad and not differentiable(t)):
        return None
    t.pending.relu = True
    return join(t) if t.requires_grad else t


def addable(t: Any, other: Any, alpha: float) -> bool:
    """Whether `t` waits with neither addition nor relu yet, and `other` can be added by the same pass."""
    if not isinstance(t, Deferred) or not isinstance(other, Tensor) or alpha != 1:
        return False
    p = t.pending
    alike = (other.shape, other.stride(), other.dtype, other.device) == (t.shape, t.stride(), t.dtype, t.device)
    return alike and p.value is None and p.other is None and not p.relu


def add(a: Any, b: Any, *, alpha: float = 1) -> Deferred | None:
    """a + b where one of them waits and the other is a tensor of the same kind; else None."""
    if not addable(a, b, alpha):
        a, b = b, a
    return Deferred(Pending(a.pending.x, a.pending.norm, b)) if addable(a, b, alpha) else None


def add_(a: Any, b: Any, *, alpha: float = 1) -> Deferred | None:
    """The same in place of `a`."""
    if not addable(a, b, alpha):
        return None
    a.pending.other = b
    a.pending.note_versions()
    return a


RELUS = {
    **dict.fromkeys((torch.relu, Tensor.relu, F.relu), relu),
    **dict.fromkeys((torch.relu_, Tensor.relu_), relu_),
}
WAITING = {
    aten.add.Tensor: add,
    aten.add_.Tensor: add_,
    aten.detach.default: lambda t: Deferred(t.pending),  # how autograd keeps a node's output
}


class Joined(torch.autograd.Function):
    """Norm, addition, relu and quantization as one node; the deferred tensor becomes its output.

    Arguments: the tensor, the norm's input, gain and bias, what is added (or None), scale and zeros (or None) of the
    quantizer, what is pending, and the further arguments of `bitwright::fake_quantize`; without these: no quantizer,
    and the quantized values are None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tensor: Deferred,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        other: Tensor | None,
        scale: Tensor | None,
        zeros: Tensor | None,
        pending: Pending,
        *rest: Any,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.mark_dirty(tensor)
        ctx.set_materialize_grads(False)
        y = None
        if rest:
            y = pending.quantize(scale, zeros, *rest)
        ctx.save_for_backward(x, weight, bias, *pending.norm[2:], pending.value, scale, zeros, *rest[:5])
        # A sum's values, if any, are not there yet; in all other cases the node must not outlive what it saves.
        ctx.sum = pending if other is not None and not rest else None
        ctx.relu, ctx.numbers = pending.relu, rest[5:]
        return tensor, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gz: Tensor | None, gy: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, weight, bias, mean, invstd, z, *tensors = ctx.saved_tensors
        if gz is None and gy is None:
            return (None,) * len(ctx.needs_input_grad)
        norm = Norm(weight, bias, mean, invstd)
        quantizer = (*tensors, *ctx.numbers) if ctx.numbers else None
        if quantizer and gy is None:
            gy = torch.zeros_like(x)
        if ctx.sum is not None:
            ctx.sum.check()
            z = ctx.sum.read()
        made = norms.backward(gy, plain(gz), x, z, norm, ctx.relu, quantizer)
        grads = (None, made.x, made.weight, made.bias, made.other, made.scale, made.zeros)
        return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))


def join(tensor: Deferred, *quantizer: Any) -> Any:
    """Make `tensor` the output of a node of its own; returns it, or with a quantizer's arguments: it, quantized."""
    p = tensor.pending
    tensor.detach_()  # the new node has the gradients of everything that its history had
    scale, zeros, *rest = quantizer or (None, None)
    _, y = Joined.apply(tensor, p.x, p.norm.weight, p.norm.bias, p.other, scale, zeros, p, *rest)  # pyright: ignore
    return y if quantizer else tensor


def batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, running: tuple[Tensor, Tensor] | None, eps: float, momentum: float
) -> Tensor:
    """`torch.nn.functional.batch_norm` in training, deferred; arguments: see `bitwright.kernels.norm.measure`."""
    made = Deferred(Pending(x, norms.measure(x, weight, bias, running, eps, momentum)))
    return join(made) if torch.is_grad_enabled() else made


def quantize(tensor: Deferred, scale: Tensor, zeros: Tensor | None, *rest: Any) -> Tensor | None:
    """`tensor` quantized in one pass with its norm; None where its values are needed in themselves.

    scale, zeros and rest: the arguments of `bitwright::fake_quantize` behind its first.
    """
    p = tensor.pending
    if p.value is not None or scale.numel() > 1:
        return None
    p.check()
    if not torch.is_grad_enabled():
        return p.quantize(scale, zeros, *rest)
    if watched(tensor) or not tensor.requires_grad:
        return None
    y = join(tensor, scale, zeros, *rest)
    if p.value is None:
        return remember(y, NormSource(p.x, p.norm, p.relu, (scale, zeros, *rest)))
    return remember(y, Source(p.value, scale, zeros, *rest))
