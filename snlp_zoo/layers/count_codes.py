"""Spike trains for whole numbers: how a count n of an integer neuron is spread over the time steps T of a token.

    code              of n in       alphabet        T for |n| <= N           decode weights
    unary             signed        {0, 1}          2 N: n > 0, then n < 0   1 N times, -1 N times
    unary             n >= 0        {0, 1}          N                        1
    ternary           signed        {-1, 0, 1}      N                        1
    bitwise           signed        {-1, 0, 1}      ceil(log2(N + 1))        2^(T-1), ..., 2, 1
    twos_complement   signed        {0, 1}          bitwise's, plus 1        -2^(T-1), 2^(T-2), ..., 1
    ttfs              signed        {-1, 0, 1}      N, one spike             N, N - 1, ..., 1
    multi_level       signed        |s| < levels    ceil(log_levels(N + 1))  levels^(T-1), ..., 1
    gif               signed        |s| < levels    ceil(N / (levels - 1))   1

Of counts without negatives no code has negative spikes. sum_t weight[t] spikes[t] = n exactly, for every |n| <= N.
T is axis 0, as everywhere. Sources: bitwise and two's complement as in SpikingBrain (arXiv:2509.05276), gif as in
SpikeLLM (Xing et al., ICLR 2025), where several unit steps are merged into one.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CODES = ("unary", "ternary", "bitwise", "twos_complement", "ttfs", "multi_level", "gif")
_OF_LEVELS = ("multi_level", "gif")
_BINARY = ("unary", "twos_complement")


def check_code(code: str, levels: int) -> None:
    """Raises ValueError unless `code` is one of `CODES` and levels, where it has them, at least 2."""
    if code not in CODES:
        raise ValueError(f"unknown spike code {code!r}, known are {', '.join(CODES)}")
    if code in _OF_LEVELS and levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}")


def alphabet(code: str, signed: bool = True) -> str:
    """ "binary", "ternary" or "integer", as `energy.kinds` names them."""
    if code in _OF_LEVELS:
        return "integer"
    return "ternary" if signed and code not in _BINARY else "binary"


def steps(code: str, largest: int, levels: int = 4, signed: bool = True) -> int:
    """T that counts up to `largest` take, at least 1 (2 for two's complement and signed unary)."""
    largest = max(largest, 1)
    if code == "unary":
        return 2 * largest if signed else largest
    if code in ("ternary", "ttfs"):
        return largest
    if code == "gif":
        return -(-largest // (levels - 1))
    if code == "twos_complement":
        return largest.bit_length() + 1
    base, digits = (2 if code == "bitwise" else levels), 1
    while base**digits <= largest:
        digits += 1
    return digits


def weights(code: str, time_steps: int, levels: int = 4, signed: bool = True) -> list[int]:
    """What a spike of each of the T steps counts."""
    if code == "unary" and signed:
        return [1] * (time_steps // 2) + [-1] * (time_steps // 2)
    if code == "ttfs":
        return list(range(time_steps, 0, -1))
    if code in ("unary", "ternary", "gif"):
        return [1] * time_steps
    base = levels if code == "multi_level" else 2
    places = [base**place for place in reversed(range(time_steps))]
    return [-places[0], *places[1:]] if code == "twos_complement" else places


def _most(code: str, time_steps: int, levels: int, signed: bool) -> int:
    """The largest count that T steps hold."""
    if code in ("unary", "ternary", "ttfs"):
        return time_steps // 2 if code == "unary" and signed else time_steps
    if code == "gif":
        return time_steps * (levels - 1)
    return (levels if code == "multi_level" else 2) ** (time_steps - (code == "twos_complement")) - 1


def trains(
    counts: Tensor, code: str, time_steps: int, levels: int = 4, signed: bool = True
) -> Iterator[tuple[int, Tensor]]:
    """Step after step: (what a spike counts, spikes of the step, shape and dtype of counts).

    Args:
        counts: whole numbers, any float or integer dtype that holds them; what T steps cannot hold is cut off.
    """
    most = _most(code, time_steps, levels, signed)
    whole = counts.long().clamp(-most - (code == "twos_complement"), most)
    magnitude, sign = whole.abs(), whole.sign()
    rest = magnitude.clone()
    for step, weight in enumerate(weights(code, time_steps, levels, signed)):
        if code == "unary":
            spikes = (whole * weight > step % (time_steps // 2 if signed else time_steps)).long()
        elif code == "ternary":
            spikes = sign * (magnitude > step)
        elif code == "ttfs":
            spikes = sign * (magnitude == weight)
        elif code == "twos_complement":
            spikes = whole >> (time_steps - 1 - step) & 1
        else:  # as many as fit
            fired = (rest // weight).clamp_max(1 if code == "bitwise" else levels - 1)
            rest -= fired * weight
            spikes = sign * fired
        yield weight, spikes.to(counts.dtype)


def encode(counts: Tensor, code: str, time_steps: int | None = None, levels: int = 4, signed: bool = True) -> Tensor:
    """All steps of `trains`, [T, ...]; without time_steps as many as the largest of the counts takes.

    Raises:
        ValueError: unknown code, levels below 2, numbers that are not whole, negative ones where signed is False, or an
            odd number of steps of signed unary, one half of which are for negative counts.
    """
    check_code(code, levels)
    if code == "unary" and signed and time_steps and time_steps % 2:
        raise ValueError(f"signed unary takes an even number of steps, half of them for each sign, got {time_steps}")
    wrong = counts[(counts != counts.round()) | counts.isinf()] if counts.is_floating_point() else counts[:0]
    if wrong.numel():
        raise ValueError(f"spike codes are of whole numbers, got {wrong[0].item():g}")
    least, most = (int(x) for x in torch.aminmax(counts)) if counts.numel() else (0, 0)
    if least < 0 and not signed:
        raise ValueError(f"counts are not negative where signed is False, got {least}")
    time_steps = time_steps or steps(code, max(-least, most), levels, signed)
    return torch.stack([spikes for _, spikes in trains(counts, code, time_steps, levels, signed)])


def decode(spikes: Tensor, code: str, levels: int = 4, signed: bool = True) -> Tensor:
    """Spikes [T, ...] -> counts [...]: the sum of what every spike counts."""
    counted = spikes.new_tensor(weights(code, len(spikes), levels, signed)).view(-1, *(1,) * (spikes.ndim - 1))
    return (counted * spikes).sum(0)


def events(counts: Tensor, code: str, levels: int = 4, time_steps: int | None = None) -> Tensor:
    """How many spikes (steps that are not 0) each count takes, int64 [...].

    Args:
        time_steps: T, which two's complement needs: of negative numbers all bits above the number's own are set.
    """
    whole = counts.long()
    magnitude = whole.abs()
    if code in ("unary", "ternary"):
        return magnitude
    if code == "ttfs":
        return (magnitude > 0).long()
    if code == "gif":
        return -(-magnitude // (levels - 1))
    largest = int(magnitude.max()) if magnitude.numel() else 0
    taken = time_steps or steps(code, largest, levels)
    return sum(((spikes != 0).long() for _, spikes in trains(whole, code, taken, levels)), torch.zeros_like(whole))
