"""The precision of frozen networks that guide the trained one."""

import contextlib

import torch

from bitwright.errors import BitwrightError


def guide_dtype(value: str | None, where: str) -> torch.dtype | None:
    """The autocast dtype of a guide's passes: "bfloat16", or None as the step runs.

    Raises:
        BitwrightError: any other; `where` names the option.
    """
    if value is None or value == "bfloat16":
        return None if value is None else torch.bfloat16
    raise BitwrightError(f"{where}={value!r} is not accepted; use bfloat16, or null for the precision of the step")


def casting(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    """Autocast to `dtype`, whatever is around; nothing for None."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
