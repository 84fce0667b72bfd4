"""`Step`: one training step with any methods."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bitwright.errors import BitwrightError
from bitwright.grids.base import as_float
from bitwright.methods.base import Batch, Method
from bitwright.methods.shared import share_memory
from bitwright.prepare import split_parameters, warn_once


@dataclass
class StepResult:
    """What a step did: detached total loss, detached losses by name, detached outputs."""

    loss: Tensor
    losses: dict[str, Tensor]
    outputs: Any


def what(value: Any) -> str:
    """A loss that is none, in words."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def detached(value: Any) -> Any:
    """A tensor without its graph; what else a model puts out as it is."""
    return value.detach() if isinstance(value, Tensor) else value


def check_arguments(optimizer: Any, methods: Any, amp_dtype: Any, clip_norm: float | None, accumulate: Any) -> None:
    """Raise BitwrightError for what would fail far from here, or train wrongly without a word."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise BitwrightError(f"step: optimizer: {type(optimizer).__name__} is not accepted; use a torch optimizer")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise BitwrightError(
            f"step: {type(optimizer).__name__} wants a closure that runs the model again; use it in a loop of your own"
        )
    batches = getattr(getattr(optimizer, "gradient_state", None), "num_steps", 1)
    if batches > 1:  # it skips steps, and a Step's losses and methods would know nothing of that
        raise BitwrightError(
            f"step: accelerate's optimizer accumulates {batches} batches by itself; use "
            f"Accelerator(gradient_accumulation_steps=1) and Step(accumulate={batches})"
        )
    if not isinstance(methods, list | tuple) or not all(isinstance(m, Method) for m in methods):
        raise BitwrightError(f"step: methods={methods!r} is not accepted; use a list of bitwright.Method objects")
    if amp_dtype is not None and not isinstance(amp_dtype, torch.dtype):
        raise BitwrightError(f"step: amp_dtype={amp_dtype!r} is not accepted; use a torch dtype, torch.bfloat16 say")
    if clip_norm is not None and not clip_norm > 0:
        raise BitwrightError(f"step: clip_norm={clip_norm} is not accepted; use a number above 0, or None")
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise BitwrightError(f"accumulate={accumulate} is not accepted; use 1 or more batches per step")


def check_frozen(optimizer: torch.optim.Optimizer, methods: Sequence[Method]) -> None:
    """Raise BitwrightError for a network that a method only reads, a teacher, and that would change as it trains."""
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    for method in methods:
        if method.frozen is not None and share_memory(trained, method.frozen.parameters()):
            raise BitwrightError(
                f"methods: {method.name}: the optimizer trains parameters of the teacher; give a network of its own, "
                "a deep copy of the trained float model"
            )


def say_what_is_not_trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A line in the log where the optimizer was made before `prepare`, and holds no learned scale."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    _, scales = split_parameters(model)
    left = sum(id(p) not in held for p in scales)
    if left:
        warn_once(
            f"bitwright: the optimizer holds {len(scales) - left} of {len(scales)} learned scales; the others stay as "
            "they are, if no other optimizer has them; make it after prepare, or add them: "
            "optimizer.add_param_group({'params': bitwright.split_parameters(model)[1], 'weight_decay': 0.0})"
        )


def say_what_begins_anew(optimizer: torch.optim.Optimizer, methods: Sequence[Method]) -> None:
    """A line in the log where a run was resumed without the methods' state: schedules would fall back to the start."""
    forgetful = [m.name for m in methods if m.state_dict()]
    if forgetful and optimizer.state:
        warn_once(
            f"bitwright: the optimizer goes on from earlier steps, and {', '.join(forgetful)} from the beginning; if "
            "this resumes a run, save step.state_dict() beside the model's and the optimizer's, and load it too"
        )


class Step:
    """Forward, losses, backward, optimizer and methods of one batch: `result = step(x, y)`.

    Args:
        model: prepared model (or any module) that maps x to outputs.
        loss_fn: `(outputs, y) -> scalar`, the task loss.
        optimizer: any torch optimizer over the model's parameters whose step needs no closure.
        methods: training methods; their hooks run in this order.
        amp_dtype: autocast dtype of forward passes and losses, for example `torch.bfloat16`; None: off. Losses are not
            scaled, so that small gradients vanish in `torch.float16`.
        clip_norm: largest gradient norm; None: no clipping.
        accumulate: batches per optimizer step, at least 1; losses are divided by it. Batches left over at the end
            of an epoch take their step in `end_epoch`, so nothing of an epoch is pending in a checkpoint.

    Attributes:
        batch, result: the present batch and the losses of its forward pass, for methods.
        steps: optimizer steps taken so far.

    Raises:
        BitwrightError: two methods own the backward pass, two set bit-widths, one computes the weights that another
            moves, the optimizer trains a method's teacher, two losses share a name, `loss_fn` gives more than one
            number, or an argument is not accepted.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        optimizer: torch.optim.Optimizer,
        methods: Sequence[Method] = (),
        *,
        amp_dtype: torch.dtype | None = None,
        clip_norm: float | None = None,
        accumulate: int = 1,
    ):
        check_arguments(optimizer, methods, amp_dtype, clip_norm, accumulate)
        owners = [m for m in methods if type(m).backward is not Method.backward]
        if len(owners) > 1:
            names = " and ".join(m.name or type(m).__name__ for m in owners)
            raise BitwrightError(f"methods: {names} both own the backward pass; use one of them")
        setters = [m.name or type(m).__name__ for m in methods if m.sets_bits]
        if len(setters) > 1:
            raise BitwrightError(f"methods: {' and '.join(setters)} both set bit-widths; use one of them")
        makers, movers = ([m.name for m in methods if getattr(m, k)] for k in ("makes_weights", "moves_weights"))
        if makers and movers:
            raise BitwrightError(
                f"methods: {makers[0]} computes the weights, so that there are none for {movers[0]} to move; "
                "use one of them"
            )
        check_frozen(optimizer, methods)
        say_what_is_not_trained(model, optimizer)
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self.methods = list(methods)
        self.amp_dtype, self.clip_norm, self.accumulate = amp_dtype, clip_norm, accumulate
        self._owner = owners[0] if owners else None
        self._names = [m.name or type(m).__name__ for m in methods]
        self.steps, self._micro = 0, 0
        self.batch: Batch | None = None
        self.result: StepResult | None = None

    def autocast(self, device: torch.device) -> torch.autocast:
        """The autocast context of this step for tensors on `device`."""
        return torch.autocast(device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)

    def forward_loss(self, batch: Batch) -> Tensor:
        """The total loss of `batch` with its graph; also sets `self.result`. The model runs once."""
        inputs = batch.inputs
        with self.autocast(inputs.device):
            outputs = inputs.call(self.model)
            losses = {"task": self.loss_fn(outputs, batch.y)}
            if not isinstance(losses["task"], Tensor) or losses["task"].numel() != 1:
                raise BitwrightError(f"step: loss_fn gave {what(losses['task'])}; one number is expected, a mean say")
            for method in self.methods:
                more = method.losses(batch, outputs)
                taken = losses.keys() & more.keys()
                if taken:
                    raise BitwrightError(f"methods: the loss name {min(taken)!r} is used twice")
                losses.update(more)
        total = torch.stack([as_float(v) for v in losses.values()]).sum()
        self.result = StepResult(
            total.detach(), {k: v.detach() for k, v in losses.items()}, tree_map(detached, outputs)
        )
        return total

    def default_backward(self) -> None:
        """One forward and one backward pass over the present batch."""
        assert self.batch is not None
        (self.forward_loss(self.batch) / self.accumulate).backward()

    def __call__(self, x: Any, y: Any) -> StepResult:
        """Train on one batch; every `accumulate`-th call steps the optimizer and runs `after_step` hooks.

        x: a tensor; a tuple of tensors, for models of several inputs; or a dict of keyword arguments, as Hugging
        Face's models are called. y: what `loss_fn` takes beside the model's outputs.
        """
        if self.steps == self._micro == 0:
            say_what_begins_anew(self.optimizer, self.methods)
        if self._micro == 0:
            self.optimizer.zero_grad(set_to_none=True)  # what other losses left, of a second network say
        self.batch = Batch(x, y)
        if self._owner is None:
            self.default_backward()
        else:
            self._owner.backward(self)
        self._micro += 1
        if self._micro == self.accumulate:
            self._optimize()
        assert self.result is not None
        return self.result

    def _optimize(self) -> None:
        """The optimizer's step on the gradients at hand, and the methods' hooks after it."""
        if self.clip_norm is not None:
            parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps, self._micro = self.steps + 1, 0
        for method in self.methods:
            method.after_step(self)

    def end_epoch(self, metrics: dict[str, Any]) -> None:
        """Step on batches left over by `accumulate`, then run the methods' `after_epoch` hooks."""
        if self._micro:
            self._optimize()
        for method in self.methods:
            method.after_epoch(metrics)

    def state_dict(self) -> dict[str, Any]:
        """Counters and the methods' state, in the order of the methods."""
        return {
            "steps": self.steps,
            "micro": self._micro,
            "names": self._names,
            "methods": [m.state_dict() for m in self.methods],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; the same methods must have been given, in the same order."""
        if len(state["methods"]) != len(self.methods):
            raise BitwrightError(
                f"checkpoint holds the state of {len(state['methods'])} methods, the run has {len(self.methods)}"
            )
        saved_names = state.get("names", self._names)
        if saved_names != self._names:
            raise BitwrightError(
                f"checkpoint holds the state of {', '.join(saved_names)}, the run has {', '.join(self._names)}"
            )
        self.steps, self._micro = int(state["steps"]), int(state["micro"])
        for method, saved in zip(self.methods, state["methods"], strict=True):
            method.load_state_dict(saved)
