"""Ctrl-C and SIGTERM as a question that the training loop asks between two steps."""

import os
import signal
import threading
from types import FrameType


class Interrupted(Exception):  # noqa: N818 (not an error: the run was asked to stop and did)
    """The run stopped because of a signal, after saving its state."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signum


class StopSignals:
    """While entered, the first SIGINT or SIGTERM only sets `signum`; a second one ends the process at once."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # pyright: ignore[reportArgumentType]
        self._before = {}

    def _note(self, signum: int, _: FrameType | None) -> None:
        if self.signum is not None:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.signum = signum

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self.signum is not None:
            raise Interrupted(self.signum)
