"""The trainer: one run, from a recipe to its summary. A user of `Step`, with no private door."""

import copy
import json
import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitwright.calibrate import calibrate
from bitwright.compiled import compile_model
from bitwright.coverage import require_complete
from bitwright.errors import BitwrightError
from bitwright.step import Step, StepResult
from bitwright.training.checkpoint import (
    load_checkpoint,
    rng_state,
    save_checkpoint,
    seed_everything,
    set_rng_state,
    write_atomic,
    write_json,
)
from bitwright.training.data import Dataset
from bitwright.training.diagnose import Diverged, first_bad_layer, first_bad_tensor
from bitwright.training.ema import Ema
from bitwright.training.evaluate import evaluate
from bitwright.training.events import EventLog
from bitwright.training.folder import RunFolder, load_state
from bitwright.training.interrupt import Interrupted, StopSignals
from bitwright.training.meter import Meter
from bitwright.training.methods import make_methods, method_context
from bitwright.training.optim import lr_factor, make_optimizer, set_lr
from bitwright.training.partner import Partner
from bitwright.training.recipe import Recipe
from bitwright.training.report import Reporter
from bitwright.training.setup import blame, choose_device, float_model, place, quantize
from bitwright.training.summary import summarize

# Batches between two looks at the loss on a GPU, where each look waits for the device; on a CPU every loss is seen.
LOOK_EVERY = 16


class Trainer:
    """One run in one folder.

    Everything that decides what happens next is in the checkpoint: weights, optimizer, methods, average, random
    states, the place in the data. A run that is stopped and resumed ends bit-identical to one that was not.

    Args:
        recipe, dataset: what to train on what; `threads` must have been set (`setup.set_threads`).
        folder: claimed, with recipe.yaml in it.
        partner: where quantized training starts; None starts from fresh weights. teacher: of `kd` and `relational`;
            None: the partner.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        folder: RunFolder,
        *,
        partner: Partner | None = None,
        teacher: Partner | None = None,
        reporter: Reporter,
        stop: StopSignals,
    ):
        self.recipe, self.dataset, self.folder = recipe, dataset, folder
        self.partner, self.teacher = partner, teacher
        self.reporter, self.stop = reporter, stop
        self.device = choose_device(recipe)
        self.batch_size = recipe.schedule.batch_size
        self.example = next(iter(self._test_batches()))[0]
        self.steps_per_epoch = dataset.steps_per_epoch(self.batch_size)
        self.epoch, self.position = 0, 0  # epochs done, batches done in the present one
        self.meter = Meter(self.device)
        self.rows: list[dict[str, Any]] = []
        self.seconds, self._ticked = 0.0, time.perf_counter()
        seed_everything(recipe.seed)
        model = float_model(recipe, dataset) if partner is None else copy.deepcopy(partner.model).requires_grad_(True)
        self.model = place(quantize(recipe, model, dataset), recipe, self.device)

    def run(self, *, resume: bool) -> dict[str, Any]:
        """Train to the end and write every file; returns the summary.

        resume: go on from the folder's checkpoint.

        Raises: Interrupted after a signal, with the state saved; Diverged when the loss is not finite, with the last
        good checkpoint in place; BitwrightError for bad input and for files that cannot be written.
        """
        self._identity = self.folder.identity()
        state = load_checkpoint(self.folder.checkpoint, digest=self.recipe.digest()) if resume else None
        if state is None:
            self._calibrate()
        else:
            load_state(self.model, state["model"], self.folder.checkpoint)
        self._assemble()
        if state is None:
            self._save()
        else:
            self._restore(state)
        self._write_metrics()
        epochs = self.recipe.schedule.epochs
        done = self.epoch * self.steps_per_epoch + self.position
        with (
            EventLog(self.folder.tensorboard, purge_step=self.epoch + 1) as events,
            self.reporter.training(epochs * self.steps_per_epoch, done),
        ):
            while self.epoch < epochs:
                speed = self._train_epoch()
                self._end_epoch(speed, events)
        summary = summarize(
            self.recipe,
            self.evaluated,
            self.dataset,
            self.rows,
            self.step.methods,
            float_accuracy=None if self.partner is None else self.partner.accuracy,
            teacher_accuracy=None if self.teacher is None else self.teacher.accuracy,
            seconds=self.seconds,
            device=self.device,
        )
        write_json(self.folder.summary, summary)
        self.stop.check()
        return summary

    @property
    def evaluated(self) -> torch.nn.Module:
        """The network that is evaluated and exported: the average where the recipe asks for one."""
        return self.model if self.ema is None else self.ema.model

    def _calibrate(self) -> None:
        """Scales and signedness from training images; an explicit phase, recorded in the model's buffers."""
        if not self.recipe.quantized:
            return
        options = self.recipe.calibration
        count = math.ceil(options.samples / options.batch_size)
        batches = self.dataset.calibration_batches(
            seed=self.recipe.seed, batch_size=options.batch_size, count=count, device=self.device
        )
        with blame(self.recipe.source):
            calibrate(self.model, batches, seed=self.recipe.seed)

    def _assemble(self) -> None:
        """Optimizer, methods, average and step around the model as it is now."""
        options = self.recipe.optimizer
        self.optimizer = make_optimizer(self.model, options)
        self.warmup_steps = round(self.recipe.schedule.warmup_epochs * self.steps_per_epoch / options.accumulate)
        partner, teacher = (None if p is None else p.model for p in (self.partner, self.teacher))
        context = method_context(
            self.recipe, self.dataset, self.model, partner, self.example, self._cross_entropy, teacher
        )
        self.total_steps = context.steps
        with blame(self.recipe.source):
            methods = make_methods(self.recipe.methods, context)
            self.step = Step(
                compile_model(self.model, activation_memory=self.recipe.activation_memory)
                if self.recipe.compile
                else self.model,
                self._task_loss,
                self.optimizer,
                methods,
                amp_dtype=torch.bfloat16 if self.recipe.amp == "bf16" else None,
                clip_norm=options.clip_norm,
                accumulate=options.accumulate,
            )
        self.ema = None if options.ema is None else Ema(self.model, options.ema)

    def _cross_entropy(self, outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs.float(), y, label_smoothing=self.recipe.optimizer.label_smoothing)

    def _task_loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy; looked at before the backward pass, while the weights are still what made it."""
        loss = self._cross_entropy(outputs, y)
        if self._looks() and not bool(torch.isfinite(loss)):
            assert self.step.batch is not None
            raise Diverged(self._diverged("the loss", first_bad_layer(self.model, self.step.batch.x)))
        return loss

    def _looks(self) -> bool:
        return self.device.type == "cpu" or self.position % LOOK_EVERY == 0

    def _diverged(self, what: str, where: str | None) -> str:
        cause = f"; first: {where}" if where else ""
        return (
            f"{self.folder.root}: {what} is not finite in epoch {self.epoch + 1}, batch {self.position + 1}{cause}; "
            f"the last good state is in {self.folder.checkpoint.name}; "
            "try a lower optimizer.lr, optimizer.clip_norm, or schedule.warmup_epochs"
        )

    def _train_epoch(self) -> float:
        """The batches of the present epoch from `position` on; returns images per second."""
        self.model.train()
        started, first = time.perf_counter(), self.position
        batches = self.dataset.train_batches(
            epoch=self.epoch,
            seed=self.recipe.seed,
            batch_size=self.batch_size,
            device=self.device,
            start=self.position,
        )

        def speed() -> float:
            return (self.position - first) * self.batch_size / (time.perf_counter() - started)

        for x, y in batches:
            if self.recipe.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            kind = self.recipe.schedule.kind
            factor = lr_factor(self.step.steps, total=self.total_steps, warmup=self.warmup_steps, kind=kind)
            set_lr(self.optimizer, factor)
            before = self.step.steps
            result = self.step(x, y)
            if self.ema is not None and self.step.steps > before:
                self.ema.update(self.model)
            self._count(result, y)
            self.position += 1
            if self.reporter.wants_state():
                self._show(speed())
            if self.stop.signum is not None:
                self._stop()
        return speed()

    def _stop(self) -> None:
        """Save the state in the middle of an epoch and leave."""
        self._save()
        self.reporter.note(f"stopped in epoch {self.epoch + 1} after batch {self.position}; state saved")
        self.stop.check()

    def _count(self, result: StepResult, y: Tensor) -> None:
        """Add one batch to the running sums; methods' losses are looked at here."""
        if self._looks() and not bool(torch.isfinite(result.loss)):
            bad = next((k for k, v in result.losses.items() if not bool(torch.isfinite(v))), "total")
            raise Diverged(self._diverged(f"the loss {bad!r}", first_bad_tensor(self.model)))
        self.meter.add(result, y)

    def _show(self, speed: float) -> None:
        means = self.meter.means()
        steps = self.epoch * self.steps_per_epoch + self.position
        label = f"epoch {self.epoch + 1}/{self.recipe.schedule.epochs}"
        state = f"loss {means['loss']:.3f}  accuracy {means['train_accuracy']:.1%}  {speed:,.0f} images/s"
        self.reporter.advance(steps, label, state)

    def _test_batches(self):
        return self.dataset.test_batches(batch_size=self.batch_size, device=self.device)

    def _end_epoch(self, speed: float, events: EventLog) -> None:
        """Evaluate, run the methods' hooks, record and save. speed: of training, images per second."""
        last = self.epoch + 1 == self.recipe.schedule.epochs
        evaluated = self.evaluated
        if self.ema is not None:
            evaluated.load_state_dict(evaluated.state_dict())  # quantizers follow the bits that were copied
        if last and self.recipe.quantized:
            from bitwright.deploy import snap_biases

            try:
                snap_biases(evaluated, self.example)
            except BitwrightError as error:
                self.reporter.note(f"biases stay as trained: {error}")
        try:
            # Not to be stopped in the last epoch: the state is saved with all biases as trained or all snapped.
            evaluation = evaluate(evaluated, self._test_batches(), check=None if last else self.stop.check)
        except Interrupted:
            self._stop()
            raise
        if evaluation.coverage is not None:
            require_complete(evaluation.coverage)
        if not math.isfinite(evaluation.loss):
            raise Diverged(self._diverged("the test loss", first_bad_layer(evaluated, self.example)))
        row: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "step": self.step.steps,
            "lr": self.optimizer.param_groups[0]["lr"],
            **self.meter.means(),
            "accuracy": evaluation.accuracy,
            "test_loss": evaluation.loss,
            "images_per_second": round(speed, 1),
        }
        self.step.end_epoch(row)
        self._tick()
        row["seconds"] = round(self.seconds, 3)
        self.rows.append(row)
        self.epoch, self.position = self.epoch + 1, 0
        self.meter.reset()
        self._check_folder()
        events.add(row)  # before the checkpoint: after a kill between the two, the resumed run replaces it
        self._save()
        self._write_metrics()
        self.reporter.epoch(row, self.recipe.schedule.epochs)
        if not last:
            self.stop.check()

    def _write_metrics(self) -> None:
        """metrics.jsonl holds what the checkpoint knows, no more and no less."""
        write_atomic(self.folder.metrics, "".join(json.dumps(row) + "\n" for row in self.rows))

    def _tick(self) -> None:
        """Add the time since the last call to the time that the run has taken."""
        now = time.perf_counter()
        self.seconds, self._ticked = self.seconds + now - self._ticked, now

    def _check_folder(self) -> None:
        """Raise BitwrightError where the folder is no longer the one that the run began in."""
        if self._identity is None or self.folder.identity() != self._identity:
            raise BitwrightError(
                f"{self.folder.root}: removed or replaced while a run was training there; nothing saved"
            )

    def _save(self) -> None:
        """Write the checkpoint; never weights that are not finite, and nothing into another run's folder."""
        self._tick()
        self._check_folder()
        where = first_bad_tensor(self.model)
        if where:
            raise Diverged(self._diverged("the network", where))
        state = {
            "recipe": self.recipe.digest(),
            "epoch": self.epoch,
            "position": self.position,
            "sums": self.meter.state_dict(),
            "rows": self.rows,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "gradients": {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "random": rng_state(),
        }
        save_checkpoint(self.folder.checkpoint, state)

    def _restore(self, state: dict[str, Any]) -> None:
        """Everything but the weights, which are loaded already; random states last."""
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self.meter.load_state_dict(state["sums"])
        self.rows, self.seconds = list(state["rows"]), float(state["seconds"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step.load_state_dict(state["step"])
        parameters = dict(self.model.named_parameters())
        for name, gradient in state["gradients"].items():
            parameters[name].grad = gradient.to(self.device)
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        set_rng_state(state["random"])
