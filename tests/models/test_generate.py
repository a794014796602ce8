"""`generate()` and the state it carries, in float64: what is cached equals what is computed anew."""

import copy
import pickle

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast, TextStreamer, pipeline

from snlp_zoo import registry
from snlp_zoo.models.cache import SpikingCache

WIRINGS = {"published": {}, "driven": {"wiring": "spike_driven", "v_threshold": 0.25}, "dense": {"spiking": False}}
every_wiring = pytest.mark.parametrize("options", WIRINGS.values(), ids=WIRINGS)
GREEDY = {"do_sample": False, "max_new_tokens": 12}


def build(**options):
    """In float64, with random values in place of the matrices that start at zero."""
    model = registry.build("spikegpt_tiny", **options).double()
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def prompts(batch=2, length=6):
    return torch.randint(0, 120, (batch, length))


def equal(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("wiring", "tokens"), [("published", 1000), ("driven", 200), ("dense", 200)])
@torch.no_grad()
def test_token_by_token_equals_the_whole(wiring, tokens):
    """T1; the state after 10 tokens has as many bytes as after all."""
    model, ids = build(**WIRINGS[wiring]), prompts(1, tokens)
    whole = model(ids)
    cache, logits, sizes = None, [], {}
    for position in range(tokens):
        output = model(ids[:, position : position + 1], past_key_values=cache)
        cache = output.past_key_values
        logits.append(output.logits)
        sizes[position + 1] = cache.nbytes
    equal(torch.cat(logits, 1), whole.logits)
    for state, expected in zip(cache.states, whole.past_key_values.states, strict=True):
        assert state.keys() == expected.keys()
        for name, values in expected.items():
            equal(state[name], values)
    assert sizes[10] == sizes[tokens] > 0
    assert cache.get_seq_length() == tokens


@every_wiring
@pytest.mark.parametrize("parts", [[1, 99], [50, 50], [99, 1], [33, 1, 1, 65], [7] * 14 + [2]], ids=str)
@torch.no_grad()
def test_a_prompt_in_parts_equals_the_whole(options, parts):
    """T1 and T2."""
    model, ids = build(**options), prompts(2, 100)
    cache, logits = None, []
    for part in ids.split(parts, 1):
        output = model(part, past_key_values=cache)
        cache = output.past_key_values
        logits.append(output.logits)
    equal(torch.cat(logits, 1), model(ids).logits)


@every_wiring
@pytest.mark.parametrize("beams", [1, 3])
def test_prompts_padded_on_the_left_generate_what_they_do_alone(options, beams):
    """T3."""
    model = build(**options)
    texts = [prompts(1, length) for length in (3, 8, 5)]
    ids = torch.cat([torch.nn.functional.pad(text, (8 - text.shape[1], 0), value=7) for text in texts])
    mask = torch.tensor([[0] * (8 - text.shape[1]) + [1] * text.shape[1] for text in texts])
    together = model.generate(ids, attention_mask=mask, num_beams=beams, **GREEDY)
    for row, text in enumerate(texts):
        alone = model.generate(text, num_beams=beams, **GREEDY)
        assert torch.equal(together[row, 8:], alone[0, text.shape[1] :])


@every_wiring
@pytest.mark.parametrize(
    "how",
    [{"do_sample": False}, {"do_sample": True, "top_p": 0.9, "num_return_sequences": 3}, {"num_beams": 3}],
    ids=str,
)
def test_with_and_without_a_cache(options, how):
    """T4."""
    model, ids = build(**options), prompts()
    outputs = []
    for cached in (True, False):
        torch.manual_seed(5)
        outputs.append(model.generate(ids, max_new_tokens=12, use_cache=cached, **how))
    assert torch.equal(*outputs)
    assert outputs[0].shape == (2 * how.get("num_return_sequences", 1), 18)


@every_wiring
@torch.no_grad()
def test_beams_equal_a_search_by_hand(options):
    """T5: two beams, each with a copy of its own state."""
    model, ids = build(**options), prompts(1)
    output = model(ids)
    scores, tokens = output.logits[0, -1].log_softmax(-1).topk(2)
    beams = [
        (score, [int(token)], copy.deepcopy(output.past_key_values))
        for score, token in zip(scores, tokens, strict=True)
    ]
    for _ in range(9):
        candidates = []
        for score, text, cache in beams:
            output = model(torch.tensor([text[-1:]]), past_key_values=cache)
            for gain, token in zip(*output.logits[0, -1].log_softmax(-1).topk(2), strict=True):
                candidates.append((score + gain, [*text, int(token)], copy.deepcopy(output.past_key_values)))
        beams = sorted(candidates, key=lambda candidate: candidate[0], reverse=True)[:2]
    got = model.generate(ids, num_beams=2, num_return_sequences=2, max_new_tokens=10, do_sample=False)
    assert got[:, 6:].tolist() == [text for _, text, _ in beams]


def test_saved_and_loaded(tmp_path):
    """T6."""
    model, ids = build(), prompts()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(ids, **GREEDY), model.generate(ids, **GREEDY))


@every_wiring
@torch.no_grad()
def test_nothing_stays_in_the_model(options):
    """T7: two calls in a row, two that take turns, and another batch in between."""
    model = build(**options)
    one, other = prompts(), prompts()
    expected = [model.generate(ids, **GREEDY) for ids in (one, other)]
    assert torch.equal(model.generate(one, **GREEDY), expected[0])
    model.generate(prompts(5, 3), **GREEDY)
    texts, caches = [one, other], [None, None]
    for _ in range(12):
        for i in range(2):
            output = model(texts[i] if caches[i] is None else texts[i][:, -1:], past_key_values=caches[i])
            caches[i] = output.past_key_values
            texts[i] = torch.cat([texts[i], output.logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(texts[0], expected[0])
    assert torch.equal(texts[1], expected[1])


def test_a_returned_cache_is_read_on_from_more_than_once():
    model, ids = build(), prompts()
    expected = model.generate(ids, **GREEDY | {"max_new_tokens": 20})
    half = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    cache = half.past_key_values
    assert cache.get_seq_length() == half.sequences.shape[1] - 1  # the last token has not been read
    for _ in range(2):
        assert torch.equal(
            model.generate(half.sequences, past_key_values=cache, do_sample=False, max_new_tokens=8), expected
        )
    assert cache.get_seq_length() == half.sequences.shape[1] - 1


def test_a_prompt_read_in_chunks():
    model, ids = build(), prompts(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    options = GREEDY | {"prefill_chunk_size": 3, "past_key_values": SpikingCache()}
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected)


def test_embeddings_in_place_of_a_prompt():
    model, ids = build(), prompts()
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embedded, **GREEDY), model.generate(ids, **GREEDY)[:, 6:])


@torch.no_grad()
def test_logits_of_the_last_tokens_alone():
    model, ids = build(), prompts()
    for kept in (1, 3):
        assert torch.equal(model(ids, logits_to_keep=kept).logits, model.lm_head(model.spikegpt(ids)[0][:, -kept:]))
    widths = []
    model.lm_head.register_forward_hook(lambda _, inputs, out: widths.append(out.shape[1]))
    model.generate(ids, **GREEDY)
    assert set(widths) == {1}  # the prompt's too


# ---- tokenizers ------------------------------------------------------------------------------------------------------
@pytest.fixture
def characters():
    inner = Tokenizer(models.WordLevel({chr(97 + i): i for i in range(26)} | {" ": 26, "?": 27}, unk_token="?"))  # noqa: S106
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(""), "isolated")
    inner.decoder = decoders.Fuse()
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="?", model_input_names=names, padding_side="left")  # noqa: S106


def test_pipeline_and_streamer(characters, tmp_path, capsys):
    model = build(vocab_size=28)
    model.save_pretrained(tmp_path)
    characters.save_pretrained(tmp_path)
    write = pipeline("text-generation", model=str(tmp_path), device="cpu")
    texts = ["a tale", "of two"]
    answers = write(texts, batch_size=2, **GREEDY)
    for text, (answer,) in zip(texts, answers, strict=True):
        ids = characters(text, return_tensors="pt")["input_ids"]
        assert ids.shape == (1, 6)
        expected = characters.decode(model.generate(ids, **GREEDY)[0], skip_special_tokens=True)
        assert answer["generated_text"] == expected
    capsys.readouterr()
    model.generate(ids, streamer=TextStreamer(characters, skip_special_tokens=True), **GREEDY)
    assert capsys.readouterr().out.strip() == expected.strip()


# ---- the cache itself ------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_what_a_cache_can_do():
    model, ids = build(), prompts(3)
    cache = model(ids).past_key_values
    assert (len(cache), cache.batch_size, cache.get_seq_length(), cache.get_max_length()) == (2, 3, 6, -1)
    assert not cache.is_compileable
    assert cache.has_previous_state()
    following = prompts(3, 1)

    def after(changed, ids):
        return model(ids, past_key_values=changed).logits

    expected = after(cache, following)
    rows = torch.tensor([2, 0, 0])
    for change in ("reorder_cache", "batch_select_indices"):
        getattr(changed := copy.deepcopy(cache), change)(rows)
        equal(after(changed, following[rows]), expected[rows])
    (changed := copy.deepcopy(cache)).batch_repeat_interleave(2)
    equal(after(changed, following.repeat_interleave(2, 0)), expected.repeat_interleave(2, 0))
    equal(after(pickle.loads(pickle.dumps(cache)), following), expected)  # noqa: S301
    equal(after(cache.to("cpu").detach(), following), expected)
    with pytest.raises(ValueError, match="cannot go back by 2 tokens"):
        cache.crop(2)
    cache.reset()
    assert (len(cache), cache.batch_size, cache.get_seq_length(), cache.nbytes) == (0, -1, 0, 0)
    equal(after(cache, ids[:1]), model(ids[:1]).logits)


@pytest.mark.parametrize(
    ("options", "batch", "expected"),
    [
        ({"hidden_size": 16}, 2, r"layers.0.time_shift is \[2, 32\], here \[2, 16\]"),
        ({"num_hidden_layers": 3}, 2, r"layers.2.time_shift is missing, here \[2, 32\]"),
        ({"num_hidden_layers": 1}, 2, r"layers.1.time_shift is \[2, 32\], here there is none"),
        ({"wiring": "spike_driven"}, 2, "layers.0.time_mix.key_neuron is missing"),
        ({"spiking": False}, 2, r"layers.0.time_neuron is \[2, 32\], here there is none"),
        ({}, 3, r"layers.0.time_shift is \[2, 32\], here \[3, 32\]"),
    ],
)
def test_a_state_of_another_model_or_batch(options, batch, expected):
    cache = build()(prompts()).past_key_values
    with pytest.raises(ValueError, match=expected):
        build(**options)(prompts(batch), past_key_values=cache)


def test_another_library_s_cache():
    with pytest.raises(ValueError, match="must be a SpikingCache, got a DynamicCache"):
        build()(prompts(), past_key_values=DynamicCache())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "cannot generate by contrastive search"),
        ({"prompt_lookup_num_tokens": 3}, "cannot generate by assisted generation"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, "cannot generate by group beam search"),
    ],
)
def test_ways_of_generating_that_are_refused(options, expected):
    with pytest.raises(ValueError, match=f"{expected}; use one of greedy search, sample, beam search, beam sample"):
        build().generate(prompts(1), max_new_tokens=4, **options)


def test_an_assistant_is_refused():
    model = build()
    with pytest.raises(ValueError, match="cannot generate by assisted generation"):
        model.generate(prompts(1), max_new_tokens=4, assistant_model=model)


def test_prompts_that_are_refused():
    model = build()
    with pytest.raises(ValueError, match="there are no tokens to read"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=4)
    with pytest.raises(ValueError, match="token id 120 is not in the vocabulary of 120"):
        model.generate(torch.tensor([[4, 120]]), max_new_tokens=4)


def test_a_state_holds_nothing_of_the_text_but_itself():
    model = registry.build("spikegpt_tiny")
    cache = model(torch.randint(0, 120, (1, 300))).past_key_values
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for s in cache.states for x in s.values()}
    assert sum(held.values()) == cache.nbytes
