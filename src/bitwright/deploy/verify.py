"""`verify`: is this file the network that was trained? Layer by layer, in the runtime as users run it."""

import copy
import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.batches import Inputs, deployed, each_batch, outputs_of
from bitwright.calibrate import evaluating
from bitwright.deploy.comparison import InputRow, VerifyReport, WeightRow
from bitwright.deploy.freeze import freeze
from bitwright.deploy.integer import IntLayer
from bitwright.deploy.predictions import compare_outputs
from bitwright.deploy.recorder import Recorder
from bitwright.deploy.targets import OPEN, target_of
from bitwright.deploy.targets.opened import Network, Opened
from bitwright.deploy.unread import unread
from bitwright.errors import BitwrightError
from bitwright.wrappers import unwrap

RUNTIMES = ("default", "native")


def verify(
    model: nn.Module,
    path: str | Path,
    batches: Iterable[Any],
    *,
    runtime: str = "default",
    class_axis: int | None = None,
) -> VerifyReport:
    """Compare the training form, the frozen integer form and the file in its runtime at default settings.

    The target is read off the file. Predictions come from the file as it is. The training form runs in float32; an
    image whose prediction then differs is run once more in float64 (`Exact`), which has the last word.

    Args:
        model: as it was exported; it is not changed.
        path: the file.
        batches: as `calibrate` takes them; all are used. A lone tensor is one batch; a dict's `labels` are left out.
        runtime: "default", the target's own (onnxruntime for `onnx`), or "native", `bitwright.runtime`, for `onnx`.
        class_axis: along which axis of the outputs classes lie, 1 or more, or negative from the last; an output with
            fewer axes has them along its last. None (default): along axis 1 of four axes and more (images, classes,
            rows, columns), else along the last: (images, classes), and (sequences, tokens, classes) as language models
            give them. Give 1 for (signals, classes, times), of which no shape tells that it is not the latter.

    Raises:
        BitwrightError: `runtime` is unknown or does not run this target; `class_axis` is no axis; the file is missing,
            damaged, not written by `export`, or of a network with other layers; its runtime is missing; there is no
            batch; or the model has no frozen form.
    """
    path = Path(path)
    model = unwrap(model)
    if class_axis is not None and (isinstance(class_axis, bool) or not isinstance(class_axis, int) or class_axis == 0):
        raise BitwrightError(
            f"verify: class_axis={class_axis!r} is not accepted; use an axis behind the first, 1 or -1 say"
        )
    stream = (deployed(x).mapped(lambda t: t.detach().cpu()) for x in each_batch(batches, "verify"))
    first = next(stream, None)
    if first is None:
        raise BitwrightError("verify: no batch was given")
    target = target_of(path)
    opener = opener_of(path, target, runtime)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    training = model if device.type == "cpu" else copy.deepcopy(model).cpu()
    frozen, exact = freeze(training, first), Exact(training)
    layers = {m.name: m for m in frozen.modules() if isinstance(m, IntLayer)}
    with evaluating(training), torch.no_grad(), Recorder(training, frozen) as recorder:
        one = first.by_row(lambda t: t[:1])
        recorder.run(one)
        calls = {name: len(codes) for name, codes in recorder.frozen.items()}
        executed = {n: layers[n] for n in recorder.order if n in layers}
        idle = frozenset(unread(training, one))
        file = opener(path, Network(training, frozen, one, executed, calls, recorder.codes, idle))
        rows = [row for n in recorder.order if (row := first_row(n, layers, recorder, file)) is not None]
        report = VerifyReport(str(path), rows, target)
        for x in (first, *stream):
            trained, integers = recorder.run(x)
            theirs, codes = file.run(x)
            clean = compare_codes(report, recorder, codes, x.rows)
            report.name_outputs(trained, len(theirs))
            for name, ours, found in zip(trained, integers.values(), theirs, strict=True):
                same_size(report, name or "its output", ours, found)
            outputs = ([*trained.values()], [*integers.values()], theirs)
            compare_outputs(report, *outputs, clean, lambda rows, x=x: exact(x.by_row(lambda t: t[rows])), class_axis)
        report.file_difference = getattr(file, "difference", None)
    return report


def opener_of(path: Path, target: str, runtime: str) -> Callable[[Path, Network], Opened]:
    """What opens a file of `target`; BitwrightError if that runtime does not."""
    if runtime not in RUNTIMES:
        raise BitwrightError(f"runtime {runtime!r} is not accepted; use {' or '.join(RUNTIMES)}")
    if runtime == "default":
        return OPEN[target]
    if target != "onnx":
        raise BitwrightError(f"{path}: is of target {target}; the native runtime runs files of target onnx")
    # The runtime reads files with this package's own functions, so it comes second.
    return importlib.import_module("bitwright.runtime.opened").NativeFile


class Exact:
    """The training form in float64, made when it is first asked for.

    Sums of quantized numbers are exact there. In float32 they are rounded, in an order that depends on the machine, and
    now and then a value on a tie of a quantizer falls on the side where the network as defined does not put it.
    """

    def __init__(self, model: nn.Module):
        # Copied before anything is hooked to the model.
        self.model = copy.deepcopy(model).eval()
        self.wide = False

    def __call__(self, x: Inputs) -> list[Tensor] | None:
        """Outputs for `x` (float inputs in any precision, or indices), float64; None if it runs in float32 only."""
        if not self.wide:
            self.model.double()
            self.wide = True
        try:
            wide = x.mapped(lambda t: t.double() if t.is_floating_point() else t)
            return [*outputs_of(wide.run(self.model), "verify").values()]
        except RuntimeError:  # it makes float32 tensors of its own
            return None


def first_row(
    name: str, layers: dict[str, IntLayer], recorder: "Recorder", file: Opened
) -> WeightRow | InputRow | None:
    """The row of a layer or a quantizer; None for a weight that the runtime does not show."""
    if name not in layers:
        return InputRow(name, recorder.codes[name].bits)
    return weight_row(layers[name], file) if name in file.weights else None


def weight_row(layer: IntLayer, file: Opened) -> WeightRow:
    """One layer's numbers against the file's, exactly."""
    wrong = count_different(layer.values, file.weights[layer.name])
    wrong_bias = 0
    if layer.bias is not None and layer.name in file.biases:
        # An integer bias is dequantized with its own rounding; its integers agree if it is within half a step.
        wrong_bias = count_different(layer.bias, file.biases[layer.name], 1e-6)
    return WeightRow(layer.name, layer.bits, layer.values.numel(), wrong, wrong_bias)


def count_different(a: Tensor, b: Tensor, relative: float = 0.0) -> int:
    """How many elements differ by more than a share of their size; all of them where the shapes differ."""
    if a.shape != b.shape:
        return a.numel()
    return int((~torch.isclose(a, b, rtol=relative, atol=0.0)).sum())


def per_image(codes: Tensor, images: int) -> Tensor:
    """(images, n); a tensor that does not keep the images apart (windows, tokens first) counts for all of them."""
    return codes.reshape(images, -1) if codes.shape[0] % images == 0 else codes.reshape(1, -1).expand(images, -1)


def same_size(report: VerifyReport, name: str, ours: Tensor, found: Tensor) -> None:
    """Raise BitwrightError where a tensor of the file cannot be that of the network: other strides, classes, …"""
    if ours.numel() != found.numel():
        theirs, expected = tuple(found.shape), tuple(ours.shape)
        raise BitwrightError(
            f"{report.path}: is of another network: {name} is {theirs} in it, {expected} in the network"
        )


def compare_codes(report: VerifyReport, recorder: Recorder, file: dict[str, list[Tensor]], images: int) -> Tensor:
    """Add one batch to every input row; returns which images agree everywhere, (images,) bool."""
    clean_frozen = clean_file = torch.ones(images, dtype=torch.bool)
    for row in report.layers:
        if not isinstance(row, InputRow):
            continue
        ours, trained = recorder.frozen[row.name], recorder.training[row.name]
        for a, b in zip(trained, ours, strict=True):
            clean_frozen = row.frozen.add(per_image(a, images), per_image(b, images), clean_frozen)
        for b, c in zip(ours, file.get(row.name, ours), strict=True):
            same_size(report, row.name, b, c)
            clean_file = row.file.add(per_image(b, images), per_image(c, images), clean_file)
    return clean_frozen & clean_file
