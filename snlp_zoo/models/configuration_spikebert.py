"""Configuration of SpikeBERT."""

from huggingface_hub.dataclasses import strict

from snlp_zoo.layers.attention import ATTENTIONS
from snlp_zoo.models.configuration import SpikingEncoderConfig
from snlp_zoo.ops import SURROGATES

NEURONS = ("lif", "if", "plif", "ternary")
FIDELITIES = ("corrected", "released")


@strict
class SpikeBertConfig(SpikingEncoderConfig):
    """SpikeBERT: a Spikformer encoder for text, without softmax (Lv et al. 2023, arXiv:2308.15122).

    Args beyond BERT's (there is no dropout inside the encoder; `hidden_dropout_prob` is that of the classifier):
        time_steps: T, spike-time steps per token.
        neuron: "lif", "if", "plif" (learned leak) or "ternary" ({-a, 0, a}); see `layers.make_neuron`. Ternary
            neurons learn a where nothing but a linear layer takes their spikes, elsewhere it is 1.
        tau: membrane time constant in time steps, > 1. Large against T it silences the network: a constant current x
            fires only if x (1 - (1 - 1 / tau)^T) reaches v_threshold.
        v_threshold: firing threshold, unit of v; half of it after attention.
        surrogate: derivative of a spike, one of `ops.SURROGATES`; learnable_surrogate trains its width, layer by layer.
        attention: one of `layers.attention.ATTENTIONS`.
        fidelity: "corrected", or "released" for the authors' wiring: padding attends, spikes and is pooled, and nothing
            tells positions apart.
        use_position_embeddings: learned positions, added before embeddings become spikes; None: not if released.
    """

    model_type = "spikebert"

    vocab_size: int = 28996
    num_attention_heads: int = 8
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    layer_norm_eps: float = 1e-5
    neuron: str = "lif"
    tau: float | int = 2.0
    v_threshold: float | int = 1.0
    surrogate: str = "atan"
    learnable_surrogate: bool = False
    attention: str = "ssa"
    fidelity: str = "corrected"
    use_position_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
        self._require("neuron", NEURONS)
        self._require("surrogate", SURROGATES)
        self._require("attention", tuple(ATTENTIONS))
        self._require("fidelity", FIDELITIES)
        self._require_lif(self.tau, self.v_threshold)
        if (rate := self.attention_probs_dropout_prob) != 0:
            raise ValueError(f"spikebert has no attention dropout: attention_probs_dropout_prob must be 0, got {rate}")
        if self.use_position_embeddings is None:
            self.use_position_embeddings = self.fidelity == "corrected"
        super().__post_init__(**kwargs)
