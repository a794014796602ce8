"""A linear layer whose input is spikes."""

from torch import Tensor, nn

from snlp_zoo.layers.neurons import ElasticBiSpike
from snlp_zoo.ops.bispike import ALPHA_FLOOR
from snlp_zoo.ops.spike_linear import spike_linear


class SpikingLinear(nn.Linear):
    """y[t] = W s[t] + b with s = neuron(x): the neuron sits in front of the weights, so the product adds weights up.

    Parameters are those of `torch.nn.Linear`, so dense weights load by name. The backward keeps two bits per spike.

    Args:
        in_features, out_features, bias: as in `torch.nn.Linear`.
        neuron_options: arguments of `ElasticBiSpike` (time_steps, firing_k, beta, ...).
    Source: Xing et al. 2024 (arXiv:2406.03287).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **neuron_options) -> None:
        super().__init__(in_features, out_features, bias)
        self.neuron = ElasticBiSpike(**neuron_options)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [T, B, N, in_features] real, mask [B, N] (1 for real tokens) -> [T, B, N, out_features]."""
        if x.shape[0] != self.neuron.time_steps:
            raise ValueError(
                f"SpikingLinear: axis 0 is T and must be {self.neuron.time_steps}, got shape {tuple(x.shape)}; "
                "encode with layers.Direct first"
            )
        spikes = self.neuron(x, from_rest=True, mask=mask)
        amplitude = self.neuron.alpha.detach().clamp_min(ALPHA_FLOOR)
        return spike_linear(spikes, amplitude, self.weight, self.bias, bits=2)
