"""`ChannelQuantizer`: a weight whose channels have bit-widths of their own."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import BitwrightError
from bitwright.grids import Affine, CodeRange, Stats
from bitwright.kernels.codes import asking
from bitwright.kernels.reference import Rounding, along
from bitwright.quantizer import Codes, Quantizer


class ChannelQuantizer(Quantizer):
    """A quantizer of a weight with one bit-width per channel, made of an ordinary one by `by_channel`.

    The sum of quantizers of one width each, every one of them for its own channels. So grids, estimators and kernels,
    which know one width, serve as they are, and each channel has the scale, the gradients and (at 1 bit, or 2 of
    `seq`) the zero point that the same weight has at that width.

    What a channel weighs in a rule that looks at the whole tensor is its own: `ewgs` with one factor for all, say. A
    state dict holds `bits` as (channels,); an ordinary quantizer that loads one becomes a `ChannelQuantizer`.

    Attributes:
        bits: (channels,), whole numbers in floats. code_lo, code_hi, code_zero: (channels,), derived from it.
        kinds: (bits, index of a channel that has them, zero point) of every width in use, the least first.
    """

    code_zero: Tensor
    kinds: tuple[tuple[int, int, float], ...]

    @torch.no_grad()
    def refresh(self) -> None:
        if self.bits.is_meta:
            return
        for state in (self.bits, self.signed, self.calibrated):
            if not torch.equal(state, state.round()):  # an average's last bits
                state.round_()
        self._signed, self._ready = bool(self.signed.item()), bool(self.calibrated.item())
        self._seen = self._versions()
        if self.code_lo.device != self.bits.device:  # loaded by `assign=True` into a model without memory
            derived = (self.code_lo, self.code_hi, self.code_zero)
            self.code_lo, self.code_hi, self.code_zero = (torch.zeros_like(t, device=self.bits.device) for t in derived)
        widths, kinds = self.bits.int().tolist(), []
        for width in sorted(set(widths)):
            codes, mine = self.grid.code_range(self._checked(width), self._signed), self.bits == width
            self.code_lo[mine], self.code_hi[mine], self.code_zero[mine] = codes.lo.item(), codes.hi.item(), codes.zero
            kinds.append((width, widths.index(width), codes.zero))
        self.kinds = tuple(kinds)

    @property
    def derived(self) -> Any:
        return self.kinds

    @property
    def codes(self) -> CodeRange:
        raise BitwrightError(f"{self.name or 'quantizer'} has bits per channel, and so no one range of codes")

    def parts(self) -> Iterator[tuple[Tensor, CodeRange]]:
        """(which channels, their codes) of every width; which: (channels,), bool."""
        for width, at, zero in self.kinds:
            yield (
                self.bits == width,
                CodeRange(self.code_lo[at : at + 1], self.code_hi[at : at + 1], zero, self._signed),
            )

    def merged(self, parts: Sequence[tuple[Tensor, Tensor]], axis: int) -> Tensor:
        """Of tensors with an axis of channels (or of one element), each for some channels, the one for all."""
        whole = parts[0][1]
        for mine, part in parts[1:]:
            whole = torch.where(along(mine, whole if whole.ndim > part.ndim else part, axis), part, whole)
        return whole

    def rounded(self, x: Tensor, rounding: Rounding) -> Tensor:
        # Who asks for integers asks for those of one grid; a single width has one.
        alone = len(self.kinds) == 1 or torch.compiler.is_compiling()
        with contextlib.nullcontext() if alone else asking(None):
            parts = [(mine, self.grid(x, codes, rounding)) for mine, codes in self.parts()]
        return self.merged(parts, self.shape.axis)

    @torch.no_grad()
    def set_bits(self, bits: int | Sequence[int]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Change the bit-widths (1 to 8) in place: of all channels, or of each; scales follow channel by channel."""
        given = [bits] * len(self.bits) if isinstance(bits, int) else list(bits)
        if len(given) != len(self.bits):
            raise BitwrightError(f"{self.name or 'quantizer'}: {len(given)} bit-widths for {len(self.bits)} channels")
        for one in given:
            self._checked(one)
        old = self.every_range()
        self.bits.copy_(torch.tensor(given, dtype=self.bits.dtype))
        self.refresh()
        self.grid.rescale(old, self.every_range())

    def every_range(self) -> CodeRange:
        """A copy of all channels' codes, each (channels,), for arithmetic on scales alone."""
        zero: Any = self.code_zero.clone()
        return CodeRange(self.code_lo.clone(), self.code_hi.clone(), zero, self._signed)

    def initialize(self, stats: Stats) -> None:
        raise BitwrightError(f"{self.name or 'quantizer'} has bits per channel; calibrate before giving it these")

    def affine(self, x: Tensor | None = None) -> Affine:
        """Scale and zero point of every channel, (channels,) or (1,) where all are alike; bounds of the widest."""
        found = [(mine, self.grid.affine(x, codes)) for mine, codes in self.parts()]
        scale = self.merged([(mine, each.scale) for mine, each in found], 0)
        zeros = {zero for _, _, zero in self.kinds}
        zero = found[0][1].zero if len(zeros) == 1 else self.merged([(mine, each.zero) for mine, each in found], 0)
        return Affine(scale, zero, min(each.lo for _, each in found), max(each.hi for _, each in found))

    @torch.no_grad()
    def integer_codes(self, x: Tensor) -> Tensor:
        found = []
        training, self.grid.training = self.grid.training, False
        try:
            for mine, codes in self.parts():
                seen = Codes()
                self.grid(x, codes, seen)
                found.append((mine, seen.k))
        finally:
            self.grid.training = training
        return self.merged(found, self.shape.axis).to(torch.int32)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}bits")
        if isinstance(saved, Tensor) and saved.numel() == 1:  # from when all channels had the same
            state_dict[f"{prefix}bits"] = saved.expand(len(self.bits)).clone()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        counts = ", ".join(f"{int((self.bits == width).sum())} of {width}" for width, _, _ in self.kinds)
        return f"bits per channel: {counts}, {'signed' if self._signed else 'unsigned'}"


@torch.no_grad()
def by_channel(quantizer: Quantizer) -> ChannelQuantizer:
    """`quantizer` itself, in place, with one bit-width per channel; at first each has what all had.

    The shape of `bits` changes: make averages and other copies of the model afterwards.

    Raises:
        BitwrightError: it is no weight's, or all its channels share a scale.
    """
    if isinstance(quantizer, ChannelQuantizer):
        return quantizer
    if quantizer.shape.role != "weight" or quantizer.shape.channels == 1:
        raise BitwrightError(
            f"{quantizer.name or 'quantizer'}: bits per channel are for weights with a scale per channel; use "
            "per_channel: true and a grid that has several scales (not dorefa, sat)"
        )
    channels = quantizer.shape.channels
    quantizer.__class__ = ChannelQuantizer
    quantizer.bits = quantizer.bits.expand(channels).clone()
    for name in ("code_lo", "code_hi", "code_zero"):
        quantizer.register_buffer(name, torch.zeros_like(quantizer.bits), persistent=False)
    quantizer.refresh()
    assert isinstance(quantizer, ChannelQuantizer)
    return quantizer
