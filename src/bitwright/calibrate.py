"""Calibration: an explicit phase in which real data sets signedness and scales."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.batches import each_batch
from bitwright.errors import BitwrightError
from bitwright.grids import Shape, Stats
from bitwright.grids.base import as_float
from bitwright.layers import LOST, lost_hooks
from bitwright.prepare import quant_layers, quantizers, set_bypass
from bitwright.quantizer import Quantizer
from bitwright.wrappers import unwrap

logger = logging.getLogger("bitwright")

# Values kept per scale and batch for searches: enough for a stable least squared error, small beside a batch.
SAMPLE = 16384


def rows_per_scale(x: Tensor, shape: Shape) -> Tensor:
    """`x` as (channels, n): one row per scale."""
    if shape.channels == 1:
        return x.reshape(1, -1)
    return x.movedim(shape.axis, 0).reshape(shape.channels, -1)


class Collector:
    """Statistics of one quantizer's input over batches: exact extremes and moments, a bounded random sample."""

    def __init__(self, shape: Shape, seed: int):
        self.shape = shape
        self.generator = torch.Generator().manual_seed(seed)
        self.batches: list[Stats] = []

    def add(self, x: Tensor) -> None:
        """Take in one tensor."""
        rows = rows_per_scale(x.detach(), self.shape)
        if rows.shape[1] == 0:
            return
        stats = Stats.of(rows)
        keep = max(SAMPLE // self.shape.channels, 256)
        if rows.shape[1] > keep:
            picks = torch.randint(rows.shape[1], (keep,), generator=self.generator).to(rows.device)
            rows = rows[:, picks]
        self.batches.append(replace(stats, sample=as_float(rows).clone()))

    def before_forward(self, quantizer: nn.Module, args: tuple[Tensor]) -> None:
        """`add` as a forward pre-hook of a quantizer."""
        del quantizer
        self.add(args[0])

    def result(self) -> Stats:
        """Everything seen so far as one `Stats`; batches weigh alike."""
        parts = self.batches
        mean = torch.stack([p.mean for p in parts]).mean(0)
        second = torch.stack([p.std.square() + p.mean.square() for p in parts]).mean(0)
        return Stats(
            minimum=torch.stack([p.minimum for p in parts]).amin(0),
            maximum=torch.stack([p.maximum for p in parts]).amax(0),
            mean=mean,
            mean_abs=torch.stack([p.mean_abs for p in parts]).mean(0),
            std=(second - mean.square()).clamp(min=0).sqrt(),
            sample=torch.cat([p.sample for p in parts], dim=1),
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for a while; every module's own mode afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def untrained_norms(model: nn.Module) -> list[Any]:
    """Batch norms whose running statistics are still those of their making: mean 0, variance 1."""

    def fresh(m: Any) -> bool:
        if not isinstance(m, nn.modules.batchnorm._BatchNorm) or m.running_mean is None or m.running_var is None:
            return False
        return not bool(m.num_batches_tracked) and not bool(m.running_mean.any()) and bool((m.running_var == 1).all())

    return [m for m in model.modules() if fresh(m)]


@contextmanager
def on_batch_statistics(norms: list[Any]) -> Iterator[None]:
    """Batch norms in evaluation mode normalise by the batch for a while, and record nothing."""
    kept = [(m, m.running_mean, m.running_var) for m in norms]
    for module in norms:
        module.running_mean = module.running_var = None
    try:
        yield
    finally:
        for module, mean, variance in kept:
            module.running_mean, module.running_var = mean, variance


def calibrate(model: nn.Module, batches: Iterable[Any], *, seed: int = 0) -> nn.Module:
    """Set signedness, scales and offsets of every quantizer from the float model's own tensors.

    The model runs in evaluation mode without gradient and with all quantizers bypassed; norm statistics and
    weights are untouched. Batch norms that were never trained normalise by the batch (of 2 or more), as they will in
    training: with their initial statistics signals would shrink or grow from layer to layer, and scales with them.
    Weight quantizers take the present weights. Scales set earlier are overwritten, so do not call it after loading
    a quantized checkpoint.

    Args:
        model: prepared by `prepare`.
        batches: a loader or list of them: tensors, (input, target) pairs, dicts of keyword arguments, or
            ((input, input, ...), target); a lone tensor is one batch. A few hundred samples suffice.
        seed: of the random sample kept for searches.

    Raises:
        BitwrightError: there is no batch, one is something else, a quantizer never saw data, or saw NaN or infinity.
    """
    given, model = model, unwrap(model)
    found = quantizers(model)
    if not found:
        raise BitwrightError("calibrate: the model has no quantizers; call bitwright.prepare first")
    readers = {n: q for n, q in found.items() if q.shape.role == "input"}
    collectors = {n: Collector(q.shape, seed + i) for i, (n, q) in enumerate(readers.items())}
    hooks = [q.register_forward_pre_hook(collectors[n].before_forward) for n, q in readers.items()]
    count = samples = 0
    set_bypass(found.values(), True)
    try:
        with evaluating(model), torch.no_grad():
            fresh = untrained_norms(model)
            for inputs in each_batch(batches, "calibrate"):
                rows = max((len(t) for t in inputs.tensors if t.ndim), default=1)
                with on_batch_statistics(fresh if rows > 1 else []):
                    inputs.run(model)
                count, samples = count + 1, samples + inputs.rows
    finally:
        set_bypass(found.values(), False)
        for hook in hooks:
            hook.remove()
    if count == 0:
        raise BitwrightError("calibrate: no batch was given")
    if samples == 0:
        raise BitwrightError("calibrate: every batch is empty")
    lost = lost_hooks(model)
    if lost:
        raise BitwrightError(f"calibrate: {lost[0]}: {LOST}")
    unseen = [name for name in readers if not collectors[name].batches]
    if unseen:
        raise BitwrightError(never_called(unseen, readers))
    silent = []
    for name, quantizer in readers.items():
        stats = collectors[name].result()
        initialize(quantizer, stats, name)
        if not bool(stats.minimum.any() or stats.maximum.any()):
            silent.append(name)
    if silent:
        logger.warning(
            "bitwright: calibrate: %s saw only zeros and got a scale for want of a better one; "
            "give more images, or look for a dead layer in front",
            silent[0] + (f" and {len(silent) - 1} more" if len(silent) > 1 else ""),
        )
    for layer_name, layer in quant_layers(model).items():
        for slot in layer.weight_slots:
            quantizer = getattr(layer, slot)
            if quantizer is not None:
                weight = layer.weight_of(slot)
                stats = Stats.of(rows_per_scale(weight, quantizer.shape))
                initialize(quantizer, stats, f"{layer_name}.{slot}")
    return given


def never_called(unseen: list[str], readers: Iterable[str]) -> str:
    """The message for quantizers that saw no data: of heads that run in training alone, say.

    It has the rule that leaves them float: the outermost modules in which no quantizer saw any.
    """
    seen = set(readers) - set(unseen)
    patterns: dict[str, None] = {}
    for name in unseen:
        parts = name.split(".")[:-1]
        outer = [".".join(parts[:i]) for i in range(1, len(parts))]
        free = next((o for o in outer if not any(other.startswith(o + ".") for other in seen)), None)
        patterns[".".join(parts) if free is None else f"{free}.*"] = None
    rest = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
    its, it = ("its layer was", "it") if len(unseen) == 1 else ("their layers were", "them")
    return (
        f"calibrate: {unseen[0]}{rest} saw no data; {its} not called on these inputs in evaluation mode (leave {it} "
        f"float by a last rule: bw.Rule(match={[*patterns]}, weight=None, input=None); or give inputs that reach {it})"
    )


def initialize(quantizer: Quantizer, stats: Stats, name: str) -> None:
    """`quantizer.initialize(stats)` after a check that the statistics are finite."""
    if not bool(torch.isfinite(stats.minimum).all() and torch.isfinite(stats.maximum).all()):
        raise BitwrightError(f"calibrate: {name} saw NaN or infinity in the float model; check weights and inputs")
    quantizer.initialize(stats)
