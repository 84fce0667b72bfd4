"""What methods compare over classes is, for a map, what it is for its pixels one by one."""

import pytest
import torch

from bitwright.methods.allocation.sensitivity import divergence
from bitwright.methods.constrained.constrained import soft_cross_entropy
from bitwright.methods.kd import kd_loss


@pytest.mark.parametrize("compare", [lambda a, b: kd_loss(a, b, 3.0), divergence, soft_cross_entropy])
@pytest.mark.parametrize(("shape", "axis"), [((2, 5, 4, 3), 1), ((2, 5, 2, 4, 3), 1), ((2, 7, 5), 2), ((6, 5), 1)])
def test_classes_of_a_map_lie_along_axis_1(compare, shape, axis):
    torch.manual_seed(0)
    one, other = torch.randn(2, *shape).double().unbind()
    rows = [t.movedim(axis, -1).reshape(-1, 5) for t in (one, other)]
    torch.testing.assert_close(compare(one, other), compare(*rows))
