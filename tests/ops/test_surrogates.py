import math

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


def triangle_integral(u):
    u = u.clamp(-1, 1)
    return u - u * u.abs() / 2


# written out anew from the table in surrogates.py: S with dS/dz the surrogate
PRIMITIVES = {
    "atan": lambda z, a: torch.atan(math.pi / 2 * a * z) / math.pi,
    "sigmoid": lambda z, a: torch.sigmoid(a * z),
    "triangular": lambda z, a: triangle_integral(a * z),
    "fast_sigmoid": lambda z, a: z / (1 + a * z.abs()),
    "rect": lambda z, a: (a * z).clamp(-0.5, 0.5),
    "ste": lambda z, a: a * z,
}
EPS = 1e-6


@pytest.mark.parametrize("alpha", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("name", SURROGATES)
def test_both_derivatives_are_those_of_the_primitive(name, alpha):
    z = torch.linspace(-1.7723, 1.8319, 240, dtype=torch.float64)  # meets no kink, such as 0
    primitive, surrogate = PRIMITIVES[name], Surrogate(name, alpha)
    by_z = (primitive(z + EPS, alpha) - primitive(z - EPS, alpha)) / (2 * EPS)
    by_alpha = (primitive(z, alpha + EPS) - primitive(z, alpha - EPS)) / (2 * EPS)
    slope = surrogate.derivative(z)
    torch.testing.assert_close(slope, by_z, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(surrogate.alpha_derivative(z, slope), by_alpha, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 1)], ids=str)
@pytest.mark.parametrize("name", SURROGATES)
def test_a_learned_alpha_gets_the_gradient_of_the_primitive(name, shape):
    z, weights = torch.randn(2, 2, 3, 5, dtype=torch.float64)
    alpha = (0.5 + torch.rand(shape, dtype=torch.float64)).requires_grad_()
    z.requires_grad_()
    spikes = Surrogate(name, alpha)(z)
    assert torch.equal(spikes, (z >= 0).double())
    got = torch.autograd.grad((spikes * weights).sum(), (z, alpha))
    expected = torch.autograd.grad((PRIMITIVES[name](z, alpha) * weights).sum(), (z, alpha))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert got[1].any()


@pytest.mark.parametrize("name", SURROGATES)
def test_a_tensor_means_the_same_steepness_as_a_number(name):
    z = torch.randn(50, dtype=torch.float64)
    torch.testing.assert_close(
        Surrogate(name, torch.tensor(1.3, dtype=torch.float64)).derivative(z), Surrogate(name, 1.3).derivative(z)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SURROGATES)
def test_a_learned_alpha_keeps_the_dtypes(name, dtype):
    z, alpha = torch.randn(4, 3).to(dtype).requires_grad_(), torch.ones(3, requires_grad=True)
    spikes = Surrogate(name, alpha)(z)
    spikes.sum().backward()
    assert (spikes.dtype, z.grad.dtype, alpha.grad.dtype) == (dtype, dtype, torch.float32)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_steepness_must_be_positive(alpha):
    with pytest.raises(ValueError, match="alpha must be positive"):
        Surrogate("atan", alpha)
