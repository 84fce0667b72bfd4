"""Deployment targets: one file each, a function that writes and a class that opens, by name."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from bitwright.deploy.files import ExportReport
from bitwright.deploy.targets.onnx import OnnxFile, export_onnx
from bitwright.deploy.targets.opened import Network, Opened

EXPORT: dict[str, Callable[[nn.Module, Path, Tensor], ExportReport]] = {
    "onnx": export_onnx,
}
OPEN: dict[str, Callable[[Path, Network], Opened]] = {
    "onnx": OnnxFile,
}


def target_of(path: Path) -> str:
    """The target that wrote `path`, by what the file says of itself."""
    return "onnx"
