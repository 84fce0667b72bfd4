"""The user's module inside other people's wrappers."""

import functools
import logging

from torch import nn
from torch.optim.swa_utils import AveragedModel

from bitwright.errors import BitwrightError

logger = logging.getLogger("bitwright")

# Classes of torch.distributed.fsdp by name, as the module takes long to import.
SHARDED = {"FSDPModule", "FullyShardedDataParallel"}
HOLDERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`'s, DistributedDataParallel's, DataParallel's and AveragedModel's wrappers."""
    while True:
        if isinstance(model, HOLDERS):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            if "_original_forward" in vars(model):
                say_autocast()
            return model


AUTOCAST = (
    "accelerate runs this model under autocast, and files compute in float32; before snap_biases, export and verify "
    "call accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
)


@functools.cache
def say_autocast() -> None:
    """A line in the log: accelerate replaces `forward` by one under autocast, whose numbers are no file's."""
    logger.warning("bitwright: %s", AUTOCAST)


def refuse_wrapped(model: nn.Module) -> None:
    """Raise BitwrightError for a model, unwrapped, that cannot be deployed as it is held: cast, or in shards."""
    if "_original_forward" in vars(model):
        raise BitwrightError(AUTOCAST)
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    if kinds & SHARDED:
        raise BitwrightError(
            "the model's parameters are shards of FSDP; gather its state dict into a model of its own first "
            "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict)"
        )
