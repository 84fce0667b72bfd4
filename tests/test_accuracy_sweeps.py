"""Every kept sweep says things that can be trained: its runs are built, as far as that goes without weights."""

from pathlib import Path

import pytest
import torch

from bitwright.training.data import load_data
from bitwright.training.data.memory import MemoryDataset
from bitwright.training.recipe_file import load_recipe
from bitwright.training.rehearsal import rehearse
from bitwright.training.sweep_file import expand, read_sweep

FOLDER = Path(__file__).parents[1] / "benchmarks" / "accuracy"
SWEEPS = sorted(path for path in FOLDER.glob("*.yaml") if "variants:" in path.read_text())


def images(size: int) -> MemoryDataset:
    """In the place of CIFAR-10: as many images, all black and one in memory."""
    black = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    labels, half = torch.arange(50_000) % 10, (0.5, 0.5, 0.5)
    test = black.expand(10_000, -1, -1, -1), labels[:10_000]
    return MemoryDataset("cifar10", 10, black.expand(50_000, -1, -1, -1), labels, *test, half, half, 4, True)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_its_runs_can_be_built(path):
    sweep = read_sweep(path)
    own = path.parent / sweep.recipe
    seen = set()
    for run in expand(sweep):
        if run.variant in seen:
            continue
        seen.add(run.variant)
        recipe = load_recipe(str(own) if own.is_file() else sweep.recipe, list(run.overrides))
        digits = recipe.data.name == "digits"  # which need no stand-in, and are cheaper: a budget of theirs means them
        rehearse(recipe, load_data("digits") if digits else images(recipe.data.options.get("image_size", 32)))
    assert seen == set(sweep.variants)
