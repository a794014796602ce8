"""A run whose training texts hold what it is scored on: they are left out, in every stage, and the run says so."""

import json

import pytest
import yaml

from snlp_zoo.errors import DataError
from snlp_zoo.train import run as runs
from snlp_zoo.train import teacher as teachers
from snlp_zoo.train.loop import Trainer

HELD = "lumi kalan modor ripim tesut bulan"
CLEAN = [
    (f"{cue} {filler} sut", label)
    for filler in ("kapim", "nedor")
    for cue, label in (("grum", "negative"), ("sola", "positive"), ("vosh", "negative"), ("fenn", "positive"))
] * 4
LEAKS = [(HELD, "positive"), (f"{HELD.upper()} !", "negative"), (f"sola {HELD}", "positive"), ("lumi", "positive")]
SCORED = [(HELD, "positive"), ("lumi .", "positive"), ("grum drel nelan", "negative")]
REAL_STEP = Trainer._step
STATES = {"hidden_mse": 1.0}


@pytest.fixture
def leaking(make_data):
    return str(make_data(train=CLEAN + LEAKS, dev=[("drel drel drel", "negative"), *SCORED[2:]], test=SCORED))


@pytest.fixture
def jobs(monkeypatch):
    """Every job as it is trained."""
    found, real = [], runs._train

    def watched(job, student, teacher):
        found.append(job)
        return real(job, student, teacher)

    monkeypatch.setattr(runs, "_train", watched)
    return found


def counts(part):
    return {key: value for key, value in part.items() if key != "examples"}


def test_rows_that_hold_a_test_text_are_left_out_and_told(run, leaking, jobs, caplog, tmp_path):
    (tmp_path / "more.txt").write_text(f"mopim\n\nkalan {HELD}\n\ngrum, drel - nelan")
    folder, summary = run(data={"source": leaking, "transfer": {"source": "more.txt"}}, train={"epochs": 1})
    (job,) = jobs
    assert list(zip(job.data.texts.train.texts, label_names(job), strict=True)) == CLEAN
    assert len(job.data.train) == len(CLEAN) + 1
    report = json.loads((folder / "overlap.json").read_text())
    assert (report["held_out"], report["found"], summary["overlap"]) == (4, 6, 6)
    stage = report["stages"]["tiny"]
    assert counts(stage["train"]) == {"rows": 36, "exact": 1, "normalised": 2, "contained": 1, "left_out": 4}
    assert counts(stage["transfer"]) == {"rows": 3, "exact": 0, "normalised": 1, "contained": 1, "left_out": 2}
    assert stage["train"]["examples"][0] == {"kind": "exact", "text": HELD, "held_out": HELD}
    assert "6 of 39 training texts hold validation or test texts (overlap.json); data.overlap is 'drop'" in caplog.text


def test_rows_may_stay_and_are_counted_all_the_same(run, leaking, jobs):
    folder, summary = run(data={"source": leaking, "overlap": "report"}, train={"max_steps": 1})
    train = json.loads((folder / "overlap.json").read_text())["stages"]["tiny"]["train"]
    assert (train["contained"], train["left_out"], summary["overlap"]) == (1, 0, 4)
    assert len(jobs[0].data.train) == 36


def label_names(job):
    return [job.data.label_names[label] for label in job.data.texts.train.labels]


def test_every_stage_is_held_against_all_labelled_ones(run, leaking, jobs, data_folder, tmp_path):
    (tmp_path / "general.txt").write_text("\n".join(["mopim tedor"] * 20 + [HELD, "Lumi", f"kalan {HELD}"]))
    stages = [
        {"name": "general", "data": {"source": "general.txt", "label": None}, "objectives": STATES},
        {"name": "task", "data": {"source": leaking}},
        {"name": "other", "data": {"source": str(data_folder)}},
    ]
    short = {"epochs": 1, "max_steps": 1}
    folder, summary = run(stages=stages, train=short)
    report = json.loads((folder / "overlap.json").read_text())
    assert list(report["stages"]) == ["tiny/1_general", "tiny/2_task", "tiny/3_other"]
    general, task, other = (report["stages"][name]["train"] for name in report["stages"])
    assert general["exact"] + general["normalised"] + general["contained"] == general["rows"] - len(jobs[0].data.train)
    texts = {text for job in jobs for text in job.data.texts.train.texts}
    assert not any(HELD in text.lower() or text.lower() == "lumi" for text in texts)
    assert counts(task) | {"rows": 36, "exact": 1} == counts(task)
    assert report["found"] == summary["overlap"] == sum(stage["overlap"] for stage in summary["stages"])
    assert other["rows"] == 96
    for stage, name in zip(report["stages"], ("1_general", "2_task", "3_other"), strict=True):
        own = json.loads((folder / name / "overlap.json").read_text())
        assert own["stages"] == {stage: report["stages"][stage]}
        assert own["held_out"] == report["held_out"]


def test_a_resumed_run_holds_texts_against_stages_that_are_finished(run, leaking, stop_at, monkeypatch, tmp_path):
    (tmp_path / "general.txt").write_text("\n".join(["mopim tedor lumi"] * 40 + [HELD, f"kalan {HELD}"]))
    stages = [
        {"name": "task", "data": {"source": leaking}},
        {"name": "general", "data": {"source": "general.txt", "label": None}, "objectives": STATES},
    ]
    changes = {"stages": stages, "train": {"max_steps": 2}, "teacher": {"tune": "head", "train": {"epochs": 1}}}
    whole, summary = run(into=tmp_path / "whole", **changes)  # tunes the teacher, too
    stop_at(4)
    with pytest.raises(stop_at.error):
        run(into=tmp_path / "run", **changes)
    monkeypatch.setattr(Trainer, "_step", REAL_STEP)
    folder, again = run(into=tmp_path / "run", resume=True, **changes)
    names = [f"{stage}/{name}" for stage in ("1_task", "2_general") for name in ("metrics.jsonl", "overlap.json")]
    for name in [*names, "overlap.json", "model/model.safetensors"]:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert again["overlap"] == summary["overlap"] == 4 + 2


def test_altered_copies_that_became_a_held_out_text(run, leaking, jobs, monkeypatch):
    real = teachers.augment

    def altered(tokens, tokenizer, *arguments, **options):
        more = real(tokens, tokenizer, *arguments, **options)
        more.input_ids[len(tokens)] = tokenizer(HELD)["input_ids"]
        return more

    monkeypatch.setattr(teachers, "augment", altered)
    augment = {"copies": 1, "probability": 0.1, "candidates": 3}
    folder, summary = run(data={"source": leaking, "augment": augment}, train={"max_steps": 1})
    copies = json.loads((folder / "overlap.json").read_text())["stages"]["tiny"]["copies"]
    assert copies["rows"] == 32
    assert copies["exact"] >= 1
    left_out = copies["exact"] + copies["normalised"] + copies["contained"]
    (job,) = jobs
    assert len(job.data.train) == 64 - left_out
    assert len(job.data.train.labels) == len(job.data.train.token_type_ids) == len(job.data.train)
    assert HELD not in job.tokenizer.batch_decode(job.data.train.input_ids, skip_special_tokens=True)
    assert summary["overlap"] == 4 + left_out


def test_documents_lose_what_is_held_out(leaking, jobs, tmp_path):
    novel = "Once there was a crew of many words and no rest. " * 60
    (tmp_path / "novel.txt").write_text(f"{novel}\n{HELD}, she said.\n{novel}")
    content = {
        "extends": "language_model",
        "name": "two",
        "model": {"model_type": "spikegpt", "config": {"hidden_size": 16, "num_hidden_layers": 1}},
        "data": {"source": "novel.txt", "max_length": 16},
        "tokenizer": {"kind": "bytes"},
        "train": {"max_steps": 1},
        "stages": [
            {"name": "language"},
            {"name": "task", "task": None, "tokenizer": None, "data": {"source": leaking, "max_length": 96}},
        ],
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(content))
    runs.distill(str(tmp_path / "two.yaml"), output_dir=tmp_path / "run")
    text = jobs[0].data.texts.train.texts[0]
    assert ", she said." in text
    assert HELD not in text
    report = json.loads((tmp_path / "run" / "overlap.json").read_text())["stages"]
    assert counts(report["two/1_language"]["train"]) == {
        "rows": 1,
        "exact": 0,
        "normalised": 0,
        "contained": 1,
        "left_out": 0,
    }


def test_text_without_labels_alone_is_not_checked(run):
    folder, summary = run(data={"label": None}, objectives=STATES, train={"max_steps": 1})
    assert not (folder / "overlap.json").exists()
    assert "overlap" not in summary


def test_nothing_is_left(run, make_data, tmp_path):
    rows = [(HELD, "positive"), ("lumi", "negative")]
    with pytest.raises(DataError, match="all 2 training texts hold validation or test texts"):
        run(into=tmp_path / "run", data={"source": str(make_data(train=rows, dev=rows, test=rows))})
    assert not (tmp_path / "run").exists()
