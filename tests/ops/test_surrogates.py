import pytest
import torch

from snlp_zoo.ops.surrogates import SURROGATES, Surrogate, as_surrogate


def test_atan_derivative_values():
    z = torch.tensor([0.0, 0.5, -0.5, 1.0, -1.0], dtype=torch.float64)
    expected = torch.tensor([1.0, 0.288400, 0.288400, 0.0919997, 0.0919997], dtype=torch.float64)
    torch.testing.assert_close(Surrogate("atan", 2.0).derivative(z), expected, rtol=0, atol=5e-7)


@pytest.mark.parametrize(
    ("name", "alpha", "z", "value"),
    [
        ("sigmoid", 4.0, 0.0, 1.0),
        ("triangular", 1.0, 0.25, 0.75),
        ("triangular", 2.0, 0.5, 0.0),
        ("fast_sigmoid", 1.0, 1.0, 0.25),
        ("rect", 2.0, 0.25, 2.0),
        ("rect", 2.0, 0.26, 0.0),
        ("ste", 1.0, 100.0, 1.0),
    ],
)
def test_derivative_values_by_hand(name, alpha, z, value):
    got = Surrogate(name, alpha).derivative(torch.tensor([z, -z], dtype=torch.float64))
    assert got.tolist() == pytest.approx([value, value], abs=1e-12)


@pytest.mark.parametrize("alpha", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("name", ["atan", "sigmoid", "triangular", "rect"])
def test_derivative_integrates_to_the_height_of_the_step(name, alpha):
    z = torch.linspace(-500, 500, 2_000_001, dtype=torch.float64)
    assert torch.trapezoid(Surrogate(name, alpha).derivative(z), z).item() == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("name", SURROGATES)
def test_step_forward_and_derivative_backward(name):
    z = torch.tensor([-1.0, -1e-6, 0.0, 1e-6, 1.0], requires_grad=True)
    surrogate = Surrogate(name)
    spikes = surrogate(z)
    assert spikes.tolist() == [0, 0, 1, 1, 1]  # fires at equality
    (grad,) = torch.autograd.grad(spikes, z, torch.full_like(z, 2.0))
    torch.testing.assert_close(grad, 2 * surrogate.derivative(z.detach()))


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_derivative_keeps_dtype_and_shape(name, dtype):
    z = torch.randn(2, 3).to(dtype)
    derivative = Surrogate(name).derivative(z)
    assert (derivative.dtype, derivative.shape) == (z.dtype, z.shape)
    assert (derivative >= 0).all()


def test_names_objects_and_defaults():
    assert as_surrogate("atan") == Surrogate("atan", 2.0)
    own = Surrogate("sigmoid", 7.0)
    assert as_surrogate(own) is own
    assert Surrogate("sigmoid").alpha == 4.0
    assert hash(Surrogate("rect")) == hash(Surrogate("rect", 1.0))


def test_unknown_name_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown surrogate 'sigmod', known are atan, .*did you mean 'sigmoid'"):
        Surrogate("sigmod")
    with pytest.raises(ValueError, match=r"unknown surrogate 'zzz', known are [^?]*$"):
        Surrogate("zzz")


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_steepness_must_be_positive(alpha):
    with pytest.raises(ValueError, match="alpha must be positive"):
        Surrogate("atan", alpha)
