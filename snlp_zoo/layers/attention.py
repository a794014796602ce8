"""Spiking self-attention: variants of what spiking queries, keys and values become, one class each.

Every variant takes and gives spikes [T, B, N, D] and has no softmax. Padding is kept out by silencing its values:
without a softmax an additive mask would inject current, and a norm's bias makes even padding without input spike.
Shapes: T, B, N, D, H, E = D / H as in ops/lif/reference.py.
"""

from collections.abc import Callable

from torch import Tensor, nn

from snlp_zoo.layers.neurons import BaseNode

MakeNeuron = Callable[[float], BaseNode]  # from the share of the model's firing threshold that this neuron has
MakeLinear = Callable[[int, int], nn.Linear]


class SpikingProjection(nn.Module):
    """Spikes of a normalised linear map: neuron(norm(W x + b))."""

    def __init__(self, inputs: int, outputs: int, make_linear: MakeLinear, make_neuron: MakeNeuron, eps: float) -> None:
        super().__init__()
        self.linear = make_linear(inputs, outputs)
        self.norm = nn.LayerNorm(outputs, eps=eps)
        self.neuron = make_neuron(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, B, N, inputs] spikes or counts of spikes -> spikes [T, B, N, outputs]."""
        return self.neuron(self.norm(self.linear(x)), from_rest=True)


class SpikingAttention(nn.Module):
    """What the variants share: heads, silenced padding, and the neuron that turns the mixed values into spikes.

    Args:
        num_heads: H; must divide D.
        make_neuron: makes the neuron; it fires at half of the model's threshold.
        causal: token i attends to tokens up to i only.
    """

    def __init__(self, num_heads: int, make_neuron: MakeNeuron, causal: bool = False) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.neuron = make_neuron(0.5)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """query, key, value spikes [T, B, N, D], mask [B, N] (1 for real tokens; None: all are) -> spikes."""
        if mask is not None:
            value = value.masked_fill((mask == 0).unsqueeze(-1), 0)
        mixed = self.mix(*(x.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3) for x in (query, key, value)))
        return self.neuron(mixed.transpose(-2, -3).flatten(-2), from_rest=True)

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query, key, value [T, B, H, N, E] -> input current of the neuron, of the same shape."""
        raise NotImplementedError

    def weights(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the values are multiplied with, [T, B, H, N, N]; columns of padding are zero."""
        raise NotImplementedError


class SSA(SpikingAttention):
    """Spiking self-attention, scale * (Q K^T) V: sums of coincidences, whole numbers before the scale.

    (Q K^T) V and Q (K^T V) are equal in whole numbers; whichever takes fewer operations is computed.
    Source: Zhou et al. 2023 (arXiv:2209.15425), Spikformer.
    """

    scale = 0.125

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.shape[-2] <= query.shape[-1]:  # N^2 E against N E^2
            return (query @ key.transpose(-1, -2)) @ value * self.scale
        return query @ (key.transpose(-1, -2) @ value) * self.scale

    def weights(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key = (x.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3) for x in (query, key))
        weights = query @ key.transpose(-1, -2) * self.scale
        return weights if mask is None else weights.masked_fill((mask == 0)[:, None, None, :], 0)


ATTENTIONS: dict[str, type[SpikingAttention]] = {"ssa": SSA}


class SpikingSelfAttention(nn.Module):
    """Spikformer's attention block: projections to spikes, a variant of `ATTENTIONS`, a projection to spikes.

    Args:
        hidden_size: D.
        attention: the variant.
        make_linear, make_neuron: of the four projections.
        eps: of their norms.
    """

    def __init__(
        self,
        hidden_size: int,
        attention: SpikingAttention,
        make_linear: MakeLinear,
        make_neuron: MakeNeuron,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        options = (hidden_size, hidden_size, make_linear, make_neuron, eps)
        self.query, self.key, self.value = (SpikingProjection(*options) for _ in range(3))
        self.attention = attention
        self.output = SpikingProjection(*options)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, want_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x [T, B, N, D], mask [B, N] -> spikes [T, B, N, D], attention weights [T, B, H, N, N] if wanted."""
        query, key, value = self.query(x), self.key(x), self.value(x)
        weights = self.attention.weights(query, key, mask) if want_weights else None
        return self.output(self.attention(query, key, value, mask)), weights
