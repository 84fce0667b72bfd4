"""Fused fake quantization on the CPU as a registered operator: `bitwright::fake_quantize`."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitwright.kernels.build import library
from bitwright.kernels.codes import Form, waiting
from bitwright.kernels.pool import empty_like
from bitwright.kernels.steady import steady

ZEROS, ZERO, COUNT, FORM = 1, 7, 9, 12  # where these lie behind the first of `make_call`'s arguments
RULES = {"clipped_ste": 0, "ste": 1, "ewgs": 2, "scalar": 3, "constant": 4, "dsq": 5}


class Call(ctypes.Structure):
    """`Call` of fused.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scale", "zeros", "lo", "hi", "strength", "rate", "seed", "poison")),
        *((name, ctypes.c_double) for name in ("zero", "times", "offset")),
        *(
            (n, ctypes.c_int64)
            for n in ("rows", "channels", "columns", "count", "rule", "replaced_only", "wide", "threads")
        ),
    )


def address(t: Tensor | None) -> int | None:
    """The address of the first element; None (a null pointer) without a tensor."""
    return None if t is None else t.data_ptr()


# Plain registrations: `torch.library.custom_op` adds Python checks to every call, which small tensors feel.
LIBRARY = torch.library.Library("bitwright", "DEF")
ARGUMENTS = (
    "Tensor x, Tensor scale, Tensor? zeros, Tensor lo, Tensor hi, Tensor? strength, Tensor? rate, Tensor? seed, "
    "float zero, int axis, int count, int rule, bool replaced_only"
)
LIBRARY.define(f"fake_quantize({ARGUMENTS}) -> Tensor")
LIBRARY.define(f"fake_quantize_backward(Tensor g, {ARGUMENTS}) -> (Tensor, Tensor, Tensor?)")


def geometry(x: Tensor, scale: Tensor, axis: int) -> tuple[int, int, int]:
    """(rows, channels, columns): `x` lies in memory as rows that share a scale each, row r that of r % channels."""
    channels, columns = scale.numel(), x.numel()
    if channels > 1:
        outer = axis + 1 if axis >= 0 else x.ndim + axis + 1
        columns = x.numel() // x.shape[:outer].numel()
    return x.numel() // columns, channels, columns


def make_call(
    x: Tensor,
    scale: Tensor,
    zeros: Tensor | None,
    lo: Tensor,
    hi: Tensor,
    strength: Tensor | None,
    rate: Tensor | None,
    seed: Tensor | None,
    zero: float,
    axis: int,
    count: int,
    rule: int,
    replaced_only: bool,
    form: Form | None = None,
) -> Call:
    """The C structure for an operator's arguments; it points into them and does not keep them.

    form: what forward passes write instead of values (`bitwright.kernels.codes`).

    x: float32 or bfloat16, not empty, dense, with `axis` and the axes before it outermost in memory. scale and
    zeros: both (1,) or both (x.shape[axis],), contiguous. All but x and seed (int64) are float32.
    Further: `reference.fake_quantize` and `KernelRule`.
    """
    rows, channels, columns = geometry(x, scale, axis)
    times, offset, poison, wide = (0.0, 0.0, None, False) if form is None else form.call()
    optional = (address(strength), address(rate), address(seed), address(poison))
    pointers = (scale.data_ptr(), address(zeros), lo.data_ptr(), hi.data_ptr(), *optional)
    sizes = (rows, channels, columns, count, rule, replaced_only, wide)
    return Call(*pointers, zero, times, offset, *sizes, torch.get_num_threads())


def lasting(quantizer: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of `make_call` behind its first, without a form, as a backward pass may find them."""
    return steady(quantizer[0]), *quantizer[1:FORM]


def space(x: Tensor, quantizer: tuple[Any, ...]) -> tuple[Tensor, Callable[[], Tensor]]:
    """Memory for `x` quantized, and what gives the quantized tensor once it is written.

    quantizer: the arguments of `make_call` behind its first.
    """
    form = quantizer[FORM] if len(quantizer) > FORM else None
    y = empty_like(x, None if form is None else form.dtype)
    return y, lambda: waiting(y, form, quantizer[0], quantizer[COUNT])


@functools.cache
def kernel(direction: str, dtype: torch.dtype) -> Any:
    """The C function for a direction and an element type; it takes a `Call` and addresses."""
    function = getattr(library(), f"{direction}_{'f32' if dtype == torch.float32 else 'bf16'}")
    function.argtypes = [ctypes.POINTER(Call), *[ctypes.c_void_p] * (2 if direction.startswith("forward") else 5)]
    return function


def forward_cpu(x: Tensor, *arguments: Any) -> Tensor:
    """The quantized tensor, laid out as `x`; arguments: see `make_call`."""
    y, made = space(x, arguments)
    kernel("forward", x.dtype)(make_call(x, *arguments), x.data_ptr(), y.data_ptr())
    return made()


def backward_cpu(g: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients (dx like `x`, dscale like `scale`, dzeros like `zeros`) for the gradient `g` of the output.

    Raises:
        MemoryError: there is no room for the partial sums.
    """
    if g.stride() != x.stride() or g.dtype != x.dtype:
        g = torch.empty_like(x).copy_(g)
    scale, zeros = arguments[0], arguments[1]
    dx, dscale = empty_like(x), torch.empty_like(scale)
    dzeros = None if zeros is None else torch.empty_like(scale)
    addresses = (g.data_ptr(), x.data_ptr(), dx.data_ptr(), dscale.data_ptr(), address(dzeros))
    if kernel("backward", x.dtype)(make_call(x, *arguments), *addresses):
        raise MemoryError("fake_quantize_backward: no room for partial sums")
    return dx, dscale, dzeros


def backward_meta(g: Tensor, x: Tensor, scale: Tensor, zeros: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Shapes of the backward operator's results."""
    return torch.empty_like(x), torch.empty_like(scale), None if zeros is None else torch.empty_like(zeros)


LIBRARY.impl("fake_quantize", forward_cpu, "CPU")
LIBRARY.impl("fake_quantize_backward", backward_cpu, "CPU")
LIBRARY.impl("fake_quantize", lambda x, *_: torch.empty_like(x), "Meta")
LIBRARY.impl("fake_quantize_backward", backward_meta, "Meta")


class Differentiable(torch.autograd.Function):
    """The operator and its gradient; for autograd it keeps nothing beyond the operator's own inputs.

    Registered by hand: `torch.library.register_autograd` reads the schema anew in every call, which costs a small
    network as much as its quantization.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        ctx.save_for_backward(*arguments[:8])
        ctx.numbers = arguments[8:]
        return below_autograd(*arguments)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = torch.ops.bitwright.fake_quantize_backward.default(g, *ctx.saved_tensors, *ctx.numbers)
        return (*grads, *[None] * 10)


def below_autograd(*arguments: Any) -> Tensor:
    """The operator without its gradient."""
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.bitwright.fake_quantize.default(*arguments)


def wants_gradient(*operands: Tensor | None) -> bool:
    """Whether autograd has to know what is made of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)


def with_autograd(*arguments: Any) -> Tensor:
    """The operator, differentiable in x, scale and zeros where one of them asks for it."""
    wanted = wants_gradient(*arguments[:3])
    return Differentiable.apply(*arguments) if wanted else below_autograd(*arguments)  # pyright: ignore


LIBRARY.impl("fake_quantize", with_autograd, "Autograd")


class Direct(torch.autograd.Function):
    """The same without torch's dispatcher, whose way to Python and back costs a small tensor most of the time."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        ctx.save_for_backward(*arguments[:8])
        ctx.numbers = arguments[8:]
        return forward_cpu(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = backward_cpu(g, *ctx.saved_tensors, *ctx.numbers)
        return (*grads, *[None] * (len(ctx.needs_input_grad) - len(grads)))


def nobody_listens(x: Tensor) -> bool:
    """Whether no mode, transform or kind of tensor would see an operator on `x` in the dispatcher."""
    modes = torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()
    return x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter) and not modes


def quantize(*arguments: Any) -> Tensor:
    """The operator, by the shortest way."""
    if not nobody_listens(arguments[0]):
        return torch.ops.bitwright.fake_quantize.default(*arguments)
    return Direct.apply(*arguments) if wants_gradient(*arguments[:3]) else forward_cpu(*arguments)  # pyright: ignore
