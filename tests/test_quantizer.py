"""`Quantizer`: what is saved and restored, what changes with the bits, what is refused."""

import copy
import io
import pickle

import pytest
import torch

from bitwright.errors import BitwrightError
from bitwright.grids import Shape
from bitwright.quantizer import Quantizer
from bitwright.spec import QuantizerSpec
from making import make_quantizer

GRIDS = ["lsq", "lsq+", "pact", "dorefa", "sat", "minmax", "tqt", "seq"]


def fresh(grid="lsq", bits=8, role="input", **more):
    return Quantizer(QuantizerSpec(bits=bits, grid=grid, **more), Shape(role))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_a_state_dict_restores_bits_sign_calibration_and_values(grid, bits):
    x = torch.randn(2, 3, 20)
    q = make_quantizer(grid, 8, x, role="input")
    q.set_bits(bits)
    file = io.BytesIO()
    torch.save(q.state_dict(), file)
    file.seek(0)
    other = fresh(grid, bits=5)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.bits.item() == bits
    assert other.signed.item()
    assert other.calibrated.item()
    assert torch.equal(other.eval()(x), q.eval()(x))
    assert other.codes[2:] == q.codes[2:]


def test_a_model_without_memory_takes_over_a_state():
    """`assign=True` brings saved tensors, and what is derived from them must live where they do."""
    x = torch.randn(2, 3, 20)
    q = make_quantizer("lsq", 3, x, role="input").eval()
    other = fresh(bits=5).to("meta")
    other.load_state_dict(q.state_dict(), assign=True)
    assert torch.equal(other.eval()(x), q(x))


@pytest.mark.parametrize("grid", GRIDS)
def test_one_made_without_memory_takes_over_a_state(grid):
    """As under `with torch.device("meta")`: bits, signedness and bounds have no values until a state is loaded."""
    x = torch.randn(2, 3, 20)
    q = make_quantizer(grid, 3, x, role="input").eval()
    with torch.device("meta"):
        assigned, emptied = fresh(grid, bits=5).eval(), fresh(grid, bits=5).eval()
    with pytest.raises(BitwrightError, match="is not calibrated"):
        assigned(x)
    assigned.load_state_dict(q.state_dict(), assign=True)
    emptied.to_empty(device="cpu").load_state_dict(q.state_dict())
    assert torch.equal(assigned(x), q(x))
    assert torch.equal(emptied(x), q(x))


def averaged(average, ours, decay):
    """Three updates of a moving average of every buffer, by the formula of torchvision's and timm's training code."""
    for _ in range(3):
        for a, b in zip(average.buffers(), ours.buffers(), strict=True):
            a.copy_(decay * a + (1 - decay) * b)


@pytest.mark.parametrize("decay", [0.9, 0.9995, 0.9998])
@pytest.mark.parametrize("bits", range(1, 9))
def test_an_average_of_buffers_keeps_the_bits(bits, decay):
    x = torch.randn(2, 3, 20)
    q = make_quantizer("lsq", bits, x, role="input")
    average = copy.deepcopy(q)
    averaged(average, q, decay)
    average.eval()
    assert {k: v.item() for k, v in average.state_dict().items()} == {k: v.item() for k, v in q.state_dict().items()}
    assert (average.affine().lo, average.affine().hi) == (q.affine().lo, q.affine().hi)


@pytest.mark.parametrize("grid", ["lsq", "seq", "dorefa"])
@pytest.mark.parametrize("bits", [1, 2])
def test_a_copy_of_the_buffers_takes_over_the_bits(grid, bits):
    """The code of the value 0 differs at 1 bit, and at 2 bits in `seq`; averages copy buffers, and no more."""
    w = torch.randn(4, 3)
    q = make_quantizer(grid, 4, w)
    average = copy.deepcopy(q)
    q.set_bits(bits)
    for a, b in zip([*average.parameters(), *average.buffers()], [*q.parameters(), *q.buffers()], strict=True):
        a.data.copy_(b)
    assert torch.equal(average.eval()(w), q(w))
    assert average.codes[2:] == q.codes[2:]


@pytest.mark.parametrize("grid", GRIDS)
def test_copies_pickles_and_casts_keep_the_function(grid):
    x = torch.randn(2, 3, 20)
    q = make_quantizer(grid, 3, x, role="input").eval()
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert torch.equal(other(x), q(x))
        other.set_bits(2)
        assert q.bits.item() == 3, "a copy shares nothing"
    double = copy.deepcopy(q).double()
    torch.testing.assert_close(double(x.double()).float(), q(x), rtol=1e-5, atol=1e-6)
    assert double(x.double()).dtype == torch.float64
    assert double.bits.item() == 3
    half = copy.deepcopy(q).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert half(x.bfloat16()).unique().numel() <= 8
    assert (half.code_lo.item(), half.code_hi.item()) == (q.code_lo.item(), q.code_hi.item())


def test_loading_an_uncalibrated_state_asks_for_calibration_again():
    q = make_quantizer("lsq", 4, torch.rand(1, 2, 9), role="input")
    q.load_state_dict(fresh("lsq", 4).state_dict())
    with pytest.raises(BitwrightError, match="not calibrated"):
        q(torch.rand(3))


def test_without_calibration_the_message_names_the_quantizer():
    q = fresh()
    q.name = "layer1.conv.input_quantizer"
    with pytest.raises(BitwrightError, match=r"layer1\.conv\.input_quantizer is not calibrated; call bitwright\.calib"):
        q(torch.rand(3))
    q.bypass = True
    x = torch.rand(3)
    assert q(x) is x


@pytest.mark.parametrize("bits", [0, 9, -1, 4.5, True, "4"])
def test_bits_outside_one_to_eight_are_refused_and_change_nothing(bits):
    q = make_quantizer("lsq", 4, torch.rand(1, 2, 9), role="input")
    before = {k: v.clone() for k, v in q.state_dict().items()}
    with pytest.raises(BitwrightError, match=r"bits=.* is not accepted; use 1 to 8"):
        q.set_bits(bits)
    assert all(torch.equal(before[k], v) for k, v in q.state_dict().items())


def test_a_state_with_impossible_bits_is_refused():
    state = fresh().state_dict()
    state["bits"] = torch.tensor([12])
    with pytest.raises(BitwrightError, match="bits=12"):
        fresh().load_state_dict(state)


def test_signedness_comes_from_data_unless_the_spec_fixes_it():
    positive, mixed = torch.rand(1, 2, 9), torch.randn(1, 2, 9)
    assert not make_quantizer("lsq", 4, positive, role="input").signed.item()
    assert make_quantizer("lsq", 4, mixed, role="input").signed.item()
    assert make_quantizer("lsq", 4, positive, role="input", signed=True).signed.item()
    assert not make_quantizer("lsq", 4, mixed, role="input", signed=False).signed.item()
    assert make_quantizer("lsq", 4, positive).signed.item(), "weights are signed"


def test_learn_false_freezes_the_grid():
    q = fresh(learn=False)
    assert not any(p.requires_grad for p in q.parameters())
    assert all(p.requires_grad for p in fresh().parameters())


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_a_bit_width(bits):
    unsigned = make_quantizer("lsq", bits, torch.rand(1, 2, 9), role="input").codes
    assert (unsigned.lo.item(), unsigned.hi.item(), unsigned.zero) == (0, 2**bits - 1, 0.0)
    signed = make_quantizer("lsq", bits, torch.randn(1, 2, 9), role="input").codes
    if bits == 1:
        assert (signed.lo.item(), signed.hi.item(), signed.zero) == (0, 1, 0.5)
    else:
        assert (signed.lo.item(), signed.hi.item(), signed.zero) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 0.0)
    assert signed.lo.shape == signed.hi.shape == (1,)


@pytest.mark.parametrize("grid", GRIDS)
def test_every_parameter_and_buffer_has_an_axis(grid):
    for role in ("weight", "input"):
        q = fresh(grid, role=role)
        assert all(t.ndim >= 1 for t in (*q.parameters(), *q.buffers()))
