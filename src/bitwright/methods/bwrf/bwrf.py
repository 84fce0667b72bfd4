"""BWRF: low-precision blocks learn inside the frozen full-precision network."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bitwright.errors import BitwrightError
from bitwright.methods.base import Batch, Method
from bitwright.methods.bwrf.blocks import GRANULARITIES, Tap, find, find_blocks
from bitwright.methods.bwrf.partner import Partner, check_cut
from bitwright.methods.kd import kd_loss
from bitwright.methods.precision import casting, guide_dtype
from bitwright.methods.probe import unwrap
from bitwright.methods.shared import share_memory
from bitwright.prepare import quantizers

ORDERS = ("prefix", "suffix")
BRANCH_LOSSES = ("both", "ce", "kd")
WEIGHTS = ("geometric", "uniform")
FADES = ("none", "linear", "cosine")


def branch_weights(count: int, kind: str, beta: float) -> list[float]:
    """Weights of the branches k = 1 ... n - 1 of n = `count` blocks.

    geometric: beta 2^-(n-k), as Block-KD divides its stepping stones; uniform: beta / (n - 1).
    """
    if kind == "uniform":
        return [beta / (count - 1)] * (count - 1)
    return [beta * 2.0 ** (k - count) for k in range(1, count)]


def fade_factor(kind: str, progress: float) -> float:
    """Factor of the branches' weights after the fraction `progress` of training: 1 at 0, and 0 at 1 unless "none".

    linear: 1 - progress; cosine: (1 + cos(pi progress)) / 2; none: 1 throughout.
    """
    progress = min(progress, 1.0)
    if kind == "linear":
        return 1.0 - progress
    return 1.0 if kind == "none" else 0.5 * (1.0 + math.cos(math.pi * progress))


class BWRF(Method):
    """Adds the losses of mixed-precision branches: low-precision blocks 1 ... k followed by frozen float blocks.

    L = CE(z_Q, y) + alpha KD(z_Q, z_F) + sum_k w_k [CE(z_k, y) + alpha KD(z_k, z_F)], k = 1 ... n - 1. The step's own
    forward pass of the model serves all branches (forward hooks record its blocks); the partner runs once
    without gradient for z_F and once for all branches, whose rows join its batch at their blocks.

    Args:
        model: the model that is trained; the same architecture as `partner` up to quantizers.
        partner: pretrained float network. It is frozen and put in evaluation mode, also again before each use. From
            the first step on a lean copy of it runs (`bitwright.methods.lean`), in "prefix" order.
        blocks: names of the modules whose outputs end the blocks, in order, the last included; None: found
            (`find_blocks`). granularity: what is looked for then, "stage" (default) or "block".
        order: "prefix" (default): branch k is Q_1 ... Q_k F_k+1 ... F_n, so that Q_k's gradient crosses no further
            quantizer. "suffix": F_1 ... F_k Q_k+1 ... Q_n; the model's suffix then really runs again, once per branch,
            on batch statistics that are not recorded: about (n - 1) / 2 further training steps of the model.
        branch_loss: "both" (default), "ce" or "kd" on the branches.
        backbone_kd: whether the model's own output gets alpha KD(z_Q, z_F). Default True; set it False beside
            the `kd` method, which adds the same term.
        weights: "geometric" (default): w_k = beta 2^-(n-k), or "uniform": beta / (n - 1).
        alpha, beta: weights of distillation and of all branches, >= 0. Default 1, 1.
        temperature: of distillation. Default 4 (CIFAR); ImageNet recipes use 1.
        teach: factor of sum_k w_k KD(z_Q, z_k): the branches, nearer to the model than the partner is, as its teachers,
            without gradient to them. Default 0; "distillation from branches" in a summary can be read so.
        fade: "none" (default): branches weigh the same throughout; "linear" or "cosine": their weights fall to 0 over
            `total_steps` optimizer steps (`fade_factor`), so that what is shipped was last trained for itself.
        total_steps: optimizer steps of the whole training; only a fade needs it.
        sample: True runs one branch a step, k drawn with p_k proportional to w_k, weighted w_k / p_k.
        joint: "prefix" only: True gives z_F and all branches in one forward pass of the partner. Fewer kernel
            launches, but the teacher's rows then take part in the backward pass; default False.
        partner_dtype: "bfloat16": the partner's passes, with all branches, run under autocast to it, whatever the
            model runs in: less time where processors have bfloat16 products. Losses stay float32. None (default): as
            the step runs.
        loss_fn: the task loss of the branches. Default cross entropy.
        seed: of the sampling.

    The model must run once per step in training mode with gradients. Losses: `bwrf_kd`, `bwrf_branches`, `bwrf_teach`.

    Raises:
        BitwrightError: a value is not accepted, a block is missing, or (in the first step) the networks cannot
            be cut at the blocks' ends.
    """

    name = "bwrf"

    def __init__(
        self,
        model: nn.Module,
        partner: nn.Module,
        blocks: list[str] | None = None,
        granularity: str = "stage",
        order: str = "prefix",
        branch_loss: str = "both",
        backbone_kd: bool = True,
        weights: str = "geometric",
        alpha: float = 1.0,
        beta: float = 1.0,
        temperature: float = 4.0,
        teach: float = 0.0,
        fade: str = "none",
        total_steps: int | None = None,
        sample: bool = False,
        joint: bool = False,
        partner_dtype: str | None = None,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        seed: int = 0,
    ):
        for key, value, accepted in (
            ("granularity", granularity, GRANULARITIES),
            ("order", order, ORDERS),
            ("branch_loss", branch_loss, BRANCH_LOSSES),
            ("weights", weights, WEIGHTS),
            ("fade", fade, FADES),
        ):
            if value not in accepted:
                raise BitwrightError(f"bwrf: {key}={value!r} is not accepted; use {' or '.join(accepted)}")
        if not (alpha >= 0 and beta >= 0 and teach >= 0 and temperature > 0):
            raise BitwrightError(
                f"bwrf: alpha={alpha}, beta={beta}, teach={teach}, temperature={temperature} is not accepted; "
                "use alpha, beta, teach >= 0 and temperature > 0"
            )
        if branch_loss == "kd" and alpha == 0:
            raise BitwrightError("bwrf: branch_loss='kd' with alpha=0 leaves the branches no loss; use alpha > 0")
        if fade != "none" and (total_steps is None or total_steps < 1):
            raise BitwrightError(f"bwrf: total_steps={total_steps} is not accepted; fade={fade!r} needs at least 1")
        self.model, inside = unwrap(model), unwrap(partner)
        if share_memory(self.model.parameters(), inside.parameters()):
            raise BitwrightError("bwrf: model and partner share parameters; give a partner of its own (a deep copy)")
        if quantizers(inside):
            raise BitwrightError("bwrf: the partner is quantized; give the float network")
        self.blocks = find_blocks(inside, granularity) if blocks is None else list(blocks)
        if len(self.blocks) < 2:
            raise BitwrightError(f"bwrf: blocks={self.blocks} is not accepted; give at least two names")
        for role, module in (("model", self.model), ("partner", inside)):
            missing = [b for b in self.blocks if find(module, b) is None]
            if missing:
                raise BitwrightError(f"bwrf: the {role} has no module {missing[0]!r}; blocks are names of its modules")
        self.order, self.branch_loss, self.backbone_kd = order, branch_loss, backbone_kd
        self.alpha, self.teach, self.temperature = alpha, teach, temperature
        self.fade, self.total_steps, self.steps = fade, total_steps or 1, 0
        self.sample, self.joint, self.loss_fn = sample, joint and order == "prefix", loss_fn
        self.weights = branch_weights(len(self.blocks), weights, beta)
        self.partner_dtype = guide_dtype(partner_dtype, "bwrf: partner_dtype")
        self.partner = Partner(partner, self.blocks)
        self.taps = [Tap() for _ in self.blocks]
        self._handles = [tap.attach(self.model.get_submodule(b)) for tap, b in zip(self.taps, self.blocks, strict=True)]
        self._generator = torch.Generator().manual_seed(seed)
        self._checked = False

    def remove(self) -> None:
        """Take the hooks off model and partner; the method is of no use afterwards."""
        for handle in (*self._handles, *self.partner.handles):
            handle.remove()

    def chosen(self) -> dict[int, float]:
        """{index of the block behind which the branch changes network: weight} for this step."""
        factor = fade_factor(self.fade, self.steps / self.total_steps)
        every = {k: w * factor for k, w in enumerate(self.weights) if w * factor > 0}
        if not self.sample or not every:
            return every
        total = sum(every.values())
        share = torch.tensor([w / total for w in every.values()])
        k = list(every)[int(torch.multinomial(share, 1, generator=self._generator))]
        return {k: total}  # w_k / p_k

    def losses(self, batch: Batch, outputs: Tensor) -> dict[str, Tensor]:
        features = [tap.output for tap in self.taps]
        for tap in self.taps:
            tap.output = None
        for name, h in zip(self.blocks, features, strict=True):
            if h is None:
                raise BitwrightError(f"bwrf: block {name!r} did not run in the model's training forward pass")
        if not self._checked:
            if not isinstance(batch.x, Tensor) or not isinstance(outputs, Tensor):
                raise BitwrightError("bwrf: takes models of one tensor in and one tensor out; wrap model and partner")
            if self.order == "prefix":  # suffixes quantize the partner's outputs: its very own
                self.partner.slim(batch.x[:2])
            check_cut(self.partner, batch.x, features)
            self._checked = True
        branches = self.chosen()
        wants_teacher = self.alpha > 0 and (self.backbone_kd or self.branch_loss != "ce")
        teacher, logits = self._logits(batch.x, features, list(branches), wants_teacher)
        named = {}
        if wants_teacher and self.backbone_kd:
            named["bwrf_kd"] = self.alpha * kd_loss(outputs, teacher, self.temperature)
        if branches:
            each = [w * self._branch_loss(logits[k], batch.y, teacher) for k, w in branches.items()]
            named["bwrf_branches"] = torch.stack(each).sum()
            if self.teach > 0:
                taught = [w * kd_loss(outputs, logits[k], self.temperature) for k, w in branches.items()]
                named["bwrf_teach"] = self.teach * torch.stack(taught).sum()
        return named

    def _logits(
        self, x: Tensor, features: list[Tensor], branches: list[int], wants_teacher: bool
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """(teacher's logits, {k: branch k's logits}); the teacher's are arbitrary where nobody wants them."""
        with casting(x.device, self.partner_dtype):
            if self.order == "prefix" and self.joint:
                teacher, logits = self.partner.branches(x, {k: features[k] for k in branches})
                return teacher.detach(), logits
            teacher, outputs = x, [x]
            if wants_teacher or self.order == "suffix":
                teacher, outputs = self.partner.plain(x)
            if not branches:
                return teacher, {}
            if self.order == "prefix":
                return teacher, self.partner.branches(x[:1], {k: features[k] for k in branches})[1]
        return teacher, {k: self._suffix(x[:2], k, outputs[k]) for k in branches}

    def _suffix(self, carrier: Tensor, k: int, h: Tensor) -> Tensor:
        """The model's logits with `h` in place of the output of block k; its buffers stay as they are."""
        self.taps[k].replace = h
        try:
            buffers = {n: b.clone() for n, b in self.model.named_buffers()}
            return functional_call(self.model, buffers, (carrier,))
        finally:
            for tap in self.taps:
                tap.replace = tap.output = None

    def _branch_loss(self, logits: Tensor, y: Tensor, teacher: Tensor) -> Tensor:
        terms = []
        if self.branch_loss != "kd":
            terms.append(self.loss_fn(logits if self.partner_dtype is None else logits.float(), y))
        if self.branch_loss != "ce" and self.alpha > 0:
            terms.append(self.alpha * kd_loss(logits, teacher, self.temperature))
        return torch.stack([t.float() for t in terms]).sum()

    def after_step(self, step: Any) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])
        self._generator.set_state(state["generator"])
