"""timm's BatchNorm with an activation, in reproducible networks; imported only where a model brings timm."""

from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor

from bitwright.layers.reproducible import FoldedNorm
from bitwright.layers.sums import normed


class ReproducibleBatchNormAct2d(FoldedNorm, BatchNormAct2d):
    """`BatchNormAct2d` that evaluates, behind a reproducible layer, what the deployed network has in its place."""

    def forward(self, x: Tensor) -> Tensor:
        y = normed(self, x)
        return super().forward(x) if y is None else self.act(self.drop(y))  # pyright: ignore
