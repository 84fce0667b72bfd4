"""Batch norms that wait: relu and the addition of a tensor keep them waiting, the quantizer does all of it.

For autograd a waiting norm is the output of one node (`Joined`), which has the gradients of everything so far, and
which a quantizer replaces by one with the quantized values as well.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitwright.kernels import norm as norms
from bitwright.kernels.deferred import Deferred, Pending, differentiable, plain, watched
from bitwright.kernels.fused import lasting
from bitwright.kernels.norm import Norm
from bitwright.kernels.sources import NormSource, Source, remember


class PendingNorm(Pending):
    """norm(x), plus `other`, relu.

    x: float32 or bfloat16 on the CPU, dense (`bitwright.kernels.norm.measure`). learned: gain and bias as autograd
    knows them. other: of the kind of x, or None.
    """

    def __init__(
        self, x: Tensor, norm: Norm, learned: tuple[Tensor, Tensor], other: Tensor | None = None, relu: bool = False
    ):
        self.norm, self.learned, self.other, self.with_relu = norm, learned, other, relu
        super().__init__(x)

    def sources(self) -> list[Tensor]:
        added = plain(self.other)
        return super().sources() if added is None else [added, *super().sources()]

    def compute(self) -> Tensor:
        value, _ = norms.forward(self.x, self.norm, plain(self.other), self.with_relu, None, True)
        assert value is not None
        return value

    def join_quantizer(self, *quantizer: Any) -> Tensor:
        """The values quantized."""
        # A sum has another reader nearly always; and its second operand need not be kept when its value is.
        keep = self.other is not None
        self.value, y = norms.forward(self.x, self.norm, plain(self.other), self.with_relu, quantizer, keep)
        self.note_versions()
        assert y is not None
        return y

    def quantize(self, t: Deferred, *quantizer: Any) -> Tensor | None:
        if not torch.is_grad_enabled():
            return self.join_quantizer(*quantizer)
        y = join(t, *quantizer)
        if self.value is None:
            return remember(y, NormSource(self.x, self.norm, self.with_relu, lasting(quantizer)))
        return remember(y, Source(self.value, *lasting(quantizer)))

    def relu(self, t: Deferred) -> Tensor | None:
        if self.value is not None:
            return None
        made = Deferred(PendingNorm(self.x, self.norm, self.learned, self.other, True))
        return join(made) if differentiable(t) else made

    def relu_(self, t: Deferred) -> Tensor | None:
        if self.value is not None or watched(t) or (t.requires_grad and not differentiable(t)):
            return None
        self.with_relu = True
        return join(t) if t.requires_grad else t

    def addable(self) -> bool:
        """Whether neither an addition nor relu came yet."""
        return (
            self.value is None and self.other is None and not self.with_relu and self.tracked == torch.is_grad_enabled()
        )

    def add(self, t: Deferred, other: Tensor) -> Tensor | None:
        return Deferred(PendingNorm(self.x, self.norm, self.learned, other)) if self.addable() else None

    def add_(self, t: Deferred, other: Tensor) -> Tensor | None:
        if not self.addable():
            return None
        self.other = other
        self.note_versions()
        return t


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
        pending: PendingNorm,
        *rest: Any,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.mark_dirty(tensor)
        ctx.set_materialize_grads(False)
        y = None
        if rest:
            y = pending.join_quantizer(scale, zeros, *rest)
        ctx.save_for_backward(x, *pending.norm, pending.value, scale, zeros, *rest[:5])
        # A sum's values, if any, are not there yet; in all other cases the node must not outlive what it saves.
        ctx.sum = pending if other is not None and not rest else None
        ctx.relu, ctx.numbers = pending.with_relu, rest[5:]
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
    assert isinstance(p, PendingNorm)
    tensor.detach_()  # the new node has the gradients of everything that its history had
    scale, zeros, *rest = quantizer or (None, None)
    _, y = Joined.apply(tensor, p.x, *p.learned, p.other, scale, zeros, p, *rest)  # pyright: ignore
    return y if quantizer else tensor


def batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, running: tuple[Tensor, Tensor] | None, eps: float, momentum: float
) -> Tensor:
    """`torch.nn.functional.batch_norm` in training, deferred; arguments: see `bitwright.kernels.norm.measure`."""
    made = Deferred(PendingNorm(x, norms.measure(x, weight, bias, running, eps, momentum), (weight, bias)))
    return join(made) if torch.is_grad_enabled() else made
