"""The folder of a run: its files, and the network that they hold."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitwright.errors import BitwrightError
from bitwright.training.checkpoint import cannot_write, load_checkpoint
from bitwright.training.data import Dataset
from bitwright.training.recipe import Recipe
from bitwright.training.recipe_file import load_recipe
from bitwright.training.setup import choose_device, float_model, place, quantize, recipe_data, set_threads


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint.pt"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def model(self) -> Path:
        return self.root / "model.onnx"

    @property
    def quickstart(self) -> Path:
        """Marks the folder of a quick start, so that --resume finishes all of it."""
        return self.root / "quickstart.json"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock of the folder, which is made where it is missing: two processes would mix their checkpoints.

        The lock is the folder's own (`flock`), goes with the process, and is not taken on filesystems without locks.

        Raises: BitwrightError where another process trains there, or the folder cannot be made.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.root, os.O_RDONLY)
        except OSError as error:
            raise cannot_write(self.root, error) from None
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BitwrightError(
                    f"{self.root}: another process is training there; wait for it or give another --out"
                ) from None
            except OSError:
                pass
            yield
        finally:
            os.close(handle)

    def busy(self) -> bool:
        """Whether another process trains there now; False where the filesystem cannot tell."""
        try:
            handle = os.open(self.root, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            os.close(handle)
        return False

    def identity(self) -> tuple[int, int] | None:
        """Tells this folder from another one of the same name; None where there is none."""
        try:
            found = os.stat(self.root)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def claim(self, *, overwrite: bool) -> None:
        """Make the folder ready for a new run; with `overwrite`, the files of an earlier one are removed.

        Raises: BitwrightError where it holds a run already, or cannot be made.
        """
        files = (self.recipe, self.checkpoint, self.metrics, self.summary, self.model, self.quickstart)
        taken = [f for f in files if f.exists()]
        if taken and not overwrite:
            raise BitwrightError(
                f"{self.root}: holds a run already ({taken[0].name}); "
                f"use --resume {self.root} to go on with it, --overwrite to replace it, or another --out"
            )
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            for file in taken:
                file.unlink()
            shutil.rmtree(self.tensorboard, ignore_errors=True)
        except OSError as error:
            raise cannot_write(self.root, error) from None

    def load_recipe(self, overrides: list[str] | None = None) -> Recipe:
        """The run's resolved recipe. Raises: BitwrightError where the folder holds no run."""
        if not self.recipe.is_file():
            raise BitwrightError(f"{self.root}: not a run (no recipe.yaml in it)")
        recipe = load_recipe(self.recipe, overrides or [])
        if "topology" not in recipe.model_fields_set:  # of a run from before recipes had one
            recipe = load_recipe(self.recipe, ["topology=fpres", *(overrides or [])])
        return recipe


@dataclass(frozen=True)
class LoadedRun:
    """A run as it stands: the network is the one that is evaluated and exported (the average, where there is one)."""

    folder: RunFolder
    recipe: Recipe
    dataset: Dataset
    model: nn.Module
    state: dict[str, Any]

    @property
    def device(self) -> torch.device:
        return choose_device(self.recipe)


def data_override(data_dir: str | Path | None) -> list[str]:
    """The override that `--data-dir` stands for."""
    return [] if data_dir is None else [f"data.dir={str(data_dir)!r}"]


def load_run(root: str | Path, *, data_dir: str | Path | None = None, cache: Path | None = None) -> LoadedRun:
    """Recipe, data and network of a run, in evaluation mode on the recipe's device.

    Raises: BitwrightError for a folder without a run, a damaged checkpoint, or data that is not there.
    """
    folder = RunFolder(Path(root))
    recipe = folder.load_recipe(data_override(data_dir))
    state = load_checkpoint(folder.checkpoint, digest=recipe.digest())
    set_threads(recipe)
    dataset = recipe_data(recipe, cache)
    model = quantize(recipe, float_model(recipe, dataset, fresh=True), dataset)
    weights = state["ema"]["model"] if state["ema"] else state["model"]
    load_state(model, weights, folder.checkpoint)
    place(model, recipe, choose_device(recipe))
    return LoadedRun(folder, recipe, dataset, model.eval(), state)


def load_state(model: nn.Module, weights: dict[str, Any], source: Path) -> None:
    """Strict `load_state_dict`. Raises: BitwrightError where names or shapes differ."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise BitwrightError(f"{source}: does not fit the recipe's model ({' '.join(lines)[:200]})") from None
