"""TensorBoard events: a scalar per number of an epoch's row."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitwright.training.checkpoint import cannot_write


class EventLog:
    """Writes to a folder while entered.

    purge_step: epochs from this one on, left by a run that was killed after its last checkpoint, are forgotten.
    """

    def __init__(self, folder: Path, *, purge_step: int):
        self.folder, self.purge_step = folder, purge_step

    def __enter__(self) -> "EventLog":
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = SummaryWriter(str(self.folder), purge_step=self.purge_step)
            self._writer.flush()  # the file's head now, not from a thread when the folder may be gone
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._writer.close()
        except OSError as error:
            raise cannot_write(self.folder, error) from None

    def add(self, row: Mapping[str, Any]) -> None:
        """Record every number of `row` at its `epoch`."""
        try:
            for key, value in row.items():
                if key != "epoch" and isinstance(value, int | float):
                    self._writer.add_scalar(key, value, row["epoch"])
            self._writer.flush()
        except OSError as error:
            raise cannot_write(self.folder, error) from None
