"""Surrogate gradients: the spike is a step, its derivative is a smooth stand-in chosen by name.

z is the distance to threshold, h - v_threshold, in the unit of v. The spike fires at equality: s = 1 if z >= 0.
Every backend reads this one table, so a name means the same derivative in Python and in a kernel.

The derivative g(z) is that of a smooth primitive S(z), which also says how a learned steepness alpha is differentiated:

    name            g = dS/dz                                S up to a constant        dS/dalpha
    atan            (alpha / 2) / (1 + (pi alpha z / 2)^2)   atan(pi alpha z / 2) / pi     z g / alpha
    sigmoid         alpha s (1 - s)                          s = sigmoid(alpha z)          z g / alpha
    triangular      max(0, alpha - alpha^2 |z|)              its integral                  z g / alpha
    rect            alpha where |alpha z| <= 1/2, else 0     clip(alpha z, -1/2, 1/2)      z g / alpha
    ste             alpha                                    alpha z                       z g / alpha
    fast_sigmoid    1 / (1 + alpha |z|)^2                    z / (1 + alpha |z|)           -z |z| g

At 0, where every g is highest, fast_sigmoid is 1 whatever alpha is; the others grow with alpha. ste has no width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from snlp_zoo.errors import lookup


def _atan(z: Tensor, alpha: float | Tensor) -> Tensor:
    # divided by alpha / 2: two passes where alpha is a number
    if isinstance(alpha, Tensor):
        return (2 / alpha + z * z * (math.pi**2 / 2 * alpha)).reciprocal_()
    return torch.addcmul(z.new_full((), 2 / alpha), z, z, value=math.pi**2 * alpha / 2).reciprocal_()


def _sigmoid(z: Tensor, alpha: float | Tensor) -> Tensor:
    s = torch.sigmoid(alpha * z)
    return alpha * s * (1 - s)


def _triangular(z: Tensor, alpha: float | Tensor) -> Tensor:
    return (alpha - alpha**2 * z.abs()).clamp_min(0)


def _fast_sigmoid(z: Tensor, alpha: float | Tensor) -> Tensor:
    return 1 / (1 + alpha * z.abs()) ** 2


def _rect(z: Tensor, alpha: float | Tensor) -> Tensor:
    return alpha * ((alpha * z).abs() <= 0.5).to(z.dtype)


def _ste(z: Tensor, alpha: float | Tensor) -> Tensor:
    return torch.zeros_like(z) + alpha


# name -> (derivative of the spike by z, default steepness)
_TABLE: dict[str, tuple[Callable[[Tensor, float | Tensor], Tensor], float]] = {
    "atan": (_atan, 2.0),  # Fang et al. 2021 (arXiv:2007.05785)
    "sigmoid": (_sigmoid, 4.0),
    "triangular": (_triangular, 1.0),
    "fast_sigmoid": (_fast_sigmoid, 1.0),  # SuperSpike, Zenke & Ganguli 2018 (arXiv:1705.11146)
    "rect": (_rect, 1.0),
    "ste": (_ste, 1.0),  # straight-through: the gradient passes everywhere
}
SURROGATES = tuple(_TABLE)


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(z, alpha, surrogate):
        return (z >= 0).to(z.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, alpha, ctx.surrogate = inputs
        ctx.save_for_backward(z, alpha)

    @staticmethod
    def backward(ctx, grad):
        z, alpha = ctx.saved_tensors
        surrogate = ctx.surrogate if alpha is None else replace(ctx.surrogate, alpha=alpha)
        slope = surrogate.derivative(z)
        grad_alpha = None
        if ctx.needs_input_grad[1]:
            grad_alpha = (grad * surrogate.alpha_derivative(z, slope)).sum_to_size(alpha.shape)
        return grad * slope, grad_alpha, None


@dataclass(frozen=True)
class Surrogate:
    """A step forward, a smooth derivative backward.

    Args:
        name: one of `SURROGATES`.
        alpha: steepness, 1 / unit of v; None takes the name's default. A tensor is learned: without axes, or such that
            it broadcasts to z (for `lif`, to the current without T). It must be positive, which nothing checks: that
            would wait for the device.
    Raises:
        ValueError: unknown name, or a number that is not positive.
    """

    name: str = "atan"
    alpha: float | Tensor | None = None

    def __post_init__(self) -> None:
        _, default = lookup("surrogate", self.name, _TABLE)
        if self.alpha is None:
            object.__setattr__(self, "alpha", default)
        elif not isinstance(self.alpha, Tensor) and not self.alpha > 0:
            raise ValueError(f"surrogate {self.name!r}: alpha must be positive, got {self.alpha}")

    def _alpha(self, z: Tensor) -> float | Tensor:
        assert self.alpha is not None  # noqa: S101  (set in __post_init__; tells the type checker)
        return self.alpha.to(z.dtype) if isinstance(self.alpha, Tensor) else self.alpha

    def derivative(self, z: Tensor) -> Tensor:
        """ds/dz at z, same shape as z."""
        return _TABLE[self.name][0](z, self._alpha(z))

    def alpha_derivative(self, z: Tensor, slope: Tensor) -> Tensor:
        """dS/dalpha at z, same shape as z, where slope is `derivative` of the same z."""
        return z * slope * (-z.abs() if self.name == "fast_sigmoid" else 1 / self._alpha(z))

    def split(self) -> "tuple[Surrogate, Tensor | None]":
        """The surrogate without a learned alpha, and that alpha: autograd functions take it as an input of its own."""
        learned = self.alpha if isinstance(self.alpha, Tensor) else None
        return (self, None) if learned is None else (Surrogate(self.name), learned)

    def __call__(self, z: Tensor) -> Tensor:
        """Spikes {0, 1} of z, differentiable through `derivative` and, by a learned alpha, `alpha_derivative`."""
        fixed, learned = self.split()
        return _Spike.apply(z, learned, fixed)


def as_surrogate(surrogate: "str | Surrogate") -> Surrogate:
    """A `Surrogate` from its name, or the object itself."""
    return surrogate if isinstance(surrogate, Surrogate) else Surrogate(surrogate)
