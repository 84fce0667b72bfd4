"""The pool gives memory again only when nobody holds it in any way."""

import pytest
import torch

from bitwright.kernels.pool import SMALLEST, Pool, empty_like


def make(pool, size=SMALLEST):
    return torch.empty(0).set_(pool.take(size).storage, 0, (size // 4,), (1,))


def test_a_tensor_that_is_gone_gives_its_memory_to_the_next_of_the_same_size():
    pool = Pool()
    first = make(pool)
    at = first.data_ptr()
    assert make(pool).data_ptr() != at
    del first
    assert {make(pool).data_ptr() for _ in range(4)} >= {at}
    assert make(pool, 2 * SMALLEST).untyped_storage().nbytes() == 2 * SMALLEST


@pytest.mark.parametrize(
    "hold",
    [
        lambda t: t.view(2, -1)[1],
        lambda t: t.detach(),
        lambda t: t.numpy(),
        lambda t: t.untyped_storage(),
        lambda t: torch.from_dlpack(t),
        lambda t: torch.ones_like(t, requires_grad=True) * t,
    ],
)
def test_memory_that_is_held_is_not_given_again(hold):
    pool = Pool()
    tensor = make(pool)
    at = tensor.data_ptr()
    held = hold(tensor)
    del tensor
    given = [make(pool) for _ in range(4)]
    assert at not in [t.data_ptr() for t in given]
    del held


def test_shared_memory_is_not_given_again():
    pool = Pool()
    tensor = make(pool)
    tensor.share_memory_()
    at = tensor.data_ptr()
    del tensor
    assert at not in [make(pool).data_ptr() for _ in range(4)]


def test_layout_and_type_are_kept():
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(4, 8, 96, 96, dtype=dtype).contiguous(memory_format=torch.channels_last)
        y = empty_like(x)
        assert (y.shape, y.stride(), y.dtype) == (x.shape, x.stride(), dtype)
