"""SpikingBERT: a spiking encoder trained at equilibrium (Bal and Sengupta 2024, arXiv:2308.10873).

    ids -> embed -> input neurons -> [attention -> MLP] * L -> average rate over T -> head
Every arrow between layers is spikes of integrate-and-fire neurons, except queries, which are real. Softmax, LayerNorm
and GELU sit inside a layer's current. The value of every output is an average spiking rate, measured over T steps
without gradient; its gradient is that of the steady state clip(current / v_threshold, 0, 1), so training memory does
not grow with T. With `feedback` the steady state is a fixed point, differentiated implicitly.
Differs from the authors' code: padding counts nowhere; dropout has one mask for simulation and steady state; feedback
works; the simulation goes layer by layer through chunks of T.
Shapes: T, B, N, D, H, E = D / H as in ops/lif/reference.py; [T, B, N, D] in the simulation, [B, N, D] at equilibrium.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import can_return_tuple

from snlp_zoo.layers import IFNode, LIFNode, make_linear
from snlp_zoo.layers.equilibrium import (
    CHUNK,
    AverageRate,
    Settling,
    Spikes,
    SteadyState,
    rate_neuron,
    rate_with_gradient,
)
from snlp_zoo.models.base import SpikingHeadOutput, SpikingModelOutput
from snlp_zoo.models.configuration_spikingbert import SpikingBertConfig
from snlp_zoo.models.encoder import (
    ForMaskedLM,
    ForSequenceClassification,
    SpikingEncoder,
    SpikingEncoderPreTrainedModel,
    SpikingHead,
)
from snlp_zoo.ops.implicit import fixed_point

Fire = Spikes | SteadyState


def _neuron(config: SpikingBertConfig) -> IFNode | LIFNode:
    return rate_neuron(config.v_threshold, config.leak, config.neuron_backend)


def _linear(config: SpikingBertConfig, inputs: int, outputs: int) -> nn.Linear:
    return make_linear(inputs, outputs, bits=config.weight_bits, packed=config.packed)


class Feedback(nn.Linear):
    """From the last layer's spikes to the input neurons. Starts at zero: large weights have no stable equilibrium."""


class SpikingBertAttention(nn.Module):
    """Attention of real queries over spiking keys and values, then projection, residual, norm and neuron."""

    def __init__(self, config: SpikingBertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads, self.head_size = config.num_attention_heads, size // config.num_attention_heads
        self.softmax = config.attention == "softmax"
        self.query, self.key, self.value, self.output = (_linear(config, size, size) for _ in range(4))
        self.key_neuron, self.value_neuron = _neuron(config), _neuron(config)
        self.context_neuron, self.output_neuron = _neuron(config), _neuron(config)
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.attention_dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_size)).transpose(-2, -3)  # [..., B, H, N, E]

    def forward(
        self, x: Tensor, mask: Tensor, fire: Fire, want_scores: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        query, key = self._heads(self.query(x)), self._heads(fire(self.key_neuron, self.key(x)))
        value = self._heads(fire(self.value_neuron, self.value(x)))
        context, scores, probabilities = self._attend(query, key, value, mask, fire, want_scores)
        context = fire(self.context_neuron, context.transpose(-2, -3).flatten(-2))
        current = self.norm(fire.drop(self.dropout, self.output(context)) + x)
        return fire(self.output_neuron, current), scores, probabilities

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, fire: Fire, want_scores: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ignored = (mask == 0)[:, None, None, :]  # [B, 1, 1, N]
        dropped = self.training and self.attention_dropout.p > 0
        if self.softmax and not (want_scores or dropped):
            padding = torch.zeros_like(ignored, dtype=query.dtype).masked_fill(ignored, torch.finfo(query.dtype).min)
            # fused attention knows one batch axis: T and B together
            lead = query.shape[:-3]
            padding = padding.expand(*lead, *padding.shape[1:]).flatten(0, -4)
            q, k, v = (y.flatten(0, -4) for y in (query, key, value))
            return scaled_dot_product_attention(q, k, v, padding).unflatten(0, lead), None, None
        scores = query @ key.transpose(-1, -2) * self.head_size**-0.5
        if self.softmax:
            probabilities = scores.masked_fill(ignored, torch.finfo(scores.dtype).min).softmax(-1)
        else:
            probabilities = scores.masked_fill(ignored, 0) / mask.sum(1).clamp_min(1)[:, None, None, None]
        return fire.drop(self.attention_dropout, probabilities) @ value, scores, probabilities


class SpikingBertMLP(nn.Module):
    """Two linear layers, each followed by its neuron; residual and norm inside the second one's current."""

    def __init__(self, config: SpikingBertConfig) -> None:
        super().__init__()
        self.up = _linear(config, config.hidden_size, config.intermediate_size)
        self.down = _linear(config, config.intermediate_size, config.hidden_size)
        self.up_neuron, self.down_neuron = _neuron(config), _neuron(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, fire: Fire) -> Tensor:
        hidden = fire(self.up_neuron, gelu(self.up(x)))
        return fire(self.down_neuron, self.norm(fire.drop(self.dropout, self.down(hidden)) + x))


class SpikingBertBlock(GradientCheckpointingLayer):
    def __init__(self, config: SpikingBertConfig) -> None:
        super().__init__()
        self.attention = SpikingBertAttention(config)
        self.mlp = SpikingBertMLP(config)

    def forward(
        self, x: Tensor, mask: Tensor, fire: Fire, want_scores: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Spikes or rates x [..., B, N, D] -> the same, attention scores and weights [..., B, H, N, N] if wanted."""
        x, scores, probabilities = self.attention(x, mask, fire, want_scores)
        return self.mlp(x, fire), scores, probabilities


class SpikingBertPreTrainedModel(SpikingEncoderPreTrainedModel):
    config: SpikingBertConfig
    base_model_prefix = "spikingbert"
    _no_split_modules = ["SpikingBertBlock"]  # noqa: RUF012  (an instance variable in transformers)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Feedback):
            init.zeros_(module.weight)


class Simulated(NamedTuple):
    """What a simulation measured: rates (L + 1 times [B, N, D], input neurons first), steps used [B], FiringRates."""

    rates: list[Tensor]
    steps_used: Tensor
    fire: Spikes


class SpikingBertModel(SpikingBertPreTrainedModel, SpikingEncoder):
    """The encoder without a head. There is no pooler: heads read the first token's rates."""

    def __init__(self, config: SpikingBertConfig, add_pooling_layer: bool = False) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.input_neuron = _neuron(config)
        self.layers = nn.ModuleList(SpikingBertBlock(config) for _ in range(config.num_hidden_layers))
        self.feedback = Feedback(config.hidden_size, config.hidden_size, bias=False) if config.feedback else None
        self.post_init()

    def pool(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, N, D] -> [B, D], each text's first real token as it is."""
        return self.first_token(x, mask)

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
        output_attention_scores: bool = False,
        time_steps: int | None = None,
        early_exit: float | None = None,
        predict: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> SpikingModelOutput:
        """input_ids, attention_mask (1 for real tokens), token_type_ids [B, N] -> `SpikingModelOutput`.

        Args:
            output_attention_scores: return the scores before the softmax; scores and attentions are the steady state's.
            time_steps: T of this call, the configuration's t_conv if None.
            early_exit: a tolerance: stop each text when its prediction has settled (`layers.equilibrium.Settling`),
                at the latest after T steps; `steps_used` says when.
            predict: (last_hidden_state, attention_mask) -> [B, ...], what has to settle; the pooled rates if None.
        """
        want_attentions, want_hidden, want_rates = self.wanted(
            output_attentions, output_hidden_states, output_spike_rates
        )
        current, mask = self.embed(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        steps = self.config.time_steps if time_steps is None else time_steps
        if steps < 1:
            raise ValueError(f"spikingbert: time_steps must be at least 1, got {steps}")
        masks: dict[nn.Module, Tensor] = {}
        with torch.no_grad():
            settling = None if early_exit is None else Settling(early_exit)
            simulated = self.simulate(current, mask, steps, masks, want_rates, settling, predict or self.pool)
        states = simulated.rates
        scores: list[Tensor] = []
        attentions: list[Tensor] = []
        want_scores = want_attentions or output_attention_scores
        if torch.is_grad_enabled() or want_scores:
            steady, scores, attentions = self._equilibrium(current, mask, masks, states[-1], want_scores)
            states = [rate_with_gradient(rate, y) for rate, y in zip(states, steady, strict=True)]
        return SpikingModelOutput(
            last_hidden_state=states[-1],
            pooler_output=self.pool(states[-1], mask),
            hidden_states=tuple(states) if want_hidden else None,
            attentions=tuple(attentions) if want_attentions else None,
            attention_scores=tuple(scores) if output_attention_scores else None,
            steps_used=None if early_exit is None else simulated.steps_used,
            **(simulated.fire.rates.result() if want_rates else {}),
        )

    def simulate(
        self,
        current: Tensor,
        mask: Tensor,
        steps: int,
        masks: dict[nn.Module, Tensor],
        want_rates: bool,
        settling: Settling | None,
        predict: Callable[[Tensor, Tensor], Tensor],
    ) -> Simulated:
        """Run the spiking network for up to `steps` steps on the constant current [B, N, D]."""
        names = {module: name for name, module in self.named_modules()} if want_rates else None
        fire = Spikes(masks, mask, self.config.v_init, names)
        rates = [AverageRate(self.config.leak) for _ in range(len(self.layers) + 1)]
        # with feedback the input of a step is the step before; to exit early every step is looked at
        chunk = 1 if self.feedback is not None or settling else CHUNK
        going, kept = torch.arange(len(current), device=current.device), None
        used, last = torch.full_like(going, steps), None
        for start in range(0, steps, chunk):
            size = min(chunk, steps - start)
            drive = current if self.feedback is None or last is None else current + self.feedback(last[-1])
            x = fire(self.input_neuron, drive.expand(size, *drive.shape))
            rates[0].add(x)
            for rate, layer in zip(rates[1:], self.layers, strict=True):
                x, *_ = layer(x, fire.mask, fire)
                rate.add(x)
            last = x
            if settling is None:
                continue
            now = rates[-1].value
            done = settling.update(predict(now.to(current.dtype), fire.mask), now.flatten(1).any(1))
            if start + size == steps:
                done = torch.ones_like(done)
            if done.any():
                kept = self._leave(rates, kept, going[done], done, len(mask))
                used[going[done]] = start + size
                going, current, last = going[~done], current[~done], last[:, ~done]
                fire.keep(~done)
                settling.keep(~done)
            if not len(going):
                break
        values = kept or [rate.value for rate in rates]
        return Simulated([value.to(current.dtype) for value in values], used, fire)

    @staticmethod
    def _leave(
        rates: list[AverageRate], kept: list[Tensor] | None, rows: Tensor, done: Tensor, batch: int
    ) -> list[Tensor]:
        """Write the rates of the examples that are done to their rows of `kept`, and go on without them."""
        values = [rate.value for rate in rates]
        kept = kept or [value.new_zeros(batch, *value.shape[1:]) for value in values]
        for rate, value, target in zip(rates, values, kept, strict=True):
            target[rows] = value[done]
            rate.total = rate.total[~done]
        return kept

    def _equilibrium(
        self, current: Tensor, mask: Tensor, masks: dict[nn.Module, Tensor], start: Tensor, want_scores: bool
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Steady rates (L + 1 times [B, N, D]), attention scores and weights of each layer, all with gradients."""
        fire = SteadyState(masks)

        def run(last: Tensor | None, want_scores: bool) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
            drive = current if last is None or self.feedback is None else current + self.feedback(last)
            states, scores, attentions = [fire(self.input_neuron, drive)], [], []
            for layer in self.layers:
                x, score, probabilities = layer(states[-1], mask, fire, want_scores)
                states.append(x)
                scores.append(score)
                attentions.append(probabilities)
            return states, scores, attentions

        if self.feedback is None:
            return run(None, want_scores)
        equilibrium = fixed_point(
            lambda last: run(last, False)[0][-1],
            start,
            max_iter=self.config.max_iter,
            tol=self.config.tolerance,
            name="spikingbert feedback",
        )
        return run(equilibrium.value, want_scores)


class _Head(SpikingHead):
    """What both heads add to the shared one: time_steps and early_exit."""

    def predict(self, last: Tensor, mask: Tensor) -> Tensor:
        """What has to settle for an early exit: class probabilities, or the value for regression, [B, ...]."""
        pooled = cast(SpikingBertModel, self.base_model).pool(last, mask)
        encoded = SpikingModelOutput(last_hidden_state=last, pooler_output=pooled)
        logits = self.logits(encoded).float()
        if logits.ndim == 3:
            logits = logits.masked_fill((mask == 0).unsqueeze(-1), 0)
        return logits if logits.shape[-1] == 1 else logits.softmax(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_spike_rates: bool | None = None,
        output_attention_scores: bool = False,
        time_steps: int | None = None,
        early_exit: float | None = None,
    ) -> SpikingHeadOutput:
        """input_ids, attention_mask, token_type_ids, position_ids [B, N] -> `SpikingHeadOutput`.

        labels as in `SpikingHead`; the other arguments as in `SpikingBertModel`.
        """
        encoded = self.base_model(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            output_spike_rates,
            output_attention_scores,
            time_steps,
            early_exit,
            self.predict,
            return_dict=True,
        )
        return self.head_output(encoded, labels)


class SpikingBertForSequenceClassification(SpikingBertPreTrainedModel, _Head, ForSequenceClassification):
    encoder_class = SpikingBertModel


class SpikingBertForMaskedLM(SpikingBertPreTrainedModel, _Head, ForMaskedLM):
    encoder_class = SpikingBertModel
