"""Deployment targets: one file each, a function that writes and a class that opens, by name."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from bitwright.batches import Inputs
from bitwright.deploy.files import ExportReport
from bitwright.deploy.probe import read
from bitwright.deploy.targets.compressed_tensors_folder import (
    CompressedTensorsFolder,
    export_compressed_tensors,
    read_config,
)
from bitwright.deploy.targets.executorch_file import ExecutorchFile, export_executorch
from bitwright.deploy.targets.onnx_file import OnnxFile, export_onnx
from bitwright.deploy.targets.opened import Network, Opened
from bitwright.deploy.targets.openvino_file import OpenVinoFile, export_openvino
from bitwright.deploy.targets.packed import PackedFile, export_packed
from bitwright.deploy.targets.qonnx_file import QonnxFile, export_qonnx
from bitwright.errors import BitwrightError

EXPORT: dict[str, Callable[[nn.Module, Path, Inputs], ExportReport]] = {
    "onnx": export_onnx,
    "packed": export_packed,
    "openvino": export_openvino,
    "qonnx": export_qonnx,
    "compressed-tensors": export_compressed_tensors,
    "executorch": export_executorch,
}
OPEN: dict[str, Callable[[Path, Network], Opened]] = {
    "onnx": OnnxFile,
    "packed": PackedFile,
    "openvino": OpenVinoFile,
    "qonnx": QonnxFile,
    "compressed-tensors": CompressedTensorsFolder,
    "executorch": ExecutorchFile,
}


def target_of(path: Path) -> str:
    """The target that wrote `path`, by its content.

    Raises:
        BitwrightError: it is missing, damaged, or not written by `export`.
    """
    if path.is_dir():
        read_config(path)
        return "compressed-tensors"
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(9)
        if start[8:] == b"{":  # safetensors: eight bytes of length, then JSON
            return "packed"
        if start[4:6] == b"ET":  # a flatbuffer: four bytes of offset, then its kind and version
            return "executorch"
    target = {p.key: p.value for p in read(path).metadata_props}.get("target", "onnx")
    if target not in OPEN:
        raise BitwrightError(f"{path}: is of target {target!r}; known are {', '.join(OPEN)}")
    return target
