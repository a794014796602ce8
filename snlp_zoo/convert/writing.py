"""A converted model in its folder: complete and loaded once, or not there at all."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from snlp_zoo import registry
from snlp_zoo.errors import CheckpointError, DataError
from snlp_zoo.models.modeling_spikegpt import SpikeGPTForCausalLM

WINDOW, TOKENS = 1024, 16_384  # tokens that are read at once, from rest; tokens of a text that are scored


@dataclass(frozen=True)
class Converted:
    """path: the folder written. parameters: how many. config: what the file's sizes and the caller made of it.

    perplexities: "binary" and "real" embeddings -> exp of the mean loss per token on the text; empty without one.
    """

    path: str
    parameters: int
    config: dict[str, Any]
    perplexities: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def write(
    state: Mapping[str, Tensor],
    dst: Path,
    *,
    config: Mapping[str, Any],
    embeddings: Sequence[bool],
    text: str | Path | None,
    tokenizer: str | Path | None,
) -> Converted:
    """Write the model of these weights to a new folder.

    Args:
        state: every weight under its name in `SpikeGPTForCausalLM`.
        dst: must not exist, or be empty.
        config: fields of its configuration, without binary_embedding.
        embeddings: what binary_embedding may be; with a text the one of lower perplexity is taken, else the first.
        text: or a file of it; its first TOKENS tokens are scored in windows of WINDOW tokens.
        tokenizer: a folder, saved with the model; a text needs it.
    Raises:
        CheckpointError: dst is there, the tokenizer is damaged, or nothing can be written.
        RecipeError: a size is out of bounds, or a configuration field is unknown or bad.
        DataError: the text is shorter than two tokens, cannot be read, or has tokens that the model lacks.
    """
    refuse_full(dst)
    words = None if tokenizer is None else registry.load_tokenizer(Path(tokenizer))
    ids = None if text is None else _tokens(text, words, config["vocab_size"])
    candidates = {}
    for binary in embeddings if ids is not None else embeddings[:1]:
        made = registry.build_config("spikegpt", {**config, "binary_embedding": binary})
        model = SpikeGPTForCausalLM.from_pretrained(None, config=made, state_dict=dict(state), use_safetensors=True)
        candidates[binary] = model.eval(), None if ids is None else perplexity(model, ids)
    chosen = min(candidates, key=lambda binary: candidates[binary][1] or 0.0)
    model = candidates[chosen][0]
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{dst.name}.", dir=dst.parent) as scratch:
            aside = Path(scratch, "model")
            model.save_pretrained(aside)
            if words is not None:
                words.save_pretrained(aside)
            SpikeGPTForCausalLM.from_pretrained(aside, use_safetensors=True)  # strict: every tensor, and no other
            aside.rename(dst)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {dst}: {error}") from error
    found = {"binary" if binary else "real": loss for binary, (_, loss) in candidates.items() if loss is not None}
    return Converted(str(dst), model.num_parameters(), {**config, "binary_embedding": chosen}, found)


def refuse_full(dst: Path) -> None:
    """Raises CheckpointError unless `dst` does not exist or is an empty folder."""
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise CheckpointError(f"cannot write {dst}: it exists; name a new folder, or remove it")


def _tokens(text: str | Path, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> Tensor:
    """The first tokens of a text, [n]."""
    if tokenizer is None:
        raise DataError("a text is scored token by token and needs a tokenizer; give its folder too")
    try:
        named = len(str(text)) < 1000 and "\n" not in str(text) and Path(text).is_file()
        content = Path(text).read_text(encoding="utf-8") if named or isinstance(text, Path) else text
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {text}: {error}; give a file of plain text in UTF-8") from error
    ids = torch.tensor(tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"][:TOKENS])
    if len(ids) < 2:
        raise DataError(f"a text to be scored has two tokens at least, this one {len(ids)}")
    if (largest := int(ids.max())) >= vocabulary:
        raise DataError(
            f"the tokenizer gives token {largest}, the checkpoint knows {vocabulary}; take the tokenizer it was "
            "trained with"
        )
    return ids


@torch.no_grad()
def perplexity(model: SpikeGPTForCausalLM, ids: Tensor) -> float:
    """exp of the mean loss of every token but the first of each window; ids [n]."""
    total, number = 0.0, 0
    for window in ids.split(WINDOW):
        if len(window) > 1:
            logits = model(window.unsqueeze(0), use_cache=False).logits[0, :-1]
            total += float(cross_entropy(logits.double(), window[1:], reduction="sum"))
            number += len(window) - 1
    return float(torch.tensor(total / number).exp())  # infinite rather than an error
