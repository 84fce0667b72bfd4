"""EWGS's scaling factor from the curvature of the loss."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from bitwright.batches import device_of
from bitwright.errors import BitwrightError
from bitwright.estimators import EWGS
from bitwright.kernels import reference_only
from bitwright.kernels.reference import along
from bitwright.methods.base import Batch, Method
from bitwright.methods.probe import training, untouched, unwrap
from bitwright.methods.ranks import mean_over_ranks
from bitwright.prepare import quantizers
from bitwright.quantizer import Quantizer

Batches = Callable[[], Iterable[tuple[Any, Any]]]


def delta_from_curvature(mean_curvature: Tensor, gradient_std: Tensor) -> Tensor:
    """clip((Tr(H) / N) / (3 std(g)), 0, inf) (EWGS, section 3.3); 0 where the gradient vanishes or the curvature is
    not finite, as that of a root at 0 is. Scalars.
    """
    ratio = mean_curvature / (3.0 * gradient_std)
    return torch.where((gradient_std > 0) & ratio.isfinite(), ratio, torch.zeros_like(ratio)).clamp(min=0.0)


def mean_curvatures(
    loss: Tensor,
    tensors: list[Tensor],
    widths: list[Tensor],
    iterations: int,
    tolerance: float,
    generator: torch.Generator,
) -> tuple[list[Tensor], list[Tensor]]:
    """Tr(H_t) / N_t and std(g_t) of every tensor t, by Hutchinson's estimator with Rademacher vectors.

    All tensors share each Hessian-vector product: their vectors are independent, so the blocks between tensors
    have expectation zero in v_t' (H v)_t.

    Args:
        loss: scalar with a graph that can be differentiated twice; tensors without a part in it have curvature 0.
        tensors: quantized tensors in that graph. widths: largest minus smallest value of each one's grid,
            broadcastable to it; curvature and gradient are those of the tensor normalised to [0, 1].
        iterations, tolerance: stop after so many vectors, or when no running mean moves by more than `tolerance`
            relative to itself.

    Returns:
        Two lists of scalars.
    """
    if not tensors:
        return [], []
    gradients = torch.autograd.grad(loss, tensors, create_graph=True, materialize_grads=True)
    spread = [(g * w).detach().std() for g, w in zip(gradients, widths, strict=True)]
    means = [torch.zeros_like(s) for s in spread]
    curved = [i for i, g in enumerate(gradients) if g.requires_grad]  # the others' are constant, or 0
    for count in range(1, iterations + 1) if curved else ():
        signs = [rademacher(t, generator) for t in tensors]
        outputs, vectors = [gradients[i] for i in curved], [signs[i] for i in curved]
        products = torch.autograd.grad(
            outputs, tensors, vectors, retain_graph=count < iterations, materialize_grads=True
        )
        moved = False
        for i, (v, hv, width) in enumerate(zip(signs, products, widths, strict=True)):
            change = ((v * hv * width.square()).mean() - means[i]) / count
            means[i] = means[i] + change
            moved = moved or bool(change.abs() > tolerance * means[i].abs())
        if not moved:
            break
    return means, spread


def rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent -1 and +1 of the shape, type and device of `like`."""
    bits = torch.randint(0, 2, like.shape, generator=generator)
    return (2 * bits - 1).to(like)


class EWGSDelta(Method):
    """Re-estimates delta of every `ewgs` estimator: delta = clip((Tr(H) / N) / (3 std(g)), 0, inf).

    H and g belong to the loss as a function of the *quantized* tensor, per quantizer, in training mode on a few
    batches; nothing of the model but delta changes.

    Args:
        model: prepared with the estimator "ewgs". loss_fn: the task loss.
        batches: called at each estimate; gives an iterable of (x, y), as `Step` takes them: `lambda: loader`.
        every: epochs between estimates. Default 10 (the paper on CIFAR; 1 on ImageNet).
        batch_count: batches over which an estimate averages curvature and std. Default 3 (the authors' code).
        iterations, tolerance: of Hutchinson's estimator. Defaults 50, 1e-3, as in the authors' code.
        seed: of the random vectors.

    Until the first estimate delta is 0, so the estimator is straight-through: epochs must be ended, by
    `Step.end_epoch`, or `after_epoch({})` in a loop of your own. Metric: `ewgs/delta`, the mean. Distributed ranks
    average over their batches.

    Raises:
        BitwrightError: a value is not accepted, no quantizer uses the ewgs estimator, or (at an estimate) there is no
            batch.
    """

    name = "ewgs"

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        batches: Batches,
        every: int = 10,
        batch_count: int = 3,
        iterations: int = 50,
        tolerance: float = 1e-3,
        seed: int = 0,
    ):
        if min(every, batch_count, iterations) < 1 or tolerance < 0:
            raise BitwrightError(
                f"ewgs: every={every}, batch_count={batch_count}, iterations={iterations}, tolerance={tolerance} is "
                "not accepted; use whole numbers >= 1 and a tolerance >= 0"
            )
        if not callable(batches):
            raise BitwrightError(
                f"ewgs: batches: {type(batches).__name__} is not accepted; every estimate calls it for fresh batches, "
                "so give a function: lambda: loader"
            )
        model = unwrap(model)
        self.found = {n: q for n, q in quantizers(model).items() if isinstance(q.estimator, EWGS)}
        if not self.found:
            raise BitwrightError(
                "ewgs: no quantizer of the model uses the estimator 'ewgs'; set estimator: ewgs in the rules"
            )
        self.model, self.loss_fn, self.batches = model, loss_fn, batches
        self.every, self.batch_count, self.seed = every, batch_count, seed
        self.iterations, self.tolerance = iterations, tolerance
        self.epochs = 0
        self._set(dict.fromkeys(self.found, 0.0))

    def _set(self, deltas: dict[str, float]) -> None:
        for name, value in deltas.items():
            self._delta(name).fill_(value)

    def _delta(self, name: str) -> Tensor:
        estimator = self.found[name].estimator
        assert isinstance(estimator, EWGS)
        return estimator.delta

    def estimate(self) -> dict[str, float]:
        """delta of every quantizer that has a gradient, from fresh batches; changes nothing.

        Raises:
            BitwrightError: there is no batch.
        """
        generator = torch.Generator().manual_seed(self.seed + self.epochs)
        device = device_of(self.model)
        totals = torch.zeros(len(self.found), 2, device=device)  # curvature, spread
        place = {name: i for i, name in enumerate(self.found)}
        seen: set[str] = set()
        with training(self.model), untouched(self.model), twice_differentiable():
            taken = list(islice(self.batches(), self.batch_count))
            for x, y in taken:
                y = tree_map_only(Tensor, lambda t: t.to(device), y)
                for name, both in self._of_batch(Batch(x, y), generator).items():
                    totals[place[name]] += torch.stack(both).to(totals)
                    seen.add(name)
        if not taken:
            raise BitwrightError("ewgs: batches() gave no batch; it is called at every estimate, give a fresh iterable")
        totals = mean_over_ranks(totals)
        return {name: delta_from_curvature(*totals[i]).item() for name, i in place.items() if name in seen}

    def _of_batch(self, batch: Batch, generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def record(name: str, quantizer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                seen[name] = (output, grid_width(self.found[name], inputs[0]))

        hooks = [q.register_forward_hook(partial(record, n)) for n, q in self.found.items()]
        try:
            loss = self.loss_fn(batch.inputs.run(self.model), batch.y)
        finally:
            for hook in hooks:
                hook.remove()
        tensors, widths = [t for t, _ in seen.values()], [w for _, w in seen.values()]
        means, spread = mean_curvatures(loss, tensors, widths, self.iterations, self.tolerance, generator)
        return dict(zip(seen, zip(means, spread, strict=True), strict=True))

    def after_epoch(self, metrics: dict[str, Any]) -> None:
        self.epochs += 1
        if self.epochs % self.every == 0:
            self._set(self.estimate())
        metrics["ewgs/delta"] = sum(self._delta(n).item() for n in self.found) / len(self.found)

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "delta": {n: self._delta(n).item() for n in self.found}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs = int(state["epochs"])
        self._set(state["delta"])


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Gradients have gradients, which compiled code, the fused kernels and fused attention do not give."""
    with reference_only(), torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        yield


@torch.no_grad()
def grid_width(quantizer: Quantizer, x: Tensor) -> Tensor:
    """Largest minus smallest value of the grid, broadcastable to `x`."""
    affine = quantizer.affine(x if quantizer.shape.role == "weight" else None)
    # Where channels have bits of their own, `affine` has the bounds of the widest.
    codes = affine.hi - affine.lo if len(quantizer.bits) == 1 else quantizer.code_hi - quantizer.code_lo
    width = affine.scale * codes
    return along(width, x, quantizer.grid.shape.axis)
