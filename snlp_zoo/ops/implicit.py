"""Layers that are a fixed point, z* = f(z*), with the gradient of the solution instead of that of the iteration.

By the implicit function theorem dL/dtheta = (df/dtheta)^T lambda with (I - J^T) lambda = dL/dz*, J = df/dz at z*: the
memory is that of one application of f, however many the solver needed.
Source: Bai et al. 2019 (arXiv:1909.01377); for spiking networks Xiao et al. 2021 (arXiv:2109.14247).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.linalg import vector_norm

from snlp_zoo.errors import ConvergenceError
from snlp_zoo.ops.fixed_point import SOLVERS, Solution, Step, reachable


@dataclass
class Adjoint:
    """How the latest backward through a fixed point went; None before it.

    iterations: products with J^T asked for; for a Neumann series its terms.
    residual: of lambda = grad + J^T lambda, as in `Solution`; for a Neumann series the last term's share,
        ||lambda_K - lambda_(K-1)|| / ||lambda_K||.
    """

    iterations: int | None = None
    residual: float | None = None


class FixedPoint(NamedTuple):
    """A solved layer.

    value: f(z*), with the implicit gradient.
    iterations, residual: of z*, as in `Solution`.
    adjoint: the backward's own, filled in when it runs.
    """

    value: Tensor
    iterations: int
    residual: float
    adjoint: Adjoint


class _Implicit(torch.autograd.Function):
    """The identity; its backward replaces the gradient by solve(gradient)."""

    @staticmethod
    def forward(ctx, image, solve):
        ctx.solve = solve
        return image.clone()  # a view could not be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.solve(grad), None


def _neumann(step: Step, grad: Tensor, terms: int) -> Solution:
    """lambda_K = sum of (J^T)^k grad over k < K, by lambda <- grad + J^T lambda."""
    before, value = torch.zeros_like(grad), grad
    for _ in range(terms - 1):
        before, value = value, step(value)
    share = vector_norm(value - before) / vector_norm(value).clamp_min(torch.finfo(grad.dtype).tiny)
    return Solution(value, terms, share.item())


def _require(solution: Solution, bound: float, what: str) -> None:
    if not solution.residual <= bound:  # nan too
        raise ConvergenceError(
            f"{what} ended with residual {solution.residual:.1e} after {solution.iterations} iterations, needed is "
            f"{bound:.1e}; try more iterations (max_iter), weaker feedback weights or a larger tolerance (tol)"
        )


def _check_options(z0: Tensor, solver: str, backward: str | int, name: str) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"{name}: solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if backward != "solve" and (type(backward) is not int or backward < 1):
        raise ValueError(f"{name}: backward must be 'solve' or a positive number of Neumann terms, got {backward!r}")
    if z0.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name}: z0 must be torch.float32 or torch.float64, got {z0.dtype}")


def fixed_point(
    f: Callable[..., Tensor],
    z0: Tensor,
    params: Sequence[Tensor] = (),
    *,
    solver: str = "anderson",
    max_iter: int = 50,
    tol: float = 1e-8,
    backward: str | int = "solve",
    name: str = "fixed_point",
) -> FixedPoint:
    """Solve z = f(z, *params); gradients reach params and all that f closes over, but not z0.

    f is solved for without a graph and then applied once more with one. Where f ignores z, value and gradients are
    those of plain autograd, bit by bit. Checkpoint inside f rather than around this call: around it the gradients are
    right too, but each product with J^T solves anew.

    Args:
        f: (z, *params) -> z, same shape and dtype, the same result for the same z (no fresh dropout mask).
        z0: where to start, any shape, float32 or float64.
        params: further arguments of f.
        solver: a name in `SOLVERS`, for the forward and for the backward solve.
        max_iter: evaluations of f, and again of products with J^T, at most.
        tol: largest residual of both solves, as in `Solution`; below 16 eps of z0's dtype (2e-6 in float32, 4e-15 in
            float64) it counts as 16 eps, which rounding lets them reach.
        backward: "solve" for the exact lambda, or K terms of its Neumann series: the gradient of applying f K times
            from z*, accurate to the K-th power of the contraction factor.
        name: the layer, for error messages.
    Returns:
        FixedPoint. Its value can be differentiated once, not twice; it requires a gradient wherever gradients are on
        and f uses z, so solve frozen layers under torch.no_grad.
    Raises:
        ConvergenceError: residual above tol after max_iter iterations, or not finite; also from the backward. A Neumann
            series must only be finite.
        ValueError: unknown solver or backward, z0 of another dtype, f returns another shape or dtype, max_iter below 1.
    """
    _check_options(z0, solver, backward, name)
    run = partial(SOLVERS[solver], max_iter=max_iter, tol=tol)
    bound, adjoint = reachable(tol, z0.dtype), Adjoint()
    solution = run(lambda z: f(z, *params), z0.detach())
    _require(solution, bound, f"{name}: the forward solve")
    z = solution.value.detach().requires_grad_(torch.is_grad_enabled())
    image = f(z, *params)

    def solve(grad: Tensor) -> Tensor:
        def step(multiplier: Tensor) -> Tensor:
            (product,) = torch.autograd.grad(image, z, multiplier, retain_graph=True, allow_unused=True)
            return grad if product is None else grad + product

        exact = backward == "solve"
        found = run(step, grad) if exact else _neumann(step, grad, int(backward))
        adjoint.iterations, adjoint.residual = found.iterations, found.residual
        _require(found, bound if exact else math.inf, f"{name}: the backward solve")
        return found.value

    value = _Implicit.apply(image, solve) if image.requires_grad else image
    return FixedPoint(value, solution.iterations, solution.residual, adjoint)
