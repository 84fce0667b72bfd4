"""The command line. Thin: every command is a few calls of the library."""

import json
import os
import re
import signal
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train neural networks at 1 to 8 bits, and ship exactly what was trained.",
)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)]
DataDir = Annotated[Path | None, typer.Option("--data-dir", metavar="DIR", help="First folder to look for data in.")]
Cache = Annotated[
    Path | None,
    typer.Option("--cache", metavar="DIR", envvar="BITWRIGHT_CACHE", help="Downloads and trained float partners."),
]
Runtime = Annotated[
    str, typer.Option("--runtime", help="default (the target's own: onnxruntime) or native (bitwright.runtime).")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Taken by `main` before commands see it; here for the help page."""


@app.command()
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
    recipe = given.pop(0) if given and "=" not in given[0] else None
    overrides = [*data_override(data_dir), *(["compile=true"] if compile else []), *given]
    reporter = Reporter()
    with StopSignals() as stop:
        shared: dict[str, Any] = {"cache": cache, "reporter": reporter, "stop": stop}
        if resume is not None:
            if recipe is not None or out is not None or overwrite:
                raise BitwrightError("--resume RUN goes on with that run; give no RECIPE, --out or --overwrite with it")
            if RunFolder(resume).quickstart.is_file():
                quick.go_on(resume, **shared)
                _ship_quickstart(resume, cache)
            else:
                _finish(resume, start.resume(resume, overrides, **shared))
        elif recipe is None:
            folder = out or Path("runs/quickstart")
            quick.begin(folder, overrides, overwrite=overwrite, reporter=reporter)
            quick.go_on(folder, **shared)
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
    _print_table(["", "accuracy", "bits W/A", "M BitOPs", "size KB"], lines)
    _export(run, run.folder.model, "onnx")
    _verify(run, run.folder.model, images=run.dataset.train_size + run.dataset.test_size, layers=False)


@app.command("eval")
def evaluate_run(run: Run, data_dir: DataDir = None, cache: Cache = None, as_json: Json = False) -> None:
    """Every quantizer, accuracy on the test split, coverage of the quantizers, cost."""
    from bitwright.coverage import require_complete
    from bitwright.prepare import describe
    from bitwright.training.evaluate import evaluate
    from bitwright.training.folder import load_run

    loaded = load_run(run, data_dir=data_dir, cache=cache)
    batches = loaded.dataset.test_batches(batch_size=loaded.recipe.schedule.batch_size, device=loaded.device)
    result = evaluate(loaded.model, batches)
    costs = _costs(loaded.model, loaded.dataset, loaded.device)
    found: dict[str, Any] = {"accuracy": result.accuracy, "loss": result.loss, "images": result.images}
    found |= {"bitops": costs.bitops, "size_bytes": costs.size_bytes}
    rows = describe(loaded.model)
    found["quantizers"] = [asdict(row) for row in rows]
    if result.coverage is not None:
        require_complete(result.coverage)
        found["coverage"] = {"ran": len(result.coverage.ran), "missed": [], "float": list(result.coverage.float_layers)}
    if as_json:
        print(json.dumps(found))
        return
    lines = [
        [r.name, r.layer, r.grid, r.estimator, str(r.bits), "signed" if r.signed else "unsigned", str(r.scales)]
        for r in rows
    ]
    if lines:
        _print_table(["quantizer", "layer", "grid", "estimator", "bits", "codes", "scales"], lines)
    print(f"accuracy {result.accuracy:.2%} on {result.images:,} images, loss {result.loss:.4f}")
    if result.coverage is not None:
        left = ", ".join(result.coverage.float_layers) or "none"
        print(f"coverage: all {len(result.coverage.ran)} quantizers ran; layers left float: {left}")
    print(f"cost: {costs.bitops / 1e9:.4g} G BitOPs, {costs.size_bytes / 1000:,.1f} KB")


@app.command()
def export(
    run: Run,
    to: Annotated[str, typer.Option("--to", metavar="TARGET", help="See docs/deployment.md.")] = "onnx",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="Default: RUN/model.onnx for onnx.")
    ] = None,
    data_dir: DataDir = None,
    cache: Cache = None,
) -> None:
    """Write the deployable file for TARGET: onnx, packed, openvino, qonnx, compressed-tensors or executorch."""
    from bitwright.deploy.targets import EXPORT
    from bitwright.errors import BitwrightError
    from bitwright.training.folder import load_run

    if out is None and to in EXPORT and to != "onnx":
        raise BitwrightError(f"--to {to}: say where with -o FILE; RUN/model.onnx is kept for onnx")
    loaded = load_run(run, data_dir=data_dir, cache=cache)
    _export(loaded, out or loaded.folder.model, to)


@app.command()
def verify(
    run: Run,
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Default: RUN/model.onnx.")] = None,
    images: Annotated[int, typer.Option("--images", min=1, help="Test images, then training images.")] = 2000,
    runtime: Runtime = "default",
    data_dir: DataDir = None,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Is FILE the network that was trained? Exit 0: yes; 1: no, with the first layer that differs."""
    from bitwright.training.folder import load_run

    loaded = load_run(run, data_dir=data_dir, cache=cache)
    _verify(loaded, file or loaded.folder.model, images=images, as_json=as_json, runtime=runtime)


@app.command()
def cost(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_RECIPE", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value …]")] = None,
    latencies: Annotated[
        Path | None, typer.Option("--latencies", help="Time every layer in the native runtime; write the table here.")
    ] = None,
    data_dir: DataDir = None,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """BitOPs and size, per layer, of a run or of what a recipe would make; with --latencies, milliseconds as well."""
    from bitwright.errors import BitwrightError
    from bitwright.training.folder import data_override, load_run
    from bitwright.training.recipe_file import load_recipe
    from bitwright.training.setup import float_model, quantize, recipe_data

    if Path(target).is_dir():
        if overrides:
            raise BitwrightError(f"{overrides[0]!r}: a run has its recipe already; give key=value with a recipe only")
        loaded = load_run(target, data_dir=data_dir, cache=cache)
        model, dataset, device = loaded.model, loaded.dataset, loaded.device
    else:
        recipe = load_recipe(target, [*data_override(data_dir), *(overrides or [])])
        dataset, device = recipe_data(recipe, cache), "cpu"
        model = quantize(recipe, float_model(recipe, dataset, fresh=True), dataset).eval()
    measured = None
    if latencies is not None:
        from bitwright.training.latency import write_latencies

        measured = write_latencies(model, dataset, latencies)
    table = _costs(model, dataset, device, measured)
    if as_json:
        print(json.dumps(table.as_dict()))
    else:
        print(table)


@app.command()
def bench(
    run: Run,
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Default: RUN/model.onnx.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images per run of the network.")] = 1,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Of the runtime.")] = 1,
    runs: Annotated[int, typer.Option("--runs", min=2, help="Timed runs of each, alternating.")] = 30,
    runtime: Runtime = "default",
    data_dir: DataDir = None,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Latency of FILE beside the float network of the same architecture in onnxruntime, alternating."""
    from bitwright.deploy import bench as measure
    from bitwright.training.folder import load_run
    from bitwright.training.setup import float_model

    loaded = load_run(run, data_dir=data_dir, cache=cache)
    example = next(iter(loaded.dataset.test_batches(batch_size=batch, device="cpu")))[0]
    twin = float_model(loaded.recipe, loaded.dataset, fresh=True)
    result = measure(file or loaded.folder.model, twin, example, threads, runs=runs, runtime=runtime)
    if as_json:
        print(json.dumps(result.as_dict()))
        return
    measured = (("file", result.file), ("float", result.float_model), ("static int8", result.static))
    lines = [[name, f"{t.median:.3f}", f"{t.lower:.3f}", f"{t.upper:.3f}"] for name, t in measured if t is not None]
    _print_table(["", "median ms", "lower quartile", "upper quartile"], lines)
    if result.operators:
        print("time: " + ", ".join(f"{name} {share:.0%}" for name, share in list(result.operators.items())[:8]))
    beside = "" if result.static_ratio is None else f", ÷ the runtime's own static int8 {result.static_ratio:.3f}"
    print(
        f"file ÷ float {result.ratio:.3f}{beside}, batch {result.batch}, threads {result.threads}; "
        f"{result.integer_share:.0%} of convolutions and products on integer kernels"
    )


@app.command()
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
    _print_table(header, rows)
    print(folder / "results.csv")
    if failed:
        raise typer.Exit(1)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Folders of runs.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="The page.")] = Path("report.html"),
) -> None:
    """One self-contained HTML page about one run or several side by side: results, curves, bits, recipes."""
    from bitwright.report import write_report

    write_report(runs, out)
    print(out)


def _costs(model: Any, dataset: Any, device: Any, latencies: Any = None) -> Any:
    from bitwright.costs import cost_table

    example = next(iter(dataset.test_batches(batch_size=1, device=device)))[0]
    return cost_table(model, example, latencies=latencies)


def _export(run: Any, file: Path, target: str) -> None:
    from bitwright.deploy import export

    example = next(iter(run.dataset.test_batches(batch_size=2, device=run.device)))[0]
    report = export(run.model, file, example, target=target)
    print(f"{file}: {report.size_bytes / 1000:,.1f} KB, of them {report.packed_bytes / 1000:,.1f} KB packed weights")


def _verify(
    run: Any, file: Path, *, images: int, as_json: bool = False, layers: bool = True, runtime: str = "default"
) -> None:
    from bitwright.deploy import verify
    from bitwright.training.evaluate import some_images

    result = verify(run.model, file, some_images(run.dataset, images, device=run.device), runtime=runtime)
    if as_json:
        print(json.dumps(result.as_dict()))
    elif layers:
        header = ["layer", "what", "bits", "values", "different", "ok"]
        lines = [
            [
                r["name"],
                r["what"],
                str(r["bits"]),
                f"{r['values']:,}",
                f"{r['different_file']:,}",
                "yes" if r["ok"] else "NO",
            ]
            for r in result.rows()
        ]
        _print_table(header, lines)
    if not as_json and result.ok:
        print(
            f"verified: {result.path} on {result.images:,} images, {result.different_file} predictions differ, "
            f"largest logit difference {result.logit_difference:.2g}"
        )
        if result.float32_differs:
            print(
                f"{result.float32_differs} near-ties: the training form decides them otherwise in float32 than float64"
            )
    if not result.ok:
        print(f"NOT the network that was trained: {result.first_difference}", file=sys.stderr)
        raise typer.Exit(1)


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    """Columns wide enough for their content, numbers to the right."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    for line in (header, *rows):
        cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        print("  ".join(cells))


def main() -> None:
    """Run the command line; a clear line and exit 2 for bad input, 1 for a run that failed, 128 + n for signal n."""
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(arguments, prog_name="bitwright")
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # `bitwright … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        if debug:
            traceback.print_exc()
        else:
            print(f"error: {_line(error)}" if code < 128 else error, file=sys.stderr)
    else:
        code = 0
    sys.exit(code)


def _line(error: Exception) -> str:
    if not _out_of_memory(error):
        return str(error)
    tried = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
    much = f" for another {tried[1]}" if tried else ""
    return f"not enough memory{much}; use a smaller schedule.batch_size (or --batch), image or network"


def _exit_code(error: Exception) -> int | None:
    """The code for an error that is not a bug, else None."""
    from bitwright.errors import BitwrightError

    if isinstance(error, BitwrightError):
        return 2
    return 1 if _out_of_memory(error) else getattr(error, "exit_code", None)


def _out_of_memory(error: Exception) -> bool:
    """Whether the machine has too little memory: no bug, and a smaller batch or network helps."""
    import torch

    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)
