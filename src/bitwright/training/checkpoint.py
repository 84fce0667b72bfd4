"""Checkpoints: one file of tensors and plain values, written whole or not at all, opened without executing anything."""

import io
import json
import os
import pickle
import random
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitwright.errors import BitwrightError

FORMAT = "bitwright run 1"
# What every run's checkpoint holds beside its format and recipe.
RUN_PARTS = ("epoch", "position", "sums", "rows", "seconds", "model", "gradients", "optimizer", "step", "ema", "random")


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content`: after a crash, a full disk or a kill there is the old file or the new one.

    Raises: BitwrightError when the folder cannot be written to or has no room.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> BitwrightError:
    """The line for a write that failed."""
    return BitwrightError(f"{path}: cannot be written ({error.strerror or error})")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, content: Any) -> None:
    """`content` as indented JSON, atomically."""
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values only) to `path`, atomically."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomic(path, buffer.getvalue())


def load_checkpoint(path: Path, *, digest: str | None = None) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU.

    digest: the recipe's; a checkpoint of another recipe, or without a part of a run (`RUN_PARTS`), is refused.

    Raises: BitwrightError for a file that is missing, damaged (every checksum is compared), not a checkpoint of a
    run, or of another recipe.
    """
    if not path.is_file():
        raise BitwrightError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad is not None:
            raise BitwrightError(f"{path}: damaged checkpoint (wrong checksum)")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise BitwrightError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (zipfile.BadZipFile, zipfile.LargeZipFile, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise BitwrightError(f"{path}: not a checkpoint, or a damaged one ({_first_line(error)})") from None
    except pickle.UnpicklingError:
        raise BitwrightError(f"{path}: not a checkpoint (holds more than tensors and plain values)") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise BitwrightError(f"{path}: not a checkpoint of a bitwright run")
    if digest is not None and state.get("recipe") != digest:
        raise BitwrightError(
            f"{path}: made by another recipe than the recipe.yaml beside it (with its overrides); "
            "only device, threads and data.dir may change"
        )
    lacking = [part for part in RUN_PARTS if part not in state] if digest is not None else []
    if lacking:
        raise BitwrightError(f"{path}: not a whole checkpoint of a run (lacks {', '.join(lacking)})")
    return state


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def rng_state() -> dict[str, Any]:
    """The global random states of torch (CPU and CUDA), NumPy and Python, as tensors and plain values."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` gave."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
