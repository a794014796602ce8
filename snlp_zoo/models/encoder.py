"""What the BERT-like families share: embeddings and pooler, starting from a dense teacher, heads.

Shapes: T, B, N, D, H as in ops/lif/reference.py. T lives inside a model only; every output is averaged over it.
"""

import logging
from dataclasses import fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLMPredictionHead, BertOnlyMLMHead, BertPooler
from transformers.utils.generic import can_return_tuple

from snlp_zoo.layers.quant import Int8Embedding, small_tables
from snlp_zoo.models.base import SpikingHeadOutput, SpikingModelOutput, SpikingPreTrainedModel
from snlp_zoo.models.configuration import SpikingEncoderConfig, make_config
from snlp_zoo.models.transfer import TransferReport, bert_name, by_short_name, copy_weights, short_name, spread_layers

logger = logging.getLogger(__name__)


class SpikingEncoderPreTrainedModel(SpikingPreTrainedModel):
    """Base of every class of a BERT-like family: initialisation, `from_teacher`."""

    config: SpikingEncoderConfig
    transfer_report: TransferReport | None = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BertLMPredictionHead):
            init.zeros_(module.bias)
        elif isinstance(module, BertEmbeddings):
            init.copy_(module.position_ids, torch.arange(module.position_ids.shape[-1]).expand((1, -1)))
            init.zeros_(module.token_type_ids)

    @classmethod
    def from_teacher(cls, teacher: PreTrainedModel, **config: Any) -> Self:
        """A student that starts from a dense teacher's weights wherever the shapes allow.

        Args:
            teacher: a BERT-like encoder, with or without a head.
            config: fields of the student's configuration; what is not given is taken from the teacher.
        Returns:
            The student, in float32. `student.transfer_report` lists what was copied and what was not; the second list
            is logged as a warning too. A shallower student takes evenly spread layers.
        Raises:
            ValueError: unknown configuration field, or a teacher none of whose layers fits.
        """
        config_class: Any = cls.config_class
        shared = {f.name for f in fields(config_class)} & {f.name for f in fields(SpikingEncoderConfig)}
        shared -= {"hidden_dropout_prob", "attention_probs_dropout_prob", "output_spike_rates", "time_steps"}
        shared -= {"weight_bits", "packed", "int8_embeddings"}
        if config.keys() & {"num_labels", "id2label", "label2id"}:  # neither the teacher's names nor its loss fit
            shared -= {"id2label", "label2id", "problem_type"}
        inherited = {name: getattr(teacher.config, name) for name in shared if hasattr(teacher.config, name)}
        student = cls(make_config(config_class, **(inherited | config)))
        student.copy_from(teacher)
        return student

    def copy_from(self, teacher: PreTrainedModel) -> TransferReport:
        """Copy a BERT-like teacher's weights in place; `from_teacher` without making the student.

        Raises:
            ValueError: none of its layers fits.
        """
        layers = spread_layers(self.config.num_hidden_layers, teacher.config.num_hidden_layers)
        report = self.transfer_report = copy_weights(
            dict(self.named_parameters()),
            by_short_name(teacher),
            lambda name: bert_name(short_name(self, name), layers),
        )
        if not any(short_name(self, name).startswith("layers.") for name in report.copied):
            raise ValueError(f"no layer of the teacher ({type(teacher).__name__}) fits {type(self).__name__}")
        if report.not_copied:
            reasons = "; ".join(f"{name} ({why})" for name, why in report.not_copied.items())
            logger.warning("not copied from the teacher: %s", reasons)
        return report


class SpikingEncoder(SpikingEncoderPreTrainedModel):
    """A text encoder with BERT's embeddings and pooler around spiking layers; subclasses set `self.layers`."""

    embeddings_class: ClassVar[Any] = BertEmbeddings

    def __init__(self, config: SpikingEncoderConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = self.embeddings_class(config)
        if config.int8_embeddings:
            small_tables(self.embeddings, Int8Embedding, filled=False)
        self.pooler: nn.Module | None = BertPooler(config) if add_pooling_layer else None

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value

    def pool(self, x: Tensor, mask: Tensor) -> Tensor | None:
        """x [B, N, D] -> [B, D], from each text's first real token, wherever its padding is."""
        return None if self.pooler is None else self.pooler(self.first_token(x, mask).unsqueeze(1))

    def first_token(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, N, D] -> [B, D]."""
        return x[torch.arange(len(x), device=x.device), mask.argmax(1)]

    def wanted(self, attentions: bool | None, hidden_states: bool | None, spike_rates: bool | None) -> list[bool]:
        """Which optional outputs to return: the argument, or the configuration where it is None."""
        config = self.config
        defaults = (config.output_attentions, config.output_hidden_states, config.output_spike_rates)
        given = (attentions, hidden_states, spike_rates)
        return [default if value is None else value for value, default in zip(given, defaults, strict=True)]

    def embed(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings [B, N, D] and the mask [B, N]. Positions count real tokens, so left padding changes nothing."""
        look = input_ids is not None and input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        given = self.read(input_ids, inputs_embeds, look)
        shape = given.shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones(shape, dtype=torch.long, device=given.device)
        attention_mask = attention_mask.long()  # of bools no first token could be found
        if attention_mask.shape != shape:
            raise ValueError(f"attention_mask must be [B, N] = {tuple(shape)}, got {tuple(attention_mask.shape)}")
        if shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"sequence of {shape[1]} tokens, but the model has {self.config.max_position_embeddings} positions; "
                "tokenise with truncation=True"
            )
        if position_ids is None:
            position_ids = (attention_mask.cumsum(1) - 1).clamp_min(0)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(position_ids)
        x = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        return x, attention_mask


class SpikingHead(SpikingEncoderPreTrainedModel):
    """An encoder and what reads its output; subclasses say how logits and loss are made."""

    encoder_class: ClassVar[type[SpikingEncoder]]

    def logits(self, encoded: SpikingModelOutput) -> Tensor:
        raise NotImplementedError

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError

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
    ) -> SpikingHeadOutput:
        """input_ids, attention_mask, token_type_ids, position_ids [B, N] -> `SpikingHeadOutput`.

        labels: [B] classes, or numbers for regression; [B, N] token ids for masked language models, -100 where nothing
        is predicted.
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
            return_dict=True,
        )
        return self.head_output(encoded, labels)

    def head_output(self, encoded: SpikingModelOutput, labels: Tensor | None) -> SpikingHeadOutput:
        """Logits, loss if there are labels, and what the encoder returned beside its states."""
        logits = self.logits(encoded)
        passed_on = {k: v for k, v in encoded.items() if k not in ("last_hidden_state", "pooler_output")}
        return SpikingHeadOutput(loss=None if labels is None else self.loss(logits, labels), logits=logits, **passed_on)


class ForSequenceClassification(SpikingHead):
    """Classification or regression on the pooled output; one label is regression, as in transformers."""

    def __init__(self, config: SpikingEncoderConfig) -> None:
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.encoder_class(config))
        dropout = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)
        self.classifier = nn.Linear(config.hidden_size, len(config.label_names))
        self.post_init()

    def logits(self, encoded: SpikingModelOutput) -> Tensor:
        return self.classifier(self.dropout(encoded.pooler_output))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.loss_function(labels, logits, self.config)


class ForMaskedLM(SpikingHead):
    """Masked language modelling with tied embeddings."""

    def __init__(self, config: SpikingEncoderConfig) -> None:
        if config.int8_embeddings:
            raise ValueError(f"{config.model_type}: a masked-language-model head shares the embeddings, not in int8")
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.encoder_class(config, add_pooling_layer=False))
        self.cls = BertOnlyMLMHead(config)
        self.post_init()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._tied_weights_keys = {
            "cls.predictions.decoder.weight": f"{cls.base_model_prefix}.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        }

    def get_output_embeddings(self) -> nn.Module:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.cls.predictions.decoder = new_embeddings  # type: ignore[assignment]
        self.cls.predictions.bias = new_embeddings.bias  # type: ignore[assignment]

    def logits(self, encoded: SpikingModelOutput) -> Tensor:
        return self.cls(encoded.last_hidden_state)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
