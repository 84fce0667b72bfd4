"""Where things that can be made again are kept: compiled kernels, downloads, float partners."""

import os
from pathlib import Path


def cache_folder(cache: str | Path | None = None) -> Path:
    """`cache`, else `$BITWRIGHT_CACHE`, else `bitwright` in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
    if cache is None:
        cache = os.environ.get("BITWRIGHT_CACHE") or None
    if cache is not None:
        return Path(cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitwright"
