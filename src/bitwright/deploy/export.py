"""`export`: the frozen integer form as a file that a runtime opens."""

from pathlib import Path

from torch import Tensor, nn

from bitwright.deploy.files import ExportReport
from bitwright.deploy.targets import EXPORT
from bitwright.errors import BitwrightError
from bitwright.layers.reproducible import is_reproducible


def export(model: nn.Module, path: str | Path, example: Tensor, *, target: str = "onnx") -> ExportReport:
    """Write the deployable file of a trained model; input `input`, output `logits` where the format names them.

    The file is written beside its destination, checked, opened and run by its runtime at default settings, and
    only then moved there: after any failure, what was there before still is.

    Args:
        model: prepared, and trained or calibrated; it is not changed. Call `snap_biases` before its last
            evaluation, so that the file is exactly what was evaluated.
        path: of the file.
        example: one input batch.
        target: "onnx" (default), or another name in `bitwright.deploy.targets.EXPORT`; what each keeps and refuses
            is in docs/deployment.md.

    Raises:
        BitwrightError: the target is unknown, does not keep what the model has, or needs a package that is absent;
            the model cannot be frozen or written; or the file cannot be written.
    """
    if target not in EXPORT:
        raise BitwrightError(f"target {target!r} is not accepted; use {' or '.join(EXPORT)}")
    if target != "onnx" and is_reproducible(model):
        raise BitwrightError(f"target {target!r} has no reproducible arithmetic; use target onnx, or train without it")
    return EXPORT[target](model, Path(path), example)
