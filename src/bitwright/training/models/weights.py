"""A float checkpoint from a file, into a model, with one clear line when they do not fit."""

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from bitwright.errors import BitwrightError
from bitwright.training.lookup import first_line


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` file or a `torch.save` file, on the CPU.

    A torch file may hold the state dict itself or hold it under "state_dict" or "model"; the "module." prefix that
    a data-parallel wrapper leaves is removed. Opened with `weights_only=True`: nothing in the file is executed.

    Raises: BitwrightError for a file that is missing, is damaged, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise BitwrightError(f"{path}: no such checkpoint file")
    try:
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            with warnings.catch_warnings(action="ignore"):  # about pickle protocols: the error below says enough
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Any other file than a zip archive ends here too: there is no pickle in it, or one of an old format.
        why = "it holds Python objects, which are not run" if zipfile.is_zipfile(path) else first_line(error)
        hint = "; save the weights alone: torch.save(model.state_dict(), FILE)" if zipfile.is_zipfile(path) else ""
        raise BitwrightError(f"{path}: not a readable checkpoint of weights ({why}){hint}") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise BitwrightError(f"{path}: not a readable checkpoint of weights ({first_line(error)})") from error
    except safetensors.SafetensorError as error:
        raise BitwrightError(f"{path}: not a readable safetensors file ({first_line(error)})") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise BitwrightError(f"{path}: holds no state dict (a mapping of names to tensors)")
    state = dict(content)
    consume_prefix_in_state_dict_if_present(state, "module.")
    return state


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into `model`; every name and shape must agree. The model is unchanged when they do not.

    Raises: BitwrightError naming `source` and the first entries that do not fit.
    """
    own = model.state_dict()
    shapes = [
        f"{name} is {tuple(state[name].shape)}, the model's is {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = {
        "missing": [name for name in own if name not in state],
        "unknown": [name for name in state if name not in own],
        "shape": shapes,
    }
    found = [f"{kind}: {_some(names)}" for kind, names in problems.items() if names]
    if found:
        raise BitwrightError(f"{source} does not fit the model ({'; '.join(found)})")
    model.load_state_dict(state)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
