"""What a person sees while a network trains."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

REFRESH_SECONDS = 0.5  # between two looks at the loss: each look waits for the device


class Reporter:
    """A progress bar on a terminal; elsewhere one line per epoch and nothing between."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._next_look = 0.0

    def note(self, text: str) -> None:
        """One line of plain text."""
        self.console.print(text, markup=False)

    def epoch(self, row: Mapping[str, Any], epochs: int) -> None:
        """The line of a finished epoch."""
        self.note(
            f"epoch {row['epoch']:>3}/{epochs}  loss {row['loss']:.4f}  train {row['train_accuracy']:.2%}  "
            f"test {row['accuracy']:.2%}  {row['images_per_second']:,.0f} images/s"
        )

    @contextmanager
    def training(self, total_steps: int, done: int) -> Iterator[None]:
        """Show progress from step `done` to `total_steps`, the batches of the whole run, while entered."""
        if not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as self._progress:
            self._task = self._progress.add_task("", total=total_steps, completed=done, state="")
            try:
                yield
            finally:
                self._progress = None

    def wants_state(self) -> bool:
        """Whether it is time to look at loss and accuracy again."""
        return self._progress is not None and time.monotonic() >= self._next_look

    def advance(self, steps: int, label: str, state: str) -> None:
        """`steps` batches are done; label: which epoch; state: loss, accuracy, speed."""
        if self._progress is not None:
            self._progress.update(self._task, completed=steps, description=label, state=state)
            self._next_look = time.monotonic() + REFRESH_SECONDS
