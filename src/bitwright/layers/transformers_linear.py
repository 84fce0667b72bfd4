"""The linear layer of GPT-2 and its kin, quantized; imported only where transformers is in use."""

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from bitwright.layers.linear import QuantProduct


class QuantTransformersConv1D(QuantProduct, Conv1D):
    """`transformers.pytorch_utils.Conv1D`, a linear layer whose weight is (in, out); scales are one per output."""

    def weight_of(self, slot: str) -> Tensor:
        return self.weight.t()
