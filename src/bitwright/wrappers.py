"""The user's module inside other people's wrappers."""

from torch import nn
from torch.optim.swa_utils import AveragedModel

HOLDERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`'s, DistributedDataParallel's, DataParallel's and AveragedModel's wrappers."""
    while True:
        if isinstance(model, HOLDERS):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model
