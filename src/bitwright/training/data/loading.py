"""Worker processes that load samples."""

import signal

from bitwright.training.machine import cores


def default_workers() -> int:
    """One a core that this process may use, at most 8."""
    return min(8, cores())


def ignore_interrupts(_: int) -> None:
    """For a worker: the parent answers to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
