import pytest
from transformers import AutoTokenizer

from snlp_zoo.data.tokenizers import END, UNKNOWN, train_tokenizer
from snlp_zoo.errors import DataError

TEXTS = [
    "plain words, don't change  two blanks .",
    "\ttabs and\nlines\r\n\n",
    "日本語 👩‍👩‍👧 \u2028 ñ n\u0303",
    " blank at both ends ",
    "[UNK] ##piece Ġ ▁",
]
KINDS = {"characters": None, "bytes": None, "bpe": 300}


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_comes_back(kind, tmp_path):
    """Also from disk, alone and in a batch; saved as transformers saves any other."""
    trained = train_tokenizer(kind, TEXTS, KINDS[kind])
    trained.save_pretrained(tmp_path)
    for tokenizer in (trained, AutoTokenizer.from_pretrained(tmp_path)):
        for text, ids in zip(TEXTS, tokenizer(TEXTS)["input_ids"], strict=True):
            assert tokenizer.decode(ids) == text
            assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.eos_token == tokenizer.pad_token == END
        assert tokenizer.decode(tokenizer("a" + END)["input_ids"], skip_special_tokens=True) == "a"


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_texts_give_the_same_tokenizer(kind):
    one, two = (train_tokenizer(kind, TEXTS, KINDS[kind]).backend_tokenizer.to_str() for _ in range(2))
    assert one == two
    more = train_tokenizer(kind, [*TEXTS, "xyz xyz xyz"], KINDS[kind]).backend_tokenizer.to_str()
    assert (one == more) == (kind == "bytes")


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_byte_level_tokenizers_know_every_text(kind):
    tokenizer = train_tokenizer(kind, ["ab"], KINDS[kind])
    text = "Ω\x00 ￿ 🐍"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_bytes_are_their_own_numbers():
    tokenizer = train_tokenizer("bytes", [])
    text = "\x00 aÿ€😀\n"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert (len(tokenizer), tokenizer.eos_token_id) == (257, 256)


def test_characters_by_hand():
    tokenizer = train_tokenizer("characters", ["caab", "ca"])
    assert tokenizer.get_vocab() == {END: 0, UNKNOWN: 1, "a": 2, "b": 3, "c": 4}
    assert tokenizer("cab!a")["input_ids"] == [4, 2, 3, 1, 2]
    assert train_tokenizer("characters", ["caab", "ca"], 4).get_vocab() == {END: 0, UNKNOWN: 1, "a": 2, "c": 3}


def test_pairs_of_bytes_that_are_frequent_become_one():
    tokenizer = train_tokenizer("bpe", ["ho ho ho ho"], 259)
    assert len(tokenizer) == 259
    assert len(tokenizer("ho")["input_ids"]) == 1


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("bpe", None, "bpe joins bytes, which are 257 tokens with <|endoftext|>; got vocab_size None"),
        ("bpe", 257, "got vocab_size 257"),
        ("bytes", 300, "bytes are 257 tokens with <|endoftext|>, got vocab_size 300; leave it out"),
        ("characters", 2, "4 characters and a vocab_size of 2 leave none beside"),
    ],
)
def test_sizes_that_cannot_be(kind, size, message):
    with pytest.raises(DataError, match=f"tokenizer: .*{message.replace('|', '.')}"):
        train_tokenizer(kind, ["abcd"], size)


def test_characters_need_text():
    with pytest.raises(DataError, match="0 characters"):
        train_tokenizer("characters", [""])
