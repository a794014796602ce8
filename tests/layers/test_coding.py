import pytest
import torch

from snlp_zoo.layers import Direct


def test_encode_repeats_without_a_copy():
    z = torch.randn(2, 3, requires_grad=True)
    x = Direct(4).encode(z)
    assert x.shape == (4, 2, 3)
    assert all(torch.equal(step, z) for step in x)
    assert x.untyped_storage().data_ptr() == z.untyped_storage().data_ptr()
    x.sum().backward()
    assert torch.equal(z.grad, torch.full((2, 3), 4.0))


def test_decode_is_the_mean_over_time():
    x = torch.randn(4, 2, 3)
    torch.testing.assert_close(Direct(4).decode(x), x.sum(0) / 4)


@pytest.mark.parametrize("time_steps", [1, 2, 8])
def test_decode_undoes_encode(time_steps):
    z = torch.randn(5)
    assert torch.equal(Direct(time_steps).decode(Direct(time_steps).encode(z)), z)  # powers of two: exact


def test_errors():
    with pytest.raises(ValueError, match="time_steps must be at least 1, got 0"):
        Direct(0)
    with pytest.raises(ValueError, match="expected 4 time steps on axis 0, got 3"):
        Direct(4).decode(torch.zeros(3, 2))
