"""Steps that several commands end with, and how they print."""

import json
import sys
from pathlib import Path
from typing import Any

import typer


def costs_of(model: Any, dataset: Any, device: Any, latencies: Any = None) -> Any:
    """The cost table of a model on one image of `dataset`."""
    from bitwright.costs import cost_table

    example = next(iter(dataset.test_batches(batch_size=1, device=device)))[0]
    return cost_table(model, example, latencies=latencies)


def export_run(run: Any, file: Path, target: str) -> None:
    """Write the file and say how large it is."""
    from bitwright.deploy import export

    example = next(iter(run.dataset.test_batches(batch_size=2, device=run.device)))[0]
    report = export(run.model, file, example, target=target)
    print(f"{file}: {report.size_bytes / 1000:,.1f} KB, of them {report.packed_bytes / 1000:,.1f} KB packed weights")


def verify_run(
    run: Any, file: Path, *, images: int, as_json: bool = False, layers: bool = True, runtime: str = "default"
) -> None:
    """Compare and print. Raises: typer.Exit(1) where the file is not the network."""
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
        print_table(header, lines)
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


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Columns wide enough for their content, numbers to the right."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    for line in (header, *rows):
        cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        print("  ".join(cells))
