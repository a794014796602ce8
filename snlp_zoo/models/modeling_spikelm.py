"""SpikeLM: BERT with elastic bi-spiking (Xing et al. 2024, arXiv:2406.03287).

    ids -> embed -> repeat over T -> [attention -> MLP] * L -> mean over T -> pooler -> head
Spiking: the input of every linear layer, keys and values. Real, as in the paper: embeddings, queries, softmax, GELU,
LayerNorm, residual stream, pooler and heads.
Differs from the authors' code: amplitudes follow the data (theirs freeze at the first batch) and ignore padding; a
negative spike resets the membrane like a positive one. `reset="reference", alpha_mode="first_batch"` is theirs.
`neuron="lif"` has binary spikes in place of ternary ones, to compare with.
Shapes: T, B, N, D, H, E = D / H as in ops/lif/reference.py.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import can_return_tuple

from snlp_zoo.layers import Direct, SpikingLinear, make_neuron
from snlp_zoo.layers.firing import firing_rates_recorded
from snlp_zoo.layers.neurons import BaseNode, amplitudes_updated
from snlp_zoo.models.base import SpikingModelOutput
from snlp_zoo.models.configuration_spikelm import SpikeLMConfig
from snlp_zoo.models.encoder import (
    ForMaskedLM,
    ForSequenceClassification,
    SpikingEncoder,
    SpikingEncoderPreTrainedModel,
)
from snlp_zoo.ops.backend import product_dtype


def _neuron_options(config: SpikeLMConfig, share: float = 1.0) -> dict[str, Any]:
    """Arguments of a neuron; a binary one fires at this share of the model's threshold."""
    if config.neuron == "lif":
        threshold = share * config.v_threshold
        return {"tau": float(config.tau), "v_threshold": threshold, "backend": config.neuron_backend}
    return {
        "time_steps": config.time_steps,
        "firing_k": config.firing_k,
        "beta": config.membrane_beta,
        "reset": config.reset,
        "alpha_mode": config.alpha_mode,
        "momentum": config.alpha_momentum,
        "backend": config.neuron_backend,
    }


def _attended(config: SpikeLMConfig) -> BaseNode:
    """A neuron of keys or values, re-spiked so that both attention products are additions; memoryless if elastic."""
    changes = {"beta": 0.0} if config.neuron == "elastic" else {}
    return make_neuron(config.neuron, **_neuron_options(config) | changes)


def _linear(config: SpikeLMConfig, inputs: int, outputs: int, share: float = 1.0) -> SpikingLinear:
    kinds: dict[str, Any] = {"bits": config.weight_bits, "packed": config.packed, "neuron": config.neuron}
    return SpikingLinear(inputs, outputs, **kinds, **_neuron_options(config, share))


def _padding(mask: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """What all layers add to their scores: 0, or the least number where a key is padding, [TB, 1, 1, N]."""
    ignored = (mask == 0)[:, None, None, :].repeat(steps, 1, 1, 1)
    return torch.zeros_like(ignored, dtype=dtype).masked_fill(ignored, torch.finfo(dtype).min)


class SpikeLMAttention(nn.Module):
    """Softmax attention of real queries over spiking keys and values, with residual and norm."""

    def __init__(self, config: SpikeLMConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads, self.head_size = config.num_attention_heads, size // config.num_attention_heads
        self.query = _linear(config, size, size)
        self.key = _linear(config, size, size)
        self.value = _linear(config, size, size)
        self.key_spikes, self.value_spikes = _attended(config), _attended(config)
        # means of binary values never reach a threshold of 1
        self.output = _linear(config, size, size, share=0.5)
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.attention_dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_size)).transpose(-2, -3)  # [T, B, H, N, E]

    def forward(
        self, x: Tensor, mask: Tensor, padding: Tensor, want_probabilities: bool
    ) -> tuple[Tensor, Tensor | None]:
        query = self._heads(self.query(x, mask))
        key = self._heads(self.key_spikes(self.key(x, mask), from_rest=True, mask=mask))
        value = self._heads(self.value_spikes(self.value(x, mask), from_rest=True, mask=mask))
        # fused attention knows one batch axis: T and B together
        query, key, value = (y.flatten(0, 1) for y in (query, key, value))
        probabilities = None
        if want_probabilities:
            scores = query @ key.transpose(-1, -2) * self.head_size**-0.5 + padding
            probabilities = self.attention_dropout(scores.softmax(-1))
            context = probabilities @ value
            probabilities = probabilities.unflatten(0, x.shape[:2])  # [T, B, H, N, N]
        else:
            dropout = self.attention_dropout.p if self.training else 0.0
            context = scaled_dot_product_attention(query, key, value, padding, dropout)
        context = context.transpose(1, 2).flatten(2).unflatten(0, x.shape[:2])
        return self.norm(self.dropout(self.output(context, mask)) + x), probabilities


class SpikeLMMLP(nn.Module):
    """Two spiking linear layers with GELU between, with residual and norm."""

    def __init__(self, config: SpikeLMConfig) -> None:
        super().__init__()
        self.up = _linear(config, config.hidden_size, config.intermediate_size)
        self.down = _linear(config, config.intermediate_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.norm(self.dropout(self.down(nn.functional.gelu(self.up(x, mask)), mask)) + x)


class SpikeLMBlock(GradientCheckpointingLayer):
    def __init__(self, config: SpikeLMConfig) -> None:
        super().__init__()
        self.attention = SpikeLMAttention(config)
        self.mlp = SpikeLMMLP(config)

    def forward(
        self, x: Tensor, mask: Tensor, padding: Tensor, want_probabilities: bool
    ) -> tuple[Tensor, Tensor | None]:
        """x [T, B, N, D], mask [B, N] and what it adds to scores [TB, 1, 1, N] -> x [T, B, N, D], attention
        probabilities [T, B, H, N, N] if wanted.
        """
        x, probabilities = self.attention(x, mask, padding, want_probabilities)
        return self.mlp(x, mask), probabilities


class SpikeLMPreTrainedModel(SpikingEncoderPreTrainedModel):
    config: SpikeLMConfig
    base_model_prefix = "spikelm"
    _no_split_modules = ["SpikeLMBlock"]  # noqa: RUF012  (an instance variable in transformers)


class SpikeLMModel(SpikeLMPreTrainedModel, SpikingEncoder):
    """The encoder without a head."""

    def __init__(self, config: SpikeLMConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer)
        self.layers = nn.ModuleList(SpikeLMBlock(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_spike_rates: bool | None = None,
    ) -> SpikingModelOutput:
        """input_ids, attention_mask (1 for real tokens), token_type_ids [B, N] -> `SpikingModelOutput`."""
        want_attentions, want_hidden, want_rates = self.wanted(
            output_attentions, output_hidden_states, output_spike_rates
        )
        x, mask = self.embed(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        coding = Direct(self.config.time_steps)
        hidden_states, attentions = [x], []
        with amplitudes_updated(self), firing_rates_recorded(self, mask, want_rates) as rates:
            x = coding.encode(x)
            padding = _padding(mask, len(x), product_dtype(x))
            for layer in self.layers:
                x, probabilities = layer(x, mask, padding, want_attentions)
                if want_hidden:
                    hidden_states.append(coding.decode(x))
                if want_attentions:
                    attentions.append(coding.decode(probabilities))
        last = coding.decode(x)
        return SpikingModelOutput(
            last_hidden_state=last,
            pooler_output=self.pool(last, mask),
            hidden_states=tuple(hidden_states) if want_hidden else None,
            attentions=tuple(attentions) if want_attentions else None,
            **rates,
        )


class SpikeLMForSequenceClassification(SpikeLMPreTrainedModel, ForSequenceClassification):
    encoder_class = SpikeLMModel


class SpikeLMForMaskedLM(SpikeLMPreTrainedModel, ForMaskedLM):
    encoder_class = SpikeLMModel
