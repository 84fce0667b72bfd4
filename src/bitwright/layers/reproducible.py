"""Networks whose evaluation is what their file computes, to the last bit: norms, GELU and the switch for all layers.

Quantized layers look at their own `reproducible`; norms and GELU become layers of these classes. Training is as
before: the same kernels, the same gradients. In evaluation without gradients, functions are those of
`bitwright.kernels.reproducible` and products are computed on integers and scaled as runtimes scale them.
"""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.errors import BitwrightError
from bitwright.kernels import reproducible as kernels
from bitwright.layers.base import QuantLayer
from bitwright.layers.sums import normed
from bitwright.layers.waiting import QuantBatchNorm2d, QuantGELU
from bitwright.layers.whole import evaluates

logger = logging.getLogger("bitwright")


class Reproducible:
    """What deployment knows such a layer by.

    name: in the frozen form. symbol: what stands for the layer while a graph is exported, or None.
    """

    name = ""
    symbol: Callable[["Reproducible", Tensor], Tensor] | None = None


class ReproducibleLayerNorm(Reproducible, nn.LayerNorm):
    """`nn.LayerNorm` over the last axis."""

    def forward(self, input: Tensor) -> Tensor:
        if self.symbol is not None:
            return self.symbol(self, input)
        if self.training or not evaluates(input, self.weight, self.bias):
            return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        return kernels.layer_norm(input, self.weight, self.bias, self.eps)


class ReproducibleLayerNorm2d(ReproducibleLayerNorm):
    """timm's and torchvision's norm over the channels of (N, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ReproducibleGELU(Reproducible, QuantGELU):
    """`nn.GELU` without approximation."""

    def forward(self, input: Tensor) -> Tensor:
        if self.symbol is not None:
            return self.symbol(self, input)
        if self.training or not evaluates(input):
            return super().forward(input)
        return kernels.gelu(input)


class ReproducibleTransformersGELU(ReproducibleGELU):
    """transformers' `GELUActivation`, which has no attributes of torch's."""

    approximate = "none"


class FoldedNorm:
    """A BatchNorm that evaluates, behind a reproducible layer, what the deployed network has in its place."""

    def forward(self, input: Tensor) -> Tensor:
        y = normed(self, input)
        return super().forward(input) if y is None else y  # pyright: ignore


class ReproducibleBatchNorm1d(FoldedNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d`."""


class ReproducibleBatchNorm3d(FoldedNorm, nn.BatchNorm3d):
    """`nn.BatchNorm3d`."""


class ReproducibleSyncBatchNorm(FoldedNorm, nn.SyncBatchNorm):
    """`nn.SyncBatchNorm`."""


class ReproduciblePool(Reproducible, nn.AdaptiveAvgPool2d):
    """`nn.AdaptiveAvgPool2d(1)`."""

    def forward(self, input: Tensor) -> Tensor:
        if self.symbol is not None:
            return self.symbol(self, input)
        if self.training or not evaluates(input):
            return super().forward(input)
        return kernels.pooled(input)


# Activations of torch's that are no arithmetic on the input.
ROUNDED = (nn.GELU, QuantGELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softmax)

FOLDED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: ReproducibleBatchNorm1d,
    nn.BatchNorm2d: QuantBatchNorm2d,
    nn.BatchNorm3d: ReproducibleBatchNorm3d,
    nn.SyncBatchNorm: ReproducibleSyncBatchNorm,
}


def reproducible_class(module: nn.Module) -> type[Any] | None:
    """The class that `module` becomes, or None."""
    kind = type(module)
    ours = kind.__module__.startswith(("torch.nn.", "timm.layers.", "torchvision."))
    if isinstance(module, nn.LayerNorm) and ours and len(module.normalized_shape) == 1:
        return {"LayerNorm": ReproducibleLayerNorm, "LayerNorm2d": ReproducibleLayerNorm2d}.get(kind.__name__)
    if kind in FOLDED:
        return FOLDED[kind]
    if kind.__name__ == "BatchNormAct2d" and ours:
        from bitwright.layers.timm_norm import ReproducibleBatchNormAct2d

        return ReproducibleBatchNormAct2d
    if kind is nn.AdaptiveAvgPool2d:
        return ReproduciblePool if module.output_size in (1, (1, 1)) else None
    if (kind.__module__, kind.__name__) == ("transformers.activations", "GELUActivation"):
        return ReproducibleTransformersGELU
    return ReproducibleGELU if kind in (nn.GELU, QuantGELU) and module.approximate == "none" else None  # pyright: ignore


def make_reproducible(model: nn.Module) -> nn.Module:
    """Let `model` evaluate as its file computes, in place; returns it.

    Norms, softmax, GELU and products are then the same to the last bit in PyTorch, in the frozen form and in
    onnxruntime; in return a transformer's file is slower, and so is evaluation. Training does not change, nor does an
    evaluation that is compiled or records gradients. Call it before weights are loaded or after, and before the
    evaluation that counts.

    Layers: `nn.LayerNorm` (also timm's and torchvision's, over channels too), `nn.GELU`, `nn.AdaptiveAvgPool2d(1)`,
    the attention, convolutions and linear layers that `prepare` quantizes, and BatchNorms that alone read one of these.
    Other norms and activations (RMSNorm, SiLU) stay as they are, and a line in the log counts them; so do functions
    that a model's own forward calls, of which none tells.

    Args:
        model: prepared.

    Raises:
        BitwrightError: the model is not prepared.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantLayer)]
    if not layers:
        raise BitwrightError("the model has no quantizers; call bitwright.prepare first")
    for layer in layers:
        layer.reproducible = True
    for module in model.modules():
        kind = reproducible_class(module)
        if kind is not None:
            module.__class__ = kind
    left = Counter(type(m).__name__.removeprefix("Quant") for m in model.modules() if rounds_its_own_way(m))
    if left:
        counts = ", ".join(f"{count} {kind}" for kind, count in left.items())
        logger.warning(
            "bitwright: make_reproducible does not cover %s: a file may differ from the evaluation there", counts
        )
    return model


def rounds_its_own_way(module: nn.Module) -> bool:
    """Whether `module` is a norm or an activation that every runtime rounds in its own way, and stays so."""
    if isinstance(module, (Reproducible, FoldedNorm, QuantBatchNorm2d)) or any(module.children()):
        return False
    return type(module) in ROUNDED or type(module).__name__.endswith(("Norm", "Activation"))


def is_reproducible(model: nn.Module) -> bool:
    """Whether `make_reproducible` was called on `model`."""
    return any(isinstance(m, QuantLayer) and m.reproducible for m in model.modules())
