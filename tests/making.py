"""Things that several tests build."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from bitwright.calibrate import rows_per_scale
from bitwright.grids import Shape, Stats
from bitwright.quantizer import Quantizer
from bitwright.spec import QuantizerSpec
from bitwright.training.vision import import_timm


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


def efficientnet_lite(classes: int) -> nn.Module:
    """Three of the seven stages of timm's `tf_efficientnet_lite0`, which have every kind of block that it has."""
    import_timm()
    from timm.models.efficientnet import EfficientNet, decode_arch_def

    stages = [["ds_r1_k3_s1_e1_c16"], ["ir_r2_k3_s2_e6_c24"], ["ir_r2_k5_s2_e6_c40"]]
    return EfficientNet(
        decode_arch_def(stages),
        num_classes=classes,
        num_features=160,
        fix_stem=True,
        pad_type="same",
        act_layer=nn.ReLU6,
        norm_layer=partial(nn.BatchNorm2d, eps=1e-3),
    )
