"""SpikeGPT: RWKV-4 whose blocks add spikes to the residual stream (Zhu et al. 2023, arXiv:2302.13939).

    ids -> embed -> binarise -> norm -> [time mixing -> LIF -> + ; channel mixing -> LIF -> +] * L -> norm -> head
Neurons walk over tokens: their membranes are state, like the token shifts and the sums of WKV, and live in the cache.
A block adds 0 or 1 per neuron; products take real numbers. `wiring="spike_driven"` puts neurons before the projections:
products take spikes, and blocks add real numbers; it starts otherwise, see `_start`. `spiking=False` is RWKV-4.
Differs from the authors' code: padding changes no state; generation rescales nothing, which a threshold would not
survive.
Shapes: B batch, N tokens, C = D width, F width of channel mixing.
"""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from snlp_zoo.layers import LIFNode, make_linear
from snlp_zoo.layers.quant import SignEmbedding
from snlp_zoo.layers.wkv import WKV4, fired, shifted
from snlp_zoo.models.cache import State
from snlp_zoo.models.configuration_spikegpt import SpikeGPTConfig
from snlp_zoo.models.decoder import (
    DecoderLayer,
    ForCausalLM,
    ForSequenceClassification,
    SpikingDecoder,
    SpikingDecoderPreTrainedModel,
)
from snlp_zoo.ops.wkv4 import EMPTY


def _linear(config: SpikeGPTConfig, inputs: int, outputs: int) -> nn.Linear:
    return make_linear(inputs, outputs, bias=False, bits=config.weight_bits, packed=config.packed)


def _inner(config: SpikeGPTConfig) -> int:
    assert config.intermediate_size is not None  # noqa: S101  (set in __post_init__; tells the type checker)
    return config.intermediate_size


def _neuron(config: SpikeGPTConfig, wiring: str) -> LIFNode | None:
    """A neuron over tokens, or None where this model's wiring has none."""
    if not config.spiking or config.wiring != wiring:
        return None
    node = LIFNode(
        tau=float(config.tau),
        v_threshold=config.v_threshold,
        surrogate_function=config.surrogate,
        detach_reset=config.detach_reset,
        backend=config.neuron_backend,
        learnable_surrogate=config.learnable_surrogate,
    )
    node.over_tokens = True
    return node


def _fired(node: LIFNode | None, x: Tensor, state: State | None, name: str) -> Tensor:
    return x if node is None else fired(node, x, state, name)


def _per_channel(config: SpikeGPTConfig) -> nn.Parameter:
    return nn.Parameter(torch.empty(config.hidden_size))


class TimeMix(nn.Module):
    """A gated mean of past values, weighted by keys and age. Source: arXiv:2305.13048, section 3.1."""

    def __init__(self, config: SpikeGPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, size = layer, config.hidden_size
        self.time_decay, self.time_first = _per_channel(config), _per_channel(config)
        self.time_mix_key, self.time_mix_value = _per_channel(config), _per_channel(config)
        self.time_mix_receptance = _per_channel(config)
        self.key, self.value = _linear(config, size, size), _linear(config, size, size)
        self.receptance, self.output = _linear(config, size, size), _linear(config, size, size)
        self.wkv = WKV4("auto" if config.neuron_backend == "cupy" else config.neuron_backend)
        self.key_neuron, self.value_neuron = _neuron(config, "spike_driven"), _neuron(config, "spike_driven")
        self.receptance_neuron, self.output_neuron = _neuron(config, "spike_driven"), _neuron(config, "spike_driven")

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        """x [B, N, C] -> [B, N, C]; writes its part of the state."""
        before = shifted(x, state, "time_shift")
        mixed = (
            torch.lerp(before, x, mix) for mix in (self.time_mix_key, self.time_mix_value, self.time_mix_receptance)
        )
        key, value, receptance = mixed
        key = self.key(_fired(self.key_neuron, key, state, "time_mix.key_neuron"))
        value = self.value(_fired(self.value_neuron, value, state, "time_mix.value_neuron"))
        receptance = self.receptance(_fired(self.receptance_neuron, receptance, state, "time_mix.receptance_neuron"))
        sums = None if state is None else (state["numerator"], state["denominator"], state["maximum"])
        wide = torch.promote_types(self.time_decay.dtype, torch.float32)
        out, sums = self.wkv(-self.time_decay.to(wide).exp(), self.time_first, key, value, sums)
        if state is not None:
            state["numerator"], state["denominator"], state["maximum"] = sums
        out = torch.sigmoid(receptance) * out
        return self.output(_fired(self.output_neuron, out, state, "time_mix.output_neuron"))

    @torch.no_grad()
    def start(self, layers: int) -> None:
        """Values at which training starts, by the depth of the layer among `layers`."""
        size, share = len(self.time_decay), 1 - self.layer / layers
        depth = self.layer / max(layers - 1, 1)
        channel = torch.arange(size, dtype=torch.float32, device=self.time_decay.device)
        init.copy_(self.time_decay, -5 + 8 * (channel / max(size - 1, 1)) ** (0.7 + 1.3 * depth))
        init.copy_(self.time_first, math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
        init.copy_(self.time_mix_key, (channel / size) ** share)
        init.copy_(self.time_mix_value, (channel / size) ** share + 0.3 * depth)
        init.copy_(self.time_mix_receptance, (channel / size) ** (0.5 * share))
        _start(self.value, zero=(self.key, self.receptance), last=self.output, fed=self.output_neuron is not None)


class ChannelMix(nn.Module):
    """A gated layer of squared ReLUs over each token and the one before."""

    def __init__(self, config: SpikeGPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, size, inner = layer, config.hidden_size, _inner(config)
        self.time_mix_key, self.time_mix_receptance = _per_channel(config), _per_channel(config)
        self.key, self.value = _linear(config, size, inner), _linear(config, inner, size)
        self.receptance = _linear(config, size, size)
        self.key_neuron, self.receptance_neuron = _neuron(config, "spike_driven"), _neuron(config, "spike_driven")
        self.value_neuron = _neuron(config, "spike_driven")

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        """x [B, N, C] -> [B, N, C]; writes its part of the state."""
        before = shifted(x, state, "channel_shift")
        key, receptance = (torch.lerp(before, x, mix) for mix in (self.time_mix_key, self.time_mix_receptance))
        key = self.key(_fired(self.key_neuron, key, state, "channel_mix.key_neuron")).relu().square()
        receptance = self.receptance(_fired(self.receptance_neuron, receptance, state, "channel_mix.receptance_neuron"))
        return torch.sigmoid(receptance) * self.value(_fired(self.value_neuron, key, state, "channel_mix.value_neuron"))

    @torch.no_grad()
    def start(self, layers: int) -> None:
        """As in `TimeMix`."""
        size = len(self.time_mix_key)
        channel = torch.arange(size, dtype=torch.float32, device=self.time_mix_key.device)
        for mix in (self.time_mix_key, self.time_mix_receptance):
            init.copy_(mix, (channel / size) ** (1 - self.layer / layers))
        _start(self.key, zero=(self.receptance,), last=self.value, fed=self.value_neuron is not None)


def _start(orthogonal: nn.Linear, zero: tuple[nn.Linear, ...], last: nn.Linear, fed: bool) -> None:
    """fed: a neuron feeds the last layer; were that zero, a silent neuron would learn nothing, and neither would it."""
    if last.weight is None:  # packed
        return
    init.orthogonal_(orthogonal.weight, gain=math.sqrt(max(orthogonal.out_features / orthogonal.in_features, 1)))
    for linear in zero if fed else (*zero, last):
        init.zeros_(linear.weight)
    if fed:
        init.orthogonal_(last.weight, gain=0.1)


class SpikeGPTBlock(DecoderLayer):
    def __init__(self, config: SpikeGPTConfig, layer: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.time_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.time_mix = TimeMix(config, layer)
        self.time_neuron = _neuron(config, "published")
        self.channel_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.channel_mix = ChannelMix(config, layer)
        self.channel_neuron = _neuron(config, "published")
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        names = ["time_shift", "channel_shift", "numerator", "denominator", "maximum"]
        names += [name for name, module in self.named_modules() if isinstance(module, LIFNode)]
        self.rest = {name: ((size,), EMPTY if name == "maximum" else 0.0) for name in names}
        if self.channel_mix.value_neuron is not None:
            self.rest["channel_mix.value_neuron"] = ((_inner(config),), 0.0)

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State | None]:
        """x [B, N, C] and the state before it -> the same after it; the state that was given stays as it was."""
        state = None if state is None else dict(state)
        x = x + _fired(self.time_neuron, self.time_mix(self.time_norm(x), state), state, "time_neuron")
        x = x + _fired(self.channel_neuron, self.channel_mix(self.channel_norm(x), state), state, "channel_neuron")
        return self.dropout(x), state


class SpikeGPTPreTrainedModel(SpikingDecoderPreTrainedModel):
    config: SpikeGPTConfig
    base_model_prefix = "spikegpt"
    _no_split_modules = ["SpikeGPTBlock"]  # noqa: RUF012  (an instance variable in transformers)

    @property
    def spike_driven(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("*layers.*",) if self.config.spiking and self.config.wiring == "spike_driven" else ()

    @property
    def small_table(self) -> type[SignEmbedding] | None:
        """Rounding to int8 would move spikes."""
        return SignEmbedding if self.config.signs_suffice else None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the authors start: in their wiring nothing but embeddings fires before the first step of training."""
        config = self.config
        if isinstance(module, TimeMix | ChannelMix):
            module.start(config.num_hidden_layers)
        elif isinstance(module, nn.Embedding):
            init.orthogonal_(module.weight, gain=1e-4 * math.sqrt(max(config.vocab_size, config.hidden_size)))
        elif module is getattr(self, "lm_head", None):
            gain = 0.5 * math.sqrt(max(config.vocab_size / config.hidden_size, 1))
            init.orthogonal_(module.weight, gain=gain)
        else:
            super()._init_weights(module)


class SpikeGPTModel(SpikeGPTPreTrainedModel, SpikingDecoder):
    """The model without a head."""

    def __init__(self, config: SpikeGPTConfig) -> None:
        super().__init__(config)
        table = SignEmbedding if config.int8_embeddings else nn.Embedding
        self.embeddings = table(config.vocab_size, config.hidden_size)
        self.binarise: LIFNode | None = None
        if config.spiking and config.binary_embedding:
            self.binarise = LIFNode(v_threshold=0.0, backend=config.neuron_backend)
            self.binarise.tau = 1.0  # a bare step at zero (its constructor refuses 1); called with T = 1, all tokens
        self.pre_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(SpikeGPTBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def encode(self, x: Tensor) -> Tensor:
        if self.binarise is not None:
            x = self.binarise(x.unsqueeze(0), from_rest=True).squeeze(0).to(x.dtype)  # a norm follows, not a product
        return self.pre_norm(x)


class SpikeGPTForCausalLM(SpikeGPTPreTrainedModel, ForCausalLM):
    decoder_class = SpikeGPTModel


class SpikeGPTForSequenceClassification(SpikeGPTPreTrainedModel, ForSequenceClassification):
    decoder_class = SpikeGPTModel
