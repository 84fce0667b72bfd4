"""Commands that train, and what they made side by side."""

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bitwright.cli.arguments import Cache, DataDir
from bitwright.cli.output import export_run, print_table, verify_run


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE] [key=value …]", help="Recipe file or built-in name; then overrides of it."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="RUN", help="Default: runs/NAME.")] = None,
    data_dir: DataDir = None,
    cache: Cache = None,
    resume: Annotated[Path | None, typer.Option("--resume", metavar="RUN", help="Go on with this run.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is there.")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the training step (compile=true).")] = False,
) -> None:
    """Train RECIPE into the folder RUN. Without RECIPE: the quick start (digits, about one minute).

    Ctrl-C and SIGTERM finish the step and save; --resume RUN then ends bit-identical to a run that never stopped.
    """
    from bitwright.errors import BitwrightError
    from bitwright.training import quickstart as quick
    from bitwright.training import start
    from bitwright.training.folder import RunFolder, data_override
    from bitwright.training.interrupt import StopSignals
    from bitwright.training.recipe_file import load_recipe
    from bitwright.training.report import Reporter

    given = list(arguments or [])
    # A file is a recipe whatever its name: folders called lr=0.1 are common.
    recipe = given.pop(0) if given and ("=" not in given[0] or Path(given[0]).is_file()) else None
    overrides = [*data_override(data_dir), *(["compile=true"] if compile else []), *given]
    reporter = Reporter()
    with StopSignals() as stop:
        shared: dict[str, Any] = {"cache": cache, "reporter": reporter, "stop": stop}
        if resume is not None:
            if recipe is not None or out is not None or overwrite:
                raise BitwrightError("--resume RUN goes on with that run; give no RECIPE, --out or --overwrite with it")
            if RunFolder(resume).quickstart.is_file():
                quick.go_on(resume, overrides, **shared)
                _ship_quickstart(resume, cache)
            else:
                _finish(resume, start.resume(resume, overrides, **shared))
        elif recipe is None:
            folder = out or Path("runs/quickstart")
            quick.begin(folder, overrides, overwrite=overwrite, reporter=reporter)
            quick.go_on(folder, [], **shared)
            _ship_quickstart(folder, cache)
        else:
            folder = out or Path("runs") / Path(recipe).stem
            _finish(folder, start.train(load_recipe(recipe, overrides), folder, overwrite=overwrite, **shared))


def _finish(folder: Path, summary: dict[str, Any]) -> None:
    """The last lines of a training."""
    partner = f", float {summary['float_accuracy']:.2%}" if "float_accuracy" in summary else ""
    print(
        f"accuracy {summary['accuracy']:.2%} (best {summary['accuracy_best']:.2%}{partner}), "
        f"{summary['bitops'] / 1e9:.4g} G BitOPs, {summary['size_bytes'] / 1000:,.1f} KB"
    )
    print(folder / "summary.json")


def _ship_quickstart(out: Path, cache: Path | None) -> None:
    """The accuracy table, the file, and the proof."""
    from bitwright.training.quickstart import table

    rows, run = table(out, cache)
    lines = [[r.name, f"{r.accuracy:.2%}", r.bits, f"{r.bitops / 1e6:,.1f}", f"{r.size_kb:,.1f}"] for r in rows]
    print_table(["", "accuracy", "bits W/A", "M BitOPs", "size KB"], lines)
    export_run(run, run.folder.model, "onnx")
    verify_run(run, run.folder.model, images=run.dataset.train_size + run.dataset.test_size, layers=False)


def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="A sweep file.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Default: runs/NAME.")] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="Runs side by side; default: the file's.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Many runs from one file; what is finished is kept, what was stopped goes on. Writes DIR/results.csv."""
    from bitwright.training.sweep import run_sweep

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs are told to save and stop
    folder = out or Path("runs") / file.stem
    failed = run_sweep(file, folder, data_dir=None if data_dir is None else str(data_dir), jobs=jobs)
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (folder / "results.md").read_text().splitlines()
    ]
    print_table(header, rows)
    print(folder / "results.csv")
    if failed:
        raise typer.Exit(1)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Folders of runs.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="The page.")] = Path("report.html"),
) -> None:
    """One self-contained HTML page about one run or several side by side: results, curves, bits, recipes."""
    from bitwright.report import write_report

    write_report(runs, out)
    print(out)
