"""Shared by the tests of the trainer."""

import pytest

import bitwright.deploy


@pytest.fixture
def snapping():
    """For tests in which biases are put on the integer grid at the end of a run."""


@pytest.fixture(autouse=True)
def biases_stay(request, monkeypatch):
    """Without `snapping`, runs in this process skip that step: its capture takes longer than a tiny training."""
    if "snapping" not in request.fixturenames:
        monkeypatch.setattr(bitwright.deploy, "snap_biases", lambda model, example: 0)
