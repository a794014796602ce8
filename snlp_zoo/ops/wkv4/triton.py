"""WKV in Triton: three launches each way, so that tokens are many programs' work and not one's after the other.

A program owns BLOCK channels of one group of tokens of one sequence. Forward: what each group adds to a state; the
states before all groups, one after another; from these the outputs. Backward likewise, from the last group to the
first: what each group's outputs contribute to the gradient of the state before it; those gradients; all others, for
which the group's states are computed again and stay in registers. Sums over tokens are left to PyTorch: no atomics.
"""

# mypy: ignore-errors
# (what Triton compiles is Python by its syntax, not by its types)

import torch
import triton
import triton.language as tl
from torch import Tensor

from snlp_zoo.ops.wkv4.kernel import GROUP

EMPTY = tl.constexpr(-1e38)
AHEAD = 8  # groups whose states are loaded together


@triton.jit
def _add(w, k, v, one, numerator, denominator, maximum):
    """The state after a token, or after all that came in with weight exp(k); and the weight of the past in it."""
    scale = tl.maximum(maximum + w, k)
    past, now = tl.exp(maximum + w - scale), tl.exp(k - scale)
    return past * numerator + now * v, past * denominator + now * one, scale, past, now


@triton.jit
def _mean(u, k, v, numerator, denominator, maximum):
    """The output at a token, the weights of past and present in it, and their sum."""
    scale = tl.maximum(maximum, u + k)
    seen, bonus = tl.exp(maximum - scale), tl.exp(u + k - scale)
    total = seen * denominator + bonus
    return (seen * numerator + bonus * v) / total, seen, bonus, total


@triton.jit
def _place(groups, C, BLOCK: tl.constexpr):
    """Sequence and group in 64 bits, channels, and which of these there are."""
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    program = tl.zeros([], tl.int64) + tl.program_id(0)
    return program // groups, program % groups, channel, channel < C


@triton.jit
def _load_state(at, plane, here):
    return (
        tl.load(at, mask=here, other=0.0),
        tl.load(at + plane, mask=here, other=0.0),
        tl.load(at + 2 * plane, mask=here, other=0.0),
    )


@triton.jit
def _store_state(at, plane, here, numerator, denominator, maximum):
    tl.store(at, numerator, mask=here)
    tl.store(at + plane, denominator, mask=here)
    tl.store(at + 2 * plane, maximum, mask=here)


@triton.jit(do_not_specialize=["N", "groups"])
def _summarise(w_ptr, k_ptr, v_ptr, states_ptr, N, C, groups, plane, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """For all groups but the last, which are whole."""
    b, group, channel, here = _place(groups - 1, C, BLOCK)
    w = tl.load(w_ptr + channel, mask=here, other=0.0)
    keys, values = (), ()
    for i in tl.static_range(GROUP):
        at = (b * N + group * GROUP + i) * C + channel
        keys += (tl.load(k_ptr + at, mask=here, other=0.0).to(tl.float32),)
        values += (tl.load(v_ptr + at, mask=here, other=0.0).to(tl.float32),)
    numerator, denominator = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    maximum = tl.zeros([BLOCK], tl.float32) + EMPTY
    for i in tl.static_range(GROUP):
        numerator, denominator, maximum, _, _ = _add(w, keys[i], values[i], 1.0, numerator, denominator, maximum)
    at = states_ptr + (b * (groups + 1) + group + 1) * C + channel
    _store_state(at, plane, here, numerator, denominator, maximum)


@triton.jit(do_not_specialize=["groups"])
def _join(
    w_ptr, numerator_ptr, denominator_ptr, maximum_ptr, states_ptr, C, groups, plane,
    GROUP: tl.constexpr, AHEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From what each group adds to the state before the next one, in place; before the first one, what is given."""
    b, _, channel, here = _place(1, C, BLOCK)
    w = tl.load(w_ptr + channel, mask=here, other=0.0)
    first = states_ptr + b * (groups + 1) * C + channel
    numerator, denominator = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    maximum = tl.zeros([BLOCK], tl.float32) + EMPTY
    if numerator_ptr is not None:
        numerator = tl.load(numerator_ptr + b * C + channel, mask=here, other=0.0)
        denominator = tl.load(denominator_ptr + b * C + channel, mask=here, other=0.0)
        maximum = tl.load(maximum_ptr + b * C + channel, mask=here, other=0.0)
    _store_state(first, plane, here, numerator, denominator, maximum)
    for start in range(1, groups, AHEAD):
        added = ()
        for i in tl.static_range(AHEAD):
            added += (_load_state(first + (start + i) * C, plane, here & (start + i < groups)),)
        for i in tl.static_range(AHEAD):
            a, d, m = added[i]
            state = _add(GROUP * w, m, a, d, numerator, denominator, maximum)
            numerator, denominator, maximum = state[0], state[1], state[2]
            at, now = first + (start + i) * C, here & (start + i < groups)
            _store_state(at, plane, now, numerator, denominator, maximum)


@triton.jit(do_not_specialize=["N", "groups"])
def _outputs(
    w_ptr, u_ptr, k_ptr, v_ptr, states_ptr, out_ptr, after_ptr, N, C, groups, plane,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, group, channel, here = _place(groups, C, BLOCK)
    w = tl.load(w_ptr + channel, mask=here, other=0.0)
    u = tl.load(u_ptr + channel, mask=here, other=0.0)
    state = states_ptr + (b * (groups + 1) + group) * C + channel
    numerator, denominator, maximum = _load_state(state, plane, here)
    keys, values = (), ()
    for i in tl.static_range(GROUP):
        at, now = (b * N + group * GROUP + i) * C + channel, here & (group * GROUP + i < N)
        keys += (tl.load(k_ptr + at, mask=now, other=0.0).to(tl.float32),)
        values += (tl.load(v_ptr + at, mask=now, other=0.0).to(tl.float32),)
    for i in tl.static_range(GROUP):
        at, now = (b * N + group * GROUP + i) * C + channel, group * GROUP + i < N
        out, _, _, _ = _mean(u, keys[i], values[i], numerator, denominator, maximum)
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=here & now)
        a, d, m, _, _ = _add(w, keys[i], values[i], 1.0, numerator, denominator, maximum)
        numerator, denominator = tl.where(now, a, numerator), tl.where(now, d, denominator)
        maximum = tl.where(now, m, maximum)
    last = here & (group == groups - 1)
    _store_state(state + C, plane, last, numerator, denominator, maximum)
    _store_state(after_ptr + b * C + channel, plane // (groups + 1), last, numerator, denominator, maximum)


@triton.jit(do_not_specialize=["N", "groups"])
def _summarise_grads(
    w_ptr, u_ptr, k_ptr, v_ptr, states_ptr, grad_out_ptr, grads_ptr, N, C, groups, plane,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, group, channel, here = _place(groups, C, BLOCK)
    w = tl.load(w_ptr + channel, mask=here, other=0.0)
    u = tl.load(u_ptr + channel, mask=here, other=0.0)
    start = (b * (groups + 1) + group) * C + channel
    numerator, denominator, maximum = _load_state(states_ptr + start, plane, here)
    keys, values, grads = (), (), ()
    for i in tl.static_range(GROUP):
        at, now = (b * N + group * GROUP + i) * C + channel, here & (group * GROUP + i < N)
        keys += (tl.load(k_ptr + at, mask=now, other=0.0).to(tl.float32),)
        values += (tl.load(v_ptr + at, mask=now, other=0.0).to(tl.float32),)
        grads += (tl.load(grad_out_ptr + at, mask=now, other=0.0).to(tl.float32),)
    of_numerator, of_denominator = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    kept = tl.zeros([BLOCK], tl.float32) + 1.0
    for i in tl.static_range(GROUP):
        out, seen, _, total = _mean(u, keys[i], values[i], numerator, denominator, maximum)
        share = tl.where(group * GROUP + i < N, grads[i] * seen / total * kept, 0.0)
        of_numerator += share
        of_denominator -= share * out
        numerator, denominator, maximum, past, _ = _add(w, keys[i], values[i], 1.0, numerator, denominator, maximum)
        kept *= past
    tl.store(grads_ptr + start, of_numerator, mask=here)
    tl.store(grads_ptr + plane + start, of_denominator, mask=here)


@triton.jit(do_not_specialize=["N", "groups"])
def _join_grads(
    w_ptr, states_ptr, grad_after_ptr, grads_ptr, grad_first_ptr, N, C, groups, plane,
    GROUP: tl.constexpr, AHEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From what each group contributes to the gradient of the state before it, in place; the last state's is given."""
    b, _, channel, here = _place(1, C, BLOCK)
    w = tl.load(w_ptr + channel, mask=here, other=0.0)
    first, of_state, part = b * (groups + 1) * C + channel, b * C + channel, plane // (groups + 1)
    of_numerator, of_denominator = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if grad_after_ptr is not None:
        of_numerator = tl.load(grad_after_ptr + of_state, mask=here, other=0.0)
        of_denominator = tl.load(grad_after_ptr + part + of_state, mask=here, other=0.0)
    tl.store(grads_ptr + first + groups * C, of_numerator, mask=here)
    tl.store(grads_ptr + plane + first + groups * C, of_denominator, mask=here)
    for start in range(0, groups, AHEAD):
        kept, added, counted = (), (), ()
        for i in tl.static_range(AHEAD):
            group = groups - 1 - start - i
            at, now = first + group * C, here & (group >= 0)
            before = tl.load(states_ptr + 2 * plane + at, mask=now, other=0.0)
            after = tl.load(states_ptr + 2 * plane + at + C, mask=now, other=0.0)
            kept += (tl.exp(before + tl.minimum(GROUP, N - group * GROUP) * w - after),)
            added += (tl.load(grads_ptr + at, mask=now, other=0.0),)
            counted += (tl.load(grads_ptr + plane + at, mask=now, other=0.0),)
        for i in tl.static_range(AHEAD):
            group = groups - 1 - start - i
            at, now = first + group * C, here & (group >= 0)
            of_numerator = added[i] + kept[i] * of_numerator
            of_denominator = counted[i] + kept[i] * of_denominator
            tl.store(grads_ptr + at, of_numerator, mask=now)
            tl.store(grads_ptr + plane + at, of_denominator, mask=now)
            tl.store(grad_first_ptr + of_state, of_numerator, mask=here & (group == 0))
            tl.store(grad_first_ptr + part + of_state, of_denominator, mask=here & (group == 0))


@triton.jit(do_not_specialize=["N", "groups"])
def _gradients(
    w_ptr, u_ptr, k_ptr, v_ptr, states_ptr, grad_out_ptr, grads_ptr, grad_k_ptr, grad_v_ptr, partial_ptr,
    N, C, groups, plane, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, group, channel, here = _place(groups, C, BLOCK)
    w = tl.load(w_ptr + channel, mask=here, other=0.0)
    u = tl.load(u_ptr + channel, mask=here, other=0.0)
    start = (b * (groups + 1) + group) * C + channel
    state = _load_state(states_ptr + start, plane, here)
    keys, values, grads = (), (), ()
    for i in tl.static_range(GROUP):
        at, now = (b * N + group * GROUP + i) * C + channel, here & (group * GROUP + i < N)
        keys += (tl.load(k_ptr + at, mask=now, other=0.0).to(tl.float32),)
        values += (tl.load(v_ptr + at, mask=now, other=0.0).to(tl.float32),)
        grads += (tl.load(grad_out_ptr + at, mask=now, other=0.0).to(tl.float32),)
    states, weights = (), ()
    for i in tl.static_range(GROUP):
        states += (state,)
        numerator, denominator, maximum, past, now = _add(w, keys[i], values[i], 1.0, state[0], state[1], state[2])
        state = (numerator, denominator, maximum)
        weights += ((past, now),)
    of_numerator = tl.load(grads_ptr + start + C, mask=here, other=0.0)
    of_denominator = tl.load(grads_ptr + plane + start + C, mask=here, other=0.0)
    grad_w, grad_u = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(GROUP):
        at, there = (b * N + group * GROUP + (GROUP - 1 - j)) * C + channel, group * GROUP + (GROUP - 1 - j) < N
        key, value = keys[GROUP - 1 - j], values[GROUP - 1 - j]
        numerator, denominator, maximum = states[GROUP - 1 - j]
        past, now = weights[GROUP - 1 - j]
        out, seen, bonus, total = _mean(u, key, value, numerator, denominator, maximum)
        grad = grads[GROUP - 1 - j] / total
        of_bonus = grad * bonus * (value - out)
        grad_v = grad * bonus + of_numerator * now
        grad_k = of_bonus + now * (of_numerator * value + of_denominator)
        tl.store(grad_k_ptr + at, grad_k.to(grad_k_ptr.dtype.element_ty), mask=here & there)
        tl.store(grad_v_ptr + at, grad_v.to(grad_v_ptr.dtype.element_ty), mask=here & there)
        grad_u += tl.where(there, of_bonus, 0.0)
        grad_w += tl.where(there, past * (of_numerator * numerator + of_denominator * denominator), 0.0)
        of_numerator = tl.where(there, grad * seen + past * of_numerator, of_numerator)
        of_denominator = tl.where(there, past * of_denominator - grad * seen * out, of_denominator)
    at = partial_ptr + (b * groups + group) * C + channel
    tl.store(at, grad_w, mask=here)
    tl.store(at + (plane // (groups + 1)) * groups, grad_u, mask=here)


BULK = {"BLOCK": 128, "num_warps": 4, "GROUP": GROUP}  # one channel per thread
FEW = {"BLOCK": 32, "num_warps": 1, "GROUP": GROUP, "AHEAD": AHEAD}  # as many programs as there can be


def _sizes(k: Tensor, states: Tensor) -> tuple[int, int, int, int, int]:
    """B, N, C, groups, and elements from one part of all states to the next."""
    return *k.shape, states.shape[2] - 1, states[0].numel()


def forward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, first: tuple[Tensor | None, ...],
    out: Tensor, states: Tensor, after: Tensor,
) -> None:  # fmt: skip
    """From a first state fill out, states [3, B, groups + 1, C] and after [3, B, C], that of the last token."""
    w, u, k, v = (x.contiguous() for x in (w, u, k, v))
    first = tuple(x if x is None else x.contiguous() for x in first)
    batch, tokens, channels, groups, plane = _sizes(k, states)
    wide, narrow = triton.cdiv(channels, BULK["BLOCK"]), triton.cdiv(channels, FEW["BLOCK"])
    if groups > 1:
        _summarise[(batch * (groups - 1), wide)](w, k, v, states, tokens, channels, groups, plane, **BULK)
    _join[(batch, narrow)](w, *first, states, channels, groups, plane, **FEW)
    _outputs[(batch * groups, wide)](w, u, k, v, states, out, after, tokens, channels, groups, plane, **BULK)


def backward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, states: Tensor, grad_out: Tensor, grad_after: Tensor | None,
    grad_k: Tensor, grad_v: Tensor, grad_first: Tensor,
) -> Tensor:  # fmt: skip
    """Fill grad_k, grad_v and grad_first [2, B, C], that of the first state's sums; return those of w and u [2, C]."""
    w, u, k, v, grad_out = (x.contiguous() for x in (w, u, k, v, grad_out))
    grad_after = grad_after if grad_after is None else grad_after.contiguous()
    batch, _, channels, groups, _ = sizes = _sizes(k, states)
    wide, narrow = triton.cdiv(channels, BULK["BLOCK"]), triton.cdiv(channels, FEW["BLOCK"])
    grads = torch.empty_like(states[:2])
    partial = states.new_empty(2, batch, groups, channels)
    common = w, u, k, v, states, grad_out, grads
    _summarise_grads[(batch * groups, wide)](*common, *sizes[1:], **BULK)
    _join_grads[(batch, narrow)](w, states, grad_after, grads, grad_first, *sizes[1:], **FEW)
    _gradients[(batch * groups, wide)](*common, grad_k, grad_v, partial, *sizes[1:], **BULK)
    return partial.sum((1, 2))
