"""`write_report`: from the folders of runs to one HTML file."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from bitwright.errors import BitwrightError
from bitwright.report.runs import RunData, read_run

Cells = list[tuple[str, str]]


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write a page about the runs in `folders` to `out`: results side by side, curves, bits, recipes.

    The page holds everything itself (no script, no network), and whatever a run's files contain is shown as text.

    Raises:
        BitwrightError: a folder is no run, a file in it is damaged, matplotlib is missing, or `out` cannot be written.
    """
    try:
        from bitwright.report import figures
    except ImportError as error:
        raise BitwrightError(f"a report needs matplotlib: pip install 'bitwright[report]' ({error})") from None
    runs = [read_run(folder) for folder in folders]
    pictures = [
        figures.curves(runs, "accuracy", "test accuracy, %", 100.0),
        figures.curves(runs, "loss", "training loss"),
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bitwright", "report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    details = [
        {
            "name": run.name,
            "pictures": [p for p in (figures.bits_per_layer(run), figures.learned_widths(run)) if p],
            "recipe": run.recipe,
            "environment": ", ".join(f"{k} {v}" for k, v in {**(run.value("versions") or {})}.items()),
        }
        for run in runs
    ]
    page = environment.get_template("page.html").render(
        rows=[results(run) for run in runs], pictures=[p for p in pictures if p], details=details
    )
    temporary = out.with_name(out.name + ".tmp")
    try:
        temporary.write_text(page)
        temporary.replace(out)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise BitwrightError(f"{out}: cannot be written: {error.strerror or error}") from None


def results(run: RunData) -> Cells:
    """One line of the table of results: (column, text). A run that has not ended shows its last epoch."""
    last = run.metrics[-1] if run.metrics else {}
    accuracy = run.value("accuracy") if run.summary else last.get("accuracy")
    return [
        ("run", run.name),
        ("accuracy, last epoch", _text(accuracy, "{:.2%}")),
        ("best", _text(run.value("accuracy_best"), "{:.2%}")),
        ("float", _text(run.value("float_accuracy"), "{:.2%}")),
        ("weight bits", _spread(run.value("weight_bits"))),
        ("input bits", _spread(run.value("input_bits"))),
        ("GBitOPs", _text(run.value("bitops"), "{:.4f}", 1e-9)),
        ("size, KB", _text(run.value("size_bytes"), "{:,.1f}", 1e-3)),
        ("epochs", str(run.value("epochs") if run.summary else f"{last.get('epoch', 0)} so far")),
        ("training, s", _text(run.value("train_seconds"), "{:,.0f}")),
        ("seed", str(run.value("seed") if run.summary else "")),
    ]


def _text(value: Any, form: str, factor: float = 1.0) -> str:
    return form.format(factor * value) if isinstance(value, int | float) else "–"


def _spread(bits: Any) -> str:
    """Which bits occur, and in how many layers: "4 (6), 8 (2)"."""
    if not isinstance(bits, dict) or not bits:
        return "–"
    values = [b for b in bits.values() if b is not None]
    return ", ".join(f"{b} ({values.count(b)})" for b in sorted(set(values))) or "float"
