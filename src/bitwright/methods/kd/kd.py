"""Knowledge distillation: the softened outputs of a teacher as targets."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.batches import class_axis, device_of, logits_of
from bitwright.errors import BitwrightError
from bitwright.methods.base import Batch, Method
from bitwright.methods.precision import casting, guide_dtype
from bitwright.methods.probe import forward_fast


def kd_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over the batch (and tokens or pixels); a scalar.

    T^2 keeps the gradient's size when T changes (section 2 of the paper). `teacher` receives no gradient.

    Args:
        student, teacher: logits, shape (batch, classes), (batch, tokens, classes) or (batch, classes, rows, columns).
        temperature: T > 0.
    """
    axis = class_axis(student)
    log_p = F.log_softmax(student.float() / temperature, axis)
    log_q = F.log_softmax(teacher.detach().float() / temperature, axis)
    rows = log_p.numel() // log_p.shape[axis]
    return F.kl_div(log_p, log_q, reduction="sum", log_target=True) * (temperature**2 / rows)


class KD(Method):
    """Adds `weight * kd_loss` to the task loss.

    Args:
        teacher: the float partner or any model with the same classes. It runs in evaluation mode, without gradients,
            and shares no parameter with what is trained: a deep copy, say, as `Step` checks.
        weight: factor of the loss. Default 1.
        temperature: default 4, usual for CIFAR; ImageNet recipes use 1.
        teacher_dtype: "bfloat16": the teacher runs under autocast to it, whatever the model runs in. None
            (default): as the step runs.

    Raises:
        BitwrightError: a value is not accepted.
    """

    name = "kd"

    def __init__(
        self,
        teacher: nn.Module,
        weight: float = 1.0,
        temperature: float = 4.0,
        teacher_dtype: str | None = None,
    ):
        if not (weight >= 0 and temperature > 0):
            raise BitwrightError(
                f"kd: weight={weight}, temperature={temperature} is not accepted; use weight >= 0, temperature > 0"
            )
        self.teacher = self.frozen = teacher
        self.weight, self.temperature = weight, temperature
        self.teacher_dtype = guide_dtype(teacher_dtype, "kd: teacher_dtype")

    def losses(self, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        self.teacher.eval()  # each time: the train() of a module that holds both reaches it
        with torch.no_grad(), casting(device_of(self.teacher), self.teacher_dtype):
            target = logits_of(forward_fast(self.teacher, batch.inputs), "kd: the teacher")
        logits = logits_of(outputs, "kd")
        if logits.shape != target.shape:
            raise BitwrightError(
                f"kd: the teacher puts out {tuple(target.shape)}, the model {tuple(logits.shape)}; "
                "use a teacher of the same classes"
            )
        return {"kd": self.weight * kd_loss(logits, target, self.temperature)}
