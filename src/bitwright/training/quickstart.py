"""The built-in quick start: float, W4A4 and W2A2 on the embedded digits, then the file that ships."""

import json
from dataclasses import dataclass
from pathlib import Path

from bitwright.training.checkpoint import write_atomic, write_json
from bitwright.training.folder import LoadedRun, RunFolder, load_run
from bitwright.training.interrupt import StopSignals
from bitwright.training.recipe_file import dump_recipe, load_recipe
from bitwright.training.report import Reporter
from bitwright.training.setup import float_model
from bitwright.training.start import resume

NOTICE = (
    "Quick start: a small ResNet on 1,797 handwritten digits (part of scikit-learn, no download): float, W4A4, W2A2.\n"
    "About one minute on 2 cores. Folder: {out}"
)


@dataclass(frozen=True)
class Row:
    """A line of the accuracy table. bits: `32/32` or weights/inputs; size_kb: 1000 bytes."""

    name: str
    accuracy: float
    bits: str
    bitops: float
    size_kb: float


def runs_of(out: Path) -> dict[str, RunFolder]:
    """The folders of a quick start: W4A4, the run that ships, in `out` itself."""
    return {"W4A4": RunFolder(out), "W2A2": RunFolder(out / "w2a2")}


def begin(out: Path, overrides: list[str], *, overwrite: bool, reporter: Reporter) -> None:
    """Make the folders and write the recipes; `go_on` then trains.

    overrides: `key=value` of both recipes.
    """
    recipes = {name: load_recipe(f"digits-{name.lower()}", overrides) for name in runs_of(out)}
    reporter.note(NOTICE.format(out=out))
    for folder in runs_of(out).values():
        with folder.alone():
            folder.claim(overwrite=overwrite)
    for name, folder in runs_of(out).items():
        write_atomic(folder.recipe, dump_recipe(recipes[name]))
    write_json(RunFolder(out).quickstart, list(recipes))


def go_on(out: Path, overrides: list[str], *, cache: Path | None, reporter: Reporter, stop: StopSignals) -> None:
    """Train what is not finished yet; overrides: as `start.resume` takes them."""
    for name, folder in runs_of(out).items():
        if not folder.summary.is_file():
            reporter.note(f"{name}:")
            resume(folder.root, overrides, cache=cache, reporter=reporter, stop=stop)


def table(out: Path, cache: Path | None) -> tuple[list[Row], LoadedRun]:
    """The accuracy table of a finished quick start, and its W4A4 run."""
    from bitwright.costs import cost_table

    runs = {name: load_run(folder.root, cache=cache) for name, folder in runs_of(out).items()}
    summaries = {name: json.loads(run.folder.summary.read_text()) for name, run in runs.items()}
    run = runs["W4A4"]
    example = next(iter(run.dataset.test_batches(batch_size=1, device="cpu")))[0]
    costs = cost_table(float_model(run.recipe, run.dataset, fresh=True).eval(), example)
    rows = [Row("float", summaries["W4A4"]["float_accuracy"], "32/32", costs.bitops, costs.size_bytes / 1000)]
    for name, summary in summaries.items():
        bits = f"{name[1]}/{name[3]}"
        rows.append(Row(name, summary["accuracy"], bits, summary["bitops"], summary["size_bytes"] / 1000))
    return rows, run
