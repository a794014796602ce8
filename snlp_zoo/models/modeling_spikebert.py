"""SpikeBERT: a Spikformer encoder for text (Lv et al. 2023, arXiv:2308.15122).

    ids -> embed -> binarise -> repeat over T -> [attention -> MLP] * L -> norm -> means over T and N -> head
Every linear layer is followed by a norm and a neuron, so attention and MLP give spikes; the residual stream sums them:
after l blocks its entries are whole numbers from 0 (of ternary spikes from -2 l) to 1 + 2 l. No softmax, no GELU. Real:
norms, last norm, head.
Differs from the authors' code: padding neither attends nor is pooled, and positions are learned, added before the
embeddings become spikes; small embeddings to start with, so that their signs can change. `fidelity="released"` is
theirs.
Shapes: T, B, N, D, H, E = D / H as in ops/lif/reference.py.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import can_return_tuple

from snlp_zoo.layers import Direct, LIFNode, make_attention, make_linear, make_neuron
from snlp_zoo.layers.attention import MakeLinear, SpikingProjection, SpikingSelfAttention
from snlp_zoo.layers.firing import firing_rates_recorded
from snlp_zoo.layers.neurons import BaseNode
from snlp_zoo.models.base import SpikingModelOutput
from snlp_zoo.models.configuration_spikebert import SpikeBertConfig
from snlp_zoo.models.encoder import (
    ForMaskedLM,
    ForSequenceClassification,
    SpikingEncoder,
    SpikingEncoderPreTrainedModel,
)


def _linear(config: SpikeBertConfig) -> MakeLinear:
    return partial(make_linear, bits=config.weight_bits, packed=config.packed)


def _neuron(config: SpikeBertConfig, share: float, feeds_linear: bool = False) -> BaseNode:
    """A neuron that fires at this share of the model's threshold.

    The residual stream counts spikes, and attention multiplies them: only where a linear layer takes them alone may a
    ternary amplitude be learned, and later be folded into its weights.
    """
    options: dict[str, Any] = {
        "v_threshold": share * config.v_threshold,
        "surrogate_function": config.surrogate,
        "learnable_surrogate": config.learnable_surrogate,
        "backend": config.neuron_backend,
    }
    tau = {"lif": "tau", "ternary": "tau", "plif": "init_tau"}.get(config.neuron)
    if tau:
        options[tau] = float(config.tau)
    if config.neuron == "ternary":
        options["learn_amplitude"] = feeds_linear
    return make_neuron(config.neuron, **options)


def _projection(config: SpikeBertConfig, inputs: int, outputs: int, feeds_linear: bool = False) -> SpikingProjection:
    neuron = partial(_neuron, config, feeds_linear=feeds_linear)
    return SpikingProjection(inputs, outputs, _linear(config), neuron, config.layer_norm_eps)


class SpikeBertEmbeddings(nn.Module):
    """Word and, unless switched off, position embeddings: the currents that become the first spikes."""

    def __init__(self, config: SpikeBertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size)
        positions = nn.Embedding(config.max_position_embeddings, size) if config.use_position_embeddings else None
        self.position_embeddings = positions

    def forward(
        self, input_ids: Tensor | None, token_type_ids: Tensor, position_ids: Tensor, inputs_embeds: Tensor | None
    ) -> Tensor:
        """ids [B, N] or embeddings [B, N, D] -> [B, N, D]; token types are not used."""
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        return x if self.position_embeddings is None else x + self.position_embeddings(position_ids)


class SpikeBertMLP(nn.Module):
    """Two projections to spikes, D -> F -> D."""

    def __init__(self, config: SpikeBertConfig) -> None:
        super().__init__()
        self.up = _projection(config, config.hidden_size, config.intermediate_size, feeds_linear=True)
        self.down = _projection(config, config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class SpikeBertBlock(GradientCheckpointingLayer):
    def __init__(self, config: SpikeBertConfig) -> None:
        super().__init__()
        mixed = partial(_neuron, config, feeds_linear=True)
        attention = make_attention(config.attention, config.num_attention_heads, mixed)
        options = (_linear(config), partial(_neuron, config), config.layer_norm_eps)
        self.attention = SpikingSelfAttention(config.hidden_size, attention, *options)
        self.mlp = SpikeBertMLP(config)

    def forward(self, x: Tensor, mask: Tensor | None, want_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Counts of spikes x [T, B, N, D], mask [B, N] -> the same, attention weights [T, B, H, N, N] if wanted."""
        spikes, weights = self.attention(x, mask, want_weights)
        x = x + spikes
        return x + self.mlp(x), weights


class MaskedMean(nn.Module):
    """Mean over the tokens of each text."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, N, D], mask [B, N] -> [B, D]; zeros where there is no token."""
        tokens = mask.sum(1, keepdim=True).clamp_min(1)  # a whole number: bfloat16 would round it above 256
        return (x * mask.unsqueeze(-1).to(x.dtype)).sum(1) / tokens


class SpikeBertPreTrainedModel(SpikingEncoderPreTrainedModel):
    config: SpikeBertConfig
    base_model_prefix = "spikebert"
    _no_split_modules = ["SpikeBertBlock"]  # noqa: RUF012  (an instance variable in transformers)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            init.normal_(
                module.weight, std=1.0 if self.config.fidelity == "released" else self.config.initializer_range
            )
        else:
            super()._init_weights(module)


class SpikeBertModel(SpikeBertPreTrainedModel, SpikingEncoder):
    """The encoder without a head; pooler_output is the mean over real tokens."""

    embeddings_class = SpikeBertEmbeddings

    def __init__(self, config: SpikeBertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.pooler = MaskedMean() if add_pooling_layer else None
        self.binarise = LIFNode(v_threshold=0.0, backend=config.neuron_backend)
        self.binarise.tau = 1.0  # keeps nothing from step to step: a bare step at zero (its constructor refuses 1)
        self.layers = nn.ModuleList(SpikeBertBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def pool(self, x: Tensor, mask: Tensor) -> Tensor | None:
        """x [B, N, D] -> [B, D]."""
        return None if self.pooler is None else self.pooler(x, mask)

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
        """input_ids, attention_mask (1 for real tokens), token_type_ids [B, N] -> `SpikingModelOutput`.

        attentions are what multiplies the values, counts times a factor and no probabilities; the last hidden state is
        the only one that is normalised.
        """
        want_attentions, want_hidden, want_rates = self.wanted(
            output_attentions, output_hidden_states, output_spike_rates
        )
        x, mask = self.embed(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        coding = Direct(self.config.time_steps)
        attending = None if self.config.fidelity == "released" else mask
        hidden_states, attentions = [], []
        with firing_rates_recorded(self, mask, want_rates) as rates:
            x = self.binarise(coding.encode(x), from_rest=True)
            for layer in self.layers:
                if want_hidden:
                    hidden_states.append(coding.decode(x))
                x, weights = layer(x, attending, want_attentions)
                if want_attentions:
                    attentions.append(coding.decode(weights))
        last = coding.decode(self.norm(x))
        return SpikingModelOutput(
            last_hidden_state=last,
            pooler_output=self.pool(last, torch.ones_like(mask) if attending is None else mask),
            hidden_states=(*hidden_states, last) if want_hidden else None,
            attentions=tuple(attentions) if want_attentions else None,
            **rates,
        )


class SpikeBertForSequenceClassification(SpikeBertPreTrainedModel, ForSequenceClassification):
    encoder_class = SpikeBertModel


class SpikeBertForMaskedLM(SpikeBertPreTrainedModel, ForMaskedLM):
    encoder_class = SpikeBertModel
