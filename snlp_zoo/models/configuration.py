"""What the families' configurations share: fields, bounds, and the refusal of unknown names."""

from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from snlp_zoo.errors import CheckpointError
from snlp_zoo.models.checkpoint import read_json
from snlp_zoo.ops.backend import Backend
from snlp_zoo.ops.bit_linear import WEIGHT_BITS

AnyConfig = TypeVar("AnyConfig", bound=PreTrainedConfig)
# No published encoder comes near these; a configuration file from elsewhere must not allocate without limit.
_BOUNDS = {
    "vocab_size": (1, 2_000_000),
    "hidden_size": (1, 32_768),
    "num_hidden_layers": (1, 512),
    "num_attention_heads": (1, 1_024),
    "intermediate_size": (1, 262_144),
    "max_position_embeddings": (1, 1_048_576),
    "type_vocab_size": (1, 1_024),
    "time_steps": (1, 1_024),
    "hidden_dropout_prob": (0, 1),
    "attention_probs_dropout_prob": (0, 1),
    "classifier_dropout": (0, 1),
    "initializer_range": (0, 100),
    "layer_norm_eps": (0, 1),
}
_MAX_LABELS, _MAX_NUMBER = 65_536, 2**31
_DTYPES = ("float32", "bfloat16", "float16", "float64")
# What transformers takes, or writes into config.json, beside the fields.
_BESIDE_FIELDS = {"num_labels", "attn_implementation", "output_attentions", "torch_dtype", "model_type"}
_BESIDE_FIELDS |= {"name_or_path", "_name_or_path"}


@strict
class SpikingConfig(PreTrainedConfig):
    """Fields every spiking model has; names as in transformers, and:

    time_steps: T, spike-time steps per token; 1, and no field, where neurons walk over tokens.
    neuron_backend: "auto", "torch", "triton" or "cupy".
    weight_bits: 32, 1.58 or 1, of the linear layers inside the encoder; embeddings, norms, pooler and heads stay float.
    packed, int8_embeddings: what `layers.pack` has done to the model; not for a model that is to be trained.
    """

    time_steps = 1

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    intermediate_size: int = 3072
    hidden_dropout_prob: float | int = 0.1
    classifier_dropout: float | int | None = None
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    output_spike_rates: bool = False
    neuron_backend: str = "auto"
    weight_bits: float | int = 32
    packed: bool = False
    int8_embeddings: bool = False

    def __post_init__(self, **kwargs):
        for alias, name in self.attribute_map.items():  # a family's own name of a shared field
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        self._refuse_unknown(kwargs)
        self._require("neuron_backend", get_args(Backend))
        for name, (low, high) in _BOUNDS.items():
            if (value := getattr(self, name, None)) is not None and not low <= value <= high:
                raise ValueError(f"{self.model_type}: {name} must be between {low} and {high}, got {value}")
        for field in fields(self):  # the rest of the numbers, NaN too
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not abs(value) <= _MAX_NUMBER:
                raise ValueError(f"{self.model_type}: {field.name} must be at most {_MAX_NUMBER}, got {value}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"{self.model_type}: pad_token_id must be below vocab_size {self.vocab_size}, got {self.pad_token_id}"
            )
        if self.weight_bits not in (32, *WEIGHT_BITS):
            raise ValueError(f"{self.model_type}: weight_bits must be 32, 1.58 or 1, got {self.weight_bits}")
        if (self.packed and self.weight_bits == 32) or (self.int8_embeddings and not self.packed):
            raise ValueError(f"{self.model_type}: packed needs weight_bits 1.58 or 1, and int8_embeddings needs packed")
        super().__post_init__(**kwargs)

    def _require(self, name: str, allowed: Iterable[str]) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(
                f"{self.model_type}: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
            )

    def _require_lif(self, tau: float, v_threshold: float) -> None:
        if not (tau > 1 and v_threshold > 0):
            raise ValueError(
                f"{self.model_type}: tau must be above 1 and v_threshold positive, got {tau} and {v_threshold}"
            )

    def _refuse_unknown(self, others: dict[str, Any]) -> None:
        """Keys that are no fields, and values that would make transformers fetch code, run it, or fill the memory."""
        check_names(type(self), others)
        if (theirs := others.get("model_type", self.model_type)) != self.model_type:
            raise ValueError(f"{self.model_type}: this is the configuration of a {theirs!r}")
        count = others.get("num_labels")
        count = len(self.id2label or ()) if count is None else count
        if not isinstance(count, int) or not 0 <= count <= _MAX_LABELS:
            raise ValueError(f"{self.model_type}: num_labels must be between 0 and {_MAX_LABELS}, got {count!r}")
        dtype = others.get("torch_dtype") or self.dtype
        if dtype is not None and str(dtype).removeprefix("torch.") not in _DTYPES:
            raise ValueError(f"{self.model_type}: dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        if "/" in str(others.get("attn_implementation")):  # the name of a kernel to download
            raise ValueError(f"{self.model_type}: attn_implementation must name none from elsewhere, got a path")

    @property
    def gradient(self) -> Literal["surrogate", "straight_through", "equilibrium"]:
        """Where gradients of spikes come from; straight through (bi-spike) and at equilibrium there is no surrogate."""
        return "surrogate"

    @property
    def label_names(self) -> list[str]:
        """Names of the classes in order; one for regression."""
        names: dict[Any, str] = self.id2label or {}
        return [names[i] for i in sorted(names)]


@strict
class SpikingEncoderConfig(SpikingConfig):
    """Fields every spiking encoder has; names as in BERT, plus `time_steps` (T)."""

    num_attention_heads: int = 12
    hidden_act: str = "gelu"  # of the masked-language-model head
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    time_steps: int = 4

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"{self.model_type}: hidden_act {self.hidden_act!r} is not known to transformers")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"{self.model_type}: hidden_size {self.hidden_size} must be a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )


@strict
class SpikingDecoderConfig(SpikingConfig):
    """Fields every causal model has.

    use_cache: return the state after the last token, unless training.
    classifier_pooling: what a classifier reads of each text: "mean" over its tokens, or the "last" one.
    """

    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    classifier_pooling: str = "mean"

    def __post_init__(self, **kwargs):
        self._require("classifier_pooling", ("mean", "last"))
        super().__post_init__(**kwargs)


def config_names(config_class: Any) -> set[str]:
    """Every name that a configuration can be given."""
    return {field.name for field in fields(config_class)} | set(config_class.attribute_map) | _BESIDE_FIELDS


def check_names(config_class: Any, names: Iterable[str]) -> None:
    """Raises ValueError for a name that a configuration cannot be given, with the nearest that it can."""
    known = config_names(config_class)
    for name in sorted(set(names) - known):
        nearest = get_close_matches(name[:80], known, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"{config_class.model_type} has no config field {name[:80]!r}{hint}")


def make_config(config_class: type[AnyConfig], **values: Any) -> AnyConfig:
    """A configuration from keyword values, of this zoo or of transformers.

    Raises:
        ValueError: unknown name (with the nearest one), wrong type, or a value out of bounds.
    """
    check_names(config_class, values)
    try:
        return config_class(**values)
    except StrictDataclassError as error:  # huggingface_hub's own, for a value of the wrong type
        raise ValueError(f"{config_class.model_type}: {' '.join(str(error).split())}") from error


def read_config(config_class: type[SpikingConfig], path: Path, **changes: Any) -> SpikingConfig:
    """The configuration in a folder or a JSON file, with `changes`.

    Raises:
        CheckpointError: it cannot be read, or a value is unknown, of the wrong type, or out of bounds.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        return make_config(config_class, **(read_json(path) | changes))
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot load {path}: {' '.join(str(error).split())[:300]}") from error
