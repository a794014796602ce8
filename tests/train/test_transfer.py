"""Texts that the teacher labels: whose examples they become, what their labels are, a stop and a resume."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from snlp_zoo.errors import DataError, RecipeError
from snlp_zoo.train import run as runs
from snlp_zoo.train.loop import Trainer
from snlp_zoo.train.recipe import load_recipe

TEXTS = [f"{cue} {filler} {cue}" for filler in ("kalan", "modor", "ripim") for cue in ("lumi", "vosh", "sola", "drel")]


@pytest.fixture
def transfer(tmp_path):
    """The key of a recipe: 12 texts in two files."""
    (tmp_path / "some.txt").write_text("\n".join(TEXTS[:8]))
    (tmp_path / "more.tsv").write_text("\n".join(["sentence\tother", *(f"{text}\tx" for text in TEXTS[8:])]))
    return {"source": [str(tmp_path / "some.txt"), str(tmp_path / "more.tsv")], "text": ["text", "sentence"]}


@pytest.fixture
def seen(monkeypatch):
    """What the student of each run is trained on, and its teacher."""
    found, real = [], runs.with_transfer

    def watched(job, teacher):
        found.append((real(job, teacher), teacher))
        return found[-1][0]

    monkeypatch.setattr(runs, "with_transfer", watched)
    return found


def by_hand(teacher, tokenizer, texts):
    """The teacher's logits, one text at a time."""
    with torch.no_grad():
        return [teacher(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]


def test_the_teacher_labels_texts_for_the_student_alone(run, transfer, seen, metrics, own_cache, teacher_folder):
    folder, summary = run(data={"transfer": transfer}, train={"epochs": 1})
    ((job, teacher),) = seen
    train, before = job.data.train, job.data.texts.train
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    assert train.labels[:96] == before.labels
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in train.input_ids[96:]] == TEXTS
    expected = [int(logits.argmax()) for logits in by_hand(teacher, tokenizer, TEXTS)]
    assert train.labels[96:] == expected
    assert set(expected) == {0, 1}
    assert [len(column) for column in (train.input_ids, train.token_type_ids, train.labels)] == [108] * 3
    assert [row["step"] for row in metrics(folder) if "loss" in row][-1] == 6  # 108 texts, 16 at a time
    assert [row["step"] for row in metrics(folder / "teacher") if "loss" in row][-1] == 24  # 4 epochs of 96
    assert summary["test_examples"] == 40


def test_the_teacher_s_value_for_a_regression(run, make_data, transfer, seen, teacher_folder):
    rows = {
        split: [(f"{end} {end} {text}", 0.5 + number) for number, text in enumerate(TEXTS[:10])]
        for split, end in (("train", "kasut"), ("dev", "morip"), ("test", "nepim"))
    }
    run(
        data={"source": str(make_data(**rows)), "transfer": transfer | {"size": 5}},
        teacher={"train": {"epochs": 1, "batch_size": 4}},
        objectives={"logit_mse": 1.0, "cross_entropy": 1.0},
        train={"epochs": 1, "batch_size": 4},
    )
    ((job, teacher),) = seen
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    labels = job.data.train.labels[-5:]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in job.data.train.input_ids[-5:]]
    assert len(set(texts) & set(TEXTS)) == 5
    assert labels == pytest.approx([float(logits) for logits in by_hand(teacher, tokenizer, texts)], abs=1e-5)
    assert all(isinstance(label, float) for label in job.data.train.labels)


def test_pairs_of_texts(run, make_data, seen, teacher_folder, tmp_path):
    pairs = [(text, second, int(text[:4] == second[:4])) for text in TEXTS[:4] for second in TEXTS[4:8]]
    folder = tmp_path / "pairs"
    folder.mkdir()
    for split, rows in (("train", pairs), ("dev", [("kasut", "lumi", 0)] * 4), ("test", [("morip", "lumi", 1)] * 4)):
        lines = ["first\tsecond\tlabel", *("\t".join(map(str, row)) for row in rows)]
        (folder / f"{split}.tsv").write_text("\n".join(lines))
    more = [(TEXTS[8], TEXTS[9]), (TEXTS[10], TEXTS[11]), ("lumi", "kasut")]  # the last is a held-out pair
    (tmp_path / "more.tsv").write_text("\n".join(["one\tother", *("\t".join(row) for row in more)]))
    run(
        data={
            "source": str(folder), "text": "first", "text_pair": "second",
            "transfer": {"source": str(tmp_path / "more.tsv"), "text": "one", "text_pair": "other"},
        },
        teacher={"train": {"epochs": 1, "batch_size": 4}},
        train={"epochs": 1, "batch_size": 4},
    )  # fmt: skip
    ((job, teacher),) = seen
    train, tokenizer = job.data.train, AutoTokenizer.from_pretrained(teacher_folder)
    assert len(train) == 18
    expected = [tokenizer(*pair, return_tensors="pt") for pair in more[:2]]
    assert train.input_ids[16:] == [batch["input_ids"][0].tolist() for batch in expected]
    assert train.token_type_ids[16:] == [batch["token_type_ids"][0].tolist() for batch in expected]
    with torch.no_grad():
        assert train.labels[16:] == [int(teacher(**batch).logits[0].argmax()) for batch in expected]
    assert job.overlap["transfer"]["left_out"] == 1


def test_beside_altered_copies_and_by_a_teacher_as_it_is(run, transfer, seen, teacher_folder, tmp_path):
    names = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    AutoModelForSequenceClassification.from_pretrained(teacher_folder, **names).save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(tmp_path / "tuned")
    augment = {"copies": 1, "probability": 0.5, "candidates": 3}
    run(
        data={"train_size": 32, "augment": augment, "transfer": transfer},
        teacher={"name": str(tmp_path / "tuned"), "tune": "none"},
        train={"max_steps": 1},
    )
    ((job, teacher),) = seen
    assert len(job.data.train) == 32 + 32 + 12
    assert job.data.train.labels[:32] == job.data.train.labels[32:64] == job.data.texts.train.labels
    logits = by_hand(teacher, job.tokenizer, TEXTS)
    assert job.data.train.labels[64:] == [int(row.argmax()) for row in logits]


@pytest.mark.parametrize("step", [2, 5])
def test_resume_gives_the_same_bytes(run, transfer, stop_at, monkeypatch, trained, tmp_path, step):
    real = Trainer._step
    changes = {
        "data": {"transfer": transfer | {"size": 10}},
        "model": {"config": {"hidden_dropout_prob": 0.1}},
        "train": {"epochs": 1, "save_steps": 3},
    }
    run(into=tmp_path / "whole", **changes)
    stop_at(step)
    with pytest.raises(stop_at.error):
        run(into=tmp_path / "run", **changes)
    monkeypatch.setattr(Trainer, "_step", real)
    torch.manual_seed(321)
    run(into=tmp_path / "run", resume=True, **changes)
    for name in ("metrics.jsonl", "model/model.safetensors", "recipe.yaml"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None, "objectives": {"cross_entropy": 1}}, "data.transfer: the teacher labels .* there is none"),
        ({"data": {"label": None}, "objectives": {"hidden_mse": 1}}, "transfer is .*, not for text without labels"),
        ({"data": {"text_pair": "label"}}, "data.transfer is for single texts with labels, not for text pairs"),
        ({"data": {"text_pair": "label"}}, "not for text pairs; name its text_pair"),
        ({"data": {"transfer": {"text_pair": "other"}}}, "transfer.text_pair is for pairs of texts with labels"),
        (
            {"task": "causal-lm", "teacher": {"tune": "none"}, "model": {"init_from": "scratch"}},
            "not for a language model",
        ),
        ({"data": {"transfer": {"size": 0}}}, "data.transfer.size"),
        ({"data": {"transfer": {"labels": "x"}}}, "data.transfer.labels: unknown key"),
    ],
)
def test_transfer_is_refused(make_recipe, transfer, changes, message):
    data = {"transfer": transfer | changes.get("data", {}).get("transfer", {})}
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(make_recipe(**changes | {"data": changes.get("data", {}) | data})))


@pytest.mark.parametrize("changes", [{"label": None}, {"text_pair": "label"}])
def test_disjoint_is_refused(make_recipe, changes):
    objectives = {"objectives": {"hidden_mse": 1}}
    with pytest.raises(RecipeError, match=r"data\.disjoint is for single texts with labels"):
        load_recipe(str(make_recipe(data={"disjoint": True} | changes, **objectives)))


def test_a_missing_text_is_told_before_anything_is_written(run, tmp_path):
    with pytest.raises(DataError, match=r"nothing\.txt: no such file"):
        run(into=tmp_path / "run", data={"transfer": {"source": "nothing.txt"}})
    assert not (tmp_path / "run").exists()
