"""`make_reproducible`: what it covers, and that it says what it does not."""

import pytest
from torch import nn

import bitwright as bw


class RootMeanSquareNorm(nn.Module):
    """A norm of the user's."""


def test_norms_and_activations_that_stay_float_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    def covered() -> list[nn.Module]:
        return [nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU(), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 4)]

    bw.make_reproducible(bw.prepare(nn.Sequential(*covered()), bw.rules("w4a4")))
    assert not caplog.records
    others = [RootMeanSquareNorm(), nn.SiLU(), nn.GroupNorm(2, 4), nn.SiLU(), nn.GELU(approximate="tanh")]
    bw.make_reproducible(bw.prepare(nn.Sequential(*covered(), *others), bw.rules("w4a4")))
    assert [r.message for r in caplog.records] == [
        "bitwright: make_reproducible does not cover 1 RootMeanSquareNorm, 2 SiLU, 1 GroupNorm, 1 GELU: "
        "a file may differ from the evaluation there"
    ]
