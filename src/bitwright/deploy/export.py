"""`export`: the frozen integer form as a file that a runtime opens."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.batches import example_of
from bitwright.deploy.files import ExportReport
from bitwright.deploy.targets import EXPORT
from bitwright.errors import BitwrightError
from bitwright.layers.reproducible import is_reproducible
from bitwright.wrappers import unwrap


def export(model: nn.Module, path: str | Path, example: Any, *, target: str = "onnx") -> ExportReport:
    """Write the deployable file of a trained model; input `input`, output `logits` where the format names them.

    Of a model of several inputs, or of keywords, the file's inputs are called as `forward` calls them. A model that
    puts out several tensors (a tuple, a list, a dict, nested ones) has an output for each: `out` and `aux` for a dict
    of these keys, `output_0`, `output_1` for a tuple (`bitwright.batches.outputs_of`).

    The file is written beside its destination, checked, opened and run by its runtime at default settings, and
    only then moved there: after any failure, what was there before still is.

    Args:
        model: prepared, and trained or calibrated, in float32; it is not changed. Of a compiled, averaged or
            distributed model it is the module inside. Call `snap_biases` before its last
            evaluation, so that the file is exactly what was evaluated.
        path: of the file.
        example: one input batch, as `calibrate` takes them; a dict's `labels` are left out. Targets openvino, qonnx
            and executorch take models of one tensor in.
        target: "onnx" (default), or another name in `bitwright.deploy.targets.EXPORT`; what each keeps and refuses
            is in docs/deployment.md.

    Raises:
        BitwrightError: the target is unknown, does not keep what the model has, or needs a package that is absent;
            the model is not in float32, or cannot be frozen or written; or the file cannot be written.
    """
    if target not in EXPORT:
        raise BitwrightError(f"target {target!r} is not accepted; use {' or '.join(EXPORT)}")
    if target != "onnx" and is_reproducible(model):
        raise BitwrightError(f"target {target!r} has no reproducible arithmetic; use target onnx, or train without it")
    model = unwrap(model)
    odd = next((n for n, p in model.named_parameters() if p.is_floating_point() and p.dtype != torch.float32), None)
    if odd is not None:
        kind = str(model.get_parameter(odd).dtype).removeprefix("torch.")
        raise BitwrightError(f"export: {odd} is {kind}; files compute in float32, so call model.float() first")
    return EXPORT[target](model, Path(path), example_of(example, "export").mapped(Tensor.cpu))
