"""What spikes do to every layer of a model on given texts, in one pass, and what would make them more exact."""

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snlp_zoo.convert.targets import check_targets
from snlp_zoo.errors import ConversionError
from snlp_zoo.layers.spike_linear import SpikeLinear
from snlp_zoo.layers.spike_statistics import SpikeCounts
from snlp_zoo.layers.watching import evaluating, hooked
from snlp_zoo.models.converted import (
    SpikingConversionConfig,
    is_converted,
    spike_layer,
    spike_layers,
    target_layers,
)

SCALES = (2.0, 3.0, 4.0, 7.0, 15.0)  # values of threshold_scale that are tried beside the model's own
OUTLIER = 10.0  # times the median channel's mean |x|
SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)  # of salient channels, among which a split is looked for


@dataclass(frozen=True)
class LayerReport:
    """One layer on the inputs that it has in the model as given.

    Args:
        counts: its spikes.
        threshold_scale: k, its own.
        errors: k -> ||y_spiking - y_dense|| / ||y_dense|| over all tokens; the bias is a part of y.
        outliers: input channels whose mean |x| is more than OUTLIER times the median channel's.
        saliency: mean over tokens of x * (x W^T W), [in_features].
        noise: share of each channel in the squared error, were rounding errors of channels independent, [in_features].
    """

    counts: SpikeCounts
    threshold_scale: float
    errors: dict[float, float]
    outliers: list[int]
    saliency: Tensor
    noise: Tensor

    @property
    def error(self) -> float:
        """At its own k."""
        return self.errors[self.threshold_scale]

    def salient(self, share: float) -> Tensor:
        """The channels of largest saliency, one at least, bool [in_features]."""
        number = max(1, round(share * len(self.saliency)))
        chosen = torch.zeros_like(self.saliency, dtype=torch.bool)
        chosen[self.saliency.topk(number).indices] = True
        return chosen

    def error_split(self, share: float, extra_bits: int) -> float:
        """Estimate of the error with so many salient channels, whose rounding errors are 2^extra_bits times smaller."""
        removed = float(self.noise[self.salient(share)].sum()) * (1 - 4.0**-extra_bits)
        return self.error * max(0.0, 1 - removed) ** 0.5

    def to_dict(self) -> dict[str, Any]:
        counts = self.counts
        return {
            "error": self.error,
            "errors": {f"{k:g}": error for k, error in self.errors.items()},
            "zero_share": counts.zero_share,
            "spikes_per_input": counts.spikes_per_value,
            "largest_count": counts.largest,
            "cut_share": counts.cut / max(counts.values, 1),
            "outliers": self.outliers,
            "outlier_share": len(self.outliers) / len(self.saliency),
            "histogram": counts.histogram.tolist(),
        }


@dataclass(frozen=True)
class CalibrationReport:
    """layers: name -> `LayerReport`. tokens: rows of the largest input of a layer, over all batches."""

    layers: dict[str, LayerReport]
    tokens: int

    def worst(self, number: int = 10) -> dict[str, LayerReport]:
        """The layers of largest error, that one first."""
        ranked = sorted(self.layers.items(), key=lambda item: -item[1].error)
        return dict(ranked[:number])

    def suggestion(self, error: float = 0.05) -> dict[str, Any]:
        """What brings every layer's error to `error` at most.

        Returns:
            layers_above: how many are not there yet. threshold_scale: the smallest k that does it (beyond those that
            were tried the error is taken to fall as 1/k); None where max_count cuts off too much for any. salient,
            extra_bits: the smallest split that does it by `LayerReport.error_split`, None if none of SHARES does.
        """
        above = [layer for layer in self.layers.values() if layer.error > error]
        worst = {
            k: max(layer.errors[k] for layer in self.layers.values()) for k in next(iter(self.layers.values())).errors
        }
        reached = [k for k in sorted(worst) if worst[k] <= error]
        largest = max(worst)
        falls = worst[largest] < 0.9 * min(worst[k] for k in worst if k < largest)
        scale = reached[0] if reached else -(-largest * worst[largest] // error) if falls else None
        split = next(
            ((s, b) for b in (1, 2, 3) for s in SHARES if all(x.error_split(s, b) <= error for x in above)),
            (None, None),
        )
        return {
            "error": error,
            "layers_above": len(above),
            "threshold_scale": scale,
            "salient": split[0] if above else None,
            "extra_bits": split[1] if above else None,
        }

    def advice(self, error: float = 0.05) -> str:
        """`suggestion` in words."""
        found, number = self.suggestion(error), len(self.layers)
        if not found["layers_above"]:
            return f"All {number} layers are within {error:.0%} of the dense ones."
        said = f"{found['layers_above']} of {number} layers are off by more than {error:.0%}."
        if found["threshold_scale"] is None:
            cut = max(layer.counts.cut / max(layer.counts.values, 1) for layer in self.layers.values())
            said += f" max_count cuts off {cut:.1%} of the inputs of one: raise it."
        else:
            said += f" threshold_scale {found['threshold_scale']:g} brings all of them below that."
        if found["salient"] is not None:
            bits = f"{found['extra_bits']} extra bit{'s' if found['extra_bits'] > 1 else ''}"
            said += f" So should {bits} for {found['salient']:.0%} of the channels."
        return said

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "suggestion": self.suggestion(),
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
        }


def calibrate(
    model: nn.Module, batches: Iterable[Any], conversion: SpikingConversionConfig | None = None
) -> CalibrationReport:
    """Run a model over batches and see what spikes do, or would do, to each of its layers; nothing of it is changed.

    Each layer is measured on its own: real outputs and those by spikes of the same inputs, which in a dense model are
    the dense ones. Only sums are kept.

    Args:
        model: dense, or converted.
        batches: each a mapping of arguments or the one argument of the model. Padding counts as tokens: leave it out.
        conversion: how a dense model is to be converted; its rounding of weights is not measured. None: by default.
    Raises:
        ConversionError: no layer to convert, unknown targets, a conversion of a converted model, or no batches.
    """
    if isinstance(batches, Mapping):
        raise ConversionError("calibrate: batches are several, each a mapping, but got a mapping; give [batch] for one")
    if is_converted(model):
        if conversion is not None:
            raise ConversionError("calibrate: the model is converted already; leave conversion out")
        layers = spike_layers(model)
    else:
        conversion = conversion or SpikingConversionConfig()
        check_targets(model, conversion.targets)
        options = conversion.layer_options() | {"bits": 32, "packed": False, "salient": False}
        layers = {name: spike_layer(layer, options) for name, layer in target_layers(model, conversion.targets).items()}
    tallies = {name: _Tally(layer) for name, layer in layers.items()}
    with evaluating(model), torch.no_grad(), hooked(_watch(model, tallies)):
        for batch in batches:
            model(**batch) if isinstance(batch, Mapping) else model(batch)
    if not any(tally.rows for tally in tallies.values()):
        raise ConversionError("calibrate: no layer has seen a token; give at least one batch")
    reports = {name: tally.report() for name, tally in tallies.items() if tally.rows}
    return CalibrationReport(reports, max(tally.rows for tally in tallies.values()))


def _watch(model: nn.Module, tallies: dict[str, "_Tally"]) -> list:
    return [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, tally=tally: tally.add(inputs[0]))
        for name, tally in tallies.items()
    ]


class _Tally:
    """Sums over the inputs of one layer."""

    def __init__(self, layer: SpikeLinear) -> None:
        self.layer, self.rows, self.counts = layer, 0, SpikeCounts()
        self.variants = {}  # k -> the layer with it, of the same weights
        for k in sorted({*SCALES, layer.threshold_scale}):
            self.variants[k] = copy(layer)
            self.variants[k].threshold_scale = k
        self.size: Any = 0.0  # squared, of the dense outputs
        self.wrong: dict[float, Any] = dict.fromkeys(self.variants, 0.0)  # squared, of their errors
        self.magnitude: Any = 0.0
        self.saliency: Any = 0.0
        self.rounded: Any = 0.0  # squared rounding errors of each channel

    def add(self, x: Tensor) -> None:
        """x [..., in_features]"""
        x = x.detach().reshape(-1, x.shape[-1])
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        weight = self.layer.matrix().to(x.dtype)
        product = x @ weight.mT
        y = product if self.layer.bias is None else product + self.layer.bias.to(x.dtype)
        self.rows += len(x)
        self.counts += SpikeCounts.of(self.layer, x)
        self.size = self.size + y.square().sum(dtype=torch.float64)
        self.magnitude = self.magnitude + x.abs().sum(0, dtype=torch.float64)
        self.saliency = self.saliency + (x * (product @ weight)).sum(0, dtype=torch.float64)
        for k, layer in self.variants.items():
            rounding = layer.values(layer.spiked(x), x.dtype) - x
            self.wrong[k] = self.wrong[k] + (rounding @ weight.mT).square().sum(dtype=torch.float64)
            if k == self.layer.threshold_scale:
                self.rounded = self.rounded + rounding.square().sum(0, dtype=torch.float64)

    @torch.no_grad()
    def report(self) -> LayerReport:
        size = float(self.size) or 1.0
        noise = self.rounded * self.layer.matrix().square().sum(0, dtype=torch.float64)
        outliers = self.magnitude > OUTLIER * self.magnitude.median()
        return LayerReport(
            self.counts,
            self.layer.threshold_scale,
            {k: (float(wrong) / size) ** 0.5 for k, wrong in self.wrong.items()},
            outliers.nonzero().flatten().tolist(),
            (self.saliency / self.rows).cpu(),
            (noise / noise.sum().clamp_min(1e-300)).cpu(),
        )
