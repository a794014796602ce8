"""The SpikeGPT authors' checkpoints (Zhu et al. 2023, arXiv:2302.13939; code ridgerchu/SpikeGPT)."""

from pathlib import Path
from typing import Any

from snlp_zoo.convert.layout import renamed, sizes
from snlp_zoo.convert.reading import read_pth
from snlp_zoo.convert.writing import Converted, write


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    binary_embedding: bool | None = None,
    text: str | Path | None = None,
    tokenizer: str | Path | None = None,
    **config: Any,
) -> Converted:
    """An official `.pth` as a saved `SpikeGPTForCausalLM`; weights are copied, none is rescaled.

    The authors' generation script halves the output weights every six layers, and the stream with them. A norm undoes
    that in RWKV, but a neuron comes first here: the halved current meets a whole threshold. So it is left out.

    Args:
        src: a state dict of torch.save; float32, bfloat16 or float16 become float32.
        dst: a new folder: config.json, model.safetensors and the tokenizer's files.
        binary_embedding: True as the model was trained; False as the authors' script generates with other
            vocabularies than 77 characters. None tries both on the text and takes the one of lower perplexity, or
            True without a text.
        text: a text, or a file of one, to measure perplexity on.
        tokenizer: folder of the tokenizer the model was trained with.
        config: other fields of `SpikeGPTConfig`; sizes come from the tensors.
    Raises:
        CheckpointError: src is no such state dict, damaged, or dst cannot be written; nothing is written then.
        DataError: the text cannot be scored.
        RecipeError: a size is out of bounds, or a configuration field is unknown or bad.
    """
    src, dst = Path(src), Path(dst)
    weights = read_pth(src)
    config = sizes(src, weights) | config
    embeddings = (True, False) if binary_embedding is None else (binary_embedding,)
    return write(
        renamed(src, weights, config), dst, config=config, embeddings=embeddings, text=text, tokenizer=tokenizer
    )
