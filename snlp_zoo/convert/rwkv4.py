"""Dense RWKV-4 checkpoints (Peng et al. 2023, arXiv:2305.13048): as they are, or where a SpikeGPT starts from."""

from pathlib import Path
from typing import Any

from snlp_zoo.convert.layout import renamed, sizes
from snlp_zoo.convert.reading import is_ggmf, read_ggmf, read_pth
from snlp_zoo.convert.writing import Converted, write
from snlp_zoo.errors import CheckpointError


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    spiking: bool = False,
    binary_embedding: bool | None = None,
    text: str | Path | None = None,
    tokenizer: str | Path | None = None,
    **config: Any,
) -> Converted:
    """A RWKV-4 checkpoint as a saved `SpikeGPTForCausalLM`.

    Args:
        src: an official `.pth`, or a file of rwkv.cpp in FP32 or FP16 (which holds -exp(time_decay)).
        dst, text, tokenizer, config: as in `convert.spikegpt.convert`.
        spiking: False keeps the dense network, logit by logit; True puts its weights into a SpikeGPT, which has to be
            trained before it is of use.
        binary_embedding: None is False: the weights know real embeddings, and lose more with their signs alone than by
            the neurons.
    Raises:
        As `convert.spikegpt.convert`; CheckpointError for spikes as embeddings of the dense network, too.
    """
    if binary_embedding and not spiking:
        raise CheckpointError("the dense network has real embeddings; binary_embedding=True needs spiking=True")
    src, dst = Path(src), Path(dst)
    if is_ggmf(src):
        weights = read_ggmf(src)
        for name in (name for name in weights if name.endswith(".att.time_decay")):
            if not (weights[name] < 0).all():
                raise CheckpointError(
                    f"cannot convert {src}: {name} must be negative, its largest is {weights[name].max():.4g}"
                )
            weights[name] = (-weights[name]).log()
    else:
        weights = read_pth(src)
    config = sizes(src, weights) | {"spiking": spiking} | config
    embeddings = (bool(binary_embedding),)
    return write(
        renamed(src, weights, config), dst, config=config, embeddings=embeddings, text=text, tokenizer=tokenizer
    )
