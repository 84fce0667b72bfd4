"""PEGE: progressive element-wise gradient estimation (Zhao, arXiv 2509.00097); a reconstruction.

The paper's text was not at hand. Its author's earlier code adds `u * (x - x_q)` to the gradient, of which the
straight-through estimator (u = 0) and EWGS (u = delta |g|) are cases; `docs` of the method say what is inferred.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError
from bitwright.kernels import KernelRule
from bitwright.kernels.reference import draw_seed, random_mask

Form = Literal["scalar", "elementwise", "constant"]
FORMS = ("scalar", "elementwise", "constant")
VARIANTS = ("everywhere", "replaced")
REPLACEMENTS = ("random", "ranked")


def ranked_mask(error: Tensor, rate: Tensor) -> Tensor:
    """The share `rate` of the elements with the smallest |error|, bool; ties at the limit are all taken."""
    size = error.abs()
    last = (rate * size.numel()).ceil().long().clamp(min=1) - 1
    return (size <= size.flatten().sort().values[last]) & (rate > 0)


def pege_gradient(g: Tensor, error: Tensor, strength: Tensor, width: Tensor, form: Form) -> Tensor:
    """g_x = g + u (x - x_q), the gradient of L + sum u/2 |x - sg(x_q)|^2 with x normalised to [0, 1].

    Args:
        g: gradient of the codes, that is of `width * x`; any shape.
        error: x - x_q in normalised units, same shape; 0 where x is clipped or (variant M) not replaced.
        strength: d or u, shape (1,). width: number of codes minus one, shape (1,).
        form: "scalar": u = d mean|g_x| over the tensor. "elementwise": u = d |g_x| (EWGS with delta = d).
            "constant": u = strength, whatever the gradient's size.
    """
    if form == "constant":
        more = strength / width * error  # u (x - x_q) is a gradient of x; codes are `width` times as large
    elif form == "elementwise":
        more = strength * g.abs() * error
    else:
        more = strength * error * g.abs().mean()
    return g + more.to(g.dtype)


class PEGE(nn.Module):
    """Codes that replace values element by element while training, and a gradient that pulls values to codes.

    Training: k = round(c) where a mask drawn with probability `rate` is set, k = c elsewhere, c = clip(v, lo, hi);
    so at rate < 1 the output is *not* integer. In evaluation every element is replaced, whatever `rate` is.
    With strength 0 and rate 1 it is the clipped straight-through estimator to the last bit.

    Args:
        form, strength: the additional gradient, see `pege_gradient`. Default scale-free, d = 0.01: a fixed u (the
            precursor code's 1e-8 ... 1e-6) fits one loss, batch and tensor size only.
        variant: "everywhere" (default): x - x_q of every element in range; "replaced": of masked elements only.
        replacement: "random" (default): Bernoulli per element, fresh in each forward pass: a counter-based generator
            whose seed is one number of torch's global generator (so `torch.manual_seed` decides). "ranked": the
            elements nearest to their codes first; exact and deterministic, but sorts every tensor.
        rate: initial share of replaced elements, 0 to 1. Default 1; `PEGECurriculum` moves it.

    Attributes:
        rate, strength: buffers of shape (1,), changed in place during training.
        full_strength: the strength as given, which schedules refer to.

    Raises:
        BitwrightError: an option has a value that is not accepted.
    """

    rate: Tensor
    strength: Tensor

    def __init__(
        self,
        form: Form = "scalar",
        strength: float = 0.01,
        variant: Literal["everywhere", "replaced"] = "everywhere",
        replacement: Literal["random", "ranked"] = "random",
        rate: float = 1.0,
    ):
        super().__init__()
        for key, value, accepted in (
            ("form", form, FORMS),
            ("variant", variant, VARIANTS),
            ("replacement", replacement, REPLACEMENTS),
        ):
            if value not in accepted:
                raise BitwrightError(
                    f"estimator_options.{key} of 'pege': {value!r} is not accepted; use {', '.join(accepted)}"
                )
        if not (isinstance(strength, int | float) and strength >= 0):
            raise BitwrightError(f"estimator_options.strength of 'pege': {strength!r} is not accepted; use >= 0")
        if not (isinstance(rate, int | float) and 0 <= rate <= 1):
            raise BitwrightError(f"estimator_options.rate of 'pege': {rate!r} is not accepted; use 0 to 1")
        self.form: Form = form
        self.variant, self.replacement = variant, replacement
        self.full_strength = float(strength)
        self.register_buffer("rate", torch.full((1,), float(rate)))
        self.register_buffer("strength", torch.full((1,), float(strength)))

    @property
    def kernel_rule(self) -> KernelRule | None:
        """This estimator in the fused kernels' terms, which have no ranked mask."""
        if self.training and self.replacement == "ranked":
            return None
        name = "ewgs" if self.form == "elementwise" else self.form
        rate = self.rate if self.training else None
        return KernelRule(name, self.strength, rate, self.variant == "replaced")

    def forward(self, v: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        c = v.clamp(lo, hi)
        move = (c.round() - c).detach()  # 0 where v is clipped, because lo and hi are integers
        replaced = move
        if self.training:
            if self.replacement == "random":
                mask = random_mask(move, self.rate, draw_seed(move.device))
            else:
                mask = ranked_mask(move, self.rate)
            replaced = torch.where(mask, move, torch.zeros_like(move))
        k = c + replaced
        if k.requires_grad:
            width = hi - lo
            error = -(move if self.variant == "everywhere" else replaced) / width
            strength, form = self.strength, self.form
            k.register_hook(lambda g: pege_gradient(g, error, strength, width, form))
        return k
