"""How many spikes the layers of a converted model take, counted while it runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from snlp_zoo.layers import count_codes
from snlp_zoo.layers.spike_linear import SpikeLinear
from snlp_zoo.layers.watching import hooked

LARGEST = 64  # of the histogram; larger counts are counted as this


@dataclass
class SpikeCounts:
    """Inputs of one layer, or of several.

    values: how many. spikes: of them, in the layer's code. cut: those that `max_count` cut off. largest: of the
    counts' magnitudes. histogram [LARGEST + 1]: how often a magnitude was 0, 1, ..., LARGEST or more.
    """

    values: int = 0
    spikes: int = 0
    cut: int = 0
    largest: int = 0
    histogram: Tensor = field(default_factory=lambda: torch.zeros(LARGEST + 1, dtype=torch.long))

    @property
    def zero_share(self) -> float:
        """Share of inputs without a spike."""
        return int(self.histogram[0]) / max(self.values, 1)

    @property
    def spikes_per_value(self) -> float:
        return self.spikes / max(self.values, 1)

    def __add__(self, other: "SpikeCounts") -> "SpikeCounts":
        return SpikeCounts(
            self.values + other.values,
            self.spikes + other.spikes,
            self.cut + other.cut,
            max(self.largest, other.largest),
            self.histogram + other.histogram,
        )

    @classmethod
    def of(cls, layer: SpikeLinear, x: Tensor) -> "SpikeCounts":
        """x [..., in_features]: what the layer is given."""
        counts, threshold, _ = layer.spiked(x)
        magnitude = counts.abs().flatten()
        spikes = count_codes.events(counts, layer.code, layer.levels, layer.time_steps(counts))
        limit = float("inf") if layer.max_count is None else layer.max_count + 0.5
        return cls(
            values=x.numel(),
            spikes=int(spikes.sum()),
            cut=int((x.abs() > threshold * limit).sum()),
            largest=int(magnitude.max()) if x.numel() else 0,
            histogram=torch.bincount(magnitude.clamp_max(LARGEST).long(), minlength=LARGEST + 1).cpu(),
        )


@contextmanager
def spikes_counted(model: nn.Module) -> Iterator[dict[str, SpikeCounts]]:
    """Count the spikes of every `SpikeLinear` below `model` while inside.

    Yields:
        A dictionary, filled by each forward: layer name -> `SpikeCounts`. Padding does not count where the model is
        given an attention_mask [B, N] by keyword and a layer's inputs are [B, N, in_features]; of models that have
        an encoder and a decoder it does.
    """
    found: dict[str, SpikeCounts] = {}
    real: list[Tensor | None] = [None]

    def note(module: nn.Module, inputs: tuple, keywords: dict) -> None:
        both = getattr(getattr(module, "config", None), "is_encoder_decoder", False)  # with a mask for each
        real[0] = None if both else keywords.get("attention_mask")

    def record(name: str) -> Callable:
        def hook(layer: nn.Module, inputs: tuple) -> None:
            assert isinstance(layer, SpikeLinear)  # noqa: S101  (for the type checker)
            x, mask = inputs[0].detach(), real[0]
            x = x[mask.bool()] if mask is not None and mask.shape == x.shape[:-1] else x
            found[name] = found.get(name, SpikeCounts()) + SpikeCounts.of(layer, x)

        return hook

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, SpikeLinear)]
    handles = [layer.register_forward_pre_hook(record(name)) for name, layer in layers]
    with hooked([model.register_forward_pre_hook(note, with_kwargs=True), *handles]):
        yield found
