"""Things that several tests build."""

from typing import Any

from torch import Tensor, nn

from bitwright.calibrate import rows_per_scale
from bitwright.grids import Shape, Stats
from bitwright.quantizer import Quantizer
from bitwright.spec import QuantizerSpec


def make_quantizer(
    grid: str,
    bits: int,
    data: Tensor,
    *,
    role: str = "weight",
    signed: bool | None = None,
    channels: int = 1,
    estimator: str = "clipped_ste",
    **options: Any,
) -> Quantizer:
    """A quantizer in the dtype of `data`, initialized from it; `options` are the grid's."""
    axis = 0 if role == "weight" else 1
    shape = Shape(role, channels, axis, data.numel() if role == "weight" else 0, data.ndim == 2)  # pyright: ignore
    spec = QuantizerSpec(bits=bits, grid=grid, estimator=estimator, signed=signed, grid_options=options)  # pyright: ignore
    made = Quantizer(spec, shape).to(data.dtype)
    made.initialize(Stats.of(rows_per_scale(data, made.shape)))
    return made


def shallow(model: nn.Module, stages: list[str]) -> nn.Module:
    """`model` with at most two blocks in each of `stages`: one that changes the shape, one that keeps it."""
    for name in stages:
        stage = model.get_submodule(name)
        for block in list(dict(stage.named_children()))[2:]:
            delattr(stage, block)
    return model
