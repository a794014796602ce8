"""Configuration of SpikingBERT."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict

from snlp_zoo.models.configuration import SpikingEncoderConfig

ATTENTIONS = ("softmax", "linear")


@strict
class SpikingBertConfig(SpikingEncoderConfig):
    """SpikingBERT: integrate-and-fire neurons trained at equilibrium (Bal and Sengupta 2024, arXiv:2308.10873).

    Args beyond BERT's:
        t_conv: T, simulated time steps; another name of `time_steps`. `model(..., time_steps=...)` overrides it.
        v_threshold: firing threshold of every neuron, unit of v. Higher is sparser and settles later.
        leak: share of the membrane kept from step to step, in (0, 1]; 1 is integrate-and-fire, below it rates are
            weighted averages.
        v_init: membrane of every neuron before the first step, in units of v_threshold, in [0, 1). 0 as published; 0.5
            makes rates of few steps unbiased, see `layers.equilibrium.Spikes`.
        feedback: a learned connection from the last layer's spikes, one step later, to the input neurons. Training
            then solves for the equilibrium, and the simulation runs step by step.
        attention: "softmax", or "linear": query times key over the number of tokens, without softmax.
        max_iter, tolerance: of the fixed-point solver, for feedback only; the residual is relative.
    """

    model_type = "spikingbert"
    attribute_map: ClassVar[dict[str, str]] = {"t_conv": "time_steps"}

    time_steps: int = 80
    v_threshold: float | int = 1.0
    leak: float | int = 1.0
    v_init: float | int = 0.0
    feedback: bool = False
    attention: str = "softmax"
    max_iter: int = 100
    tolerance: float = 1e-3

    def __post_init__(self, **kwargs):
        self._require("attention", ATTENTIONS)
        if not (self.v_threshold > 0 and 0 < self.leak <= 1 and 0 <= self.v_init < 1):
            raise ValueError(
                "spikingbert: v_threshold must be positive, leak in (0, 1] and v_init in [0, 1); "
                f"got {self.v_threshold}, {self.leak} and {self.v_init}"
            )
        if not (1 <= self.max_iter <= 10_000 and 0 < self.tolerance < 1):
            raise ValueError(
                "spikingbert: max_iter must be between 1 and 10000 and tolerance in (0, 1); "
                f"got {self.max_iter} and {self.tolerance}"
            )
        super().__post_init__(**kwargs)

    @property
    def gradient(self) -> Literal["equilibrium"]:
        return "equilibrium"
