"""Where data is looked for, and how a missing file is fetched."""

import dataclasses
import hashlib
import http.client
import os
import sys
import tempfile
import urllib.request
from pathlib import Path

from bitwright.cache import cache_folder
from bitwright.errors import BitwrightError

CONNECT_SECONDS = 5.0
SYSTEM_FOLDER = Path("/usr/share/datasets")  # where Debian's dataset-* packages put theirs


@dataclasses.dataclass(frozen=True)
class Remote:
    """A published file. size: bytes; md5: hexadecimal (guards against damage, not against an attacker)."""

    url: str
    size: int
    md5: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def search_folders(name: str, data_dir: str | Path | None, cache: str | Path | None) -> list[Path]:
    """Folders to look in for the set `name`, in order: the given one, the system's, the cache's.

    Raises: BitwrightError where the given folder does not exist.
    """
    given = []
    if data_dir is not None:
        given = [Path(data_dir).expanduser()]
        if not given[0].is_dir():
            raise BitwrightError(f"data folder {data_dir}: no such folder")
    return [*given, SYSTEM_FOLDER / name, cache_folder(cache) / name]


def fetch_missing(
    name: str, looked: list[Path], files: list[Remote], target: Path, *, allowed: bool, remedy: str
) -> None:
    """Download what `target` lacks of `files`, for a set `name` that was not found in the folders `looked`.

    Raises: BitwrightError saying where it was looked for and how to get it, where downloads are not `allowed` or fail.
    """
    try:
        if not allowed:
            raise BitwrightError("downloads are switched off")
        for file in files:
            if not (target / file.name).is_file():
                fetch(file, target / file.name)
    except BitwrightError as error:
        places = ", ".join(str(folder) for folder in looked)
        raise BitwrightError(f"data {name!r} not found in {places}; {error}; {remedy}") from error


def fetch(file: Remote, target: Path) -> None:
    """Download `file` as `target`, whole or not at all: a temporary file beside it, checked, then renamed.

    Raises: BitwrightError when there is no network, the folder cannot be written, or the content is not what is
    expected; `target` is then what it was before.
    """
    print(f"downloading {file.url} ({file.size / 1e6:.0f} MB) to {target}", file=sys.stderr)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise BitwrightError(f"cannot write to {target.parent}: {error.strerror}") from error
    try:
        digest, received = hashlib.md5(usedforsecurity=False), 0
        with (
            open(descriptor, "wb") as sink,
            urllib.request.urlopen(file.url, timeout=CONNECT_SECONDS) as response,
        ):
            while received <= file.size and (chunk := response.read(1 << 20)):
                received += len(chunk)
                digest.update(chunk)
                sink.write(chunk)
        if received != file.size or digest.hexdigest() != file.md5:
            raise BitwrightError(
                f"{file.url}: not the expected file ({received} bytes, MD5 {digest.hexdigest()}; "
                f"expected {file.size} bytes, MD5 {file.md5})"
            )
        os.replace(temporary, target)
    except (OSError, http.client.HTTPException) as error:
        raise BitwrightError(f"cannot download {file.url}: {getattr(error, 'reason', error)}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
