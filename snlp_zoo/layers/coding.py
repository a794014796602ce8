"""The only place where the spike-time axis T is created or removed. T is always axis 0."""

import torch
from torch import Tensor


class Direct:
    """Direct coding: the same real value at every step; the first neurons turn it into spikes.

    Args:
        time_steps: T, at least 1.
    Raises:
        ValueError: time_steps below 1, or a spike train of another length.
    """

    def __init__(self, time_steps: int) -> None:
        if time_steps < 1:
            raise ValueError(f"time_steps must be at least 1, got {time_steps}")
        self.time_steps = time_steps

    def encode(self, z: Tensor) -> Tensor:
        """[...] -> [T, ...], a view without a copy."""
        return z.unsqueeze(0).expand(self.time_steps, *z.shape)

    def decode(self, spikes: Tensor) -> Tensor:
        """[T, ...] -> [...], the mean over T."""
        if len(spikes) != self.time_steps:
            raise ValueError(f"expected {self.time_steps} time steps on axis 0, got {len(spikes)}")
        return torch.mean(spikes, dim=0)
