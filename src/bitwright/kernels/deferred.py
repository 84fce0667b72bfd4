"""Batch norms that wait for their reader: a quantizer then does norm, addition, relu and quantization in one pass.

In training a batch norm gives a `Deferred`, a tensor without memory that knows what it would hold. Relu and the
addition of a tensor keep it waiting; a quantizer reads the norm's own input; anything else that touches it, in
Python or in C++, gets its values, computed then and kept. Autograd sees ordinary operators until a quantizer joins
them: its node gives the gradients of all, for the quantized values and for other readers of the same tensor.
"""

from typing import Any

import torch
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

    x: float32 or bfloat16 on the CPU, contiguous, (samples, channels, ...). other: of the same kind, or None.
    """

    def __init__(self, x: Tensor, norm: Norm, other: Tensor | None = None, relu: bool = False):
        self.x, self.norm, self.other, self.relu = x, norm, other, relu
        self.value: Tensor | None = None
        self.versions = self.present()

    def present(self) -> list[int]:
        """Versions of the tensors that values are computed from."""
        return [t._version for t in (self.x, plain(self.other)) if t is not None]

    def check(self) -> None:
        """Raise BitwrightError where such a tensor was written to; autograd refuses that too, if later."""
        if self.present() != self.versions:
            raise BitwrightError("the input of a batch norm was changed in place before its output was read")

    def read(self) -> Tensor:
        """The values."""
        if self.value is None:
            self.check()
            self.value, _ = norms.forward(self.x, self.norm, plain(self.other), self.relu, None, True)
            assert self.value is not None
        return self.value


class Deferred(Tensor):
    """A tensor of `pending`'s shape and type without memory of its own; see the module's text."""

    pending: Pending
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @staticmethod
    def __new__(cls, pending: Pending) -> "Deferred":
        x = pending.x
        made = Tensor._make_wrapper_subclass(cls, x.shape, strides=x.stride(), dtype=x.dtype, device=x.device)
        made.pending = pending
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waiting = WAITING[func](*args, **(kwargs or {})) if func in WAITING else None
        if waiting is not None:
            return waiting
        return func(*tree_map_only(Deferred, plain, args), **tree_map_only(Deferred, plain, kwargs or {}))

    def detach(self) -> Tensor:
        """The values; code that detaches is about to look at them, maybe past torch's operators."""
        return self.pending.read().detach()

    def __repr__(self, **options: Any) -> str:
        return repr(self.detach())


def plain(t: Any) -> Any:
    """`t`, or its values if it is deferred."""
    return t.pending.read() if isinstance(t, Deferred) else t


def waits(t: Any) -> bool:
    """Whether `t` is a deferred norm that nobody has read, with neither addition nor relu yet."""
    return isinstance(t, Deferred) and t.pending.value is None and t.pending.other is None and not t.pending.relu


def relu(t: Deferred) -> Deferred | None:
    """Relu of what waits; None where it does not."""
    p = t.pending
    return Deferred(Pending(p.x, p.norm, p.other, True)) if p.value is None else None


def relu_(t: Deferred) -> Deferred | None:
    """The same in place."""
    if t.pending.value is None:
        t.pending.relu = True
        return t
    return None


def addable(t: Any, other: Any, alpha: float) -> bool:
    """Whether `t` waits and `other` can be added by the same pass."""
    return (
        waits(t)
        and isinstance(other, Tensor)
        and alpha == 1
        and (other.shape, other.stride(), other.dtype) == (t.shape, t.stride(), t.dtype)
        and other.device == t.device
    )


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
    a.pending.versions = a.pending.present()
    return a


def alias(t: Deferred) -> Deferred:
    """The same tensor without gradient, as autograd keeps it."""
    return Deferred(t.pending)


WAITING = {
    aten.relu.default: relu,
    aten.relu_.default: relu_,
    aten.add.Tensor: add,
    aten.add_.Tensor: add_,
    aten.detach.default: alias,
}


class Defer(torch.autograd.Function):
    """A batch norm with a deferred output; its own gradient, for readers that are no quantizers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: Norm) -> Tensor:
        ctx.save_for_backward(x, weight, bias, norm.mean, norm.invstd)
        return Deferred(Pending(x, norm))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *norm = ctx.saved_tensors
        made = norms.backward(None, plain(g), x, None, Norm(*norm), False, None)
        return made.x, made.weight, made.bias, None


class NormQuantize(torch.autograd.Function):
    """The values of a deferred tensor, quantized; the tensor itself becomes the second output.

    Arguments: the tensor, its pending norm's input, gain and bias, what is added (or None), scale and zeros (or
    None) of the quantizer, the pending norm, and the further arguments of `bitwright::fake_quantize`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tensor: Deferred,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        other: Tensor | None,
        scale: Tensor,
        zeros: Tensor | None,
        pending: Pending,
        *rest: Any,
    ) -> tuple[Tensor, Tensor]:
        ctx.mark_dirty(tensor)
        ctx.set_materialize_grads(False)
        quantizer = (scale, zeros, *rest)
        # A sum has another reader nearly always; and its second operand need not be kept when its value is.
        pending.value, y = norms.forward(x, pending.norm, plain(other), pending.relu, quantizer, other is not None)
        ctx.save_for_backward(x, pending.value, weight, bias, *pending.norm[2:], *quantizer[:7])
        ctx.relu, ctx.numbers = pending.relu, quantizer[7:]
        assert y is not None
        return y, tensor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor | None, gz: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, z, *rest = ctx.saved_tensors
        norm, quantizer = Norm(*rest[:4]), (*rest[4:], *ctx.numbers)
        gy = torch.zeros_like(x) if gy is None else gy
        made = norms.backward(gy, plain(gz), x, z, norm, ctx.relu, quantizer)
        return None, made.x, made.weight, made.bias, made.other, made.scale, made.zeros, *[None] * 12


def batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, running: tuple[Tensor, Tensor] | None, eps: float, momentum: float
) -> Tensor:
    """`torch.nn.functional.batch_norm` in training, deferred; arguments: see `bitwright.kernels.norm.measure`."""
    norm = norms.measure(x, weight, bias, running, eps, momentum)
    return Defer.apply(x, weight, bias, norm)  # pyright: ignore[reportReturnType]


def quantize(tensor: Deferred, scale: Tensor, zeros: Tensor | None, *rest: Any) -> Tensor | None:
    """`tensor` quantized in one pass with its norm; None where its values are needed in themselves.

    scale, zeros and rest: the arguments of `bitwright::fake_quantize` behind its first.
    """
    p = tensor.pending
    watched = tensor._backward_hooks or tensor.retains_grad
    if p.value is not None or watched or scale.numel() > 1 or not torch.is_grad_enabled():
        return None
    p.check()
    tensor.detach_()  # its history so far is not used: the node below has the gradients of all of it
    inputs = (p.x, p.norm.weight, p.norm.bias, p.other)
    y, _ = NormQuantize.apply(tensor, *inputs, scale, zeros, p, *rest)  # pyright: ignore
    if p.value is None:
        return remember(y, NormSource(p.x, p.norm, p.relu, (scale, zeros, *rest)))
    return remember(y, Source(p.value, scale, zeros, *rest))
