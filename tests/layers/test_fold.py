"""Numbers of a deployed layer: the same values in finer numbers, and biases on the finer grid."""

import pytest
import torch

from bitwright.deploy.integer import InputCodes, IntLinear
from bitwright.grids import Affine
from bitwright.layers.fold import FINE, Weight, finer, magnitudes, on_bias_grid


def signed_weight(bits: int, step: int, seed: int = 0) -> Weight:
    """All codes of a signed grid occur; step 2: a grid without 0 (-3, -1, 1, 3 at 2 bits)."""
    offset = -(2 ** (bits - 1)) if step == 1 else 1 - 2**bits
    codes = torch.randint(0, 2**bits, (4, 3, 5, 5), generator=torch.Generator().manual_seed(seed))
    codes.view(-1)[: 2**bits] = torch.arange(2**bits)
    numbers = (step * codes + offset).to(torch.int8)
    return Weight(numbers, torch.tensor([0.3, -0.07, 1.1e-3, 5.0]), bits, step, offset)


@pytest.mark.parametrize(
    ("bits", "step", "multiple"),
    [(1, 1, 8), (1, 2, 8), (2, 1, 4), (2, 2, 2), (3, 1, 2), (3, 2, 1), (4, 1, 1), (5, 1, 1), (8, 1, 1)],
)
def test_finer_numbers_are_the_same_weight(bits, step, multiple):
    weight = signed_weight(bits, step)
    fine = finer(weight)
    assert fine.multiple == multiple
    assert torch.equal(fine.values(), weight.values())
    assert torch.equal(fine.stored, weight.stored)
    assert torch.equal(fine.numbers, weight.numbers * multiple)
    assert multiple == 1 or int(fine.numbers.abs().max()) <= FINE


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_biases_of_few_bits_are_rounded_no_coarser_than_at_four(bits):
    weight = signed_weight(bits, 1)
    bias = torch.linspace(-3, 3, 4, dtype=torch.float64) + 0.01234
    scale = torch.tensor([0.25])
    fine, codes = on_bias_grid(weight, bias, scale, reach=2**bits - 1)
    assert codes is not None
    step = 0.25 * weight.scale.double().abs() / {1: 8, 2: 4, 3: 2, 4: 1}[bits]
    assert torch.equal(fine.scale.double().abs() * 0.25, step)
    error = (codes * scale.double() * fine.scale.double() - bias).abs()
    assert bool((error <= step / 2 + 1e-12).all())
    assert float(error.max()) > 0  # the grid is really met, not the bias itself


def test_weights_at_the_lowest_code_of_a_byte_count_in_full():
    """-128 has no absolute value in int8: such a channel once seemed to vanish beside its bias."""
    numbers = torch.full((2, 600), -128, dtype=torch.int8)
    assert magnitudes(numbers).tolist() == [600 * 128] * 2
    weight = Weight(numbers, torch.tensor([1e-4, 2e-4]), 8, 1, -128)
    kept, codes = on_bias_grid(weight, torch.tensor([0.1, -0.2], dtype=torch.float64), torch.tensor([0.1]), reach=255)
    assert codes is not None
    assert torch.equal(kept.numbers, numbers)
    layer = IntLinear("n", weight, None, input_quantizer=InputCodes("i", affine_of_a_byte(), -1, 8))
    assert not layer.short_sums  # 600 * 128 * 255 is beyond 2^24
    x = torch.full((1, 600), 255 * 0.1)
    expected = -600 * 128 * 255 * torch.tensor([0.1], dtype=torch.float32).double() * weight.scale.double()
    assert layer(x).double().flatten().tolist() == pytest.approx(expected.tolist(), rel=1e-7)


def affine_of_a_byte() -> Affine:
    return Affine(torch.tensor([0.1]), torch.zeros(1), 0, 255)
