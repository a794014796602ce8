"""Which layers can be made to spike, before anything is changed."""

from difflib import get_close_matches

from torch import nn

from snlp_zoo.errors import ConversionError
from snlp_zoo.models.converted import METHOD, Targets, is_converted, linear_layers, target_layers


def check_targets(model: nn.Module, targets: Targets) -> None:
    """Raises ConversionError unless `to_spiking` finds layers for every one of these targets."""
    kind = type(model).__name__
    if is_converted(model):
        raise ConversionError(f"to_spiking: this {kind} is converted already; start from the dense model")
    other = getattr(getattr(model, "config", None), "quantization_config", None)
    method = other.get("quant_method") if isinstance(other, dict) else getattr(other, "quant_method", None)
    if method not in (None, METHOD):  # a configuration may be shared with a model that is converted
        raise ConversionError(f"to_spiking: this {kind} was loaded by {method}; convert a model with plain weights")
    layers = linear_layers(model)
    if not layers:
        raise ConversionError(f"to_spiking: {kind} has no linear layer; there is nothing to convert")
    if not targets:
        raise ConversionError("to_spiking: targets are empty; name 'all-but-head', 'all' or patterns of layer names")
    for target in [targets] if isinstance(targets, str) else targets:
        if not target_layers(model, target):
            last = dict.fromkeys(f"*.{name.rpartition('.')[2]}" for name in layers)
            nearest = get_close_matches(target, [*last, *layers], n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"layers are {', '.join(list(layers)[:8])}"
            raise ConversionError(f"to_spiking: no linear layer fits the target {target!r}; {hint}")
