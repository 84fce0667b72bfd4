"""Many runs from one file: a process per run, resumable, one table that grows as runs end."""

import csv
import fcntl
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitwright.errors import BitwrightError

RESULT_FIELDS = ["accuracy", "accuracy_best", "float_accuracy", "bitops", "size_bytes", "epochs", "train_seconds"]


class SweepFile(BaseModel):
    """What SWEEP.yaml holds.

    Attributes:
        recipe: a recipe file (relative to the sweep file) or the name of a built-in one.
        overrides: recipe keys, dotted or nested, for every run.
        variants: name -> recipe keys; every variant is one row of the final table.
        grid: recipe key -> list of values; every combination multiplies the variants.
        seeds: one run per seed; at least three make a standard deviation worth printing.
        jobs: runs side by side. Default: one per core.
        threads: of every run. Default 1: several threads per process beside other processes are slower.
    """

    model_config = ConfigDict(extra="forbid")

    recipe: str
    overrides: dict[str, Any] = Field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = Field(default_factory=lambda: {"base": {}})
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    seeds: list[int] = Field(default_factory=lambda: [0, 1, 2], min_length=1)
    jobs: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)
    threads: int = Field(default=1, ge=1)


@dataclass(frozen=True)
class Run:
    """One run of a sweep: its folder name, its row in the table, its seed and `key=value` overrides."""

    name: str
    variant: str
    point: tuple[tuple[str, Any], ...]
    seed: int
    overrides: tuple[str, ...]


def read_sweep(path: Path) -> SweepFile:
    """The sweep in `path`; BitwrightError naming file, key, value and what is accepted."""
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise BitwrightError(f"{path}: {error.strerror or error}") from None
    except yaml.YAMLError as error:
        raise BitwrightError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise BitwrightError(f"{path}: a sweep is a mapping with the key 'recipe'")
    try:
        return SweepFile.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        accepted = ", ".join(SweepFile.model_fields)
        hint = f"; accepted keys: {accepted}" if first["type"] == "extra_forbidden" else ""
        raise BitwrightError(f"{path}: {key}: {first['input']!r}: {first['msg']}{hint}") from None


def as_override(key: str, value: Any) -> str:
    """`key=value`, the value as one line of YAML that the command line reads back."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False)
    return f"{key}={text.strip().removesuffix('...').strip()}"


def expand(sweep: SweepFile) -> list[Run]:
    """Every run, seeds innermost last: whole rounds of seeds end early runs first, so a table is useful early."""
    keys = list(sweep.grid)
    runs = []
    for seed in sweep.seeds:
        for values in itertools.product(*sweep.grid.values()):
            point = tuple(zip(keys, values, strict=True))
            for variant, changes in sweep.variants.items():
                # threads before the overrides: a sweep may say otherwise for one variant.
                merged = {"threads": sweep.threads, **sweep.overrides, **dict(point), **changes, "seed": seed}
                label = "-".join([variant, *(str(v) for v in values), f"seed{seed}"])
                name = "".join(c if c.isalnum() or c in "-_.+" else "_" for c in label)
                runs.append(Run(name, variant, point, seed, tuple(as_override(k, v) for k, v in merged.items())))
    names = [r.name for r in runs]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice:
        raise BitwrightError(f"sweep: two runs would share the folder {twice!r}; rename a variant or a grid value")
    return runs


def command(sweep: SweepFile, recipe: str, run: Run, folder: Path, data_dir: str | None) -> list[str]:
    """The `bitwright train` command of a run; an interrupted one is resumed."""
    if (folder / "checkpoint.pt").exists():
        return [sys.executable, "-m", "bitwright", "train", "--resume", str(folder)]
    made = [sys.executable, "-m", "bitwright", "train", recipe, *run.overrides, "--out", str(folder)]
    made += ["--overwrite"] if folder.exists() else []
    return made + (["--data-dir", data_dir] if data_dir else [])


def result_of(folder: Path) -> dict[str, Any] | None:
    """The summary of a finished run, or None."""
    try:
        return json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None


def write_results(out: Path, runs: list[Run], failed: dict[str, str]) -> None:
    """`results.csv` (a line per finished or failed run) and `results.md` (mean and standard deviation), atomically."""
    rows = []
    for run in runs:
        summary = result_of(out / run.name)
        if summary is None and run.name not in failed:
            continue
        row = {"run": run.name, "variant": run.variant, **dict(run.point), "seed": run.seed}
        row |= {k: (summary or {}).get(k) for k in RESULT_FIELDS}
        rows.append(row | {"error": failed.get(run.name, "")})
    if not rows:
        return
    temporary = out / "results.csv.tmp"
    with temporary.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, out / "results.csv")
    temporary = out / "results.md.tmp"
    temporary.write_text(markdown(rows, [k for k, _ in runs[0].point]))
    os.replace(temporary, out / "results.md")


def markdown(rows: list[dict[str, Any]], keys: list[str]) -> str:
    """A table with one line per variant and grid point: last-epoch accuracy in percent, mean ± sample deviation."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["accuracy"] is not None:
            groups.setdefault((row["variant"], *(str(row[k]) for k in keys)), []).append(row)
    lines = [
        "| " + " | ".join(["variant", *keys, "accuracy %", "float %", "n", "seconds", "GBitOPs"]) + " |",
        "|" + "---|" * (6 + len(keys)),
    ]
    for label, group in groups.items():
        accuracies = [100 * r["accuracy"] for r in group]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(group) > 1 else ""
        floats = [100 * r["float_accuracy"] for r in group if r["float_accuracy"] is not None]
        cells = [
            *map(str, label),
            f"{statistics.mean(accuracies):.2f}{spread}",
            f"{statistics.mean(floats):.2f}" if floats else "",
            str(len(group)),
            f"{statistics.mean(r['train_seconds'] or 0 for r in group):.0f}",
            f"{(group[0]['bitops'] or 0) / 1e9:.4f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def run_sweep(
    path: Path, out: Path, *, data_dir: str | None = None, jobs: int | None = None, say: Callable[[str], None] = print
) -> int:
    """Run what is not finished yet, `jobs` processes at a time; the number of failed runs.

    Args:
        path: SWEEP.yaml. out: folder of the runs, `results.csv` and `results.md`; an earlier one is continued.
        data_dir: passed to every run. jobs: instead of the file's. say: receives one line per event.

    Raises:
        BitwrightError: the file is not a sweep, `out` cannot be written, or another sweep is running there.
    """
    sweep = read_sweep(path)
    recipe = sweep.recipe
    if (path.parent / recipe).is_file():
        recipe = str(path.parent / recipe)
    runs = expand(sweep)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BitwrightError(f"{out}: {error.strerror or error}") from None
    with _alone(out):
        waiting = [r for r in runs if result_of(out / r.name) is None]
        say(f"{len(runs)} runs, {len(runs) - len(waiting)} finished before, {jobs or sweep.jobs} side by side")
        going: dict[str, tuple[Run, subprocess.Popen[bytes]]] = {}
        failed: dict[str, str] = {}
        environment = {**os.environ, "OMP_NUM_THREADS": str(sweep.threads)}
        try:
            while waiting or going:
                while waiting and len(going) < (jobs or sweep.jobs):
                    run = waiting.pop(0)
                    with (out / f"{run.name}.log").open("ab") as log:
                        line = command(sweep, recipe, run, out / run.name, data_dir)
                        going[run.name] = (run, subprocess.Popen(line, stdout=log, stderr=log, env=environment))
                time.sleep(0.2)
                for name, (_, process) in list(going.items()):
                    if process.poll() is None:
                        continue
                    del going[name]
                    summary = result_of(out / name)
                    if process.returncode != 0 or summary is None:
                        failed[name] = last_line(out / f"{name}.log") or f"exit code {process.returncode}"
                        say(f"{name}: FAILED: {failed[name]}")
                    else:
                        say(f"{name}: {100 * summary['accuracy']:.2f} %")
                    write_results(out, runs, failed)
        except BaseException:
            for _, process in going.values():
                process.send_signal(signal.SIGTERM)
            for _, process in going.values():
                process.wait()
            raise
        write_results(out, runs, failed)
        return len(failed)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the lock of a sweep's folder: a second sweep there would start the first one's runs again."""
    with (out / "sweep.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BitwrightError(f"{out}: another sweep is running there; wait for it or give another --out") from None
        yield


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""
