"""A run from its recipe, or from its folder."""

from pathlib import Path
from typing import Any

from bitwright.errors import BitwrightError
from bitwright.training.checkpoint import write_atomic
from bitwright.training.folder import RunFolder
from bitwright.training.interrupt import StopSignals
from bitwright.training.loop import Trainer
from bitwright.training.memory import keep_freed_memory
from bitwright.training.partner import get_partner, get_teacher
from bitwright.training.recipe import Recipe
from bitwright.training.recipe_file import dump_recipe
from bitwright.training.rehearsal import rehearse
from bitwright.training.report import Reporter
from bitwright.training.setup import choose_device, recipe_data, set_threads


def train(
    recipe: Recipe, out: Path, *, cache: Path | None, overwrite: bool, reporter: Reporter, stop: StopSignals
) -> dict[str, Any]:
    """Train `recipe` in the new folder `out`; returns the summary.

    Data, model, rules and methods are checked before the folder is touched.

    Raises: see `Trainer.run`; BitwrightError for a folder that holds a run already, unless `overwrite`, or in which
        another process trains.
    """
    set_threads(recipe)
    choose_device(recipe)
    dataset = recipe_data(recipe, cache)
    rehearse(recipe, dataset)
    folder = RunFolder(out)
    with folder.alone():
        folder.claim(overwrite=overwrite)
        write_atomic(folder.recipe, dump_recipe(recipe))
        return _run(recipe, folder, dataset, cache, reporter, stop)


def resume(
    root: Path, overrides: list[str], *, cache: Path | None, reporter: Reporter, stop: StopSignals
) -> dict[str, Any]:
    """Go on with the run in `root`, from its last checkpoint or, where it has none, from the start.

    overrides: of `device`, `threads` and `data.dir` only.

    Raises: as `train`; BitwrightError for other overrides, with or without a checkpoint: recipe.yaml would not say what
        was trained, and the run could not be opened.
    """
    folder = RunFolder(root)
    recipe = folder.load_recipe(overrides)
    if recipe.digest() != folder.load_recipe().digest():
        raise BitwrightError(
            f"{root}: made by another recipe than with {' '.join(overrides)!r}; "
            "only device, threads and data.dir may change"
        )
    set_threads(recipe)
    with folder.alone():
        return _run(recipe, folder, recipe_data(recipe, cache), cache, reporter, stop)


def _run(
    recipe: Recipe, folder: RunFolder, dataset: Any, cache: Path | None, reporter: Reporter, stop: StopSignals
) -> dict[str, Any]:
    keep_freed_memory()
    partner = get_partner(recipe, dataset, cache=cache, reporter=reporter, stop=stop)
    teacher = get_teacher(recipe, dataset, cache=cache, reporter=reporter, stop=stop)
    trainer = Trainer(recipe, dataset, folder, partner=partner, teacher=teacher, reporter=reporter, stop=stop)
    return trainer.run(resume=folder.checkpoint.is_file())
