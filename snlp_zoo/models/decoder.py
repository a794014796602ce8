"""What the causal families share: padding and state around their layers, heads, `generate()`.

    ids -> embed -> layers -> norm -> head
A layer remembers nothing but the state that it takes and returns, and knows nothing of padding: see `pieces`.
Shapes: B, N, D as in ops/lif/reference.py.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import can_return_tuple

from snlp_zoo.layers.firing import firing_rates_recorded
from snlp_zoo.layers.quant import SignEmbedding
from snlp_zoo.models.base import SpikingHeadOutput, SpikingModelOutput, SpikingPreTrainedModel
from snlp_zoo.models.cache import SpikingCache, State
from snlp_zoo.models.configuration import SpikingDecoderConfig

MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)
Piece = tuple[slice, Tensor | None]
WHOLE: list[Piece] = [(slice(None), None)]


def captured(x: Tensor) -> bool:
    """Whether what is done to x becomes part of a CUDA graph, so that no value can be looked at."""
    return x.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def pieces(mask: Tensor | None, carry: bool) -> list[Piece]:
    """A batch of texts cut where the padding of any of them begins or ends, so that padding can freeze every state.

    Args:
        mask: [B, N], 1 for real tokens; None: no padding.
        carry: the state after the last token is wanted. If not, padding that nothing real follows does no harm.
    Returns:
        For each piece its columns and which texts are real there, [B]; None: no state needs to be kept from it.
    A CUDA graph cannot look at the mask: captured, the batch must need no cut, else the device stops with an error.
    """
    if mask is None:
        return WHOLE
    real = mask.bool()
    uncut = real.all() if carry else ~(real[:, 1:] & ~real[:, :-1]).any()
    if captured(mask):
        torch._assert_async(uncut, "in a CUDA graph padding must be on the right, and nowhere before a cache")
        return WHOLE
    if uncut:  # on a GPU this waits for the device, once per forward
        return WHOLE
    edges = (real[:, 1:] != real[:, :-1]).any(0).nonzero().flatten() + 1
    return [(slice(start, end), real[:, start]) for start, end in pairwise([0, *edges.tolist(), real.shape[1]])]


class DecoderLayer(GradientCheckpointingLayer):
    """layer(x [B, N, D], state) -> x, state after it; the state that is given stays as it was.

    rest: the state before the first token: name -> (shape without B, value). Called with None, a layer starts there and
    returns None.
    """

    rest: dict[str, tuple[tuple[int, ...], float]]

    def at_rest(self, x: Tensor) -> State:
        """The state before x [B, N, D], in float32 or what is wider."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return {name: x.new_full((len(x), *shape), value, dtype=dtype) for name, (shape, value) in self.rest.items()}

    def run(self, x: Tensor, state: State | None, cut: list[Piece]) -> tuple[Tensor, State | None]:
        """The layer itself, except that padding leaves the state as it was."""
        if cut is WHOLE or state is None:
            return self(x, state)
        parts = []
        for columns, real in cut:
            part, after = self(x[:, columns], state)
            state = {name: _where(real, after[name], kept) for name, kept in state.items()}
            parts.append(part)
        return torch.cat(parts, 1), state


def _where(real: Tensor | None, new: Tensor, kept: Tensor) -> Tensor:
    """new in the texts that are real, [B], kept in the others."""
    return new if real is None else torch.where(real.view(-1, *(1,) * (new.ndim - 1)), new, kept)


class SpikingDecoderPreTrainedModel(SpikingPreTrainedModel):
    """Base of every class of a causal family."""

    config: SpikingDecoderConfig
    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() then leaves making the cache to forward


class SpikingDecoder(SpikingDecoderPreTrainedModel):
    """A causal model without a head; subclasses set `embeddings`, `layers`, `norm`, and may change `encode`."""

    embeddings: nn.Embedding | SignEmbedding
    layers: nn.ModuleList
    norm: nn.Module

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.embeddings = value

    def encode(self, x: Tensor) -> Tensor:
        """Embeddings [B, N, D] -> what enters the first layer, [B, N, D]."""
        return x

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: SpikingCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_spike_rates: bool | None = None,
    ) -> SpikingModelOutput:
        """input_ids [B, N] or inputs_embeds [B, N, D], of any length -> `SpikingModelOutput`.

        Padding, wherever it stands, changes no state and no real token's output; its own outputs mean nothing. On a CPU
        ids are checked; on a GPU only those of a prompt, because looking at them waits for the device.

        Args:
            attention_mask: 1 for real tokens, [B, N] or, after `past_key_values`, [B, tokens read + N].
            past_key_values: state to read on from; it stays as it was.
            use_cache: return the state after the last token; None: as configured, but never while training.
        Raises:
            ValueError: no tokens, an id out of range, or a mask or a state that does not fit.
        """
        config = self.config
        want_hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        want_rates = config.output_spike_rates if output_spike_rates is None else output_spike_rates
        if past_key_values is not None and not isinstance(past_key_values, SpikingCache):
            raise ValueError(f"past_key_values must be a SpikingCache, got a {type(past_key_values).__name__}")
        carry = config.use_cache and not self.training if use_cache is None else use_cache
        x = self._embed(input_ids, inputs_embeds, past_key_values)
        mask = self._mask(attention_mask, x, past_key_values)
        cut = pieces(mask, carry)
        states = self._states(past_key_values, x, carry or cut is not WHOLE)
        seen = past_key_values.seen if past_key_values is not None else 0
        mask = torch.ones(x.shape[:2], dtype=torch.long, device=x.device) if mask is None and want_rates else mask
        hidden_states, after = [], []
        with firing_rates_recorded(self, mask, want_rates) as rates:  # type: ignore[arg-type]
            x = self.encode(x)
            for layer, state in zip(self._layers(), states, strict=True):
                if want_hidden:
                    hidden_states.append(x)
                x, state = layer.run(x, state, cut)
                after.append(state)
        last = self.norm(x)
        return SpikingModelOutput(
            last_hidden_state=last,
            hidden_states=(*hidden_states, last) if want_hidden else None,
            past_key_values=SpikingCache(after, seen + x.shape[1]) if carry else None,  # type: ignore[arg-type]
            **rates,
        )

    def _embed(self, ids: Tensor | None, embeds: Tensor | None, past: SpikingCache | None) -> Tensor:
        look = (
            ids is not None
            and not (captured(ids) or torch.compiler.is_compiling())
            and (ids.device.type == "cpu" or not (self.training or past))
        )
        given = self.read(ids, embeds, look)
        return given if ids is None else self.embeddings(ids)

    def _mask(self, mask: Tensor | None, x: Tensor, past: SpikingCache | None) -> Tensor | None:
        """attention_mask of the tokens in x alone, [B, N]."""
        if mask is None:
            return None
        (batch, length), seen = x.shape[:2], past.seen if past is not None else 0
        if mask.shape not in ((batch, length), (batch, seen + length)):
            longer = f" or [B, read + N] = {(batch, seen + length)}" if seen else ""
            raise ValueError(f"attention_mask must be [B, N] = {(batch, length)}{longer}, got {tuple(mask.shape)}")
        return mask[:, -length:]

    def _layers(self) -> list[DecoderLayer]:
        return list(self.layers)  # type: ignore[arg-type]

    def _states(self, past: SpikingCache | None, x: Tensor, needed: bool) -> Sequence[State | None]:
        """Every layer's state before the first token of x: that of the cache, or at rest; None where none is needed."""
        if past is None or not past.states:
            return [layer.at_rest(x) if needed else None for layer in self._layers()]
        layers = dict(enumerate(self._layers()))
        wanted = {f"{i}.{name}": [len(x), *shape] for i in layers for name, (shape, _) in layers[i].rest.items()}
        found = {f"{i}.{name}": [*kept.shape] for i, state in enumerate(past.states) for name, kept in state.items()}
        if wanted != found:
            name = next(name for name in wanted | found if wanted.get(name) != found.get(name))
            raise ValueError(
                f"{type(self).__name__}: the state in past_key_values is that of another model or batch: its layers."
                f"{name} is {found.get(name, 'missing')}, here {wanted.get(name, 'there is none')}; start without it, "
                "or repeat it for as many texts (batch_repeat_interleave)"
            )
        return past.states


class SpikingDecoderHead(SpikingDecoderPreTrainedModel):
    """A causal model and what reads its output."""

    decoder_class: ClassVar[type[SpikingDecoder]]

    def __init__(self, config: SpikingDecoderConfig) -> None:
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.decoder_class(config))

    def head_output(self, decoded: SpikingModelOutput, logits: Tensor, loss: Tensor | None) -> SpikingHeadOutput:
        passed_on = {key: value for key, value in decoded.items() if key != "last_hidden_state"}
        return SpikingHeadOutput(loss=loss, logits=logits, **passed_on)


class ForCausalLM(SpikingDecoderHead, GenerationMixin):
    """Language modelling: logits of every next token."""

    def __init__(self, config: SpikingDecoderConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._tied_weights_keys = {"lm_head.weight": f"{cls.base_model_prefix}.embeddings.weight"}

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.lm_head = new_embeddings

    def _get_deprecated_gen_repo(self, generation_mode: GenerationMode, *args: Any, **kwargs: Any) -> None:
        """The first question of `generate()`; transformers' own would send other modes to code on the Hub."""
        if generation_mode not in MODES:
            asked, *known = (mode.value.replace("_", " ") for mode in (generation_mode, *MODES))
            raise ValueError(f"{type(self).__name__} cannot generate by {asked}; use one of {', '.join(known)}")

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: SpikingCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_spike_rates: bool | None = None,
        logits_to_keep: int = 0,
    ) -> SpikingHeadOutput:
        """As `SpikingDecoder.forward`; logits [B, N, V].

        Args:
            labels: [B, N], the ids themselves: logits of a real token are compared with the next label; -100 counts
                nothing.
            logits_to_keep: compute logits of that many last tokens only; 0: of all, which labels need.
        Raises:
            ValueError: logits_to_keep is negative, or given with labels.
        """
        if logits_to_keep < 0 or (logits_to_keep and labels is not None):
            raise ValueError(f"logits_to_keep must be at least 0, and 0 with labels, got {logits_to_keep}")
        decoded = self.base_model(
            input_ids,
            attention_mask,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            output_spike_rates,
            return_dict=True,
        )
        logits = self.lm_head(decoded.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            if attention_mask is not None:  # outputs of padding mean nothing: they predict no token
                before = nn.functional.pad(attention_mask[:, -labels.shape[1] :], (1, -1))
                labels = labels.masked_fill(before == 0, -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        return self.head_output(decoded, logits, loss)


class ForSequenceClassification(SpikingDecoderHead):
    """Classification or regression of whole texts; one label is regression, as in transformers."""

    def __init__(self, config: SpikingDecoderConfig) -> None:
        super().__init__(config)
        dropout = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)
        self.classifier = nn.Linear(config.hidden_size, len(config.label_names))
        self.post_init()

    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, N, D], mask [B, N] -> [B, D]: the mean of each text's real tokens, or the last of them."""
        real = x.new_ones(x.shape[:2], dtype=torch.long) if mask is None else mask.long()
        if self.config.classifier_pooling == "last":
            last = (real * torch.arange(1, x.shape[1] + 1, device=x.device)).argmax(1)
            return x[torch.arange(len(x), device=x.device), last]
        return (x * real.unsqueeze(-1).to(x.dtype)).sum(1) / real.sum(1, keepdim=True).clamp_min(1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_spike_rates: bool | None = None,
    ) -> SpikingHeadOutput:
        """input_ids, attention_mask [B, N] -> `SpikingHeadOutput`; labels: [B] classes, or numbers for regression."""
        decoded = self.base_model(
            input_ids,
            attention_mask,
            None,
            inputs_embeds,
            False,
            output_hidden_states,
            output_spike_rates,
            return_dict=True,
        )
        logits = self.classifier(self.dropout(self.pool(decoded.last_hidden_state, attention_mask)))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return self.head_output(decoded, logits, loss)
