"""Batch norm of quantized networks: the same function, which in eager training waits for the quantizer behind it."""

from torch import Tensor, nn

from bitwright.kernels import takes_norm
from bitwright.kernels.deferred import batch_norm


class QuantBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d`; in eager training on the CPU its output is deferred (`bitwright.kernels.deferred`)."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.momentum is None or not takes_norm(input, self.weight):
            return super().forward(input)
        self._check_input_dim(input)
        running = None
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            running = (self.running_mean, self.running_var)
        return batch_norm(input, self.weight, self.bias, running, self.eps, self.momentum)


def defer_norms(model: nn.Module) -> None:
    """Turn the batch norms of `model` into ones that wait for their readers, in place; subclasses stay as they are."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = QuantBatchNorm2d
