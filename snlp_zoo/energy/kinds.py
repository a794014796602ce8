"""What a tensor's values are: declared by the layer that made it, never guessed from the values, checked against them.

    binary {0, 1}   scaled {0, a}   ternary {-a, 0, a}   integer (sums of spikes)   lowbit {-a, 0, a} weights   real

Amplitudes that differ between channels cannot be applied after a product: such spikes are real numbers to it, and a
product with them takes multiplications, until `layers.fold_amplitude` makes them 1.

An all-zero tensor, or a real one that happens to hold zeros and ones, is what its producer says it is.
"""

from dataclasses import dataclass

from spikingjelly.activation_based import neuron
from torch import Tensor, nn

SPIKES = ("binary", "scaled", "ternary", "integer")
_FOREIGN = {neuron.TernaryIFNode: "ternary", neuron.TernaryLIFNode: "ternary", neuron.ILIFNode: "integer"}


@dataclass(frozen=True, eq=False)
class Tag:
    """What is known of one tensor.

    kind: see above. source: name of the module that made the spikes.
    amplitudes: magnitudes spikes may have, [1] or one per time step; None where they are 1.
    timed: axis 0 is T (or holds it). static: depends on weights alone. readout: summed over T, not yet used.
    """

    kind: str = "real"
    source: str = ""
    amplitudes: Tensor | None = None
    timed: bool = False
    static: bool = False
    readout: bool = False

    @property
    def spikes(self) -> bool:
        return self.kind in SPIKES

    @property
    def whole(self) -> bool:
        """Spikes of size 1, or sums of them: whatever is added or multiplied up of these is whole numbers too."""
        return self.spikes and self.amplitudes is None


def declared_kind(node: nn.Module) -> str:
    """The alphabet a neuron declares: its `spike_kind`, else SpikingJelly's own, else binary."""
    return getattr(node, "spike_kind", None) or _FOREIGN.get(type(node), "binary")


def spikes_tag(node: nn.Module, name: str, spikes: Tensor) -> Tag:
    """What a neuron says of its output, [T, ...]; its amplitudes are the largest magnitudes of each step.

    One that walks over tokens (`as_recorded`: T = 1) has no axis of T in what it really gives.
    """
    kind, timed = declared_kind(node), not getattr(node, "over_tokens", False)
    if kind in ("binary", "integer"):
        return Tag(kind, name, timed=timed)
    amplitude = getattr(node, "amplitude", None)
    if amplitude is None:
        return Tag(kind, name, step_amplitudes(spikes), timed=timed)
    if (amplitude == 1).all():
        return Tag(kind, name, timed=timed)
    if node.channels and (amplitude != amplitude[..., :1]).any():
        return Tag("real", name, timed=timed)
    return Tag(kind, name, step_amplitudes(spikes), timed=timed)


def step_amplitudes(spikes: Tensor) -> Tensor:
    """The largest magnitude of each step, [T, ...] -> [T]."""
    return spikes.abs().flatten(1).amax(1)


def contradiction(x: Tensor, tag: Tag, by_step: bool = False) -> str | None:
    """What in the data is not of the declared kind, or None; `by_step`: x is [T, ...] as its neuron gave it."""
    if tag.kind == "real":
        return None
    if tag.kind == "binary":
        wrong = (x != 0) & (x != 1)
    elif tag.kind == "integer":
        wrong = x != x.round()
    elif tag.kind == "lowbit":
        wrong = (x != 0) & (x.abs() != x.abs().max())
    else:
        magnitude = x.abs()
        wrong = (magnitude != 0) if tag.kind == "ternary" else (x != 0)
        if by_step and tag.amplitudes is not None:
            wrong &= magnitude != tag.amplitudes.view(-1, *(1,) * (x.ndim - 1))
        else:
            for amplitude in (1.0,) if tag.amplitudes is None else tag.amplitudes.tolist():
                wrong &= (magnitude if tag.kind == "ternary" else x) != amplitude
    if not (bad := int(wrong.count_nonzero())):
        return None
    alphabet = {"binary": "{0, 1}", "scaled": "{0, a}", "integer": "whole numbers"}.get(tag.kind, "{-a, 0, a}")
    return f"declared {tag.kind} {alphabet}, but {bad} of {x.numel()} values are not, such as {x[wrong][0].item():.4g}"
