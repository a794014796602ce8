"""A linear layer whose input is a whole number of spikes: what a dense checkpoint's layers are converted to."""

from collections.abc import Callable, Iterator
from threading import local
from typing import Any, Literal, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from snlp_zoo.layers import count_codes
from snlp_zoo.layers.quant import BitLinear
from snlp_zoo.ops.backend import product_dtype
from snlp_zoo.ops.bit_linear import bit_linear, quantise, unpack_weight
from snlp_zoo.ops.counts import counts as plain_counts
from snlp_zoo.ops.int8_linear import int8_linear, quantise_int8

Mode = Literal["count", "spikes"]
MODES = ("count", "spikes")
LEAST, MOST = 1e-5, 1e4  # of the threshold
WEIGHT_BITS = (32, 8, 1.58, 1)


class Spiked(NamedTuple):
    """counts [..., in_features], whole numbers; threshold [..., 1], what one of them is worth; zero_point [..., 1],
    whole numbers, or None; x is about threshold * (counts / 2^extra_bits + zero_point).
    """

    counts: Tensor
    threshold: Tensor
    zero_point: Tensor | None = None


class SpikeLinear(BitLinear):
    """y = W x + b with x as spikes: of every token n = round(x / V) with the threshold V = mean|x| / threshold_scale.

    The neuron integrates without leak, is reset softly and knows no other token, so there is no state: outputs do not
    depend on padding, companions or a cache. Parameters are those of `torch.nn.Linear`. Where a gradient is wanted it
    goes straight through the neuron. Without one y = V * (W n), with sums that are exact in float64; in half precision
    y = W (V n), which the same product computes without another pass over y.

    Args:
        in_features, out_features, bias: as in `torch.nn.Linear`.
        threshold_scale: k; the larger, the more spikes and the smaller the error.
        code: one of `count_codes.CODES`: how a count is spread over the time steps of a token.
        max_count: counts are cut off at +- this; None: not at all.
        symmetric: counts are signed; else each token's smallest input is its zero point, and no count is negative.
        levels: of the codes multi_level and gif.
        mode: "count" computes with counts in one product, "spikes" emits every spike of the code and accumulates.
        bits: of weights: 32 (as they are), 8 (int8, one scale per output; for inference), 1.58 or 1 (`BitLinear`, which
            quantises in every call; `layers.pack` does it once, for inference).
        packed: with 1.58 or 1 bits, as in `BitLinear`.
        salient: with `extra_bits`, see `mark_salient`.
        transposed: `weight` is [in_features, out_features], as in transformers' Conv1D; of 32 bits only.
    State that is saved: as in `BitLinear`; of 8 bits `weight_int8` [out_features, in_features] and `weight_scale`
        [out_features], float32; `extra_bits` uint8 [in_features] where channels are salient.
    Raises:
        ValueError: an option that `check_options` refuses, low bits in a transposed layer, or, in mode "spikes" without
            max_count, an input that is not finite.
        RuntimeError: training with mode "spikes" or int8 weights, neither of which has a gradient.
    Source: Pan et al. 2025 (SpikingBrain, arXiv:2509.05276); Huang et al. 2026 (SpikingMamba, arXiv:2510.04595).
    """

    weight_int8: Tensor
    extra_bits: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        threshold_scale: float = 3.0,
        code: str = "bitwise",
        max_count: int | None = None,
        symmetric: bool = True,
        levels: int = 4,
        mode: Mode = "count",
        bits: float = 32,
        packed: bool = False,
        salient: bool = False,
        transposed: bool = False,
    ) -> None:
        check_options(threshold_scale, code, max_count, levels, mode, bits)
        if transposed and bits != 32:
            raise ValueError(f"weights of {bits} bits are stored as [out_features, in_features]; leave transposed out")
        super().__init__(in_features, out_features, bias, 32 if bits == 8 else bits, packed)
        self.threshold_scale, self.code, self.max_count = threshold_scale, code, max_count
        self.symmetric, self.levels, self.mode, self.transposed = symmetric, levels, mode, transposed
        self.register_buffer("extra_bits", torch.zeros(in_features, dtype=torch.uint8) if salient else None)
        if transposed:
            self.weight = nn.Parameter(self.weight.detach().mT.contiguous())
        if bits == 8:
            scale = torch.ones(out_features, dtype=torch.float32)
            self._hold_int8(torch.zeros(out_features, in_features, dtype=torch.int8), scale)

    def _hold_int8(self, codes: Tensor, scale: Tensor) -> None:
        self.bits = 8
        self.register_parameter("weight", None)
        self.register_buffer("weight_int8", codes)
        self.register_buffer("weight_scale", scale)

    @property
    def packed(self) -> bool:
        return self.weight is None and self.bits != 8

    @torch.no_grad()
    def to_bits(self, bits: float) -> None:
        """Give a layer of 32 bits weights of fewer; int8 ones are quantised here, once (see `ops.int8_linear`)."""
        if bits != 32 and self.transposed:
            self.weight, self.transposed = nn.Parameter(self.weight.mT.contiguous()), False
        if bits == 8:
            self._hold_int8(*quantise_int8(self.weight))
        self.bits = bits

    def mark_salient(self, channels: Tensor, extra_bits: int = 1) -> None:
        """Give some input channels a threshold of V / 2^extra_bits: so many times the spikes, and so much finer.

        Args:
            channels: bool [in_features].
        """
        self.extra_bits = channels.to(torch.uint8) * extra_bits

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the weight acts as, [out_features, in_features]; in `dtype` if it is stored in integers."""
        if self.bits == 8:
            return (self.weight_int8.to(dtype) * self.weight_scale.unsqueeze(1)).to(dtype)
        if self.packed:
            return unpack_weight(self.weight_packed, self.bits, self.in_features).to(dtype) * self.weight_scale.to(
                dtype
            )
        weight = self.quantised_weight()
        return weight.mT if self.transposed else weight

    def time_steps(self, counts: Tensor) -> int:
        """T of the code: fixed by max_count, else what the largest of these counts takes."""
        if self.max_count is not None:
            extra = 0 if self.extra_bits is None else int(self.extra_bits.max())
            largest = (self.max_count << extra) * (1 if self.symmetric else 2)
        elif not counts.numel():
            largest = 0
        elif not (most := float(counts.abs().max())) < float("inf"):
            raise ValueError(f"SpikeLinear: inputs must be finite to be spikes, got {most}; mode='count' goes on")
        else:
            largest = int(most)
        return count_codes.steps(self.code, largest, self.levels, self.symmetric)

    @torch.no_grad()
    def spiked(self, x: Tensor, dtype: torch.dtype | None = None) -> Spiked:
        """The spikes of x [..., in_features] as counts, in `dtype` or else, as thresholds, in float32 or float64.

        bfloat16 holds counts to 256 exactly and rounds larger ones to 8 bits, as it does numbers.
        """
        wide_dtype = torch.promote_types(x.dtype, torch.float32)
        if self.symmetric and self.extra_bits is None:
            return Spiked(*plain_counts(x, self.threshold_scale, max_count=self.max_count, dtype=dtype or wide_dtype))
        wide = x.to(wide_dtype)
        threshold = (wide.abs().mean(-1, keepdim=True) / self.threshold_scale).clamp(LEAST, MOST)
        potential, finer = wide / threshold, 1 if self.extra_bits is None else torch.exp2(self.extra_bits.to(wide))
        if self.max_count is not None:
            potential = potential.clamp(-self.max_count, self.max_count)
        zero_point = None if self.symmetric else potential.amin(-1, keepdim=True).floor()
        counts = (potential * finer).round()
        if zero_point is not None:
            counts = counts - zero_point * finer
        return Spiked(counts.to(dtype or wide_dtype), threshold, zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        self.refuse_training()
        self.check_width(x)
        wanted = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        if self.mode == "spikes":
            y = self._by_spikes(x)
            return _NoGradient.apply(y, x, self.weight) if wanted else y
        if wanted:
            return self._as_values(self.straight_through(x))
        return self._by_counts(x)

    def refuse_training(self) -> None:
        super().refuse_training()
        if self.training and torch.is_grad_enabled():
            if self.mode == "spikes":
                raise RuntimeError("SpikeLinear: mode 'spikes' has no gradient; train with mode='count'")
            if self.bits == 8:
                raise RuntimeError("SpikeLinear: int8 weights cannot be trained; call .eval(), or convert with 32 bits")

    def straight_through(self, x: Tensor) -> Tensor:
        """threshold * counts, with the gradient of x where |x| <= threshold * max_count, and none beyond."""
        values, threshold = self._values(x.detach(), x.dtype)
        inside = None if self.max_count is None else x.detach().abs() <= threshold * self.max_count
        return _StraightThrough.apply(x, values, inside)

    @torch.no_grad()
    def _values(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What the spikes of x say it is, [..., in_features] in `dtype`, and the threshold."""
        if self.symmetric and self.extra_bits is None:
            return _once(x, self.threshold_scale, self.max_count, dtype, True)
        spiked = self.spiked(x)
        return self.values(spiked, dtype), spiked.threshold

    def values(self, spiked: Spiked, dtype: torch.dtype) -> Tensor:
        """What the spikes say x is, [..., in_features]."""
        return (self._in_thresholds(spiked) * spiked.threshold).to(dtype)

    def _in_thresholds(self, spiked: Spiked) -> Tensor:
        counts, _, zero_point = spiked
        if self.extra_bits is not None:
            counts = counts * torch.exp2(-self.extra_bits.to(counts.dtype))
        return counts if zero_point is None else counts + zero_point

    def _as_values(self, x: Tensor) -> Tensor:
        if self.packed:
            return bit_linear(x, self.weight_packed, self.weight_scale, self.bias, bits=self.bits)
        return linear(x, self.matrix(x.dtype), self.bias)

    def _by_counts(self, x: Tensor) -> Tensor:
        plain = self.symmetric and self.extra_bits is None
        if self.bits == 8 and plain and (self.max_count or 128) < 128 and x.dtype != torch.float64:
            counts, threshold = _once(x, self.threshold_scale, self.max_count, torch.int8, False)
            return int8_linear(
                counts, self.weight_int8, threshold, self.weight_scale, self.bias, dtype=product_dtype(x)
            )
        if (half := product_dtype(x)).itemsize == 2:  # float16 is too narrow for sums of counts; and one kernel less
            return self._as_values(self._values(x, half)[0])
        if plain:
            counts, threshold = _once(x, self.threshold_scale, self.max_count, x.dtype, False)
        else:
            spiked = self.spiked(x)
            counts, threshold = self._in_thresholds(spiked).to(x.dtype), spiked.threshold
        product, scale = self._sums(x.dtype)
        return self._scaled(product(counts), threshold, scale)

    @torch.no_grad()
    def _by_spikes(self, x: Tensor) -> Tensor:
        spiked = self.spiked(x)
        total = torch.zeros_like(spiked.threshold)
        with torch.autocast(x.device.type, enabled=False):  # sums of whole numbers: half precision is too narrow
            product, scale = self._sums(total.dtype)
            for weight, spikes in self.spike_trains(spiked.counts):
                if self.extra_bits is not None:  # a spike of a salient channel is worth a part of the others'
                    spikes = spikes * torch.exp2(-self.extra_bits.to(spikes.dtype))
                total = total + weight * product(spikes)
            if spiked.zero_point is not None:
                total = total + product(spiked.zero_point.expand_as(x))
        return self._scaled(total, spiked.threshold, scale).to(product_dtype(x))

    def spike_trains(self, counts: Tensor) -> Iterator[tuple[int, Tensor]]:
        """`count_codes.trains` of this layer's code."""
        return count_codes.trains(counts, self.code, self.time_steps(counts), self.levels, self.symmetric)

    def _sums(self, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
        """The product with weights, for inputs in `dtype`, and what it must be scaled by: sums of whole numbers are
        exact before that.
        """
        if self.packed:
            codes, one = self.weight_packed, torch.ones_like(self.weight_scale)
            return lambda x: bit_linear(x, codes, one, bits=self.bits), self.weight_scale
        if self.bits == 8:
            whole = self.weight_int8.to(dtype)
            return lambda x: linear(x, whole), self.weight_scale
        matrix, scale = (self.weight, None) if self.bits == 32 else quantise(self.weight, self.bits)
        matrix = (matrix.mT if self.transposed else matrix).to(dtype)
        return lambda x: linear(x, matrix), scale

    def _scaled(self, y: Tensor, threshold: Tensor, scale: Tensor | None) -> Tensor:
        y = y.mul_(threshold if scale is None else threshold * scale)
        return y if self.bias is None else y.add_(self.bias)

    def _load_from_state_dict(self, state_dict, prefix, *others) -> None:
        theirs = state_dict.get(f"{prefix}extra_bits")
        if theirs is not None and self.extra_bits is None:
            self.extra_bits = torch.zeros_like(theirs)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        window = "" if self.max_count is None else f", max_count={self.max_count}"
        return f"{super().extra_repr()}, threshold_scale={self.threshold_scale:g}, code={self.code}{window}"


def check_options(
    threshold_scale: float, code: str, max_count: int | None, levels: int, mode: str, bits: float
) -> None:
    """Raises ValueError for what no `SpikeLinear` can be made with."""
    if not 0 < threshold_scale < float("inf"):
        raise ValueError(f"threshold_scale must be positive, got {threshold_scale}; 3 is a good start")
    if max_count is not None and not (isinstance(max_count, int) and max_count >= 1):
        raise ValueError(f"max_count must be at least 1 and whole, or None for no limit, got {max_count}")
    count_codes.check_code(code, levels)
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}, known are {', '.join(MODES)}")
    if bits not in WEIGHT_BITS:
        raise ValueError(f"weights have 32, 8, 1.58 or 1 bits, got {bits}")


_last = local()  # .input (a weak reference), .key, .counts: of this thread's last call


def _once(
    x: Tensor, threshold_scale: float, max_count: int | None, dtype: torch.dtype, scaled: bool
) -> tuple[Tensor, Tensor]:
    """`ops.counts`, which the query, key and value layers (or gate and up) ask for the same input, one after another.

    The last answer is kept as long as its input lives, and holds while nobody writes to that.
    """
    options: dict[str, Any] = {"max_count": max_count, "dtype": dtype, "scaled": scaled}
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or x.is_inference()  # of which nobody knows whether it was written to
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())  # a graph must compute what it replays
    ):
        return plain_counts(x, threshold_scale, **options)
    key = (x._version, threshold_scale, *options.values())
    if getattr(_last, "key", None) == key and _last.input() is x:
        return _last.counts
    _last.counts = plain_counts(x, threshold_scale, **options)
    _last.key, _last.input = key, ref(x, _forget)
    return _last.counts


def _forget(input: "ref[Tensor]") -> None:
    if getattr(_last, "input", None) is input:
        _last.key = _last.counts = None


class _NoGradient(torch.autograd.Function):
    """Scores may be had without `torch.no_grad()`, gradients may not."""

    @staticmethod
    def forward(ctx, y: Tensor, *inputs: Tensor | None) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Any:
        raise RuntimeError("SpikeLinear: mode 'spikes' has no gradient; use mode='count'")


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, values: Tensor, inside: Tensor | None) -> Tensor:
        ctx.save_for_backward(inside)
        return values

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grad if inside is None else grad * inside, None, None
