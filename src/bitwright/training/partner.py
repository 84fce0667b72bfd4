"""The float networks of a run, partner and teacher: loaded, fetched, or trained once and kept for later runs."""

import fcntl
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import bitwright
from bitwright.cache import cache_folder
from bitwright.errors import BitwrightError
from bitwright.training.checkpoint import cannot_write, load_checkpoint, seed_everything, write_atomic
from bitwright.training.data import Dataset
from bitwright.training.evaluate import evaluate
from bitwright.training.folder import RunFolder, load_state
from bitwright.training.interrupt import StopSignals
from bitwright.training.models.own import fingerprint
from bitwright.training.recipe import PartnerSection, Recipe, float_recipe, teacher_recipe
from bitwright.training.recipe_file import dump_recipe
from bitwright.training.report import Reporter
from bitwright.training.setup import choose_device, float_model, place


@dataclass(frozen=True)
class Partner:
    """model: float, in evaluation mode on the run's device, without gradients. accuracy: on the test split."""

    model: nn.Module
    accuracy: float


def get_partner(
    recipe: Recipe,
    dataset: Dataset,
    *,
    cache: Path | None,
    reporter: Reporter,
    stop: StopSignals,
    role: str = "float partner",
) -> Partner | None:
    """The partner that the recipe asks for, or None. role: what messages call it.

    Raises: BitwrightError for weights that cannot be had; Interrupted when a signal came during its training.
    """
    wanted = recipe.partner
    if wanted is None:
        return None
    given = named_weights(wanted)
    if not given:
        return _trained(recipe, dataset, cache, reporter, stop, role)
    model = place(float_model(recipe, dataset, extra=given), recipe, choose_device(recipe))
    batches = dataset.test_batches(batch_size=recipe.schedule.batch_size, device=choose_device(recipe))
    accuracy = evaluate(model, batches, check=stop.check).accuracy
    origin = "published weights" if wanted.pretrained else wanted.checkpoint
    reporter.note(f"{role}: {origin}, accuracy {accuracy:.2%}")
    return Partner(model.eval().requires_grad_(False), accuracy)


def named_weights(wanted: PartnerSection) -> dict[str, Any]:
    """The option of `build_model` for weights that the recipe names; empty for a partner that is trained."""
    if wanted.pretrained:
        return {"pretrained": True}
    return {} if wanted.checkpoint is None else {"checkpoint": wanted.checkpoint}


def partner_key(recipe: Recipe, dataset: Dataset) -> str:
    """Names the trained partner of a run: a hash of its recipe, of the data's content and of our version."""
    content = hashlib.sha256()
    for batches in (
        dataset.test_batches(batch_size=64, device="cpu"),
        dataset.calibration_batches(seed=0, batch_size=64, count=1, device="cpu"),
    ):
        x, y = next(iter(batches))
        content.update(x.numpy().tobytes() + y.numpy().tobytes())
    assert recipe.partner is not None
    sizes = [dataset.train_size, dataset.test_size, dataset.num_classes]
    parts = [bitwright.__version__, float_recipe(recipe, recipe.partner).digest(), sizes, content.hexdigest()]
    if ":" in recipe.model.name:  # a file of the user's, which may change while its name stays
        parts.append(fingerprint(recipe.model.name, float_model(recipe, dataset, fresh=True)))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def get_teacher(
    recipe: Recipe, dataset: Dataset, *, cache: Path | None, reporter: Reporter, stop: StopSignals
) -> Partner | None:
    """The teacher that the recipe asks for beside its partner, or None. Raises: as `get_partner`."""
    if recipe.teacher is None:
        return None
    own = teacher_recipe(recipe, recipe.teacher)
    return get_partner(own, dataset, cache=cache, reporter=reporter, stop=stop, role="teacher")


def _trained(
    recipe: Recipe, dataset: Dataset, cache: Path | None, reporter: Reporter, stop: StopSignals, role: str
) -> Partner:
    from bitwright.training.loop import Trainer

    assert recipe.partner is not None
    own = float_recipe(recipe, recipe.partner)
    folder = RunFolder(cache_folder(cache) / "partners" / partner_key(recipe, dataset))
    with _alone(folder.root, reporter, stop, role):
        if folder.summary.is_file():
            reporter.note(f"{role}: trained before, from {folder.root}")
        else:
            reporter.note(f"{role}: {own.model.name} on {dataset.name}, {own.schedule.epochs} epochs")
            write_atomic(folder.recipe, dump_recipe(own))
            Trainer(own, dataset, folder, reporter=reporter, stop=stop).run(resume=folder.checkpoint.is_file())
        state = load_checkpoint(folder.checkpoint, digest=own.digest())
        try:
            accuracy = float(json.loads(folder.summary.read_text())["accuracy"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BitwrightError(f"{folder.summary}: damaged ({error}); remove the folder to train again") from None
    seed_everything(own.seed)
    model = float_model(own, dataset, fresh=True)
    load_state(model, state["ema"]["model"] if state["ema"] else state["model"], folder.checkpoint)
    place(model, recipe, choose_device(recipe))
    return Partner(model.eval().requires_grad_(False), accuracy)


@contextmanager
def _alone(root: Path, reporter: Reporter, stop: StopSignals, role: str) -> Iterator[None]:
    """Hold the lock of a cached partner: another process that wants the same one waits for it."""
    lock = root.with_suffix(".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "w")  # noqa: SIM115 (closed below; only the opening is guarded)
    except OSError as error:
        raise cannot_write(lock, error) from None
    with file:
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    reporter.note(f"{role}: another run is training it; waiting")
                waiting = True
                stop.check()
                time.sleep(0.5)
        yield
