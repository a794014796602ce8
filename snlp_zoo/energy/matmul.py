"""How many accumulates and multiply-accumulates a product [n, K] x [K, M] takes, by what its operands are."""

import math
from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

from snlp_zoo.energy.kinds import Tag


@dataclass
class Product:
    """counts, alternative, nnz, sizes, elements, ac, mac, dense, fan_in, fan_out, spike_driven as in `rows.Row`."""

    nnz: int
    elements: int
    dense: int
    fan_in: int
    fan_out: int
    sizes: int = 0
    ac: int = 0
    mac: int = 0
    spike_driven: bool = False
    counts: Counter = field(default_factory=Counter)
    alternative: Counter = field(default_factory=Counter)


def product(a: Tensor, b: Tensor, left: Tag, right: Tag) -> Product:
    """a [B, n, K], b [B, K, M] -> Product.

    spikes x spikes, spikes x low-bit    an addition of integers wherever both are nonzero
    spikes x integer                     the same: where a spike meets an integer, that is added as it is
    spikes x real                        an addition of floats for every spike and output it reaches
    real x low-bit                       an addition of floats for every nonzero weight and row
    integer x weights or integers        a spike counts as often as it says; or one multiplication, if cheaper
    real x real                          a multiplication and an addition, everywhere
    """
    (batch, rows, inner), outputs = a.shape, b.shape[-1]
    sparse_left, sparse_right = left.kind != "real", right.kind != "real"
    gated = {left.kind, right.kind} in ({"binary", "integer"}, {"ternary", "integer"})
    # how much of the inner axis is nonzero, or, of integers, how many spikes stand there: [B, K]
    weight_left = _events(a, left, gated).sum(1) if sparse_left else None
    weight_right = _events(b, right, gated).sum(2) if sparse_right else None
    focus, tag = (a, left) if left.spikes or not right.spikes else (b, right)
    made = Product(
        nnz=int(focus.count_nonzero()),
        elements=focus.numel(),
        dense=batch * rows * inner * outputs,
        fan_in=inner,
        fan_out=outputs,
        spike_driven=left.spikes or right.spikes,
    )
    if weight_left is not None and weight_right is not None:
        made.ac = int((weight_left * weight_right).sum())
        made.counts["iadd"] = made.ac
    elif weight_left is not None:
        made.ac = int(weight_left.sum()) * outputs
        made.counts["add"] = made.ac
    elif weight_right is not None:
        made.ac = int(weight_right.sum()) * rows
        made.counts["add"] = made.ac
    else:
        made.mac = made.dense
        made.counts.update({"mul": made.mac, "add": made.mac})
    if tag.kind == "integer" and not gated:
        made.sizes = int(focus.abs().sum())
        _multiply_instead(made, focus, a, b, tag is left, integer="iadd" in made.counts)
    return made


def _events(x: Tensor, tag: Tag, once: bool) -> Tensor:
    return (x.abs() if tag.kind == "integer" and not once else x != 0).double()


def _multiply_instead(made: Product, focus: Tensor, a: Tensor, b: Tensor, on_left: bool, integer: bool) -> None:
    """One multiplication per nonzero integer: of the bits it needs with 8-bit weights, of floats otherwise."""
    other = (b if on_left else a) != 0
    if integer:
        macs = int(((a != 0).double().sum(1) * (b != 0).double().sum(2)).sum())
        largest = int(focus.abs().max()) if focus.numel() else 0
        bits = max(1, math.ceil(math.log2(2 * largest + 1)))
        made.alternative.update({"imul8": macs * bits / 8, "iadd": macs})
    else:
        macs = made.nnz * (other.shape[-1] if on_left else other.shape[-2])
        made.alternative.update({"mul": macs, "add": macs})
