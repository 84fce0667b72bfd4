"""The command line. Thin: every command is a few calls of the library, which it loads when it runs."""

import os
import platform
import re
import sys
import traceback
from importlib.metadata import version as installed
from typing import Annotated

import typer

from bitwright import __version__
from bitwright.cli import runs, training

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train neural networks at 1 to 8 bits, and ship exactly what was trained.",
)


def print_version(asked: bool) -> None:
    """Print this package's version, torch's (read off the installation: loading it takes seconds) and Python's."""
    if asked:
        typer.echo(f"bitwright {__version__} (torch {installed('torch')}, Python {platform.python_version()})")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print versions and leave.", callback=print_version, is_eager=True),
    ] = False,
) -> None:
    """`debug` is taken by `main` before commands see it; here for the help page."""


app.command()(training.train)
app.command("eval")(runs.evaluate_run)
for command in (runs.export, runs.verify, runs.cost, runs.bench, training.sweep, training.report):
    app.command()(command)


def main() -> None:
    """Run the command line; a clear line and exit 2 for bad input, 1 for a run that failed, 128 + n for signal n."""
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(arguments, prog_name="bitwright")
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # `bitwright … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        if debug:
            traceback.print_exc()
        else:
            print(f"error: {_line(error)}" if code < 128 else error, file=sys.stderr)
    else:
        code = 0
    sys.exit(code)


def _line(error: Exception) -> str:
    if not _out_of_memory(error):
        return str(error)
    tried = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
    much = f" for another {tried[1]}" if tried else ""
    return f"not enough memory{much}; use a smaller schedule.batch_size (or --batch), image or network"


def _exit_code(error: Exception) -> int | None:
    """The code for an error that is not a bug, else None."""
    from bitwright.errors import BitwrightError

    if isinstance(error, BitwrightError):
        return 2
    return 1 if _out_of_memory(error) else getattr(error, "exit_code", None)


def _out_of_memory(error: Exception) -> bool:
    """Whether the machine has too little memory: no bug, and a smaller batch or network helps."""
    import torch

    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)
