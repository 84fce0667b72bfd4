"""What the backward pass computes again: from what it was, or not at all."""

import pytest
import torch
from test_fused import needs_compiler
from torch import nn

import bitwright as bw
from bitwright.kernels import integer

pytestmark = needs_compiler


@pytest.mark.parametrize("multiplies", ["values", "integers"])
@pytest.mark.parametrize("change", ["image", "scale", "bits"])
def test_a_change_before_the_backward_pass_is_an_error(change, multiplies, monkeypatch):
    monkeypatch.setattr(integer, "SMALLEST", 0 if multiplies == "integers" else 1 << 60)
    monkeypatch.setattr(integer, "FEWEST", 0)
    image = torch.rand(2, 3, 8, 8)
    model = bw.prepare(nn.Sequential(nn.Conv2d(3, 4, 3)), bw.rules("w4a4", ends=None))
    bw.calibrate(model, [image]).train()
    quantizer = model[0].input_quantizer
    quantizer.set_learned(False)  # as an image's: nothing of it has a gradient, so autograd does not watch it
    loss = model(image).square().sum()
    if change == "image":
        image.copy_(torch.rand(2, 3, 8, 8))
    elif change == "scale":
        quantizer.grid.scale.mul_(2)
    else:
        quantizer.set_bits(3)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()
