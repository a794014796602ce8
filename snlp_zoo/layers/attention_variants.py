"""Spiking self-attention: variants of what spiking queries, keys and values become, one class each.

Every variant takes and gives spikes [T, B, N, D] and has no softmax. Padding is kept out by silencing its values:
without a softmax an additive mask would inject current, and a norm's bias makes even the padding of an empty input
spike. Distances and numbers of tokens count real tokens, so padding on either side changes nothing for them.

Products of binary spikes are whole numbers, so in float32 and float64 neither the form that `mixing` chooses nor
padding or companions change a bit (in `LinearAttention` up to rounding, unless its decay is a power of two). Under
bfloat16 autocast products above 256 are rounded to eight bits, and a neuron may fire differently where its membrane is
that close to the threshold.
Shapes: T, B, N, D, H, E = D / H as in ops/lif/reference.py.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snlp_zoo.layers.bernoulli import BernoulliNode, draw
from snlp_zoo.layers.mixing import mix
from snlp_zoo.layers.neurons import BaseNode

MakeNeuron = Callable[[float], BaseNode]  # from the share of the model's firing threshold that this neuron has
State = tuple[Tensor, Tensor]  # memory [T, B, H, F, E] and the number of real tokens seen [B, 1, 1, 1]


def head_width(hidden_size: int, num_heads: int) -> int:
    """E = D / H.

    Raises:
        ValueError: D does not divide into H heads.
    """
    if num_heads < 1 or hidden_size % num_heads:
        raise ValueError(
            f"hidden_size {hidden_size} does not divide into {num_heads} heads; choose num_heads from its divisors"
        )
    return hidden_size // num_heads


def _full(x: Tensor) -> torch.dtype:
    """Where sums of x are kept: half precision would round whole numbers above 256."""
    return torch.promote_types(x.dtype, torch.float32)


def _merge(x: Tensor) -> Tensor:
    """[T, B, H, N, E] -> [T, B, N, H E]: as neurons and what watches them take it, token by token."""
    return x.transpose(-2, -3).flatten(-2)


class HeadShare(nn.Module):
    """A number of each head between 0 and 1, [H, 1, 1]: the sigmoid of a parameter, or fixed.

    Args:
        what: its name in errors.
        share: one number, or one per head; learnable ones lie strictly between 0 and 1.
    """

    share: Tensor

    def __init__(self, what: str, share: float | Sequence[float], num_heads: int, learnable: bool) -> None:
        super().__init__()
        shares = [float(share)] * num_heads if isinstance(share, int | float) else [float(x) for x in share]
        inside = all(0 < x < 1 if learnable else 0 <= x <= 1 for x in shares)
        if len(shares) != num_heads or not inside:
            bounds = "strictly between 0 and 1 where learned" if learnable else "from 0 to 1"
            raise ValueError(f"{what} is one number, or one for each of {num_heads} heads, {bounds}; got {share}")
        self.learnable = learnable
        if learnable:
            self.fresh = {"logit": [math.log(x / (1 - x)) for x in shares]}
            self.logit = nn.Parameter(torch.tensor(self.fresh["logit"]))
        else:
            self.fresh = {"share": shares}
            self.register_buffer("share", torch.tensor(shares))

    def forward(self) -> Tensor:
        return (self.logit.sigmoid() if self.learnable else self.share).view(-1, 1, 1)


class SpikingAttention(nn.Module):
    """What the variants share: heads, silenced padding, and the neuron that turns the mixed values into spikes.

    A variant says how all tokens mix at once (`mix`), what a token leaves to later ones (`remember`) and what a query
    takes out of that (`recall`).

    Args:
        num_heads: H; must divide D.
        make_neuron: makes the neuron; it fires at half of the model's threshold.
        causal: token i attends to tokens up to i only.
    Raises:
        ValueError: here, a neuron of another alphabet than the variant is made for; in calls, shapes that do not fit.
    """

    binary_only = False

    def __init__(self, num_heads: int, make_neuron: MakeNeuron, causal: bool = False) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.neuron: BaseNode = make_neuron(0.5)
        kind = getattr(self.neuron, "spike_kind", "binary")
        if self.binary_only and kind != "binary":
            raise ValueError(
                f"{type(self).__name__} is made for binary spikes, its neuron gives {kind} ones; "
                "take a binary neuron, or attention 'ssa' or 'linear'"
            )

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """query, key, value spikes [T, B, N, D], mask [B, N] (1 for real tokens; None: all are) -> spikes."""
        value, counts = self._masked(value, mask)
        mixed = self.mix(self._split(query), self._split(key), self._split(value), counts)
        return self.fire(mixed, query, counts)

    def weights(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        """What values are multiplied with before they add up, [T, B, H, N, N]; 0 in columns of padding.

        Raises:
            ValueError: a variant that adds values without weighing them.
        """
        own = torch.eye(query.shape[2], dtype=query.dtype, device=query.device).expand(*query.shape[:2], -1, -1)
        own, counts = self._masked(own, mask)  # values that show which tokens they came from
        return self.expected(self._split(query), self._split(key), own.unsqueeze(2), counts)

    def state(self, key: Tensor, value: Tensor, mask: Tensor | None = None) -> State:
        """The state behind the last of these tokens, key and value spikes [T, B, N, D], from which `step` goes on."""
        value, counts = self._masked(value, mask)
        key, value = (self._split(x).to(_full(x)) for x in (key, value))
        end = counts[..., -1:, :]
        with torch.autocast(key.device.type, enabled=False):  # sums over all tokens before, in float32
            memory = self.remember(key, self.faded(value, end - counts))
        return memory, end.expand(value.shape[1], -1, -1, -1)

    def step(
        self, query: Tensor, key: Tensor, value: Tensor, state: State | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The next token of a causal attention, as the full form gives it.

        Args:
            query, key, value: spikes [T, B, D].
            state: what the last step (or `state`) returned, None before the first token. Its memory is [T, B, H, E, E]
                in float32, E times as many numbers as a token's spikes at all T steps, however many tokens came
                before; axis 1 is the batch. `SDSA` keeps [T, B, H, 1, E].
            mask: [B], 0 where this token is padding: its state stays as it was.
        Returns:
            spikes [T, B, D] and the new state. Neurons start every token at rest, so no membrane is part of it.
        Raises:
            ValueError: a bidirectional attention, which needs later tokens.
        """
        if not self.causal:
            raise ValueError(f"{type(self).__name__}.step needs causal=True: without, a token attends to later ones")
        query, key, value = (x.unsqueeze(2) for x in (query, key, value))
        memory, count = self.state(key, value, None if mask is None else mask.unsqueeze(1))
        with torch.autocast(query.device.type, enabled=False):
            if state is not None:
                memory, count = self.faded(state[0], count) + memory, state[1] + count
            mixed = self.recall(self._split(query).to(memory.dtype), memory, count)
        return self.fire(mixed, query, count).squeeze(2), (memory, count)

    def _masked(self, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """value [T, B, N, D] without what padding holds, and how many real tokens there are up to each."""
        if mask is None:
            return value, torch.arange(1, value.shape[2] + 1, device=value.device)[None, None, :, None]
        if mask.shape != value.shape[1:3]:
            raise ValueError(f"mask {tuple(mask.shape)} must be [B, N] of the spikes, {tuple(value.shape[1:3])}")
        return value.masked_fill((mask == 0).unsqueeze(-1), 0), (mask != 0).cumsum(-1)[:, None, :, None]

    def _split(self, x: Tensor) -> Tensor:
        """[T, B, N, D] -> [T, B, H, N, E]."""
        width = head_width(x.shape[-1], self.num_heads)
        return x.unflatten(-1, (self.num_heads, width)).transpose(-2, -3)

    def fire(self, mixed: Tensor, query: Tensor, counts: Tensor) -> Tensor:
        """mixed currents [T, B, H, N, E], query spikes [T, B, N, D], counts as in `mix` -> spikes [T, B, N, D]."""
        return self.neuron(_merge(mixed), from_rest=True).to(query.dtype)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, counts: Tensor) -> Tensor:
        """query, key, value [T, B, H, N, E], counts [B or 1, 1, N, 1] of real tokens up to each -> mixed currents."""
        raise NotImplementedError

    def expected(self, query: Tensor, key: Tensor, value: Tensor, counts: Tensor) -> Tensor:
        """`mix`, or its mean where that draws."""
        return self.mix(query, key, value, counts)

    def remember(self, key: Tensor, value: Tensor) -> Tensor:
        """key and value of some tokens, [T, B, H, N, E] -> what they add to the memory."""
        return key.mT @ value

    def faded(self, x: Tensor, distance: Tensor) -> Tensor:
        """What is left of values or of a memory so many real tokens later."""
        return x

    def recall(self, query: Tensor, memory: Tensor, counts: Tensor) -> Tensor:
        """query of one token [T, B, H, 1, E], memory, counts [B, 1, 1, 1] -> mixed currents [T, B, H, 1, E]."""
        raise NotImplementedError

    def attended(self, query: Tensor, counts: Tensor) -> Tensor:
        """How many tokens each attends to, at least 1, in a dtype that holds it: [B or 1, 1, N or 1, 1]."""
        return (counts if self.causal else counts[..., -1:, :]).clamp_min(1).to(_full(query))


class SSA(SpikingAttention):
    """Spiking self-attention, scale (Q K^T) V: values, as often as spikes of query and key coincide.

    Args:
        scale: 0.125 as published; sums grow with N, and None divides them by sqrt(E) times the tokens attended to.
    Source: Zhou et al. 2023 (arXiv:2209.15425), Spikformer.
    """

    def __init__(
        self, num_heads: int, make_neuron: MakeNeuron, causal: bool = False, scale: float | None = 0.125
    ) -> None:
        super().__init__(num_heads, make_neuron, causal)
        self.scale = scale

    def mix(self, query: Tensor, key: Tensor, value: Tensor, counts: Tensor) -> Tensor:
        return self.scaled(mix(query, key, value, counts, self.causal), query, counts)

    def recall(self, query: Tensor, memory: Tensor, counts: Tensor) -> Tensor:
        return self.scaled(query @ memory, query, counts)

    def scaled(self, mixed: Tensor, query: Tensor, counts: Tensor) -> Tensor:
        if self.scale is not None:
            return mixed * self.scale
        return mixed * (self.attended(query, counts) * query.shape[-1] ** 0.5).reciprocal()


class SDSA(SpikingAttention):
    """Spike-driven self-attention: a gate per channel, neuron(sum_j K_j * V_j), that lets the query's spikes through.

    No product of matrices: coincidences of key and value are counted over the tokens, up to i where causal (prefix
    sums are ours, the source has no causal form). The bidirectional gate is one for all tokens: its neuron's spikes are
    [T, B, 1, D]. Takes binary spikes, whose product is their coincidence.
    Source: Yao et al. 2023 (arXiv:2307.01694), Spike-driven Transformer.
    """

    binary_only = True

    def mix(self, query: Tensor, key: Tensor, value: Tensor, counts: Tensor) -> Tensor:
        both = key * value
        return both.cumsum(-2, dtype=_full(both)) if self.causal else both.sum(-2, keepdim=True, dtype=_full(both))

    def fire(self, mixed: Tensor, query: Tensor, counts: Tensor) -> Tensor:
        return query * super().fire(mixed, query, counts)

    def weights(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        raise ValueError("SDSA has no attention weights: its gate is one for all tokens; ask for no attentions")

    def remember(self, key: Tensor, value: Tensor) -> Tensor:
        return (key * value).sum(-2, keepdim=True)

    def recall(self, query: Tensor, memory: Tensor, counts: Tensor) -> Tensor:
        return memory


class AXNOR(SSA):
    """SSA whose scores also count where query and key are both silent, each time as a: q.k + a (1 - q).(1 - k).

    The second product is E - |q| - |k| + q.k, so next to SSA's product it takes only sums over tokens, whole numbers
    too: (1 + a) (Q K^T) V + a ((E - |q_i|) sum_j v_j - sum_j |k_j| v_j).

    Args:
        a: in (0, 1), one number or one per head.
        learnable: learn a as the sigmoid of a parameter; otherwise it is fixed, and a = 1 is the XNOR of the spikes.
        scale: as in `SSA`.
    Source: Xiao et al. 2025 (CVPR), a-XNOR; that it is learned for each head, and counts no mismatch, is ours.
    """

    binary_only = True

    def __init__(
        self,
        num_heads: int,
        make_neuron: MakeNeuron,
        causal: bool = False,
        scale: float | None = 0.125,
        a: float | Sequence[float] = 0.1,
        learnable: bool = True,
    ) -> None:
        super().__init__(num_heads, make_neuron, causal, scale)
        self.a = HeadShare("a", a, num_heads, learnable)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, counts: Tensor) -> Tensor:
        dtype, active = _full(value), key.sum(-1, keepdim=True)
        values, weighted = (
            x.cumsum(-2, dtype=dtype) if self.causal else x.sum(-2, keepdim=True, dtype=dtype)
            for x in (value, active * value)
        )
        return self.combined(mix(query, key, value, counts, self.causal), values, weighted, query, counts)

    def combined(self, both: Tensor, values: Tensor, weighted: Tensor, query: Tensor, counts: Tensor) -> Tensor:
        silent = query.shape[-1] - query.sum(-1, keepdim=True)
        return self.scaled(both + self.a() * (both + (silent * values - weighted)), query, counts)

    def remember(self, key: Tensor, value: Tensor) -> Tensor:
        """K^T V, and below it the rows of sum_j v_j and sum_j |k_j| v_j."""
        return torch.cat([key, torch.ones_like(key[..., :1]), key.sum(-1, keepdim=True)], -1).mT @ value

    def recall(self, query: Tensor, memory: Tensor, counts: Tensor) -> Tensor:
        matrix, values, weighted = memory.split([query.shape[-1], 1, 1], -2)
        return self.combined(query @ matrix, values, weighted, query, counts)


class StochasticAttention(SpikingAttention):
    """Scores and outputs are drawn: S_ij ~ Bernoulli(q_i.k_j / E), then spikes ~ Bernoulli(sum_j S_ij v_j / n_i).

    n_i is the number of real tokens attended to. Every draw is independent, and gradients are those of expectations.
    In evaluation nothing is drawn: scores are their expectation and the neuron integrates theirs (see `BernoulliNode`),
    so a text's spikes are always the same. `step` draws no scores either: a memory holds sums, not keys.

    Args:
        make_neuron: is asked for its alphabet only; the neuron is a `BernoulliNode`.
        sample_intermediate: False never draws, which is nearer to the mean at the same T.
        always: draw in evaluation too.
    Source: Song et al. 2024 (arXiv:2402.09109), stochastic spiking attention; causal counts are ours.
    """

    binary_only = True

    def __init__(
        self,
        num_heads: int,
        make_neuron: MakeNeuron,
        causal: bool = False,
        sample_intermediate: bool = True,
        always: bool = False,
    ) -> None:
        super().__init__(num_heads, make_neuron, causal)
        if always and not sample_intermediate:
            raise ValueError("always=True draws and sample_intermediate=False never does; choose one of them")
        draws: Any = ("always" if always else "training") if sample_intermediate else "never"
        self.neuron = BernoulliNode(draws)
        self.score_neuron = BernoulliNode(draws) if draws == "always" else None  # a neuron must fire in every mode

    def mix(self, query: Tensor, key: Tensor, value: Tensor, counts: Tensor) -> Tensor:
        if not self.neuron.drawing:
            return self.expected(query, key, value, counts)
        share = self.attended(query, counts).reciprocal()
        scores = query @ key.mT * (1 / query.shape[-1])
        scores = scores.tril() if self.causal else scores
        node = self.score_neuron
        drawn = draw(scores) if node is None else self._split(node(_merge(scores), from_rest=True))
        return drawn @ value * share

    def expected(self, query: Tensor, key: Tensor, value: Tensor, counts: Tensor) -> Tensor:
        share = self.attended(query, counts).reciprocal() / query.shape[-1]
        return mix(query, key, value, counts, self.causal) * share

    def fire(self, mixed: Tensor, query: Tensor, counts: Tensor) -> Tensor:
        return self.neuron(_merge(mixed), from_rest=True, counts=counts.squeeze(1)).to(query.dtype)

    def recall(self, query: Tensor, memory: Tensor, counts: Tensor) -> Tensor:
        return query @ memory * (self.attended(query, counts).reciprocal() / query.shape[-1])


class LinearAttention(SSA):
    """SSA that fades with distance: scale sum_j decay^|i - j| (q_i.k_j) v_j, distances in real tokens.

    Args:
        decay: of one token's distance, one number or one per head.
        learnable: learn it as the sigmoid of a parameter; otherwise it is fixed, and 1 makes this `SSA`.
        scale: as in `SSA`.
    Source: Katharopoulos et al. 2020 (arXiv:2006.16236) and Sun et al. 2023 (arXiv:2307.08621), on spikes.
    """

    def __init__(
        self,
        num_heads: int,
        make_neuron: MakeNeuron,
        causal: bool = False,
        scale: float | None = 0.125,
        decay: float | Sequence[float] = 0.9,
        learnable: bool = True,
    ) -> None:
        super().__init__(num_heads, make_neuron, causal, scale)
        self.decay = HeadShare("decay", decay, num_heads, learnable)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, counts: Tensor) -> Tensor:
        return self.scaled(mix(query, key, value, counts, self.causal, self.decay()), query, counts)

    def faded(self, x: Tensor, distance: Tensor) -> Tensor:
        return x * self.decay() ** distance
