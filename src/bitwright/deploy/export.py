"""`export`: the frozen integer form as a file that a standard runtime opens."""

import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from bitwright.deploy.capture import first_line, quiet_export
from bitwright.deploy.freeze import freeze
from bitwright.deploy.integer import InputCodes, IntLayer
from bitwright.deploy.lower import LayerFile, lower
from bitwright.deploy.packing import OPSET
from bitwright.errors import BitwrightError

TARGETS = ("onnx",)


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    packed_bytes: of the quantized layers' weights. dynamic_batch: whether any batch size is accepted.
    """

    path: Path
    size_bytes: int
    packed_bytes: int
    dynamic_batch: bool
    layers: tuple[LayerFile, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**asdict(self), "path": str(self.path), "layers": [asdict(layer) for layer in self.layers]}


def export(model: nn.Module, path: str | Path, example: Tensor, *, target: str = "onnx") -> ExportReport:
    """Write the deployable file of a trained model; input `input`, output `logits`.

    The file is written beside its destination, checked, opened and run by the runtime at default settings, and
    only then moved there: after any failure, what was there before still is.

    Args:
        model: prepared, and trained or calibrated; it is not changed. Call `snap_biases` before its last
            evaluation, so that the file is exactly what was evaluated.
        path: of the file.
        example: one input batch.
        target: only "onnx".

    Raises:
        BitwrightError: the target is unknown, the model cannot be frozen or written as ONNX, or the file cannot
            be written.
    """
    if target not in TARGETS:
        raise BitwrightError(f"target {target!r} is not accepted; use {' or '.join(TARGETS)}")
    path = Path(path)
    frozen = freeze(model, example)
    proto, layers = to_onnx(frozen, example.cpu())
    size = write(proto, path, example.cpu())
    packed = sum(layer.size_bytes for layer in layers if layer.packing != "float32")
    dynamic = bool(proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param)
    return ExportReport(path, size, packed, dynamic, tuple(layers))


def to_onnx(frozen: nn.Module, example: Tensor) -> tuple[onnx.ModelProto, list[LayerFile]]:
    """The frozen form as an ONNX model, and how each weight is stored in it."""
    parts = [m for m in frozen.modules() if isinstance(m, InputCodes | IntLayer)]
    # A batch of one would be taken for a constant by torch.export.
    rows = torch.cat([example, example]) if example.shape[0] == 1 else example
    for part in parts:
        part.placeholder = True
    try:
        with quiet_export(), torch.no_grad():
            program = torch.onnx.export(
                frozen,
                (rows,),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=({0: torch.export.Dim.AUTO},),
                input_names=["input"],
                output_names=["logits"],
                verbose=False,
            )
    except Exception as error:
        reason = first_line(error.__cause__ or error)
        raise BitwrightError(f"{type(frozen).__name__}: torch.onnx.export failed: {reason}") from error
    finally:
        for part in parts:
            part.placeholder = False
    assert program is not None
    model = program.model_proto
    if len(model.graph.input) != 1 or len(model.graph.output) != 1:
        raise BitwrightError(
            f"{type(frozen).__name__} has {len(model.graph.input)} inputs and {len(model.graph.output)} outputs; "
            "export takes models of one tensor in and one out"
        )
    return lower(model, frozen)


def write(proto: onnx.ModelProto, path: Path, example: Tensor) -> int:
    """Write, check, open, run, then move to `path`; returns the size in bytes."""
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(proto.SerializeToString())
            file.flush()
            os.fsync(file.fileno())
        onnx.checker.check_model(str(temporary), full_check=True)
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        session.run(None, {"input": example.numpy()})
        size = temporary.stat().st_size
        os.replace(temporary, path)
    except OSError as error:
        raise BitwrightError(f"{path}: cannot be written: {error.strerror or first_line(error)}") from error
    except Exception as error:
        raise BitwrightError(f"{path}: not written, the new file does not open: {first_line(error)}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return size
