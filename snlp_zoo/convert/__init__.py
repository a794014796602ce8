"""Other people's models as models that spike.

`to_spiking` converts a dense model of any kind; spikegpt and rwkv4 read checkpoints into models of this zoo, by
`convert(src, dst, ...)` in each.
"""

from snlp_zoo.convert.spiking import to_spiking

__all__ = ["to_spiking"]
