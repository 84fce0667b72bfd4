"""Keep what a quantized tensor was made from instead of the tensor itself, until the backward pass needs it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitwright.kernels import fused, gelu
from bitwright.kernels import norm as norms
from bitwright.kernels.codes import Form, as_number, held, no_poison, times_of
from bitwright.kernels.deferred import Deferred
from bitwright.kernels.norm import Norm
from bitwright.kernels.twice import runs_twice


class Source(NamedTuple):
    """The arguments of one `bitwright::fake_quantize`. All of them live on anyway: its own backward keeps them.

    x: or what it was made from in turn, where it is quantized itself.
    """

    x: "Tensor | AnySource"
    scale: Tensor
    zeros: Tensor | None
    lo: Tensor
    hi: Tensor
    strength: Tensor | None
    rate: Tensor | None
    seed: Tensor | None
    zero: float
    axis: int
    count: int
    rule: int
    replaced_only: bool

    @property
    def quantizer(self) -> tuple[Any, ...]:
        """The arguments of `bitwright::fake_quantize` behind its first."""
        return self[1:]

    def quantize(self, *form: Form) -> Tensor:
        """The quantized tensor once more, to the last bit; `held` integers if a form is given."""
        x = self.x if isinstance(self.x, Tensor) else self.x.quantize()
        with torch.no_grad():
            return fused.quantize(x, *self.quantizer, *form)


class NormSource(NamedTuple):
    """The same for a quantized batch norm of x, behind relu or not; see `bitwright.kernels.norm.forward`."""

    x: Tensor
    norm: Norm
    relu: bool
    quantizer: tuple[Any, ...]

    def quantize(self, *form: Form) -> Tensor:
        """See `Source`."""
        _, y = norms.forward(self.x, self.norm, None, self.relu, (*self.quantizer, *form), False)
        assert y is not None
        return y


class GeluSource(NamedTuple):
    """The same for GELU of x."""

    x: Tensor
    quantizer: tuple[Any, ...]

    def quantize(self, *form: Form) -> Tensor:
        """See `Source`."""
        return gelu.forward(self.x, *self.quantizer, *form)


AnySource = Source | NormSource | GeluSource


def versions(source: Any) -> list[int]:
    """Others after somebody wrote to a tensor of `source`.

    Autograd does not watch these where none of them has a gradient: an image, a scale that is not learned.
    """
    if isinstance(source, Tensor):
        return [0 if source.is_inference() else source._version]
    return [v for part in source for v in versions(part)] if isinstance(source, tuple) else []


def remember(y: Tensor, source: AnySource) -> Tensor:
    """Note on `y` what it was made from. What is computed from `y` has no note; writing to `y` makes the note void.

    Tensors of `torch.inference_mode`, which do not say whether somebody wrote to them, get none.
    """
    if not y.is_inference():
        y.bitwright_source = source, y._version  # pyright: ignore[reportAttributeAccessIssue]
    return y


def noted(t: Tensor) -> AnySource | None:
    """What `t` was made from, if that is known and `t` is still the same."""
    source, version = getattr(t, "bitwright_source", (None, 0))
    return source if source is not None and version == t._version else None


def place(t: Tensor) -> int:
    """Where `t` lies: an address in memory; for a deferred tensor that of what it holds."""
    return id(t.pending) if isinstance(t, Deferred) else t.data_ptr()


def integers(source: AnySource) -> Tensor:
    """The integers of a quantized tensor as bfloat16 (`bitwright.kernels.codes.Form`)."""
    zeros, constant = source.quantizer[fused.ZEROS], source.quantizer[fused.ZERO]
    times = times_of(as_number(constant if zeros is None else zeros))
    found = held(source.quantize(Form(torch.bfloat16, times, 0.0, no_poison())))
    assert found is not None
    return found.numbers


def keep_sources(
    *quantized: Tensor, give: Callable[[AnySource], Tensor] = lambda source: source.quantize()
) -> AbstractContextManager[Any]:
    """Operators in this context save the sources of `quantized` tensors for backward, not the tensors.

    A layer that saves both its float input (for the quantizer's backward) and its quantized input (for the layer's)
    keeps 1.5 times what the float layer keeps; with this it keeps the same, for one more forward quantization.

    give: what the backward pass gets of a source.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or runs_twice():
        return nullcontext()
    notes = [noted(t) for t in quantized]
    if all(source is None for source in notes):
        return nullcontext()
    # Looked up by address within this context only, while `quantized` keeps the storages alive.
    sources = {place(t): (t.numel(), t.dtype, source) for t, source in zip(quantized, notes, strict=True)}

    def pack(t: Tensor) -> Any:
        numel, dtype, source = sources.get(place(t), (0, None, None))
        # Products keep views of their operands: flattened, transposed.
        if source is None or (t.numel(), t.dtype) != (numel, dtype):
            return t
        return source, versions(source), t.shape, t.stride()

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        source, seen, shape, stride = kept
        if versions(source) != seen:
            raise RuntimeError("what the gradient is computed from was changed in place after the forward pass")
        return give(source).as_strided(shape, stride)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
