"""Small networks, data and training runs that the tests of methods share."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from bitwright import QuantizerSpec, Rule, Step, calibrate, prepare
from bitwright.training.models.resnet import CifarResNet

torch.set_num_threads(1)


def float_net(seed: int = 0) -> CifarResNet:
    """A ResNet-8 of width 4 for 8x8 images, with norm statistics that are not the initial ones, in evaluation mode."""
    torch.manual_seed(seed)
    net = CifarResNet(8, 4, width=4)
    for _ in range(3):
        net(torch.randn(16, 3, 8, 8) + 0.3)
    return net.eval()


def data(seed: int = 1, count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """(count, 3, 8, 8) images and labels in 0 ... 3."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.randint(4, (count,), generator=generator)


def quantized(
    net: nn.Module, bits: int = 2, estimator: str = "clipped_ste", grid: str = "lsq", ends: int = 8, **options: object
) -> nn.Module:
    """A prepared and calibrated copy of `net` in training mode; the first and the last layer at `ends` bits."""

    def spec(width: int) -> QuantizerSpec:
        return QuantizerSpec(bits=width, grid=grid, estimator=estimator, estimator_options=dict(options))

    rules = [
        Rule(match=("*",), weight=spec(bits), input=spec(bits)),
        Rule(match=("first", "last"), weight=spec(ends), input=spec(ends)),
    ]
    model = prepare(copy.deepcopy(net).requires_grad_(True), rules)
    calibrate(model, [data(seed=7, count=32)])
    return model.train()


def make_step(model: nn.Module, methods=(), lr: float = 0.05, compiled=None, **options) -> Step:
    """A `Step` with momentum SGD over `model`, compiled with the backend `compiled` if given."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    run = torch.compile(model, backend=compiled) if compiled else model
    return Step(run, F.cross_entropy, optimizer, methods, **options)


def run(step: Step, first: int, last: int) -> None:
    """Train on batches `first` ... `last` - 1 (data and random state belong to the batch's number)."""
    for i in range(first, last):
        torch.manual_seed(100 + i)
        step(*data(seed=i))


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models' states are equal to the last bit."""
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def resumed(fresh: Callable[[], tuple[nn.Module, Step]], stop: int, last: int) -> nn.Module:
    """The model of a run that stopped after `stop` batches and went on to `last` from its saved state."""
    half, step = fresh()
    run(step, 0, stop)
    pending = [p.grad for p in half.parameters()]
    saved = copy.deepcopy((half.state_dict(), step.optimizer.state_dict(), step.state_dict()))
    rest, step = fresh()
    rest.load_state_dict(saved[0])
    step.optimizer.load_state_dict(saved[1])
    step.load_state_dict(saved[2])
    for parameter, gradient in zip(rest.parameters(), pending, strict=True):
        parameter.grad = gradient
    run(step, stop, last)
    return rest
