"""What a batch may be, wherever the library runs a model on data of the user's."""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from bitwright.errors import BitwrightError

ACCEPTED = (
    "a tensor or array, an (input, target) pair as a DataLoader gives it, a dict of keyword arguments, or "
    "((input, input, ...), target)"
)


class Inputs(NamedTuple):
    """What a model is called with: positional and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among them, in order."""
        return [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor)]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """The same with every tensor changed."""

        def one(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        return Inputs(tuple(one(v) for v in self.args), {k: one(v) for k, v in self.kwargs.items()})

    @property
    def rows(self) -> int:
        """How many samples: the length of the first tensor that has an axis."""
        return next((len(t) for t in self.tensors if t.ndim), 1)

    def by_row(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """The same with every tensor changed that has one row per sample."""
        rows = self.rows
        return self.mapped(lambda t: change(t) if t.ndim and len(t) == rows else t)

    @property
    def device(self) -> torch.device:
        """Where the first tensor lives."""
        return self.tensors[0].device

    def call(self, model: Callable[..., Any]) -> Any:
        """`model` called with them."""
        return model(*self.args, **self.kwargs)

    def run(self, model: nn.Module) -> Any:
        """The same on the model's device."""
        return self.mapped(lambda t: t.to(device_of(model))).call(model)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters live."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def inputs_of(batch: Any, who: str) -> Inputs:
    """The inputs in one batch.

    Args:
        batch: a tensor or numpy array; a sequence whose first item is the input and whose others (targets) are left
            out; the first item may itself be a sequence of inputs, for models that take several, or a dict; or a
            dict: keyword arguments.
        who: the function that was given it, for messages.

    Raises:
        BitwrightError: it is something else, or holds no tensor.
    """
    if isinstance(batch, Inputs):
        return batch
    found = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if isinstance(found, Mapping):
        inputs = Inputs((), {str(k): as_tensor(v) for k, v in found.items()})
    elif isinstance(found, tuple | list):
        inputs = Inputs(tuple(as_tensor(v) for v in found), {})
    else:
        inputs = Inputs((as_tensor(found),), {})
    if not inputs.tensors or not all(isinstance(v, Tensor) for v in inputs.args):
        raise BitwrightError(f"{who}: a batch is {described(batch)}; accepted are {ACCEPTED}")
    return inputs


def each_batch(batches: Iterable[Any], who: str) -> Iterator[Inputs]:
    """`inputs_of` every batch; a lone tensor, array or dict is one batch, not a row of them.

    Raises:
        BitwrightError: as `inputs_of`, or there is no iterating over `batches`.
    """
    if isinstance(batches, Tensor | np.ndarray | Mapping):
        batches = [batches]
    if not isinstance(batches, Iterable) or isinstance(batches, str | bytes):
        raise BitwrightError(f"{who}: batches is {described(batches)}; give a list or loader of them")
    for batch in batches:
        yield inputs_of(batch, who)


def one_tensor(inputs: Inputs, who: str) -> Tensor:
    """The tensor of a model of one input. Raises: BitwrightError where there are several, or keywords."""
    if len(inputs.args) != 1 or inputs.kwargs:
        names = f", {', '.join(inputs.kwargs)}" if inputs.kwargs else ""
        raise BitwrightError(
            f"{who}: takes models of one tensor in, not of {len(inputs.args) + len(inputs.kwargs)} inputs{names}; "
            "wrap the model in a module of one input"
        )
    return inputs.args[0]


def example_of(example: Any, who: str) -> Inputs:
    """An example input, without gradients and without labels; see `inputs_of` and `deployed`."""
    return deployed(inputs_of(example, who)).mapped(Tensor.detach)


def deployed(inputs: Inputs) -> Inputs:
    """What a deployed network reads: a dict's `labels`, from which Hugging Face's models take their loss, are not."""
    return inputs._replace(kwargs={k: v for k, v in inputs.kwargs.items() if k != "labels"})


def outputs_of(output: Any, who: str) -> dict[str, Tensor]:
    """The tensors that a model puts out, in order, by the names that files give them.

    One alone, as it is or in a dict, tuple or dataclass, is `logits`, and so is what is called `logits` among others:
    what Hugging Face's models give beside it (a loss, hidden states, caches) is not deployed. Of several each has its
    key, its keys joined by `_` where they are nested, and behind `output_` where that is a number: `out`, `aux`,
    `output_0`, `boxes_1`.

    Raises:
        BitwrightError: there is none.
    """
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return {"logits": named}
    found = [(path, t) for path, t in tree_flatten_with_path(output)[0] if isinstance(t, Tensor)]
    if not found:
        raise BitwrightError(f"{who}: takes models of tensors out; this one gives {described(output)} without any")
    if len(found) == 1:
        return {"logits": found[0][1]}
    names = ["_".join(re.sub(r"\W", "_", key_of(part)) for part in path) for path, _ in found]
    names = [f"output_{name}" if not name or name[0].isdigit() or name == "input" else name for name in names]
    names = [f"{name}_{names[:i].count(name)}" if name in names[:i] else name for i, name in enumerate(names)]
    return {name: t for name, (_, t) in zip(names, found, strict=True)}


def logits_of(output: Any, who: str) -> Tensor:
    """The tensor of a model that puts out one, or one called `logits`; see `outputs_of`.

    Raises:
        BitwrightError: it puts out several, or none.
    """
    found = {"logits": output} if isinstance(output, Tensor) else outputs_of(output, who)
    if len(found) > 1:
        raise BitwrightError(f"{who}: takes models of one tensor out, or of one called logits; not {', '.join(found)}")
    return next(iter(found.values()))


def class_axis(output: Tensor) -> int:
    """Along which axis classes lie: 1 of four axes and more (images, classes, rows, columns), else the last of
    (images, classes) and (sequences, tokens, classes), counted from 0.
    """
    return 1 if output.ndim >= 4 else output.ndim - 1


def key_of(part: Any) -> str:
    """One step of a path into a nested output: a dict's key, an attribute's name or an index."""
    return str(next(getattr(part, what) for what in ("key", "name", "idx") if hasattr(part, what)))


@contextmanager
def exportable(model: nn.Module, inputs: Inputs) -> Iterator[Inputs]:
    """What torch's exporters can call: `model` puts out its tensors (see `outputs_of`), and of `inputs` the tensors
    alone are left; the other arguments are constants meanwhile.
    """
    own, forward = vars(model).get("forward"), model.forward
    constants = {k: v for k, v in inputs.kwargs.items() if not isinstance(v, Tensor)}

    @functools.wraps(forward)
    def alone(*args: Any, **kwargs: Any) -> Any:
        tensors = [*outputs_of(forward(*args, **{**constants, **kwargs}), "export").values()]
        return tensors[0] if len(tensors) == 1 else tensors

    model.forward = alone
    try:
        yield inputs._replace(kwargs={k: v for k, v in inputs.kwargs.items() if k not in constants})
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def as_tensor(value: Any) -> Any:
    """Arrays as tensors; everything else as it is."""
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def described(value: Any) -> str:
    """A value's kind, in words."""
    if isinstance(value, tuple | list):
        inner = ", ".join(type(v).__name__ for v in value[:3]) + (", ..." if len(value) > 3 else "")
        return f"a {type(value).__name__} of ({inner})"
    return f"a {type(value).__name__}"
