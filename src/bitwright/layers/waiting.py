"""Batch norm and GELU of quantized networks: the same functions, which in eager training wait for their quantizer."""

from torch import Tensor, nn

from bitwright.kernels import may_wait, takes_batch_norm
from bitwright.kernels.deferred_gelu import gelu
from bitwright.kernels.deferred_norm import batch_norm
from bitwright.layers.sums import normed


class QuantBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d`; in eager training on the CPU its output is deferred (`bitwright.kernels.deferred`).

    Behind a reproducible layer it evaluates what the deployed network has in its place (`bitwright.layers.sums`).
    """

    def forward(self, input: Tensor) -> Tensor:
        y = None if self.training else normed(self, input)
        if y is not None:
            return y
        if not self.training or self.momentum is None or not takes_batch_norm(input, self.weight, self.bias):
            return super().forward(input)
        self._check_input_dim(input)
        running = None
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            running = (self.running_mean, self.running_var)
        return batch_norm(input, self.weight, self.bias, running, self.eps, self.momentum)


class QuantGELU(nn.GELU):
    """`nn.GELU`, so deferred where it is not approximated."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.approximate != "none" or not may_wait(input):
            return super().forward(input)
        return gelu(input)


WAITING = {nn.BatchNorm2d: QuantBatchNorm2d, nn.GELU: QuantGELU}


def let_wait(model: nn.Module) -> None:
    """Turn such layers of `model` into ones that wait for their readers, in place; subclasses stay as they are."""
    for module in model.modules():
        if type(module) in WAITING:
            module.__class__ = WAITING[type(module)]
