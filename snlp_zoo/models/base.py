"""Everything the families share with the transformers library beside configuration: outputs, loading, initialisation.

Shapes: T, B, N, D, H as in ops/lif/reference.py. T lives inside a model only; every output is averaged over it.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from snlp_zoo.errors import CheckpointError
from snlp_zoo.layers import BitLinear, ElasticBiSpike
from snlp_zoo.layers.quant import Int8Embedding, SignEmbedding, Table
from snlp_zoo.models.cache import SpikingCache
from snlp_zoo.models.checkpoint import architecture, check_finite, check_weights, locate, read_json, stored_weights
from snlp_zoo.models.configuration import SpikingConfig, config_names, read_config

logger = logging.getLogger(__name__)
_HUB_OPTIONS = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")


@dataclass
class SpikingModelOutput(ModelOutput):
    """last_hidden_state [B, N, D], pooler_output [B, D], hidden_states (L + 1 times [B, N, D], embeddings first) and
    attentions (L times [B, H, N, N]) are means over T. spike_rates: site name -> [T], share of neurons that fired on
    real tokens; firing_rate: that share over all sites and steps. attention_scores (L times [B, H, N, N], before the
    softmax), steps_used ([B], time steps until the prediction settled) and past_key_values (the state after the last
    token) where a family has them.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    attention_scores: tuple[Tensor, ...] | None = None
    spike_rates: dict[str, Tensor] | None = None
    firing_rate: Tensor | None = None
    steps_used: Tensor | None = None
    past_key_values: SpikingCache | None = None


@dataclass
class SpikingHeadOutput(ModelOutput):
    """loss (with labels), logits ([B, classes], or [B, N, V] for language models); the rest as in the base."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    attention_scores: tuple[Tensor, ...] | None = None
    spike_rates: dict[str, Tensor] | None = None
    firing_rate: Tensor | None = None
    steps_used: Tensor | None = None
    past_key_values: SpikingCache | None = None


def _subclasses(model_class: Any) -> Iterator[Any]:
    for subclass in model_class.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


class SpikingPreTrainedModel(PreTrainedModel):
    """Base of every spiking model: initialisation, save and load."""

    config: SpikingConfig
    supports_gradient_checkpointing = True
    spike_driven = ("*layers.*",)  # modules whose every product has spikes on one side: a claim `energy` verifies

    @property
    def small_table(self) -> Table | None:
        """As what `layers.pack` can keep embedding tables; None: not at all, as a head shares them."""
        return Int8Embedding if self.get_output_embeddings() is None else None

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; ValueError if the table is kept in int8 or as signs, for it has no weight to resize."""
        table = self.get_input_embeddings()
        if isinstance(table, Int8Embedding | SignEmbedding):
            raise ValueError(
                f"{type(self).__name__} keeps its embeddings as {type(table).__name__}, which cannot be resized; "
                "resize the model before it is packed"
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def read(self, ids: Tensor | None, embeds: Tensor | None, look: bool) -> Tensor:
        """The one of input_ids [B, N] and inputs_embeds [B, N, D] that was given.

        Args:
            look: compare ids with the vocabulary; on a GPU this waits for the device.
        Raises:
            ValueError: both, none, other axes, no tokens, or an id out of range.
        """
        name = type(self).__name__
        if (ids is None) == (embeds is None):
            raise ValueError(f"{name}: pass exactly one of input_ids and inputs_embeds")
        given: Any = embeds if ids is None else ids
        if given.ndim != (3 if ids is None else 2):
            raise ValueError(f"{name}: input_ids are [B, N], inputs_embeds [B, N, D]; got shape {tuple(given.shape)}")
        if 0 in given.shape[:2]:
            cached = " (after a cache: those it has not read, or all of them with a mask as long)"
            raise ValueError(
                f"{name}: there are no tokens to read, the input's shape is {tuple(given.shape)}; give at least one"
                + (cached if self._is_stateful else "")
            )
        if ids is not None and look:
            table: Any = self.get_input_embeddings()
            (low, high), size = (int(x) for x in ids.aminmax()), table.num_embeddings
            if low < 0 or high >= size:
                raise ValueError(
                    f"{name}: token id {low if low < 0 else high} is not in the vocabulary of {size}; "
                    "use the model's own tokenizer"
                )
        return given

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        config: Any = None,
        allow_missing: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, but strict: only safetensors, which must hold all of the model they were saved from.

        Headers are compared with the configuration before anything is allocated. A class with a head that the saved
        model did not have starts that head afresh and says so, as in transformers.

        Args:
            allow_missing: tensors that are in no file start afresh.
            kwargs: as in transformers; ignore_mismatched_sizes=True lets tensors of another shape start afresh.
        Raises:
            CheckpointError: a file is damaged or points elsewhere; a tensor is missing, unexpected, of another shape or
                kind, or not finite; the configuration is out of bounds.
        """
        name = pretrained_model_name_or_path
        kwargs |= {"output_loading_info": output_loading_info, "use_safetensors": True}
        if name is None:  # the weights are in memory: state_dict=...
            return super().from_pretrained(name, *args, config=config, **kwargs)
        folder, fetch = locate(name, **{key: kwargs.pop(key) for key in _HUB_OPTIONS if key in kwargs})
        held = stored_weights(folder, fetch, kwargs.get("variant"))
        if not isinstance(config, SpikingConfig):
            config_class: Any = cls.config_class
            names = config_names(config_class) & kwargs.keys() - {"dtype", "torch_dtype"}
            config = read_config(config_class, Path(config or folder), **{key: kwargs.pop(key) for key in names})
        if config.num_hidden_layers > len(held):  # before so many layers are built
            raise CheckpointError(
                f"cannot load {folder}: config.json has num_hidden_layers {config.num_hidden_layers}, the weights only "
                f"{len(held)} tensors; they must be of one model"
            )
        with torch.device("meta"):
            saved = cls._saved_class(folder)(config)
        misshapen = kwargs.get("ignore_mismatched_sizes", False)
        check_weights(folder, held, saved, allow_missing=allow_missing, allow_misshapen=misshapen)
        loaded: Any = super().from_pretrained(folder, *args, config=config, **kwargs)
        model = loaded[0] if output_loading_info else loaded
        model.name_or_path = model.config.name_or_path = str(name)
        check_finite(folder, model)
        return loaded

    @classmethod
    def _saved_class(cls, folder: Path) -> "type[SpikingPreTrainedModel]":
        """The class of this family that the weights were saved from; its own where config.json does not say one."""
        path = folder / "config.json"
        name = architecture(read_json(path)) if path.is_file() else "?"
        same = (c for c in _subclasses(SpikingPreTrainedModel) if c.config_class is cls.config_class)
        return next((c for c in same if c.__name__ == name), cls)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Int8Embedding | SignEmbedding) or (isinstance(module, BitLinear) and module.packed):
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                (init.ones_ if name == "weight_scale" else init.zeros_)(tensor)
            return
        super()._init_weights(module)
        if isinstance(module, ElasticBiSpike):
            init.ones_(module.alpha)
            init.zeros_(module.initialized)
            init.zeros_(module.magnitude)
        for name, start in getattr(module, "fresh", {}).items():  # of neurons and attention: not what torch allocated
            state = getattr(module, name)
            init.copy_(state, torch.tensor(start, dtype=state.dtype, device=state.device).expand_as(state))
