"""A dense model as a spiking one, in one call: every linear layer gets its input as spikes."""

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from snlp_zoo.convert.calibration import CalibrationReport, calibrate
from snlp_zoo.convert.targets import check_targets
from snlp_zoo.errors import ConversionError
from snlp_zoo.models.converted import (
    SpikingConversionConfig,
    Targets,
    convert_in_place,
    spike_layer,
    spike_layers,
    target_layers,
)

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def to_spiking(
    model: AnyModule,
    *,
    threshold_scale: float = 3.0,
    code: str = "bitwise",
    max_count: int | None = None,
    targets: Targets = "all-but-head",
    symmetric: bool = True,
    levels: int = 4,
    mode: str = "count",
    weight_bits: float = 32,
    salient: float | None = None,
    extra_bits: int = 1,
    calibration: Iterable[Any] | CalibrationReport | None = None,
) -> AnyModule:
    """Replace a model's linear layers by `layers.SpikeLinear`, in place; nothing is trained and no weight is copied.

    Args:
        model: any module; a transformers model keeps its class, `generate`, and `save_pretrained`, and what was done is
            in `config.quantization_config`.
        threshold_scale, code, max_count, symmetric, levels, mode: as in `SpikeLinear`.
        targets: "all-but-head", "all", or patterns of module names, see `models.converted.target_layers`.
        weight_bits: 32 (as they are), 8 (int8), 1.58 or 1 (to be trained).
        salient: share of each layer's input channels, those of the largest saliency in `calibration`, that get
            `extra_bits` more: a threshold of V / 2^extra_bits.
        calibration: batches, as `calibrate` takes them, or what it has made of them.
    Returns:
        The model (of a lone linear layer its replacement).
    Raises:
        ConversionError: nothing to convert, converted already, a pattern that fits no layer (with the nearest names),
            or an option out of range; salient without calibration.
    """
    try:
        config = SpikingConversionConfig(
            threshold_scale, code, max_count, targets, symmetric, levels, mode, weight_bits, salient=salient is not None
        )
    except (ValueError, TypeError) as error:
        raise ConversionError(f"to_spiking: {error}") from error
    check_targets(model, targets)
    if salient is not None:
        _check_salient(salient, extra_bits, calibration)
        if not isinstance(calibration, CalibrationReport):
            calibration = calibrate(model, calibration or (), config)
        _check_calibration(calibration, target_layers(model, targets))
    if isinstance(model, nn.Linear | Conv1D):
        model = spike_layer(model, config.layer_options())  # type: ignore[assignment]
    else:
        convert_in_place(model, config)
    if isinstance(calibration, CalibrationReport) and salient is not None:
        for name, layer in spike_layers(model).items():
            if name in calibration.layers and layer.extra_bits is not None:  # not one that the texts did not reach
                layer.mark_salient(calibration.layers[name].salient(salient).to(layer.extra_bits.device), extra_bits)
    return model


def _check_calibration(report: CalibrationReport, layers: dict[str, nn.Linear | Conv1D]) -> None:
    widths = {name: layer.weight.shape[0 if isinstance(layer, Conv1D) else 1] for name, layer in layers.items()}
    fitting = [name for name, found in report.layers.items() if len(found.saliency) == widths.get(name)]
    if not fitting or any(name in widths for name in report.layers.keys() - set(fitting)):
        raise ConversionError("to_spiking: this calibration is of another model; give batches, or calibrate this one")


def _check_salient(salient: float, extra_bits: int, calibration: Any) -> None:
    if not 0 < salient < 1:
        raise ConversionError(f"to_spiking: salient is a share of channels between 0 and 1, got {salient}; try 0.1")
    if not 1 <= extra_bits <= 8:
        raise ConversionError(f"to_spiking: extra_bits must be between 1 and 8, got {extra_bits}")
    if calibration is None:
        raise ConversionError("to_spiking: salient channels are found on texts; give calibration=batches")
