"""What the families' configurations share: fields, bounds, and the refusal of unknown names."""

from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from snlp_zoo.ops.bit_linear import WEIGHT_BITS

# No published encoder comes near these; a configuration file from elsewhere must not allocate without limit.
_BOUNDS = {
    "vocab_size": 2_000_000,
    "hidden_size": 32_768,
    "num_hidden_layers": 512,
    "num_attention_heads": 1_024,
    "intermediate_size": 262_144,
    "max_position_embeddings": 1_048_576,
    "type_vocab_size": 1_024,
    "time_steps": 1_024,
}


@strict
class SpikingConfig(PreTrainedConfig):
    """Fields every spiking encoder has; names as in BERT, plus `time_steps` (T) and how weights are kept:

    weight_bits: 32, 1.58 or 1, of the linear layers inside the encoder; embeddings, norms, pooler and heads stay float.
    packed, int8_embeddings: what `layers.pack` has done to the model; not for a model that is to be trained.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"  # of the masked-language-model head
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    classifier_dropout: float | int | None = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    output_spike_rates: bool = False
    time_steps: int = 4
    weight_bits: float | int = 32
    packed: bool = False
    int8_embeddings: bool = False

    def __post_init__(self, **kwargs):
        for alias, name in self.attribute_map.items():  # a family's own name of a shared field
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        for name, limit in _BOUNDS.items():
            if not 1 <= getattr(self, name) <= limit:
                raise ValueError(f"{self.model_type}: {name} must be between 1 and {limit}, got {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"{self.model_type}: hidden_size {self.hidden_size} must be a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.weight_bits not in (32, *WEIGHT_BITS):
            raise ValueError(f"{self.model_type}: weight_bits must be 32, 1.58 or 1, got {self.weight_bits}")
        if (self.packed and self.weight_bits == 32) or (self.int8_embeddings and not self.packed):
            raise ValueError(f"{self.model_type}: packed needs weight_bits 1.58 or 1, and int8_embeddings needs packed")
        super().__post_init__(**kwargs)

    @property
    def label_names(self) -> list[str]:
        """Names of the classes in order; one for regression."""
        names: dict[Any, str] = self.id2label or {}
        return [names[i] for i in sorted(names)]


def make_config(config_class: type[SpikingConfig], **values: Any) -> SpikingConfig:
    """A configuration from keyword values, refusing names it does not have (transformers keeps typos silently).

    Raises:
        ValueError: unknown name (with the nearest one), or a value out of bounds.
    """
    known = {field.name for field in fields(config_class)} | {"num_labels", "attn_implementation"}
    known |= set(config_class.attribute_map)
    for name in values.keys() - known:
        nearest = get_close_matches(name, known, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"{config_class.model_type} has no config field {name!r}{hint}")
    try:
        return config_class(**values)
    except StrictDataclassError as error:  # huggingface_hub's own, for a value of the wrong type
        raise ValueError(f"{config_class.model_type}: {' '.join(str(error).split())}") from error
