"""`summary.json`: what a finished run is, in one page."""

import platform
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import bitwright
from bitwright.costs.table import slot_bits
from bitwright.layers import OUTPUT, SharedInput
from bitwright.methods import Method
from bitwright.prepare import quant_layers, quantizers
from bitwright.training.data import Dataset
from bitwright.training.recipe import Recipe


def layer_bits(model: nn.Module) -> dict[str, dict[str, float]]:
    """Present bit-widths of weights, inputs and outputs ("weight", "input", "output"), by layer name.

    The mean where channels have their own.

    Float tensors are absent. A layer with several weight or several input quantizers is there once for each, as
    `layer.slot`.
    """
    found: dict[str, dict[str, float]] = {"weight": {}, "input": {}, "output": {}}
    for name, quantizer in quantizers(model).items():
        layer, _, slot = name.rpartition(".")
        key = layer if slot in ("weight_quantizer", "input_quantizer", OUTPUT) else name
        found["output" if slot == OUTPUT else quantizer.shape.role][key] = quantizer.mean_bits
    for name, layer in quant_layers(model).items():
        if isinstance(getattr(layer, "input_quantizer", None), SharedInput):
            found["input"][name] = slot_bits(layer, "input_quantizer")
    return found


def versions() -> dict[str, str]:
    """What the numbers depend on besides the recipe."""
    return {"bitwright": bitwright.__version__, "torch": torch.__version__, "python": platform.python_version()}


def environment(device: torch.device) -> dict[str, Any]:
    """The machine, as far as it decides times and last bits."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": str(device), "device_name": name, "threads": torch.get_num_threads()}


def summarize(
    recipe: Recipe,
    model: nn.Module,
    dataset: Dataset,
    rows: list[dict[str, Any]],
    methods: Sequence[Method],
    *,
    float_accuracy: float | None,
    teacher_accuracy: float | None,
    seconds: float,
    device: torch.device,
) -> dict[str, Any]:
    """The content of summary.json.

    model: the trained network, as it is evaluated. rows: of metrics.jsonl. methods: their own summaries, by name,
    are under the key "methods". float_accuracy, teacher_accuracy: of the partner and of the teacher; the keys are
    absent where there is none. seconds: of training and evaluation, over all sessions of the run.
    """
    from bitwright.costs import cost_table

    costs = cost_table(model, next(iter(dataset.test_batches(batch_size=1, device=device)))[0])
    bits = layer_bits(model)
    accuracies = [row["accuracy"] for row in rows]
    return {
        "accuracy": accuracies[-1],
        "accuracy_best": max(accuracies),
        **({} if float_accuracy is None else {"float_accuracy": float_accuracy}),
        **({} if teacher_accuracy is None else {"teacher_accuracy": teacher_accuracy}),
        "weight_bits": bits["weight"],
        "input_bits": bits["input"],
        "output_bits": bits["output"],
        "bitops": costs.bitops,
        "size_bytes": costs.size_bytes,
        "epochs": len(rows),
        "train_seconds": round(seconds, 1),
        "seed": recipe.seed,
        "versions": versions(),
        "environment": environment(device),
        "data": dataset.name,
        "model": recipe.model.name,
        "recipe": recipe.digest(),
        "methods": {m.name: found for m in methods if (found := m.summary())},
    }
