"""Arguments that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)]
DataDir = Annotated[Path | None, typer.Option("--data-dir", metavar="DIR", help="First folder to look for data in.")]
Cache = Annotated[
    Path | None,
    typer.Option("--cache", metavar="DIR", envvar="BITWRIGHT_CACHE", help="Downloads and trained float partners."),
]
Runtime = Annotated[
    str, typer.Option("--runtime", help="default (the target's own: onnxruntime) or native (bitwright.runtime).")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
