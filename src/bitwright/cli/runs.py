"""Commands about a run that is there."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitwright.cli.arguments import Cache, DataDir, Json, Run, Runtime
from bitwright.cli.output import costs_of, export_run, print_table, verify_run

if TYPE_CHECKING:
    from bitwright.prepare import QuantizerRow


def evaluate_run(run: Run, data_dir: DataDir = None, cache: Cache = None, as_json: Json = False) -> None:
    """Every quantizer, accuracy on the test split, coverage of the quantizers, cost."""
    from bitwright.coverage import require_complete
    from bitwright.prepare import describe
    from bitwright.training.evaluate import evaluate
    from bitwright.training.folder import load_run

    loaded = load_run(run, data_dir=data_dir, cache=cache)
    batches = loaded.dataset.test_batches(batch_size=loaded.recipe.schedule.batch_size, device=loaded.device)
    result = evaluate(loaded.model, batches)
    costs = costs_of(loaded.model, loaded.dataset, loaded.device)
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
        [r.name, r.layer, r.grid, r.estimator, shown_bits(r), "signed" if r.signed else "unsigned", str(r.scales)]
        for r in rows
    ]
    if lines:
        print_table(["quantizer", "layer", "grid", "estimator", "bits", "codes", "scales"], lines)
    print(f"accuracy {result.accuracy:.2%} on {result.images:,} images, loss {result.loss:.4f}")
    if result.coverage is not None:
        left = ", ".join(result.coverage.float_layers) or "none"
        print(f"coverage: all {len(result.coverage.ran)} quantizers ran; layers left float: {left}")
    print(f"cost: {costs.bitops / 1e9:.4g} G BitOPs, {costs.size_bytes / 1000:,.1f} KB")


def shown_bits(row: "QuantizerRow") -> str:
    """A quantizer's bits; where channels have their own, the mean and the largest."""
    return f"{row.bits:.4g}" if row.bits == row.most_bits else f"{row.bits:.4g}, to {row.most_bits}"


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
    export_run(loaded, out or loaded.folder.model, to)


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
    verify_run(loaded, file or loaded.folder.model, images=images, as_json=as_json, runtime=runtime)


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
    table = costs_of(model, dataset, device, measured)
    if as_json:
        print(json.dumps(table.as_dict()))
    else:
        print(table)


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
    print_table(["", "median ms", "lower quartile", "upper quartile"], lines)
    if result.operators:
        print("time: " + ", ".join(f"{name} {share:.0%}" for name, share in list(result.operators.items())[:8]))
    beside = "" if result.static_ratio is None else f", ÷ the runtime's own static int8 {result.static_ratio:.3f}"
    print(
        f"file ÷ float {result.ratio:.3f}{beside}, batch {result.batch}, threads {result.threads}; "
        f"{result.integer_share:.0%} of convolutions and products on integer kernels"
    )
