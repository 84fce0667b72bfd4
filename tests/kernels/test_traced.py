"""What compilers read of fake quantization, beside its values and gradients, which `test_fused.py` compares."""

from pathlib import Path

import pytest
import torch

from bitwright.kernels import reference, traced


def test_the_operator_is_named_after_its_sources() -> None:
    """torch keeps compiled gradients on disk by the operator's name: an upgrade must not meet those of before."""
    assert traced.operator_name(b"a") == traced.operator_name(b"a") != traced.operator_name(b"b")
    assert traced.traced_fake_quantize.name() == f"bitwright::{traced.NAME}"
    assert (
        traced.operator_name(Path(traced.__file__).read_bytes(), Path(reference.__file__).read_bytes()) == traced.NAME
    )


@pytest.mark.parametrize(
    ("shape", "axis", "scales"),
    [((6,), 0, 6), ((6,), 0, 1), ((4, 5), 0, 4), ((2, 3, 4, 5), 1, 1), ((2, 3, 4, 5), -3, 3), ((2, 3, 4), -1, 1)],
)
def test_sums_by_scale(shape: tuple[int, ...], axis: int, scales: int) -> None:
    t = torch.randn(shape, dtype=torch.float64)
    got = traced.per_scale(t, torch.empty(scales), axis)
    expected = t.movedim(axis, 0).reshape(scales, -1).sum(1) if scales > 1 else t.sum().reshape(1)
    assert got.shape == (scales,)
    torch.testing.assert_close(got, expected)
