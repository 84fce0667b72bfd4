"""Min-max ranges: present extremes, running and batch statistics, the affine form with an offset."""

import pytest
import torch

from bitwright.errors import BitwrightError


def symmetric(x, reach, n):
    return (x / (reach / n)).round().clamp(-n, n) * (reach / n)


def test_weights_use_their_present_extremes_per_channel(make):
    w = torch.randn(3, 8, dtype=torch.float64)
    q = make("minmax", 4, w, channels=3)
    with torch.no_grad():
        w *= torch.tensor([[1.0], [5.0], [0.1]])
    torch.testing.assert_close(q(w), symmetric(w, w.abs().amax(1, keepdim=True), 7))


def test_running_statistics_move_in_training_only(make):
    x = torch.rand(4, 3, 8, dtype=torch.float64) - 0.4
    q = make("minmax", 4, x, role="input", momentum=0.25)
    low, high = x.min(), x.max()
    q.eval()
    q(x * 9)
    assert q.grid.high.item() == pytest.approx(high.item())
    q.train()
    y = q(x * 9)
    high, low = 0.75 * high + 0.25 * 9 * high, 0.75 * low + 0.25 * 9 * low
    torch.testing.assert_close(q.grid.high, high.reshape(1))
    torch.testing.assert_close(y, symmetric(x * 9, torch.maximum(high, -low), 7))


def test_batch_statistics_in_training_running_ones_in_evaluation(make):
    x = torch.rand(4, 3, 8, dtype=torch.float64) - 0.5
    q = make("minmax", 4, x, role="input", statistic="batch").train()
    batch = x * 3
    torch.testing.assert_close(q(batch), symmetric(batch, batch.abs().max(), 7))
    q.eval()
    reach = torch.maximum(-q.grid.low, q.grid.high)
    assert reach < batch.abs().max()
    torch.testing.assert_close(q(batch), symmetric(batch, reach, 7))


@pytest.mark.parametrize("bits", range(1, 9))
def test_offset_form_represents_zero_exactly(make, bits):
    x = torch.rand(4, 3, 40, dtype=torch.float64) * 3 - 1
    q = make("minmax", bits, x, role="input", offset=True).eval()
    n = 2**bits - 1
    scale = (x.max() - x.min()) / n
    zero = (-x.min() / scale).round()  # in codes counted from 0
    expected = ((x / scale + zero).round().clamp(0, n) - zero) * scale
    torch.testing.assert_close(q(x), expected, rtol=1e-9, atol=1e-9)
    assert q(torch.zeros(1, 3, 1, dtype=torch.float64)).abs().max() == 0
    affine = q.affine()
    assert affine.hi - affine.lo == n
    assert affine.zero.item() == affine.zero.round().item()


def test_unsigned_inputs_do_not_widen_for_negative_values(make):
    x = torch.tensor([[[-10.0, 0.5, 1.0]]])
    q = make("minmax", 4, x, role="input", signed=False).eval()
    assert q.affine().scale.item() == pytest.approx(1 / 15)


def test_an_empty_batch_leaves_the_statistics_alone(make):
    q = make("minmax", 4, torch.rand(2, 3, 4), role="input").train()
    before = q.grid.high.clone()
    assert q(torch.empty(0, 3, 4)).shape == (0, 3, 4)
    assert torch.equal(q.grid.high, before)


@pytest.mark.parametrize("options", [{"momentum": 0.0}, {"momentum": 1.5}, {"statistic": "median"}])
def test_options_are_checked(make, options):
    with pytest.raises(BitwrightError, match="is not accepted"):
        make("minmax", 4, torch.rand(3), **options)
