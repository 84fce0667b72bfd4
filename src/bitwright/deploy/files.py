"""What an export reports, and the way a file takes the place of an older one."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitwright.deploy.capture import first_line
from bitwright.deploy.lower import LayerFile
from bitwright.errors import BitwrightError


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    target: name of the format. packed_bytes: of the quantized layers' weights. dynamic_batch: whether any batch size
    is accepted.
    """

    path: Path
    size_bytes: int
    packed_bytes: int
    dynamic_batch: bool
    layers: tuple[LayerFile, ...]
    target: str = "onnx"

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**asdict(self), "path": str(self.path), "layers": [asdict(layer) for layer in self.layers]}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, moved to `path` when the block ends; after a failure nothing has changed.

    The block writes a file or makes a folder there and proves it good. A folder that is in the way is replaced too:
    the caller has made sure that it is one of ours.

    Raises:
        BitwrightError: it cannot be written, or the block's proof failed.
    """
    temporary: Path | None = None
    try:
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        new = temporary / path.name
        yield new
        if new.is_file():
            with new.open("rb") as file:
                os.fsync(file.fileno())
        if path.is_dir() and new.is_dir():
            os.rename(path, old := temporary / "old")  # a folder takes another's place only where that one is empty
            try:
                os.rename(new, path)
            except OSError:
                os.rename(old, path)
                raise
        else:
            os.replace(new, path)
    except BitwrightError:
        raise
    except OSError as error:
        raise BitwrightError(f"{path}: cannot be written: {error.strerror or first_line(error)}") from error
    except Exception as error:
        raise BitwrightError(f"{path}: not written, the new file does not open: {first_line(error)}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size
