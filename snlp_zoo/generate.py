"""Text that a saved causal model writes after a prompt, without anything that training needs."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from snlp_zoo import hub, registry
from snlp_zoo.data.text import refuse_half_pairs
from snlp_zoo.errors import CheckpointError, DataError
from snlp_zoo.models.converted import is_converted

_COLDEST = 1e-6  # a temperature below it takes the likeliest token anyway, and logits overflow


class _Pieces(TextStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


def generate(
    path_or_entry: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float | None = None,
    top_p: float = 1.0,
    num_beams: int = 1,
    seed: int | None = None,
    stream: Callable[[str], None] | None = None,
    revision: str | None = None,
    verify: bool = False,
) -> dict[str, Any]:
    """Continue a prompt.

    Args:
        path_or_entry: a saved folder, a zoo entry (see `find_checkpoint`), or "user/name" on the Hub.
        temperature: divides the logits before a token is drawn; 0 takes the likeliest. None: 1, or 0 with beams.
        top_p: draw from the likeliest tokens that hold this share of the probability.
        num_beams: continuations that are followed side by side; the likeliest is returned.
        seed: of the draw; None: another one every time.
        stream: called with every piece of text as soon as it is there; not with beams.
        revision, verify: as `snlp_zoo.load`.
    Returns:
        prompt, text (what was added), tokens (how many), seconds.
    Raises:
        CheckpointError: no such model, it is damaged, or it writes no text.
        DataError: a prompt without tokens, more tokens than the model has positions, or an option out of bounds.
    """
    if not isinstance(prompt, str):
        raise DataError(f"generate: the prompt is one text, got a {type(prompt).__name__}; call it for each text")
    _check(max_new_tokens, temperature, top_p, num_beams, seed, stream)
    folder = hub.find_checkpoint(path_or_entry, revision=revision, verify=verify)
    model: Any = registry.load(folder)
    if registry.task_of(model) != "causal-lm":
        raise CheckpointError(f"{folder} holds a {type(model).__name__}, which writes no text; use one for causal-lm")
    tokenizer = registry.load_tokenizer(folder)
    ids = _prompt_ids(tokenizer, prompt, model, folder)
    heat = float(num_beams == 1) if temperature is None else temperature * (temperature > _COLDEST)
    drawing = {"temperature": float(heat), "top_p": float(top_p), "top_k": 0} if heat else {}
    end = tokenizer.eos_token_id
    padding = next((token for token in (tokenizer.pad_token_id, end) if token is not None), 0)
    start = time.perf_counter()
    with torch.random.fork_rng(enabled=seed is not None):  # the caller's generator goes on as it would have
        if seed is not None:
            torch.manual_seed(seed)
        written = _written(
            model,
            ids,
            max_new_tokens=max_new_tokens,
            do_sample=heat > 0,
            num_beams=num_beams,
            streamer=None if stream is None else _Pieces(tokenizer, stream),
            eos_token_id=end,
            pad_token_id=padding,
            **drawing,
        )
    seconds = time.perf_counter() - start
    text = tokenizer.decode(written, skip_special_tokens=True)
    return {"prompt": prompt, "text": text, "tokens": len(written), "seconds": seconds}


def _written(model: Any, ids: torch.Tensor, max_new_tokens: int, **options: Any) -> torch.Tensor:
    """The new tokens after those of a prompt, ids [1, N]; options of transformers' `generate`."""
    mask = torch.ones_like(ids)
    try:
        return model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, **options)[0, ids.shape[1] :]
    except IndexError as error:  # its ids are known to fit: what ran out is a table of positions
        raise DataError(
            f"generate: the prompt's {ids.shape[1]} tokens and {max_new_tokens} more do not fit into the "
            f"{model.config.max_position_embeddings} positions of this model; take fewer of either"
        ) from error


def _check(
    max_new_tokens: int, temperature: float | None, top_p: float, num_beams: int, seed: int | None, stream: Any
) -> None:
    if stream is not None and num_beams > 1:
        raise DataError(
            f"generate: beams are chosen at the end and cannot be streamed; num_beams is {num_beams}, use 1"
        )
    if not (max_new_tokens > 0 and num_beams > 0 and 0 < top_p <= 1 and (temperature is None or temperature >= 0)):
        raise DataError(
            "generate: max_new_tokens and num_beams must be at least 1, top_p above 0 and at most 1, temperature not "
            f"negative; got {max_new_tokens}, {num_beams}, {top_p} and {temperature}"
        )
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise DataError(f"generate: seed {seed} is no number of 64 bits; use one nearer to 0")


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, model: Any, folder: Path) -> torch.Tensor:
    """[1, N]"""
    refuse_half_pairs(prompt, "generate: the prompt")
    special, vocab_size = is_converted(model), model.config.vocab_size  # as in training, ours and others'
    ids = tokenizer(prompt, add_special_tokens=special, return_tensors="pt")["input_ids"].long()
    if not ids.numel():
        raise DataError(f"generate: the prompt {prompt!r} has no tokens; give it at least one word")
    if int(ids.max()) >= vocab_size:
        raise CheckpointError(
            f"cannot generate with {folder}: its tokenizer gives token {int(ids.max())}, its model knows {vocab_size}; "
            "save both of one training"
        )
    return ids
