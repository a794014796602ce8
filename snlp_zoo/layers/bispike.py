"""A linear layer whose input is spikes."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from snlp_zoo.layers.neurons import ElasticBiSpike, TernaryLIFNode, make_neuron
from snlp_zoo.layers.quant import BitLinear
from snlp_zoo.ops.backend import product_dtype
from snlp_zoo.ops.bispike import ALPHA_FLOOR, elastic_bispike
from snlp_zoo.ops.bit_linear import bit_linear, quantise, sign_dtype
from snlp_zoo.ops.spike_linear import spike_linear


class SpikingLinear(BitLinear):
    """y[t] = W s[t] + b with s = neuron(x): the neuron sits in front of the weights, so the product adds weights up.

    Parameters are those of `torch.nn.Linear`, so dense weights load by name. Behind elastic neurons the backward keeps
    two bits per spike, and low-bit weights are summed by the signs of spikes, exactly, wherever no gradient is wanted
    and outputs are float32: packed and unpacked layers then give the same numbers. Elastic amplitudes follow the
    training batches where the network's forward runs within `layers.neurons.amplitudes_updated(network)`, as those of
    our models do; elsewhere they stay what the first batch measured.

    Args:
        in_features, out_features, bias, bits, packed: as in `BitLinear`.
        neuron: "elastic" or one without an amplitude, "lif", "if" or "plif", see `make_neuron`.
        neuron_options: its arguments (of "elastic": time_steps, firing_k, beta, ...).
    Raises:
        ValueError: as in `BitLinear`, or a neuron that is unknown or "ternary".
    Source: Xing et al. 2024 (arXiv:2406.03287).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        bits: float = 32,
        packed: bool = False,
        neuron: str = "elastic",
        **neuron_options,
    ) -> None:
        super().__init__(in_features, out_features, bias, bits, packed)
        self.neuron = make_neuron(neuron, **neuron_options)
        if isinstance(self.neuron, TernaryLIFNode):
            raise ValueError(
                "SpikingLinear: neuron is 'elastic', 'lif', 'if' or 'plif', got 'ternary', which has an amplitude of "
                "another kind; put layers.TernaryLIFNode in front of a linear layer, layers.fold_amplitude absorbs it"
            )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [T, B, N, in_features] real, mask [B, N] (1 for real tokens) -> [T, B, N, out_features]."""
        self.refuse_training()
        self.check_width(x)
        if not isinstance(self.neuron, ElasticBiSpike):
            return super().forward(self.neuron(x, from_rest=True, mask=mask))
        if x.shape[0] != self.neuron.time_steps:
            raise ValueError(
                f"SpikingLinear: axis 0 is T and must be {self.neuron.time_steps}, got shape {tuple(x.shape)}; "
                "encode with layers.Direct first"
            )
        if self.packed:
            return self._packed_product(self.neuron, x)
        spikes = self.neuron(x, from_rest=True, mask=mask)
        amplitude = self.neuron.alpha.detach().clamp_min(ALPHA_FLOOR)
        if self.bits == 32 or torch.is_grad_enabled() or product_dtype(x).itemsize < 4:
            low_bit = self.bits != 32
            return spike_linear(spikes, amplitude, self.quantised_weight(), self.bias, bits=2, low_bit=low_bit)
        signs, scale = quantise(self.weight, self.bits, centred_scale=self.centred_scale)
        y = linear(spikes.sign(), signs).mul_((amplitude * scale).view(-1, *(1,) * (x.ndim - 1)))
        return y if self.bias is None else y.add_(self.bias)

    def _packed_product(self, neuron: ElasticBiSpike, x: Tensor) -> Tensor:
        codes, scale = self.weight_packed, self.weight_scale
        dtype = sign_dtype(x, self.out_features)
        if dtype is None:
            return bit_linear(neuron(x, from_rest=True), codes, scale, self.bias, bits=self.bits)
        if dtype.itemsize > 1 or neuron._forward_hooks:  # who watches the neuron sees spikes with their amplitude
            spikes = neuron(x, from_rest=True).sign().to(dtype)
        else:
            options: dict[str, Any] = {"beta": neuron.beta, "reset": neuron.reset_kind, "backend": neuron.backend}
            spikes, _ = elastic_bispike(x, None, neuron.alpha, spike_dtype=dtype, carry_out=False, **options)
        amplitude = neuron.alpha.detach().clamp_min(ALPHA_FLOOR).float()
        return bit_linear(spikes, codes, scale, self.bias, bits=self.bits, amplitude=amplitude, dtype=product_dtype(x))
