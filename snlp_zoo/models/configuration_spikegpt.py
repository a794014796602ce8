"""Configuration of SpikeGPT."""

from huggingface_hub.dataclasses import strict

from snlp_zoo.models.configuration import SpikingDecoderConfig
from snlp_zoo.ops import SURROGATES

WIRINGS = ("published", "spike_driven")


@strict
class SpikeGPTConfig(SpikingDecoderConfig):
    """SpikeGPT: RWKV-4 whose blocks add spikes to the residual stream (Zhu et al. 2023, arXiv:2302.13939).

    Membranes walk over tokens, so there is no T and no limit to a text's length.

    Args beyond those of `SpikingDecoderConfig`:
        intermediate_size: width of channel mixing; None: 4 x hidden_size.
        hidden_dropout_prob: on the residual stream, after every block.
        tau: membrane time constant in tokens, > 1.
        v_threshold: firing threshold, unit of v.
        surrogate: derivative of a spike, one of `ops.SURROGATES`; learnable_surrogate trains its width, layer by layer.
        detach_reset: keep the reset out of the gradient; the authors do not.
        binary_embedding: embeddings become spikes, as the authors train. Their generator does so for one vocabulary
            only: for weights of theirs, try both.
        spiking: False is the dense control, RWKV-4 of the same shape without any neuron.
        wiring: "published", a neuron after each mixing, so that blocks add 0 or 1 and products take real numbers; or
            "spike_driven", a neuron before each projection, so that products take spikes and blocks add real numbers.
    """

    model_type = "spikegpt"

    vocab_size: int = 50277
    num_hidden_layers: int = 18
    intermediate_size: int | None = None  # type: ignore[assignment]
    hidden_dropout_prob: float | int = 0.03
    tau: float | int = 2.0
    v_threshold: float | int = 1.0
    surrogate: str = "atan"
    learnable_surrogate: bool = False
    detach_reset: bool = False
    binary_embedding: bool = True
    spiking: bool = True
    wiring: str = "published"

    def __post_init__(self, **kwargs):
        self._require("surrogate", SURROGATES)
        self._require("wiring", WIRINGS)
        self._require_lif(self.tau, self.v_threshold)
        if self.int8_embeddings and not self.signs_suffice:
            raise ValueError(
                "spikegpt: embeddings that are tied to the head, or do not become spikes by their signs, are kept "
                "whole; int8_embeddings must be false"
            )
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)

    @property
    def signs_suffice(self) -> bool:
        """Whether nothing but the signs of the embeddings is used."""
        return self.spiking and self.binary_embedding and not self.tie_word_embeddings
