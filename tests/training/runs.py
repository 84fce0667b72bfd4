"""Tiny runs for the tests of the trainer."""

import contextlib
import io
import json
import signal
from pathlib import Path

import torch
from rich.console import Console

from bitwright.training import start
from bitwright.training.checkpoint import load_checkpoint
from bitwright.training.interrupt import Interrupted, StopSignals
from bitwright.training.recipe import Recipe
from bitwright.training.recipe_file import load_recipe
from bitwright.training.report import Reporter

RECIPE = """
data: {name: digits, options: {subset: 400}}
model: {name: resnet8, options: {width: 4}}
bits: w4a4
optimizer: {lr: 0.05}
schedule: {epochs: 3, batch_size: 100}
calibration: {samples: 64, batch_size: 32}
device: cpu
threads: 1
"""
PARTNER = "partner={optimizer: {lr: 0.1}, schedule: {epochs: 2, batch_size: 100}}"


class StopAfter(StopSignals):
    """A SIGTERM that comes when the loop has asked `looks` times."""

    def __init__(self, looks: int):
        self.looks = looks

    @property
    def signum(self):
        self.looks -= 1
        return signal.SIGTERM if self.looks < 0 else None


def recipe(folder: Path, *overrides: str) -> Recipe:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(RECIPE)
    return load_recipe(path, overrides)


def quiet() -> Reporter:
    return Reporter(Console(file=io.StringIO(), force_terminal=False, width=200, soft_wrap=True))


def train(folder: Path, *overrides: str, stop: StopSignals | None = None, reporter: Reporter | None = None, **options):
    """Train in folder/run with a cache in folder/cache; returns the summary."""
    made = recipe(folder, *overrides)
    options = {"overwrite": False, "cache": folder / "cache", **options}
    return start.train(made, folder / "run", reporter=reporter or quiet(), stop=stop or StopSignals(), **options)


def resume(folder: Path, *overrides: str, stop: StopSignals | None = None):
    """Go on in folder/run."""
    stop = stop or StopSignals()
    return start.resume(folder / "run", list(overrides), cache=folder / "cache", reporter=quiet(), stop=stop)


def train_in_pieces(folder: Path, *overrides: str, looks: int) -> int:
    """Train, stopped whenever the loop has looked `looks` times, until the end; returns how often it stopped."""
    stops = 0
    try:
        train(folder, *overrides, stop=StopAfter(looks))
    except Interrupted:
        stops += 1
    while not (folder / "run" / "summary.json").exists():
        assert stops < 200
        with contextlib.suppress(Interrupted):
            resume(folder, stop=StopAfter(looks))
            continue
        stops += 1
    return stops


def state_of(folder: Path):
    return load_checkpoint(folder / "run" / "checkpoint.pt")


def rows_of(folder: Path):
    """metrics.jsonl without times."""
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_second")} for r in rows]


def assert_same(a, b, path="state"):
    """Bit-equality of nested tensors and plain values, whatever the times."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key not in ("seconds", "images_per_second"):
                assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{i}]")
    else:
        assert a == b, path
