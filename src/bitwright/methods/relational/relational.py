"""Relational distillation: what resembles what inside a feature map, as in the teacher's."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.batches import device_of
from bitwright.errors import BitwrightError
from bitwright.methods.base import Batch, Method
from bitwright.methods.bwrf.blocks import Tap, find, find_blocks
from bitwright.methods.options import require
from bitwright.methods.precision import casting, guide_dtype
from bitwright.methods.probe import forward_fast, unwrap


def relation(features: Tensor) -> Tensor:
    """The similarity of every place with every other: cosines, (N, places, places), float32.

    Args:
        features: a map (N, C, ...) with its places behind the channels, or tokens (N, places, C). A place whose
            features are all 0 resembles none, and gets no gradient.
    """
    vectors = features.float()
    vectors = vectors if features.ndim == 3 else vectors.flatten(2).transpose(1, 2)
    norm = torch.linalg.vector_norm(vectors, dim=2, keepdim=True)
    unit = vectors / torch.where(norm > 0, norm, 1.0)
    return unit @ unit.transpose(1, 2)


def relational_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(relation of the teacher) || softmax(relation of the student)), mean over places and samples; a scalar.

    Args:
        student, teacher: features of as many places; their channels may differ in number. `teacher` receives no
            gradient.
    """
    with torch.autocast(student.device.type, enabled=False):  # cosines of bfloat16 products have two digits
        log_p = F.log_softmax(relation(student), 2)
        log_q = F.log_softmax(relation(teacher.detach()), 2)
        rows = log_p.shape[0] * log_p.shape[1]
        return F.kl_div(log_p, log_q, reduction="sum", log_target=True) / rows


class Relational(Method):
    """Adds `weight` times the mean of `relational_loss` over some modules' outputs, in every `every`-th step.

    Hooks on these modules record what the step's own forward pass puts out; the teacher runs once more, in evaluation
    mode, without gradients. Neither has an effect outside of training: nothing of it is exported.

    Args:
        model: the model that is trained, compiled or wrapped or not.
        teacher: the float partner, or a float network that has modules of the same names with outputs of as many
            places (pixels or tokens). It shares no parameter with what is trained, as `Step` checks.
        modules: names of the modules whose outputs are compared: one tensor each, (N, C, ...) with channels first, or
            tokens (N, places, C). None: the last stage that `bitwright.methods.bwrf.blocks.find_blocks` finds.
        weight: factor of the loss. Default 100, as in the source.
        every: in which steps: 0, `every`, 2 `every`, ... Default 2, every second one, as in the source.
        teacher_dtype: "bfloat16": the teacher runs under autocast to it, whatever the model runs in. None
            (default): as the step runs.

    Relations are (places x places) per sample: 4 MB for a map of 32 x 32. Loss: `relational`.

    Raises:
        BitwrightError: a value is not accepted, a module is missing, or (in the first step) outputs cannot be compared.
    """

    name = "relational"

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        modules: Sequence[str] | None = None,
        weight: float = 100.0,
        every: int = 2,
        teacher_dtype: str | None = None,
    ):
        need = partial(require, self.name)
        need(weight >= 0, "weight", weight, "a number >= 0")
        need(isinstance(every, int) and every >= 1, "every", every, "a whole number >= 1")
        need(modules is None or len(modules) > 0, "modules", modules, "a list of names, or null")
        inside = {"model": unwrap(model), "teacher": unwrap(teacher)}
        self.modules = [last_stage(inside["model"])] if modules is None else list(modules)
        for role, module in inside.items():
            missing = [name for name in self.modules if find(module, name) is None]
            if missing:
                raise BitwrightError(f"relational: modules: the {role} has no module {missing[0]!r}")
        self.teacher = self.frozen = teacher
        self.weight, self.every, self.steps = weight, every, 0
        self.teacher_dtype = guide_dtype(teacher_dtype, "relational: teacher_dtype")
        self.taps = [Tap() for _ in self.modules]
        self.teacher_taps = [Tap(always=True) for _ in self.modules]
        for role, taps in (("model", self.taps), ("teacher", self.teacher_taps)):
            for name, tap in zip(self.modules, taps, strict=True):
                tap.attach(inside[role].get_submodule(name))
        self._listen(False)

    def _listen(self, alive: bool) -> None:
        """The teacher's taps act in our own passes only: it may also serve another method."""
        for tap in self.teacher_taps:
            tap.alive, tap.output = alive, None

    def losses(self, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        students = [tap.output for tap in self.taps]
        for tap in self.taps:
            tap.output = None
        if self.steps % self.every or self.weight == 0:
            return {}
        self.teacher.eval()  # each time: the train() of a module that holds both reaches it
        self._listen(True)
        try:
            with torch.no_grad(), casting(device_of(self.teacher), self.teacher_dtype):
                forward_fast(self.teacher, batch.inputs)
            teachers = [tap.output for tap in self.teacher_taps]
        finally:
            self._listen(False)
        each = []
        for name, student, teacher in zip(self.modules, students, teachers, strict=True):
            check_pair(name, student, teacher)
            each.append(relational_loss(student, teacher))
        return {"relational": self.weight * torch.stack(each).mean()}

    def after_step(self, step: Any) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])


def last_stage(model: nn.Module) -> str:
    """The name of the module whose output ends the last stage; BitwrightError where the structure is not known."""
    try:
        return find_blocks(model)[-1]
    except BitwrightError:
        known = ", ".join([name for name, _ in model.named_children()][:6])
        raise BitwrightError(
            f"relational: the stages of this {type(model).__name__} are not known; give modules: [name, ...] "
            f"(its modules: {known} ...)"
        ) from None


def check_pair(name: str, student: Any, teacher: Any) -> None:
    """Raise BitwrightError unless both networks' outputs of the module are features with as many places."""
    for role, found in (("model", student), ("teacher", teacher)):
        if found is None:
            raise BitwrightError(f"relational: modules: {name!r} did not run in the {role}'s forward pass")
        if not isinstance(found, Tensor) or found.ndim < 3:
            what = f"of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise BitwrightError(
                f"relational: modules: what {name!r} puts out in the {role} is {what}; use one with a map (N, C, H, W) "
                "or tokens (N, T, C)"
            )
    places = [t.shape[1] if t.ndim == 3 else t.shape[2:].numel() for t in (student, teacher)]
    if (student.ndim, len(student), places[0]) != (teacher.ndim, len(teacher), places[1]):
        raise BitwrightError(
            f"relational: modules: {name!r} puts out {tuple(student.shape)} in the model, {tuple(teacher.shape)} in "
            "the teacher; only channels may differ in number"
        )
