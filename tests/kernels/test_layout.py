"""Images turned round: torch's own copies."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fused import needs_compiler

from bitwright.kernels import layout

pytestmark = needs_compiler


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    threads=st.integers(1, 2),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_there_and_back(dtype, shape, threads):
    torch.set_num_threads(threads)
    x = torch.randint(0, 255, shape).to(dtype)
    last = layout.channels_last(x)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, x)
    first = layout.channels_first(last)
    assert first.is_contiguous()
    assert torch.equal(first, x)
