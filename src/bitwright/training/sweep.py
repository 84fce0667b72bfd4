"""Many runs from one file: a process per run, resumable, one table that grows as runs end."""

import csv
import fcntl
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitwright.errors import BitwrightError
from bitwright.training.checkpoint import cannot_write
from bitwright.training.folder import RunFolder
from bitwright.training.sweep_file import Run, SweepFile, check_runs, expand, read_sweep

RESULT_FIELDS = ["accuracy", "accuracy_best", "float_accuracy", "bitops", "size_bytes", "epochs", "train_seconds"]


def command(sweep: SweepFile, recipe: str, run: Run, folder: Path, data_dir: str | None) -> list[str]:
    """The `bitwright train` command of a run; an interrupted one is resumed."""
    made = [sys.executable, "-m", "bitwright", "train"]
    if (folder / "checkpoint.pt").exists():
        made += ["--resume", str(folder)]
    else:
        made += [recipe, *run.overrides, "--out", str(folder), *(["--overwrite"] if folder.exists() else [])]
    return made + (["--data-dir", data_dir] if data_dir else [])


class LeftBehind:
    """In the place of a process: the one that a sweep which was killed left training in `folder`."""

    returncode = 0

    def __init__(self, folder: Path):
        self.folder = RunFolder(folder)

    def poll(self) -> int | None:
        """None while it trains."""
        return None if self.folder.busy() else self.returncode

    def send_signal(self, signum: int) -> None:
        """Nothing: it is not ours to stop."""

    def wait(self) -> int:
        """It goes on by itself."""
        return self.returncode


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
            *(" ".join(str(part).replace("|", "/").split()) for part in label),  # a cell of a table is one line
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
        BitwrightError: the file is not a sweep, one of its recipes is not accepted (nothing is started then), `out`
            cannot be written, holds runs of other recipes, or goes away, or another sweep is running there.
    """
    sweep = read_sweep(path)
    recipe = sweep.recipe
    if (path.parent / recipe).is_file():
        recipe = str(path.parent / recipe)
    try:
        runs = expand(sweep)
    except BitwrightError as error:
        raise BitwrightError(f"{path}: {error}") from None
    check_runs(path, recipe, runs, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BitwrightError(f"{out}: {error.strerror or error}") from None
    with _alone(out):
        waiting = [r for r in runs if result_of(out / r.name) is None]
        say(f"{len(runs)} runs, {len(runs) - len(waiting)} finished before, {jobs or sweep.jobs} side by side")
        going: dict[str, tuple[Run, subprocess.Popen[bytes] | LeftBehind]] = {}
        failed: dict[str, str] = {}
        environment = {**os.environ, "OMP_NUM_THREADS": str(sweep.threads)}
        try:
            while waiting or going:
                while waiting and len(going) < (jobs or sweep.jobs):
                    run = waiting.pop(0)
                    if RunFolder(out / run.name).busy():
                        say(f"{run.name}: another process is training there; waiting for it")
                        going[run.name] = (run, LeftBehind(out / run.name))
                        continue
                    with (out / f"{run.name}.log").open("ab") as log:
                        line = command(sweep, recipe, run, out / run.name, data_dir)
                        # A group of its own: Ctrl-C comes to us alone, and runs get one signal. A second would end
                        # them before they have saved.
                        process = subprocess.Popen(line, stdout=log, stderr=log, env=environment, process_group=0)
                        going[run.name] = (run, process)
                time.sleep(0.2)
                for name, (run, process) in list(going.items()):
                    if process.poll() is None:
                        continue
                    del going[name]
                    summary = result_of(out / name)
                    if summary is None and isinstance(process, LeftBehind):
                        waiting.append(run)  # to be resumed
                        continue
                    if process.returncode != 0 or summary is None:
                        failed[name] = reason(process.returncode, out / f"{name}.log")
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
def _writing(out: Path) -> Iterator[None]:
    """One line for a folder that can no longer be written to, or is gone."""
    try:
        yield
    except OSError as error:
        raise cannot_write(Path(error.filename or out), error) from None


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the lock of a sweep's folder: a second sweep there would start the first one's runs again."""
    with _writing(out), (out / "sweep.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BitwrightError(f"{out}: another sweep is running there; wait for it or give another --out") from None
        yield


def reason(returncode: int, log: Path) -> str:
    """Why a run failed, in one line: the signal that killed it, else the last line of its log that says something."""
    if returncode < 0:  # its log ends with whatever it did well
        memory = "; the machine may have run out of memory" if -returncode == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-returncode).name}{memory}"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {returncode}"
