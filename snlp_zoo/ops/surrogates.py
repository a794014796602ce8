"""Surrogate gradients: the spike is a step, its derivative is a smooth stand-in chosen by name.

z is the distance to threshold, h - v_threshold, in the unit of v. The spike fires at equality: s = 1 if z >= 0.
Every backend reads this one table, so a name means the same derivative in Python and in a kernel.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor


def _atan(z: Tensor, alpha: float) -> Tensor:
    # (alpha / 2) / (1 + (pi / 2 alpha z)^2), in two passes
    return torch.addcmul(z.new_full((), 2 / alpha), z, z, value=math.pi**2 * alpha / 2).reciprocal_()


def _sigmoid(z: Tensor, alpha: float) -> Tensor:
    s = torch.sigmoid(alpha * z)
    return alpha * s * (1 - s)


def _triangular(z: Tensor, alpha: float) -> Tensor:
    return (alpha - alpha**2 * z.abs()).clamp_min(0)


def _fast_sigmoid(z: Tensor, alpha: float) -> Tensor:
    return 1 / (1 + alpha * z.abs()) ** 2


def _rect(z: Tensor, alpha: float) -> Tensor:
    return alpha * ((alpha * z).abs() <= 0.5).to(z.dtype)


def _ste(z: Tensor, alpha: float) -> Tensor:
    return torch.full_like(z, alpha)


# name -> (derivative of the spike by z, default steepness)
_TABLE: dict[str, tuple[Callable[[Tensor, float], Tensor], float]] = {
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
    def forward(z, surrogate):
        return (z >= 0).to(z.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, ctx.surrogate = inputs
        ctx.save_for_backward(z)

    @staticmethod
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        return grad * ctx.surrogate.derivative(z), None


@dataclass(frozen=True)
class Surrogate:
    """A step forward, a smooth derivative backward.

    Args:
        name: one of `SURROGATES`.
        alpha: steepness, 1 / unit of v; None takes the name's default.
    Raises:
        ValueError: unknown name, or alpha not positive.
    """

    name: str = "atan"
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.name not in _TABLE:
            nearest = get_close_matches(self.name, SURROGATES, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"unknown surrogate {self.name!r}, known are {', '.join(SURROGATES)}{hint}")
        if self.alpha is None:
            object.__setattr__(self, "alpha", _TABLE[self.name][1])
        elif not self.alpha > 0:
            raise ValueError(f"surrogate {self.name!r}: alpha must be positive, got {self.alpha}")

    def derivative(self, z: Tensor) -> Tensor:
        """ds/dz at z, same shape as z."""
        assert self.alpha is not None  # noqa: S101  (set in __post_init__; tells the type checker)
        return _TABLE[self.name][0](z, self.alpha)

    def __call__(self, z: Tensor) -> Tensor:
        """Spikes {0, 1} of z, differentiable through `derivative`."""
        return _Spike.apply(z, self)


def as_surrogate(surrogate: "str | Surrogate") -> Surrogate:
    """A `Surrogate` from its name, or the object itself."""
    return surrogate if isinstance(surrogate, Surrogate) else Surrogate(surrogate)
