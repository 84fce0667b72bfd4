"""Training methods by the names that recipes use."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bitwright.errors import BitwrightError
from bitwright.methods import (
    AMED,
    BWRF,
    CAGE,
    CSQ,
    GAQAT,
    HGQ,
    KD,
    SAQ,
    AdaQAT,
    Allocation,
    ChannelBits,
    Constrained,
    EWGSDelta,
    Method,
    PEGECurriculum,
    QuantNet,
    Relational,
)
from bitwright.training.data import Dataset
from bitwright.training.lookup import check_types, close_matches
from bitwright.training.recipe import Recipe


@dataclass(frozen=True)
class MethodContext:
    """What a method may be built from.

    model: prepared and calibrated, on the training device. partner: the float network in evaluation mode on the same
    device, or None. teacher: the float network that `kd` and `relational` learn from, alike; None: the partner.
    loss_fn: the task loss, (outputs, y) -> scalar. dataset; batch_size: of the run. example: one batch of inputs on
    the device. steps: optimizer steps of the whole run. epochs, seed: of the run.
    """

    model: nn.Module
    partner: nn.Module | None
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    dataset: Dataset
    batch_size: int
    example: Tensor
    steps: int
    epochs: int
    seed: int
    teacher: nn.Module | None = None

    def cost_table(self, latencies: str | None = None) -> Any:
        """`bitwright.costs.cost_table` of the model at its present bit-widths; latencies: file of measured ones."""
        from bitwright.costs import cost_table, read_latencies

        measured = None if latencies is None else read_latencies(latencies)
        return cost_table(self.model, self.example[:1], latencies=measured)

    def need_partner(self, method: str) -> nn.Module:
        """The partner. Raises: BitwrightError where the recipe has none."""
        if self.partner is None:
            raise BitwrightError(f"methods: {method} learns from a float partner; add 'partner:' to the recipe")
        return self.partner


def method_context(
    recipe: Recipe,
    dataset: Dataset,
    model: nn.Module,
    partner: nn.Module | None,
    example: Tensor,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    teacher: nn.Module | None = None,
) -> MethodContext:
    """The context of a run of `recipe`."""
    schedule = recipe.schedule
    steps = schedule.epochs * dataset.steps_per_epoch(schedule.batch_size) // recipe.optimizer.accumulate
    return MethodContext(
        model, partner, loss_fn, dataset, schedule.batch_size, example, steps, schedule.epochs, recipe.seed, teacher
    )


def _kd(options: dict[str, Any], context: MethodContext) -> Method:
    return KD(context.need_partner("kd") if context.teacher is None else context.teacher, **options)


def _relational(options: dict[str, Any], context: MethodContext) -> Method:
    teacher = context.need_partner("relational") if context.teacher is None else context.teacher
    return Relational(context.model, teacher, **options)


def _bwrf(options: dict[str, Any], context: MethodContext) -> Method:
    own = {"seed": context.seed, "loss_fn": context.loss_fn, "total_steps": context.steps}
    return BWRF(context.model, context.need_partner("bwrf"), **{**own, **options})


def _pege(options: dict[str, Any], context: MethodContext) -> Method:
    return PEGECurriculum(context.model, context.steps, **options)


def _adaqat(options: dict[str, Any], context: MethodContext) -> Method:
    return AdaQAT(context.model, context.steps, context.cost_table(), **options)


def _hgq(options: dict[str, Any], context: MethodContext) -> Method:
    return HGQ(context.model, context.steps, context.cost_table(), **options)


def _csq(options: dict[str, Any], context: MethodContext) -> Method:
    return CSQ(context.model, context.steps, context.cost_table(), **options)


def _quantnet(options: dict[str, Any], context: MethodContext) -> Method:
    return QuantNet(context.model, context.steps, **options)


def _channel_bits(options: dict[str, Any], context: MethodContext) -> Method:
    return ChannelBits(context.model, **options)


def _costed(options: dict[str, Any], context: MethodContext) -> tuple[Any, dict[str, Any]]:
    """(the table of costs, with the latencies of the file that the options name, if any; the other options)."""
    latencies = options.get("latencies")
    if not isinstance(latencies, str | None):
        raise BitwrightError(f"methods: latencies={latencies!r} is not accepted; use the path of a table (CSV)")
    return context.cost_table(latencies), {k: v for k, v in options.items() if k != "latencies"}


def _allocation(options: dict[str, Any], context: MethodContext) -> Method:
    costs, rest = _costed(options, context)
    return Allocation(context.model, costs, **rest)


def _cage(options: dict[str, Any], context: MethodContext) -> Method:
    return CAGE(context.model, context.steps, **options)


def _amed(options: dict[str, Any], context: MethodContext) -> Method:
    costs, rest = _costed(options, context)
    return AMED(context.model, context.steps, costs, **{"seed": context.seed, **rest})


def _constrained(options: dict[str, Any], context: MethodContext) -> Method:
    return Constrained(context.model, context.loss_fn, **options)


def _saq(options: dict[str, Any], context: MethodContext) -> Method:
    return SAQ(context.model, **options)


def _gaqat(options: dict[str, Any], context: MethodContext) -> Method:
    return GAQAT(context.model, **options)


def _ewgs(options: dict[str, Any], context: MethodContext) -> Method:
    device = context.example.device

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        return context.dataset.train_batches(epoch=0, seed=context.seed, batch_size=context.batch_size, device=device)

    return EWGSDelta(context.model, context.loss_fn, batches, **{"seed": context.seed, **options})


METHODS: dict[str, Callable[[dict[str, Any], MethodContext], Method]] = {
    "kd": _kd,
    "relational": _relational,
    "bwrf": _bwrf,
    "pege": _pege,
    "adaqat": _adaqat,
    "hgq": _hgq,
    "csq": _csq,
    "quantnet": _quantnet,
    "channel_bits": _channel_bits,
    "allocation": _allocation,
    "ewgs": _ewgs,
    "cage": _cage,
    "amed": _amed,
    "constrained": _constrained,
    "saq": _saq,
    "gaqat": _gaqat,
}


# What each name makes, for the names and types of its options; GIVEN are the parameters that the context fills.
MADE: dict[str, type[Method]] = {
    "kd": KD,
    "relational": Relational,
    "bwrf": BWRF,
    "pege": PEGECurriculum,
    "adaqat": AdaQAT,
    "hgq": HGQ,
    "csq": CSQ,
    "quantnet": QuantNet,
    "channel_bits": ChannelBits,
    "allocation": Allocation,
    "ewgs": EWGSDelta,
    "cage": CAGE,
    "amed": AMED,
    "constrained": Constrained,
    "saq": SAQ,
    "gaqat": GAQAT,
}
# `latencies` of those in COSTED is a file, from which the context makes their costs.
COSTED = ("allocation", "amed")
GIVEN = ("model", "partner", "teacher", "loss_fn", "costs", "total_steps", "batches")


def make_methods(wanted: list[dict[str, dict[str, Any]]], context: MethodContext) -> list[Method]:
    """The methods of a recipe, in its order.

    wanted: [{name: options}, …].

    Raises: BitwrightError for an unknown name, a name given twice, and options that are unknown or of another type.
    """
    made: list[Method] = []
    names = [name for entry in wanted for name in entry]
    for index, entry in enumerate(wanted):
        ((name, options),) = entry.items()
        if name not in METHODS:
            raise BitwrightError(f"methods.{index}: {name!r} is not accepted; {close_matches(name, METHODS)}")
        if name in names[:index]:
            raise BitwrightError(f"methods.{index}: {name!r} is there already; use each method once")
        if name in MADE:
            own = {k: v for k, v in options.items() if not (k == "latencies" and name in COSTED)}
            try:
                check_types(MADE[name], own, GIVEN)
            except BitwrightError as error:
                raise BitwrightError(f"methods.{index}.{name}: {error}") from None
        made.append(METHODS[name](options, context))
    return made
