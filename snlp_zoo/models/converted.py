"""Any model with linear layers, its inputs to them as spikes; transformers saves and loads it as it does other models.

What a conversion was is kept in `config.quantization_config`, where transformers looks for ways of loading that differ:
with `import snlp_zoo` the method "spiking" is known, and every Auto class builds the layers before it reads weights.
"""

from copy import copy, deepcopy
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from snlp_zoo.errors import ConversionError
from snlp_zoo.layers.quant import BitLinear, Int8Embedding, SignEmbedding
from snlp_zoo.layers.spike_linear import Mode, SpikeLinear, check_options

METHOD = "spiking"
OPTIONS = ("threshold_scale", "code", "max_count", "levels", "mode", "bits")  # that `check_options` checks
HEADS = ("lm_head", "head", "classifier", "score")  # last names of heads outside transformers
# what computes as a linear layer does; other subclasses have their weight used past their forward, or compute else
PLAIN = ("Linear", "Conv1D", "FalconLinear")
Targets = str | list[str]


@register_quantization_config(METHOD)
class SpikingConversionConfig(QuantizationConfigMixin):
    """How a model's linear layers were, or are to be, made to spike: arguments of `SpikeLinear`, and which of them.

    Args:
        targets: "all-but-head", "all", or patterns of module names such as "*.mlp.*"; see `target_layers`.
        weight_bits: bits of `SpikeLinear`.
        salient: layers have channels of finer threshold.
    Raises:
        ValueError: as `SpikeLinear`.
        TypeError: an argument it does not have.
    """

    def __init__(
        self,
        threshold_scale: float = 3.0,
        code: str = "bitwise",
        max_count: int | None = None,
        targets: Targets = "all-but-head",
        symmetric: bool = True,
        levels: int = 4,
        mode: str = "count",
        weight_bits: float = 32,
        packed: bool = False,
        salient: bool = False,
        quant_method: str = METHOD,
    ) -> None:
        check_options(threshold_scale, code, max_count, levels, mode, weight_bits)
        self.quant_method = quant_method  # type: ignore[assignment]  # of a method that is registered it is the name
        self.threshold_scale, self.code, self.max_count = float(threshold_scale), code, max_count
        self.targets, self.symmetric, self.levels, self.mode = targets, symmetric, levels, mode
        self.weight_bits, self.packed, self.salient = weight_bits, packed, salient

    def layer_options(self) -> dict[str, Any]:
        """Arguments of `SpikeLinear`."""
        names = ("threshold_scale", "code", "max_count", "symmetric", "levels", "mode", "packed", "salient")
        return {name: getattr(self, name) for name in names} | {"bits": self.weight_bits}


@register_quantizer(METHOD)
class SpikingQuantizer(HfQuantizer):
    """Builds `SpikeLinear` layers before transformers fills them from files."""

    requires_calibration = False
    is_compileable = True
    is_trainable = True
    quantization_config: SpikingConversionConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs) -> None:
        options = self.quantization_config.layer_options()
        _refuse_narrow(model, self.quantization_config.targets, options["bits"])
        if not self.pre_quantized:  # files have dense weights: fewer bits come afterwards
            if options["salient"]:
                raise ConversionError("salient channels are found by calibration; use to_spiking on the dense model")
            options |= {"bits": 32, "packed": False}
        replace_layers(model, self.quantization_config.targets, options)
        for parent in model.modules():
            for child in parent.children():
                if isinstance(child, SpikeLinear) and child.weight is None:  # transformers would start it afresh
                    child._is_hf_initialized = True
                    if not parent._buffers:  # some start their parts' weights; tables that are in no file it must make
                        parent._is_hf_initialized = True
        model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), "weight_scale"}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs) -> None:
        if not self.pre_quantized:
            for layer in spike_layers(model).values():
                layer.to_bits(self.quantization_config.weight_bits)
                if self.quantization_config.packed:
                    layer.pack()
        model.is_quantized = False  # type: ignore[assignment]  # to transformers that means: neither cast nor train it

    def is_serializable(self) -> bool:
        return True


def convert_in_place(model: nn.Module, conversion: SpikingConversionConfig) -> None:
    """Replace the target layers, and of a transformers model keep in its configuration what was done."""
    replace_layers(model, conversion.targets, conversion.layer_options())
    _note(model, conversion)


def set_mode(model: nn.Module, mode: Mode) -> None:
    """Let every layer of a converted model compute by "count" or by "spikes", now and when it is loaded again.

    Raises:
        ConversionError: another mode, or a model that is not converted.
    """
    _change(model, mode=mode)


def set_window(model: nn.Module, max_count: int | None, threshold_scale: float | None = None) -> None:
    """Give every layer of a converted model another largest count, and another threshold_scale if it is not None.

    Raises:
        ConversionError: an option out of range, or a model that is not converted.
    """
    scale = {} if threshold_scale is None else {"threshold_scale": float(threshold_scale)}
    _change(model, max_count=max_count, **scale)


def _change(model: nn.Module, **options: Any) -> None:
    layers = spike_layers(model)
    if not layers:
        raise ConversionError(f"{type(model).__name__} has no SpikeLinear; convert it first, with to_spiking")
    for layer in layers.values():
        try:
            check_options(**{name: options.get(name, getattr(layer, name)) for name in OPTIONS})
        except ValueError as error:
            raise ConversionError(str(error)) from error
    for layer in layers.values():
        vars(layer).update(options)
    conversion = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(conversion, SpikingConversionConfig):
        conversion = copy(conversion)
        vars(conversion).update(options)
        _note(model, conversion)


def _note(model: nn.Module, conversion: SpikingConversionConfig) -> None:
    """Other models may share the configuration, so this one gets its own."""
    if isinstance(model, PreTrainedModel):
        shared, own = model.config, deepcopy(model.config)
        own.quantization_config = conversion
        for module in model.modules():
            if getattr(module, "config", None) is shared:
                module.config = own  # type: ignore[assignment]


def spike_layers(model: nn.Module) -> dict[str, SpikeLinear]:
    """Every `SpikeLinear` of a model, by its name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SpikeLinear)}


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model, weights in integers and packed ones among them."""
    integers = 0
    for module in model.modules():
        if isinstance(module, BitLinear) and module.weight is None:
            integers += module.in_features * module.out_features
        elif isinstance(module, Int8Embedding):
            integers += module.weight_int8.numel()
        elif isinstance(module, SignEmbedding):
            integers += module.num_embeddings * module.embedding_dim
    return sum(parameter.numel() for parameter in model.parameters()) + integers


def is_converted(model: nn.Module) -> bool:
    """Whether any of its layers is a `SpikeLinear`."""
    return any(isinstance(module, SpikeLinear) for module in model.modules())


def linear_layers(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """What can be converted, by name: linear layers and transformers' Conv1D.

    Not among them is the dt_proj of Mamba mixers: transformers multiplies by its weight without calling it.
    """
    layers: dict[str, nn.Linear | Conv1D] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and type(module).__name__ in PLAIN:
            layers[name] = module
    return {name: layer for name, layer in layers.items() if _of_mixer(model, name) != "dt_proj"}


def target_layers(model: nn.Module, targets: Targets = "all-but-head") -> dict[str, nn.Linear | Conv1D]:
    """The layers that `targets` names: "all", "all-but-head", patterns as in `fnmatch`, or a list of such.

    Heads are the output embeddings and, in transformers, whatever is outside of the base model; elsewhere layers called
    lm_head, head, classifier or score. "all-but-head" also leaves alone what a Mamba mixer makes its time step and its
    matrices of (x_proj), as in SpikingMamba. Patterns fit a model's names and those it has below a head.
    """
    layers = linear_layers(model)
    if not isinstance(targets, str):
        named = {name for target in targets for name in target_layers(model, target)}
        return {name: layer for name, layer in layers.items() if name in named}
    if targets == "all":
        return layers
    if targets == "all-but-head":
        return {
            name: layer
            for name, layer in layers.items()
            if not _is_head(model, name) and _of_mixer(model, name) != "x_proj"
        }
    prefix = f"{model.base_model_prefix}." if isinstance(model, PreTrainedModel) and model.base_model is model else ""
    return {name: layer for name, layer in layers.items() if fnmatch(name, targets) or fnmatch(prefix + name, targets)}


def _is_head(model: nn.Module, name: str) -> bool:
    if not isinstance(model, PreTrainedModel):
        return name.rpartition(".")[2] in HEADS
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    return not name.startswith(prefix) or model.get_submodule(name) is model.get_output_embeddings()


def _of_mixer(model: nn.Module, name: str) -> str | None:
    """What a layer is called in the Mamba mixer that it is a part of."""
    parent, _, last = name.rpartition(".")
    return last if hasattr(model.get_submodule(parent), "A_log") else None


def replace_layers(model: nn.Module, targets: Targets, options: dict[str, Any]) -> list[str]:
    """Replace target layers in place; weights are the same tensors. Returns the names of the replaced.

    Args:
        options: of `SpikeLinear`, besides its sizes.
    Raises:
        ConversionError: accelerate has spread the model over devices, or a head that shares its weight would have fewer
            bits.
    """
    _refuse_narrow(model, targets, options["bits"])
    found = target_layers(model, targets)
    if any(hasattr(layer, "_hf_hook") for layer in found.values()):
        raise ConversionError(
            f"this {type(model).__name__} is spread over devices already; convert it before, or load it with "
            "quantization_config=SpikingConversionConfig(...) and a device_map"
        )
    places: dict[nn.Linear | Conv1D, list[tuple[nn.Module, str]]] = {layer: [] for layer in found.values()}
    names = list(found)
    del found
    for parent in model.modules():
        for name, child in parent._modules.items():  # also the second name of a layer that has two
            if isinstance(child, nn.Linear | Conv1D) and child in places:
                places[child].append((parent, name))
    mixers = {parent for where in places.values() for parent, _ in where if hasattr(parent, "A_log")}
    for mixer in mixers:
        mixer.register_forward_pre_hook(_keep_faithful, with_kwargs=True)
    for parent in {parent for where in places.values() for parent, _ in where}:
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # its fast path would use the weights without calling the layers
    while places:  # one after another, so that no more than one layer is there twice
        layer, where = places.popitem()
        made = spike_layer(layer, options)
        for parent, name in where:
            setattr(parent, name, made)
    return names


def _refuse_narrow(model: nn.Module, targets: Targets, bits: float) -> None:
    if bits == 32 or not isinstance(model, PreTrainedModel):
        return
    if model.config.model_type == "rwkv":
        raise ConversionError(
            f"{type(model).__name__} scales the weights of some layers in evaluation, which those of {bits:g} bits do "
            "not allow; leave weight_bits at 32"
        )
    head, tied = model.get_output_embeddings(), getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if tied and head is not None and head in target_layers(model, targets).values():
        raise ConversionError(
            f"the head of this {type(model).__name__} shares the embeddings' weight, which has no {bits:g} bits; "
            "leave it out of the targets"
        )


def _keep_faithful(mixer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before a Mamba mixer runs: keep it from what it would do past its neurons, or wrongly."""
    mixer.training = False  # in training a fused kernel takes the weight of out_proj without calling it
    cache, inputs = kwargs.get("cache_params"), args[0] if args else kwargs["hidden_states"]
    if cache is None or inputs.shape[1] == 1 or not hasattr(mixer, "x_proj"):
        return
    if cache.get_recurrent_state(mixer.layer_idx) is not None:  # the scan of several tokens starts from nothing
        raise ValueError(
            f"a cached Mamba goes on by one token at a time, got {inputs.shape[1]}; give the whole text without a cache"
        )


def spike_layer(layer: nn.Linear | Conv1D, options: dict[str, Any]) -> SpikeLinear:
    """A `SpikeLinear` with the weight and bias of a linear layer or a Conv1D; on the meta device as it is saved."""
    bits, packed, meta = options["bits"], options["packed"], layer.weight.is_meta
    transposed = isinstance(layer, Conv1D) and (bits == 32 or not meta)
    inputs, outputs = layer.weight.shape if isinstance(layer, Conv1D) else reversed(layer.weight.shape)
    if not meta:
        options = options | {"bits": 32, "packed": False}
    with torch.device("meta"):
        made = SpikeLinear(inputs, outputs, layer.bias is not None, **options, transposed=transposed)
    made.bias = layer.bias
    if made.weight is not None:
        made.weight = layer.weight if transposed or not isinstance(layer, Conv1D) else nn.Parameter(layer.weight.mT)
    if meta:
        return made.train(layer.training)
    if made.extra_bits is not None:
        made.extra_bits = torch.zeros(inputs, dtype=torch.uint8, device=layer.weight.device)
    made.to_bits(bits)
    if packed:
        made.pack()
    return made.train(layer.training)
