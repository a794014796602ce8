import json

import pytest
import torch
from accelerate import skip_first_batches

from snlp_zoo.data import load_documents, read_documents
from snlp_zoo.data.streams import CropBatches, Crops, crop_loader, make_stream
from snlp_zoo.data.tokenizers import train_tokenizer
from snlp_zoo.errors import DataError

TEXTS = ["abcde", "fg", "hijklmnopq"]


@pytest.fixture
def letters():
    return train_tokenizer("characters", [*TEXTS, "\n"])


@pytest.fixture
def stream(letters):
    return make_stream(TEXTS, letters)


def test_a_stream_by_hand(letters, stream):
    assert letters.decode(stream.tokens) == "<|endoftext|>abcde<|endoftext|>fg<|endoftext|>hijklmnopq<|endoftext|>"
    assert (len(stream), stream.utf8_bytes, stream.characters, stream.unknown) == (20, 20, 20, 0)
    lines = make_stream(TEXTS, letters, "\n")
    assert letters.decode(lines.tokens) == "\nabcde\nfg\nhijklmnopq\n"
    assert (len(lines), lines.utf8_bytes, lines.characters) == (20, 20, 20)


def test_bytes_and_characters_are_those_of_the_text():
    """é has two bytes; the end of a text counts as one, a separator as what it is."""
    tokenizer = train_tokenizer("bytes", [])
    ended, marked = make_stream(["aé", "b"], tokenizer), make_stream(["aé", "b"], tokenizer, " € ")
    assert (len(ended), ended.utf8_bytes, ended.characters) == (6, 6, 5)
    assert (len(marked), marked.utf8_bytes, marked.characters) == (4 + 2 * 5, 4 + 2 * 5, 3 + 2 * 3)
    assert make_stream(["aéx"], train_tokenizer("characters", ["a"])).unknown == 2


def test_more_texts_than_are_encoded_at_once(letters):
    texts = ["ab", "c"] * 1100
    assert letters.decode(make_stream(texts, letters, "\n").tokens) == "\n" + "".join(f"{text}\n" for text in texts)


@pytest.mark.parametrize(("length", "batch_size"), [(1, 1), (3, 2), (6, 4), (20, 1), (50, 8)])
def test_to_be_scored_every_token_is_predicted_once(stream, letters, length, batch_size):
    batches = list(crop_loader(stream, letters, length, batch_size, shuffle=False))
    predicted, read = [], []
    for batch in batches:
        real = batch["labels"] != -100
        assert torch.equal(real, batch["attention_mask"].bool())
        predicted += batch["labels"][real].tolist()
        read += batch["input_ids"][real].tolist()
    assert predicted == stream.tokens[1:].tolist()
    assert read == stream.tokens[:-1].tolist()
    assert all(batch["input_ids"].shape[1] <= length and len(batch["index"]) <= batch_size for batch in batches)


def test_to_train_crops_are_pieces_of_the_stream_from_anywhere(stream, letters):
    loader = crop_loader(stream, letters, 4, 2, seed=3, shuffle=True)
    before, starts = torch.get_rng_state(), set()
    for epoch in range(40):
        loader.batch_sampler.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == len(loader) == 2  # five crops cover 20 tokens; the batch that is not full is left out
        for batch in batches:
            assert batch["input_ids"].shape == batch["labels"].shape == (2, 4)
            assert batch["attention_mask"].all()
            for start, ids, labels in zip(batch["index"], batch["input_ids"], batch["labels"], strict=True):
                assert torch.equal(ids, stream.tokens[start : start + 4].long())
                assert torch.equal(labels, stream.tokens[start + 1 : start + 5].long())
                starts.add(int(start))
    assert starts == set(range(17))
    assert torch.equal(before, torch.get_rng_state())


def test_crops_follow_from_seed_and_epoch_alone(stream, letters):
    def drawn(seed, epoch):
        batches = crop_loader(stream, letters, 3, 2, seed=seed, shuffle=True).batch_sampler
        batches.set_epoch(epoch)
        return list(batches)

    assert drawn(0, 1) == drawn(0, 1)
    assert len({json.dumps(drawn(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6


def test_skipping_goes_on_where_it_stopped(stream, letters):
    loader = crop_loader(stream, letters, 2, 2, seed=1, shuffle=True)
    rest = list(skip_first_batches(loader, 3))
    assert [batch["index"].tolist() for batch in rest] == [batch["index"].tolist() for batch in loader][3:]


def test_few_crops_still_make_a_full_batch(stream):
    (batch,) = CropBatches(Crops(stream, 10), 8, shuffle=True)
    assert len(batch) == 8


def test_what_cannot_be_cropped(stream, letters):
    with pytest.raises(
        DataError, match="the stream of 20 tokens is shorter than a crop of 21; give more text, or lower"
    ):
        CropBatches(Crops(stream, 21), 2, shuffle=True)
    with pytest.raises(DataError, match="batch_size 0"):
        CropBatches(Crops(stream, 2), 0, shuffle=False)
    with pytest.raises(DataError, match="0 texts and the separator None make no stream"):
        make_stream([], letters)
    letters.eos_token = None
    with pytest.raises(DataError, match=r"no end of text to stand between texts; set data\.separator"):
        make_stream(TEXTS, letters)


# ---- whole texts ----


def test_a_text_file_is_one_text_and_is_cut_where_lines_end(tmp_path):
    text = "".join(f"  line {number}\n\n" for number in range(300))
    path = tmp_path / "play.txt"
    path.write_text(text)
    assert read_documents(path) == [text]
    splits = load_documents(str(path))
    (train,), (validation,), (test,) = (part.texts for part in (splits.train, splits.validation, splits.test))
    assert train + validation + test == text  # nothing is lost, nothing is in two splits
    assert train.endswith("\n")
    assert validation.endswith("\n")
    assert abs(len(validation) - len(text) / 10) < 30
    assert abs(len(test) - len(text) / 10) < 30


def test_a_text_without_lines_is_cut_anyway(tmp_path):
    (tmp_path / "long.txt").write_text("ab" * 50 + "\n")
    splits = load_documents(str(tmp_path / "long.txt"))
    assert [len(part.texts[0]) for part in (splits.train, splits.validation, splits.test)] == [80, 10, 11]
    (tmp_path / "short.txt").write_text("ab")
    with pytest.raises(DataError, match="too short to cut validation and test"):
        load_documents(str(tmp_path / "short.txt"))


@pytest.mark.parametrize("given", [["train"], ["train", "test"], ["train", "valid"], ["train", "valid", "test"]])
def test_splits_of_a_folder_are_kept_and_share_no_text(tmp_path, given):
    for name in given:
        rows = "".join(json.dumps({"text": f"{name} {number}"}) + "\n" for number in range(40))
        (tmp_path / f"{name}.jsonl").write_text(rows)
    splits = load_documents(str(tmp_path))
    sets = [set(part.texts) for part in (splits.train, splits.validation, splits.test)]
    assert sum(map(len, sets)) == 40 * len(given) == len(set.union(*sets))
    assert {text.split()[0] for text in sets[2]} == {given[-1]}  # what is given beside train is reported


def test_a_missing_split_is_cut_from_train_where_another_is_given(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {number}\n" for number in range(100)))
    splits = load_documents(str(tmp_path))
    assert splits.test.texts == [(tmp_path / "test.txt").read_text()]
    assert splits.train.texts[0] + splits.validation.texts[0] == (tmp_path / "train.txt").read_text()


def test_subsets_of_the_tweets():
    splits = load_documents("tweets", train_size=20, validation_size=5, test_size=6)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [20, 5, 6]


def test_rows_without_text_are_left_out_of_documents(tmp_path):
    path = tmp_path / "wiki.jsonl"
    rows = ["", " = Heading = ", "one", "  ", "two"]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    assert read_documents(path) == [" = Heading = ", "one", "two"]
    path.write_text(json.dumps({"text": "half \ud83d"}) + "\n")
    with pytest.raises(DataError, match=r"wiki\.jsonl, line 1: the text has half of a surrogate pair"):
        read_documents(path)


def test_one_text_is_not_a_list(letters):
    with pytest.raises(DataError, match="list of texts, got one text"):
        make_stream("abc", letters)
    with pytest.raises(DataError, match="list of texts, got one text"):
        train_tokenizer("bpe", "abc", 300)
    with pytest.raises(DataError, match=r"unknown tokenizer 'character'.*'characters'"):
        train_tokenizer("character", ["abc"])
