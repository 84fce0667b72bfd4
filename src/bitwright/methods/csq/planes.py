"""A weight as bit planes: an expression over logits while it trains, integer codes once it is hard."""

from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError
from bitwright.grids.base import positive
from bitwright.grids.lsq import LSQ, shared_by
from bitwright.kernels import scale_gradient
from bitwright.kernels.reference import along
from bitwright.methods.csq.rule import kept_planes
from bitwright.quantizer import Quantizer

CERTAIN = 1e4  # a mask that is chosen: sigma of it is 1 or 0 to the last bit


def soft_codes(up: Tensor, down: Tensor, mask: Tensor, significance: Tensor, temperature: Tensor) -> Tensor:
    """sum_b significance_b (sigma(T up_b) - sigma(T down_b)) sigma(T mask_b): real-valued codes, shape of a weight.

    Args:
        up, down: logits of the bits that add to a weight and that take from it, (planes, *weight's shape).
        mask: logits of the planes, (planes,). significance: what a bit is worth, (planes,). temperature: T, (1,).
    """
    worth = significance * torch.sigmoid(temperature * mask)
    bits = torch.sigmoid(temperature * up) - torch.sigmoid(temperature * down)
    return (worth.view(-1, *[1] * (up.ndim - 1)) * bits).sum(0)


def hard_codes(up: Tensor, down: Tensor, mask: Tensor, significance: Tensor) -> Tensor:
    """`soft_codes` with 1[logit > 0] in the place of every sigma; whole numbers where a kept plane is worth 1."""
    worth = significance * (mask > 0)
    bits = (up > 0).to(worth) - (down > 0).to(worth)
    return (worth.view(-1, *[1] * (up.ndim - 1)) * bits).sum(0)


def plane_grid(quantizer: Quantizer) -> LSQ:
    """The grid of a quantizer whose codes bit planes can add up to. Raises: BitwrightError where they cannot."""
    if type(quantizer.grid) is not LSQ:
        raise BitwrightError(
            f"csq: the grid {quantizer.spec.grid!r} of {quantizer.name} is not the evenly spaced one that bits add up "
            "to; use lsq"
        )
    if quantizer.spec.bits < 2:
        raise BitwrightError(f"csq: {quantizer.name} starts at 1 bit, which is its sign; use 2 to 8")
    return quantizer.grid


class BitPlanes:
    """The bit planes behind one weight quantizer, whose output they replace in training mode.

    The value is scale * codes, with the quantizer's own learned scale as the distance between neighbouring codes at the
    lowest plane that is kept: the paper's s * 2^low / (2^planes - 1). The layer's weight holds the value after every
    step, so that whatever reads it (evaluation, averages, deployment) sees an ordinary weight of an ordinary quantizer.

    Args:
        layer: name, for messages. quantizer: of grid `lsq`; its rule's bits less one (the sign) are the planes.
        weight: what it quantizes. temperature: (1,), shared. start: logits of bits are -start or start.

    Attributes:
        up, down, mask: leaves with gradients of their own, see `soft_codes`. kept: the planes that are kept, ascending.
        hard: whether codes are whole and fixed; then only the scale learns.
    """

    codes: Tensor

    def __init__(self, layer: str, quantizer: Quantizer, weight: nn.Parameter, temperature: Tensor, start: float):
        self.layer, self.quantizer, self.grid = layer, quantizer, plane_grid(quantizer)
        self.weight, self.temperature, self.hard = weight, temperature, False
        self.first, self.axis = quantizer.spec.bits - 1, self.grid.shape.axis
        self.kept = list(range(self.first))
        if int(quantizer.bits.item()) != self.bits:  # loaded before; `load_state_dict` brings all of it back
            quantizer.set_bits(self.bits)
        # What a bit is worth in codes, 1 at the lowest plane that is kept: no parameter, so it cannot drift.
        self.worth = torch.arange(self.first, device=weight.device).exp2().to(weight)
        self._set_up(start)
        quantizer.register_forward_hook(self, prepend=True)

    @torch.no_grad()
    def _set_up(self, start: float) -> None:
        """Logits, and the scale under which the soft value is the weight, rounded."""
        rows = self.weight.movedim(self.axis, 0) if self.grid.scale.numel() > 1 else self.weight.unsqueeze(0)
        flat = rows.flatten(1)
        step = positive(flat.abs().amax(1)) / (2**self.first - 1)
        whole = (self.weight / along(step, self.weight, self.axis)).round().int()
        place = torch.arange(self.first, device=whole.device).view(-1, *[1] * whole.ndim)
        bits = [(part.clamp(min=0) >> place & 1).to(self.weight) for part in (whole, -whole)]
        self.up, self.down = ((start * (2 * b - 1)).requires_grad_() for b in bits)
        self.mask = self.weight.new_zeros(self.first).requires_grad_()
        on = torch.tanh(0.5 * self.temperature * start)
        self.grid.scale.copy_(step / (0.5 * on))

    def leaves(self) -> list[Tensor]:
        """What has gradients of its own."""
        return [self.up, self.down, self.mask]

    @property
    def bits(self) -> int:
        """The width of the codes: from the lowest to the highest plane that is kept, and the sign."""
        return self.kept[-1] - self.kept[0] + 2

    def __call__(self, quantizer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """The value in place of the quantizer's output, while training."""
        if quantizer.bypass or not quantizer.training:
            return None
        scale = self.grid.effective_scale()
        if scale.requires_grad:
            scale = scale_gradient(scale, (shared_by(self.weight, self.grid.shape) * quantizer.code_hi).rsqrt())
        y = along(scale, output, self.axis) * self.present_codes()
        # The weight and what rounds it take part, by nothing: distributed training waits for every gradient.
        return y.to(output.dtype) + 0.0 * output

    def present_codes(self) -> Tensor:
        """Whole and fixed, or soft."""
        if self.hard:
            return self.codes
        return soft_codes(self.up, self.down, self.mask, self.worth, self.temperature)

    @torch.no_grad()
    def write(self) -> None:
        """Give the layer's weight the present value."""
        self.weight.copy_(along(self.grid.effective_scale(), self.weight, self.axis) * self.present_codes())

    @torch.no_grad()
    def follow(self, kept: list[int]) -> bool:
        """Give the quantizer the width of `kept`, and its scale the worth of the lowest; whether the width changed."""
        before, lowest, self.kept = self.bits, self.kept[0], kept
        scale = self.grid.scale * 2.0 ** (kept[0] - lowest)
        self.worth.mul_(2.0 ** (lowest - kept[0]))
        if self.bits != before:
            self.quantizer.set_bits(self.bits)
        self.grid.scale.copy_(scale)
        return self.bits != before

    @torch.no_grad()
    def choose(self, window: tuple[int, int]) -> None:
        """Keep for good the planes that are kept now and lie within `window` (lowest, highest)."""
        self.follow([b for b in self.kept if window[0] <= b <= window[1]])
        self.mask.fill_(-CERTAIN)
        self.mask[self.kept] = CERTAIN
        self.mask.requires_grad_(False)
        self.mask.grad = None

    @torch.no_grad()
    def harden(self) -> None:
        """Whole codes for good."""
        self.rest(hard_codes(self.up, self.down, self.mask, self.worth))

    def rest(self, codes: Tensor) -> None:
        """From now on the value is scale * `codes`, and the logits are gone."""
        self.codes, self.hard = codes.to(self.weight), True
        self.up = self.down = self.mask = self.weight.new_zeros(0)

    def state_dict(self) -> dict[str, Any]:
        """Logits with gradients not yet stepped on, or codes; and the scale, from which the weight follows."""
        return {
            "kept": list(self.kept),
            "scale": self.grid.scale.detach().clone(),
            "codes": self.codes.to(torch.int8) if self.hard else None,
            "leaves": [t.detach().clone() for t in self.leaves()],
            "pending": [None if t.grad is None else t.grad.clone() for t in self.leaves()],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], chosen: bool) -> None:
        """Restore what `state_dict` gave, after `choose` or before: width, scale and weight as well."""
        self.follow([int(b) for b in state["kept"]])
        self.quantizer.set_bits(self.bits)  # whatever was loaded meanwhile
        self.grid.scale.copy_(state["scale"])
        if state["codes"] is not None:
            self.rest(state["codes"].to(self.weight.device))
            return
        for leaf, value, pending in zip(self.leaves(), state["leaves"], state["pending"], strict=True):
            leaf.copy_(value)
            leaf.grad = None if pending is None else pending.to(leaf)
        self.mask.requires_grad_(not chosen)


def follow_masks(planes: list[BitPlanes]) -> list[BitPlanes]:
    """Widths follow the masks; those that changed."""
    masks = torch.cat([p.mask.detach() for p in planes]).tolist()  # one look at the device for all
    changed = []
    for each in planes:
        logits, masks = masks[: each.first], masks[each.first :]
        if (kept := kept_planes(logits)) != each.kept and each.follow(kept):
            changed.append(each)
    return changed
