"""What a causal model remembers of the tokens it has read, for `generate()` and for reading on."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor
from transformers import Cache

State = dict[str, Tensor]  # of one layer: name -> [B, ...]


class SpikingCache(Cache):
    """Token shifts, sums and membranes of every layer after the last token; its size does not grow with the text.

    A forward leaves the cache it is given as it was and returns a new one, so one beginning can be continued twice.

    Args:
        states: of each layer, name -> [B, ...]; none for a model at rest.
        seen: tokens read so far, padding included.
    """

    def __init__(self, states: list[State] | None = None, seen: int = 0) -> None:
        super().__init__(layers=[])
        self.states = states or []
        self.seen = seen

    def __repr__(self) -> str:
        return f"SpikingCache(layers={len(self.states)}, batch_size={self.batch_size}, seen={self.seen})"

    def __len__(self) -> int:
        return len(self.states)

    def __bool__(self) -> bool:
        return True  # at rest too

    @property
    def batch_size(self) -> int:
        """Texts; -1 at rest."""
        return next((len(x) for state in self.states for x in state.values()), -1)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for state in self.states for x in state.values())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # no limit

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return bool(self.states)

    is_compileable = False
    is_croppable = False

    @property
    def is_initialized(self) -> bool:
        return bool(self.states)

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError: a state cannot go back, which assisted and contrastive generation would need."""
        raise ValueError(
            f"a spiking state cannot go back by {tokens_to_remove} tokens; read the shorter text from its beginning"
        )

    def reset(self) -> None:
        """At rest, for any batch size."""
        self.states, self.seen = [], 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda x: x.repeat_interleave(repeats, 0))

    def to(self, device: torch.device | str) -> Self:
        self._change(lambda x: x.to(device))
        return self

    def detach(self) -> Self:
        """For truncated backpropagation: no gradient flows into earlier tokens."""
        self._change(Tensor.detach)
        return self

    def _change(self, function: Callable[[Tensor], Tensor]) -> None:
        self.states = [{name: function(x) for name, x in state.items()} for state in self.states]
