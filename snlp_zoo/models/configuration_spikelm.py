"""Configuration of SpikeLM."""

from typing import Literal, get_args

from huggingface_hub.dataclasses import strict

from snlp_zoo.layers.neurons import ALPHA_MODES
from snlp_zoo.models.configuration import SpikingEncoderConfig
from snlp_zoo.ops.bispike import Reset

NEURONS = ("elastic", "lif")


@strict
class SpikeLMConfig(SpikingEncoderConfig):
    """SpikeLM: BERT whose linear layers, keys and values take ternary spikes (Xing et al. 2024, arXiv:2406.03287).

    Args beyond BERT's:
        time_steps: T, spike-time steps per token.
        firing_k: spike amplitude in units of the mean membrane magnitude; threshold is half of it. Larger is sparser.
        membrane_beta: share of the membrane kept by a neuron that did not fire.
        reset: "symmetric", or "reference" for the released recursion.
        alpha_mode: "first_batch" (as released), "ema" or "learned"; see `layers.ElasticBiSpike`.
        alpha_momentum: share of the old amplitude kept per batch in mode "ema".
        neuron: "elastic", or "lif" for binary spikes {0, 1} of `layers.LIFNode`, to compare with: of the options above
            these take time_steps alone.
        tau, v_threshold: of LIF neurons: membrane time constant in time steps, > 1, and what fires, unit of v; half of
            that after attention. There is no amplitude to learn, and the threshold follows no data: where currents are
            small a neuron is silent and only its surrogate's gradient, "atan", can wake it.
    """

    model_type = "spikelm"

    firing_k: float | int = 2.0
    membrane_beta: float | int = 0.25
    reset: str = "symmetric"
    alpha_mode: str = "ema"
    alpha_momentum: float | int = 0.99
    neuron: str = "elastic"
    tau: float | int = 2.0
    v_threshold: float | int = 1.0

    def __post_init__(self, **kwargs):
        self._require("reset", get_args(Reset))
        self._require("alpha_mode", ALPHA_MODES)
        if not (self.firing_k > 0 and 0 <= self.membrane_beta <= 1 and 0 <= self.alpha_momentum <= 1):
            raise ValueError(
                "spikelm: firing_k must be positive, membrane_beta and alpha_momentum in [0, 1]; "
                f"got {self.firing_k}, {self.membrane_beta}, {self.alpha_momentum}"
            )
        self._require("neuron", NEURONS)
        self._require_lif(self.tau, self.v_threshold)
        super().__post_init__(**kwargs)

    @property
    def gradient(self) -> Literal["surrogate", "straight_through"]:
        return "surrogate" if self.neuron == "lif" else "straight_through"
