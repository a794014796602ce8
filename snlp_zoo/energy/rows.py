"""What was counted: one row for each kind of work of a module."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Row:
    """One kind of work of one module, summed over texts and time steps.

    role: matmul, gate (spikes times spikes, element by element), counter (of spikes over tokens or channels), neuron,
    recurrence, norm, softmax, activation, residual, bias, amplitude, scale, gather, readout or other.
    counts: primitives of `costs`; alternative: another way to compute the same, of which the cheaper is taken.
    timed: done anew at each of T steps; a dense network does it once. Neurons that walk over tokens have T = 1.
    The rest belongs to products and neurons: kind of the operands; their nonzeros and elements; accumulates and
    multiply-accumulates; dense: the same of real operands; outputs; weights: K M and their weight_bits (0:
    no weights); spike trains and real operands that are moved: (kind, "words" or "events" or "address_bits") -> how
    many; bytes of a gather.
    Of layers with a code of whole numbers (`codes`) elements are those numbers, each of which takes several spikes;
    sizes: of these spikes, or of integers, added up, for so many accumulates per output; steps: their T, all texts
    together; state: words of potentials and sums, each read and written.
    """

    name: str
    role: str
    timed: bool
    counts: Counter = field(default_factory=Counter)
    alternative: Counter = field(default_factory=Counter)
    kind: str = "-"
    nnz: int = 0
    elements: int = 0
    ac: int = 0
    mac: int = 0
    dense: int = 0
    fan_in: int = 0
    fan_out: int = 0
    outputs: int = 0
    weight_bits: float = 0
    moved: Counter = field(default_factory=Counter)
    bytes: int = 0
    spike_driven: bool = False
    spikes: int = 0
    sizes: int = 0
    steps: int = 0
    state: int = 0

    @property
    def events(self) -> int:
        """Spikes, each of them looked up by its address."""
        return self.spikes or self.nnz

    @property
    def total(self) -> int:
        """What all spikes add up to: an integer is as many as were added up to it."""
        return self.sizes or self.nnz


@dataclass(frozen=True)
class Operand:
    """One operand of one product as `verify` shows it."""

    layer: str
    kind: str
    source: str
    problem: str | None
