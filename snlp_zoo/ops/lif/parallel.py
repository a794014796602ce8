"""LIF over many steps, in few: groups of steps run side by side, again and again, until all of them fit.

Each group starts from a guess of its membrane. A sweep runs all groups, then each takes over the membrane with which
the one before it ended. The first group is right after one sweep, the second after two at the latest; but membranes
forget where they started, by leaking and at every hard reset, so a few sweeps serve any number of groups. What a
constant input keeps out of phase for longer is mended group by group. Where every group fits, the result is the loop's
to the last bit: each step computes what the loop computes. The backward does the same, from the last group on.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from snlp_zoo.ops.chunks import by_chunks
from snlp_zoo.ops.lif.analytic import _backward, _forward, lif_analytic
from snlp_zoo.ops.surrogates import Surrogate

GROUP = 32  # steps
SWEEPS = 4  # of all groups; what does not fit then is mended one after the other


def _fold(x: Tensor) -> Tensor:
    """x [groups * GROUP, M] as [GROUP, groups, M]."""
    return x.unflatten(0, (-1, GROUP)).transpose(0, 1)


def settle(
    function: Callable[..., None], dtype: torch.dtype, inputs: Sequence[Any], outputs: Sequence[Any], options: tuple,
    given: Tensor, left: Tensor, side: int,
) -> int:  # fmt: skip
    """Call function on groups until each is `given` [groups, M] what its neighbour has `left`; returns the sweeps.

    side: -1 where the neighbour is the group before, 1 where it is the one after.
    """

    def run(groups: slice) -> None:
        parts = ([x[..., groups, :] if x is not None and x.ndim else x for x in xs] for xs in (inputs, outputs))
        by_chunks(function, dtype, *parts, *options)

    order = range(1, len(given)) if side < 0 else range(len(given) - 2, -1, -1)
    taken, offered = (given[1:], left[:-1]) if side < 0 else (given[:-1], left[1:])
    for sweep in range(1, SWEEPS + 1):
        run(slice(None))
        if torch.equal(taken, offered):
            return sweep
        if sweep < SWEEPS:
            taken.copy_(offered)
    for group in order:
        if not torch.equal(given[group], left[group + side]):
            given[group] = left[group + side]
            run(slice(group, group + 1))
    return SWEEPS + 1


class _Groups(torch.autograd.Function):
    """Inputs current [groups * GROUP, M], v_init [M] or None at rest, leak = 1 / tau, a scalar."""

    @staticmethod
    def forward(current, v_init, leak, v_threshold, v_reset, decay_input, detach_reset, surrogate):
        spikes = torch.empty(current.shape, dtype=current.dtype, device=current.device)
        starts = leak.new_full((len(current) // GROUP, current.shape[1]), v_reset or 0.0)
        if v_init is not None:
            starts[0] = v_init
        ends = torch.empty_like(starts)
        inputs, outputs = (_fold(current), starts, leak), (_fold(spikes), ends)
        settle(_forward, leak.dtype, inputs, outputs, (v_threshold, v_reset, decay_input), starts, ends, -1)
        return spikes, ends[-1].clone(), starts

    @staticmethod
    def setup_context(ctx, inputs, output):
        current, v_init, leak, *ctx.options = inputs
        ctx.given = v_init is not None
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(current, leak, output[2])

    @staticmethod
    def backward(ctx, grad_spikes, grad_v, _):
        current, leak, starts = ctx.saved_tensors
        grad_current = torch.empty(current.shape, dtype=current.dtype, device=current.device)
        grad_starts, grad_ends = torch.empty_like(starts), torch.zeros_like(starts)
        grad_ends[-1] = grad_v
        inputs = (_fold(current), starts, leak, None, _fold(grad_spikes), grad_ends)
        outputs = (_fold(grad_current), grad_starts, None, None)
        settle(_backward, leak.dtype, inputs, outputs, tuple(ctx.options), grad_ends, grad_starts, 1)
        return grad_current, grad_starts[0] if ctx.given else None, *(None,) * 6


def worthwhile(current: Tensor, tau: float | Tensor, surrogate: Surrogate) -> bool:
    """Whether groups are right and quicker than the loop.

    They need a membrane that forgets within one group, by float32's precision, whatever its resets do (tau up to 2.4),
    and two groups. Forward and backward on one core at tau = 2, T = 1,024: 9 times the loop's speed with 64 neurons, 7
    with 512, 3 with 1,024, but 0.8 with 4,096, where no time is lost between operations. At T = 128: 1.7 to 1.5.
    """
    if isinstance(tau, Tensor) or isinstance(surrogate.alpha, Tensor) or torch.compiler.is_compiling():
        return False
    forgets = (1 - 1 / tau) ** GROUP <= 2.0**-24
    return forgets and len(current) >= 2 * GROUP and (current.is_cuda or 0 < current[0].numel() <= 2048)


def lif_parallel(
    current: Tensor,
    v_init: Tensor | None,
    leak: Tensor,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
    detach_reset: bool,
    surrogate: Surrogate,
    carry_out: bool,
) -> tuple[Tensor, Tensor]:
    """`lif_analytic` for one leak and a surrogate that are not learned."""
    options = (v_threshold, v_reset, decay_input, detach_reset, surrogate)
    whole, step = len(current) // GROUP * GROUP, current.shape[1:]
    v_init = None if v_init is None else v_init.reshape(-1)
    spikes, v, _ = _Groups.apply(current[:whole].reshape(whole, -1), v_init, leak, *options)
    spikes, v = spikes.view(whole, *step), v.view(step)
    if whole == len(current):
        return spikes, v
    rest, v = lif_analytic(current[whole:], v, leak, *options, carry_out)
    return torch.cat([spikes, rest]), v
