"""Optimizers over a prepared model, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from bitwright.prepare import split_parameters
from bitwright.training.recipe import OptimizerSection


def parameter_groups(model: nn.Module, options: OptimizerSection) -> list[dict]:
    """Weights, then (with `decay_norms: false`) biases and norms, then grid parameters; empty groups are left out.

    `initial_lr` in each group is the rate at the top of the schedule.
    """
    weights, grid = split_parameters(model)
    spared = [] if options.decay_norms else [p for p in weights if p.ndim < 2]
    spared_ids = {id(p) for p in spared}
    decayed = [p for p in weights if id(p) not in spared_ids]
    grid_lr = options.lr if options.quantizer_lr is None else options.quantizer_lr
    groups = [
        {"params": decayed, "lr": options.lr, "weight_decay": options.weight_decay},
        {"params": spared, "lr": options.lr, "weight_decay": 0.0},
        {"params": grid, "lr": grid_lr, "weight_decay": options.quantizer_weight_decay},
    ]
    return [{**group, "initial_lr": group["lr"]} for group in groups if group["params"]]


def make_optimizer(model: nn.Module, options: OptimizerSection) -> torch.optim.Optimizer:
    """SGD or AdamW over `parameter_groups`."""
    groups = parameter_groups(model, options)
    if options.name == "adamw":
        return torch.optim.AdamW(groups, lr=options.lr)
    nesterov = options.nesterov and options.momentum > 0
    return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=nesterov)


def lr_factor(step: int, *, total: int, warmup: int, kind: str) -> float:
    """The learning rate of optimizer step `step` (0 … total - 1) as a fraction of the rate at the top.

    Linear from 1/warmup to 1 in the first `warmup` steps; then `cosine` and `linear` fall from 1 towards 0, which
    they would reach at step `total`; `constant` stays.
    """
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return 0.5 * (1 + math.cos(math.pi * progress)) if kind == "cosine" else 1 - progress


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Put every group's rate at `factor` times its `initial_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
