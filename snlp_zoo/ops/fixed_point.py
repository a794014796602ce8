"""Solvers for z = f(z), without gradients. One signature: (f, z0, *, max_iter, tol) -> Solution."""

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

MEMORY = 5  # earlier steps that Anderson acceleration mixes in

Step = Callable[[Tensor], Tensor]


class Solution(NamedTuple):
    """The best iterate a solver saw.

    value: z, the iterate with the smallest residual.
    iterations: how often f was evaluated.
    residual: ||f(z) - z|| / (||f(z)|| + 1e-4 ||f(z0)||), Euclidean over all elements, 0 / 0 = 0. It does not depend on
        the unit of z; the second term lets iterates that shrink to zero arrive. After a step that is not finite it is
        nan, and value the best iterate before that step.
    """

    value: Tensor
    iterations: int
    residual: float


def reachable(tol: float, dtype: torch.dtype) -> float:
    """The residual at which solvers stop: tol, but no less than rounding allows, 16 eps (2e-6 in float32)."""
    return max(tol, 16 * torch.finfo(dtype).eps)


def _check(z: Tensor, fz: Tensor) -> None:
    if (fz.shape, fz.dtype) != (z.shape, z.dtype):
        raise ValueError(
            f"fixed point: f must return the shape and dtype of z, {tuple(z.shape)} {z.dtype}, "
            f"got {tuple(fz.shape)} {fz.dtype}"
        )


@torch.no_grad()
def _iterate(f: Step, z0: Tensor, following: Callable[[Tensor, Tensor], Tensor], max_iter: int, tol: float) -> Solution:
    """Evaluate f at z0, then at following(z, f(z)) again and again, until the residual is small enough."""
    if max_iter < 1:
        raise ValueError(f"fixed point: max_iter must be at least 1, got {max_iter}")
    z, best, scale, limits = z0, Solution(z0, 0, math.inf), None, torch.finfo(z0.dtype)
    for iteration in range(1, max_iter + 1):
        fz = f(z)
        _check(z, fz)
        size = vector_norm(fz)
        scale = 1e-4 * size + limits.tiny if scale is None else scale  # tiny: 0 / 0 = 0
        # a finite step to f(z) = 0 may overflow here, one that is not finite gives nan
        residual = (vector_norm(fz - z) / (size + scale)).clamp_max(limits.max).item()
        if math.isnan(residual):
            return Solution(best.value, iteration, residual)
        best = Solution(z, iteration, residual) if residual < best.residual else best
        if residual <= reachable(tol, z.dtype):
            break
        z = following(z, fz)
    return best._replace(iterations=iteration)


def picard(f: Step, z0: Tensor, *, max_iter: int, tol: float) -> Solution:
    """Plain iteration, z <- f(z): the residual falls by the contraction factor of f in each step.

    Args:
        f: z -> z, same shape and dtype.
        z0: where to start, any shape, float32 or float64.
        max_iter: evaluations of f at most.
        tol: residual to stop at, as in `Solution`, but no less than `reachable`.
    Returns:
        Solution; whether its residual is small enough is for the caller to check.
    Raises:
        ValueError: f returns another shape or dtype; max_iter below 1.
    """
    return _iterate(f, z0, lambda z, fz: fz, max_iter, tol)


def anderson(f: Step, z0: Tensor, *, max_iter: int, tol: float) -> Solution:
    """Anderson acceleration: `picard` with the last steps mixed so that their linear model has the least residual.

    z is one flat vector with one mixture, whatever its shape: no axis needs to be the batch. Arguments, result and
    errors are those of `picard`.
    Source: Walker & Ni 2011, "Anderson acceleration for fixed-point iterations", the unconstrained form.
    """
    history: deque[tuple[Tensor, Tensor]] = deque(maxlen=MEMORY + 1)

    def following(z: Tensor, fz: Tensor) -> Tensor:
        history.append((fz.flatten(), (fz - z).flatten()))
        return fz if len(history) == 1 else _mix(history).view(fz.shape)

    return _iterate(f, z0, following, max_iter, tol)


def _mix(history: deque[tuple[Tensor, Tensor]]) -> Tensor:
    """The next iterate [n] from pairs of f(z) and f(z) - z, [n] each, the latest last."""
    images, residuals = (torch.stack(vectors) for vectors in zip(*history, strict=True))
    steps = residuals.diff(dim=0)
    limits = torch.finfo(steps.dtype)
    # Unit steps make the ridge relative; a repeated iterate leaves a zero step, which the ridge gives no weight.
    length = vector_norm(steps, dim=1, keepdim=True).clamp_min(limits.tiny)
    unit = steps / length
    with torch.autocast(unit.device.type, enabled=False):  # it would take these products in half precision
        ridge = 16 * limits.eps * torch.eye(len(unit), dtype=unit.dtype, device=unit.device)
        weights = torch.linalg.solve(unit @ unit.T + ridge, unit @ residuals[-1])
        return images[-1] - (weights / length[:, 0]) @ images.diff(dim=0)


SOLVERS: dict[str, Callable[..., Solution]] = {"anderson": anderson, "picard": picard}
