"""Deployment targets: one file each, a function that writes and a class that opens, by name."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from bitwright.deploy.files import ExportReport
from bitwright.deploy.targets.onnx import OnnxFile, export_onnx
from bitwright.deploy.targets.opened import Network, Opened
from bitwright.deploy.targets.packed import PackedFile, export_packed

EXPORT: dict[str, Callable[[nn.Module, Path, Tensor], ExportReport]] = {
    "onnx": export_onnx,
    "packed": export_packed,
}
OPEN: dict[str, Callable[[Path, Network], Opened]] = {
    "onnx": OnnxFile,
    "packed": PackedFile,
}


def target_of(path: Path) -> str:
    """The target that wrote `path`, by its content; "onnx" where it cannot be read, which then says so."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return "onnx"
    return "packed" if start[8:] == b"{" else "onnx"  # safetensors: eight bytes of length, then JSON
