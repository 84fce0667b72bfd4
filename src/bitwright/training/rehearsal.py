"""What can be refused without trained weights is refused before anything is trained or written."""

import torch
import torch.nn.functional as F

from bitwright.errors import BitwrightError
from bitwright.step import Step
from bitwright.training.data import Dataset
from bitwright.training.methods import make_methods, method_context
from bitwright.training.partner import named_weights
from bitwright.training.recipe import Recipe, teacher_recipe
from bitwright.training.setup import blame, float_model, quantize


def rehearse(recipe: Recipe, dataset: Dataset) -> None:
    """Build model, rules and methods once, on the CPU: a float partner may take hours to train.

    Weights that the recipe names are loaded, so that a file that is missing or does not fit makes no folder.

    Raises:
        BitwrightError: as the parts of a run do, naming the recipe.
    """
    batches = dataset.steps_per_epoch(recipe.schedule.batch_size) * recipe.schedule.epochs
    if recipe.optimizer.accumulate > batches:
        raise BitwrightError(
            f"{recipe.source}: optimizer.accumulate: {recipe.optimizer.accumulate} is not accepted; "
            f"use a number up to {batches}, the batches of the whole training"
        )
    if recipe.channels_last and dataset.blank.ndim != 4:
        raise BitwrightError(
            f"{recipe.source}: channels_last: true is not accepted; it is for images, and the samples of "
            f"{dataset.name} have shape {tuple(dataset.blank.shape[1:])}"
        )
    weights = None if recipe.partner is None else named_weights(recipe.partner)
    model = quantize(recipe, float_model(recipe, dataset, extra=weights), dataset)
    if not recipe.methods:
        return
    partner = None if recipe.partner is None else float_model(recipe, dataset, fresh=True).eval()
    teacher = None
    if recipe.teacher is not None:
        given = named_weights(recipe.teacher)
        teacher = float_model(teacher_recipe(recipe, recipe.teacher), dataset, extra=given).eval()
    example = dataset.blank.repeat_interleave(2, 0)
    with blame(recipe.source):
        methods = make_methods(
            recipe.methods, method_context(recipe, dataset, model, partner, example, F.cross_entropy, teacher)
        )
        Step(model, F.cross_entropy, torch.optim.SGD(model.parameters()), methods)
