"""Spiking self-attention for models: the variants by name, and the blocks of projections around them."""

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

from snlp_zoo.errors import lookup
from snlp_zoo.layers.attention_variants import (
    AXNOR,
    SDSA,
    SSA,
    LinearAttention,
    MakeNeuron,
    SpikingAttention,
    State,
    StochasticAttention,
    head_width,
)

MakeLinear = Callable[[int, int], nn.Linear]

ATTENTIONS: dict[str, type[SpikingAttention]] = {
    "ssa": SSA,
    "sdsa": SDSA,
    "axnor": AXNOR,
    "stochastic": StochasticAttention,
    "linear": LinearAttention,
}


def make_attention(
    name: str, num_heads: int, make_neuron: MakeNeuron, causal: bool = False, **options
) -> SpikingAttention:
    """A variant by its name in `ATTENTIONS`; options as in its class.

    Raises:
        ValueError: unknown name, or a neuron of an alphabet that the variant is not made for.
        TypeError: an option the variant does not have.
    """
    return lookup("attention", name, ATTENTIONS)(num_heads, make_neuron, causal, **options)


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


class SpikingSelfAttention(nn.Module):
    """Spikformer's attention block: projections to spikes, a variant of `ATTENTIONS`, a projection to spikes.

    A residual around it adds spikes to spikes: counts, not {0, 1}.

    Args:
        hidden_size: D.
        attention: the variant.
        make_linear, make_neuron: of the four projections.
        eps: of their norms.
    Raises:
        ValueError: the variant's heads do not divide D.
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
        head_width(hidden_size, attention.num_heads)
        options = (hidden_size, hidden_size, make_linear, make_neuron, eps)
        self.query, self.key, self.value = (SpikingProjection(*options) for _ in range(3))
        self.attention = attention
        self.output: nn.Module = SpikingProjection(*options)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, want_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x [T, B, N, D], mask [B, N] -> spikes [T, B, N, D], attention weights [T, B, H, N, N] if wanted."""
        query, key, value = self.query(x), self.key(x), self.value(x)
        weights = self.attention.weights(query, key, mask) if want_weights else None
        return self.output(self.attention(query, key, value, mask)), weights

    def step(self, x: Tensor, state: State | None = None, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """One token: x [T, B, D], mask [B] -> spikes [T, B, D], and the state as in `SpikingAttention.step`."""
        spikes, state = self.attention.step(self.query(x), self.key(x), self.value(x), state, mask)
        return self.output(spikes), state


class SpikingformerSelfAttention(SpikingSelfAttention):
    """Spikingformer's attention block: its residual is a membrane shortcut, x + block(x) adds reals to reals.

    A neuron stands before every linear map, the first included, and none after the last: only spikes are multiplied by
    weights, and nothing but the residual stream is real. Arguments as in `SpikingSelfAttention`.
    Source: Zhou et al. 2023 (arXiv:2304.11954), Spikingformer.
    """

    def __init__(
        self,
        hidden_size: int,
        attention: SpikingAttention,
        make_linear: MakeLinear,
        make_neuron: MakeNeuron,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(hidden_size, attention, make_linear, make_neuron, eps)
        self.neuron = make_neuron(1.0)
        linear, norm = make_linear(hidden_size, hidden_size), nn.LayerNorm(hidden_size, eps=eps)
        self.output = nn.Sequential(OrderedDict(linear=linear, norm=norm))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, want_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x [T, B, N, D] real, mask [B, N] -> real currents [T, B, N, D], to be added to x; weights as above."""
        return super().forward(self.neuron(x, from_rest=True), mask, want_weights)

    def step(self, x: Tensor, state: State | None = None, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """One token: x [T, B, D] real, mask [B] -> currents [T, B, D], and the state as in `SpikingAttention.step`."""
        return super().step(self.neuron(x, from_rest=True), state, mask)
