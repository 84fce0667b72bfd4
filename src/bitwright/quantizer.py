"""`Quantizer`: one quantized tensor: a grid, an estimator, a bit-width, a signedness."""

from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError
from bitwright.estimators import make_estimator
from bitwright.grids import Affine, CodeRange, Shape, Stats, make_grid
from bitwright.kernels.reference import Rounding
from bitwright.spec import MAX_BITS, MIN_BITS, QuantizerSpec


class Quantizer(nn.Module):
    """Fake quantization of one tensor.

    Bit-width, signedness and whether it was calibrated are buffers, so a checkpoint is complete and compiled code
    survives their change. `bits`, `signed` and `calibrated` are whole numbers in float tensors of shape (1,): averages
    of buffers, which several libraries keep beside a model, cannot subtract bools, and cut integers off (an average of
    3 and 3 as int64 is 2 with a decay of 0.9995). What somebody wrote into them takes effect at the next `train()` or
    `eval()`.

    Args:
        spec: what is asked for.
        shape: the tensor's role, channels and size.

    Attributes:
        name: dotted name in the model, set by `prepare`, used in messages.
        bypass: True lets tensors through unchanged (calibration and float probes); a plain Python switch.
    """

    bits: Tensor
    signed: Tensor
    calibrated: Tensor
    code_lo: Tensor
    code_hi: Tensor
    _seen: tuple[int, ...] = ()

    def __init__(self, spec: QuantizerSpec, shape: Shape):
        super().__init__()
        self.spec = spec
        self.name = ""
        self.bypass = False
        self.grid = make_grid(spec.grid, shape, spec.grid_options)
        self.shape: Shape = self.grid.shape
        self.estimator = make_estimator(spec.estimator, spec.estimator_options)
        signed = shape.role == "weight" if spec.signed is None else spec.signed
        self.register_buffer("bits", torch.tensor([float(spec.bits)]))
        self.register_buffer("signed", torch.tensor([float(signed)]))
        self.register_buffer("calibrated", torch.zeros(1))
        # Derived from bits and signed, kept apart so that the forward pass need not compute them.
        self.register_buffer("code_lo", torch.zeros(1), persistent=False)
        self.register_buffer("code_hi", torch.zeros(1), persistent=False)
        self.refresh()
        self.set_learned(spec.learn is not False)

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring everything derived from the buffers in line with them."""
        if self.bits.is_meta:  # made in `torch.device("meta")`; loading comes here again
            self._signed, self._ready, self._zero = bool(self.spec.signed), False, 0.0
            return
        for state in (self.bits, self.signed, self.calibrated):
            value = state.item()
            if value != round(value):  # an average's last bits
                state.fill_(round(value))
        self._signed, self._ready = bool(self.signed.item()), bool(self.calibrated.item())
        self._seen = self._versions()
        codes = self.grid.code_range(self._checked(int(self.bits.item())), self._signed)
        if self.code_lo.device != self.bits.device:  # loaded by `assign=True` into a model without memory
            device = self.bits.device
            self.code_lo, self.code_hi = (torch.zeros_like(t, device=device) for t in (self.code_lo, self.code_hi))
        self.code_lo.copy_(codes.lo)
        self.code_hi.copy_(codes.hi)
        self._zero = codes.zero

    def _versions(self) -> tuple[int, ...]:
        """Another tuple after somebody wrote to the state in place."""
        return tuple(0 if t.is_inference() else t._version for t in (self.bits, self.signed, self.calibrated))

    def train(self, mode: bool = True) -> "Quantizer":
        """As of any module; also takes up what somebody else wrote to the state: an average, a copy of buffers."""
        if self._seen != self._versions():
            self.refresh()
        return super().train(mode)

    def _checked(self, bits: int) -> int:
        """`bits` if it is a bit-width."""
        if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
            raise BitwrightError(
                f"{self.name or 'quantizer'}: bits={bits!r} is not accepted; use {MIN_BITS} to {MAX_BITS}"
            )
        return bits

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}bits")
        if isinstance(saved, Tensor) and 1 < saved.numel() == self.shape.channels and len(self.bits) == 1:
            from bitwright.channels import by_channel  # which is made of this class

            by_channel(self)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.refresh()

    @property
    def mean_bits(self) -> float:
        """The bit-width, a whole number; of a weight whose channels have their own, the mean."""
        mean = self.bits.double().mean().item()
        return round(mean) if mean == round(mean) else mean

    @property
    def most_bits(self) -> int:
        """The bit-width; of a weight whose channels have their own, the largest, at which files hold all of it."""
        return round(self.bits.max().item())

    @property
    def derived(self) -> Any:
        """What follows from the bits and is no buffer."""
        return self._zero

    @property
    def codes(self) -> CodeRange:
        """The codes of the present bit-width; its tensors live where the quantizer lives."""
        return CodeRange(self.code_lo, self.code_hi, self._zero, self._signed)

    def set_learned(self, learned: bool) -> None:
        """Whether the grid's parameters receive gradients."""
        for parameter in self.grid.parameters():
            parameter.requires_grad_(learned)

    @torch.no_grad()
    def set_bits(self, bits: int) -> None:
        """Change the bit-width (1 to 8) in place; the grid's scale follows.

        The clipping bound stays, except for LSQ's weights (see `bitwright.grids.lsq.LSQ`).

        Raises:
            BitwrightError: `bits` is not an integer from 1 to 8.
        """
        old = CodeRange(self.code_lo.clone(), self.code_hi.clone(), self._zero, self._signed)
        self.bits.fill_(self._checked(bits))
        self.refresh()
        self.grid.rescale(old, self.codes)

    @torch.no_grad()
    def initialize(self, stats: Stats) -> None:
        """Set signedness (unless the spec fixes it) and the grid's parameters from statistics."""
        if self.spec.signed is None and self.shape.role == "input":
            self.signed.fill_(bool((stats.minimum < 0).any()))
        self.calibrated.fill_(True)
        self.refresh()
        self.grid.initialize(stats, self.codes)

    def forward(self, x: Tensor) -> Tensor:
        """`x` (any shape, floating point) on the grid; the same shape.

        Raises:
            BitwrightError: the quantizer was never calibrated and no calibrated state was loaded.
        """
        if self.bypass:
            return x
        if not self._ready:
            raise BitwrightError(
                f"{self.name or 'quantizer'} is not calibrated; call bitwright.calibrate(model, batches) first"
            )
        return self.rounded(x, self.estimator)

    def rounded(self, x: Tensor, rounding: Rounding) -> Tensor:
        """`x` (any shape) on the grid as `forward` has it, by an estimator or another `(v, lo, hi) -> k`."""
        return self.grid(x, self.codes, rounding)

    def affine(self, x: Tensor | None = None) -> Affine:
        """Scale, zero point and code bounds now; for weights pass the weight."""
        return self.grid.affine(x, self.codes)

    @torch.no_grad()
    def integer_codes(self, x: Tensor) -> Tensor:
        """The codes of `x` in evaluation as int32, same shape: (codes - zero) * scale of `affine` are the values.

        They are those of the forward pass itself, not a second computation that could fall on the other side of a
        tie; the values agree to the last bit, except for a rescaled SAT weight, where two products round apart.
        """
        seen = Codes()
        training, self.grid.training = self.grid.training, False
        try:
            self.grid(x, self.codes, seen)
        finally:
            self.grid.training = training
        return seen.k.to(torch.int32)

    def extra_repr(self) -> str:
        sign = "signed" if self._signed else "unsigned"
        return f"bits={round(self.bits.item())}, {sign}, channels={self.shape.channels}"


class Codes:
    """A rounding that remembers its codes."""

    k: Tensor

    def __call__(self, v: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        self.k = v.clamp(lo, hi).round()
        return self.k
