import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
    pipeline,
)

import snlp_zoo
from snlp_zoo.data.batches import Tokenised, loader
from snlp_zoo.distill.distiller import Distiller
from snlp_zoo.errors import DataError, RecipeError
from snlp_zoo.train import teacher as teacher_module
from snlp_zoo.train.loop import Trainer, make_accelerator
from snlp_zoo.train.recipe import TrainPart, load_recipe
from snlp_zoo.train.run import distill
from snlp_zoo.train.saved import evaluate_checkpoint

ONE_STEP = {"max_steps": 1}
QUICK = {"max_steps": 4, "eval_steps": 4}


def tensors(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)


# ---- the finished run ----


def test_the_run_folder_is_complete(trained):
    names = {path.name for path in trained.folder.iterdir()}
    assert {"recipe.yaml", "metrics.jsonl", "summary.json", "model", "checkpoints"} <= names
    assert not [name for name in names if name.startswith(".")]
    assert load_recipe(str(trained.folder / "recipe.yaml")) == load_recipe(str(trained.recipe))
    assert json.loads((trained.folder / "summary.json").read_text()) == trained.summary


def test_the_summary_says_who_is_how_good(trained):
    summary = trained.summary
    assert summary["name"] == "tiny"
    assert summary["test_examples"] == 40
    assert summary["path"] == str(trained.folder / "model")
    assert summary["teacher_accuracy"] > 0.8
    assert summary["student_accuracy"] > 0.8
    assert summary["baseline_accuracy"] > 0.8
    assert 0 < summary["firing_rate"] < 1
    assert summary["parameters"] == snlp_zoo.load(summary["path"]).num_parameters()
    assert summary["seconds"] > 0


def test_every_step_is_logged_with_every_term_and_their_weighted_sum(trained, metrics):
    rows = [row for row in metrics(trained.folder) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row in rows:
        total = 0.8 * row["forward_kl"] + 0.2 * row["cross_entropy"] + 0.5 * row["hidden_mse"]
        assert row["loss"] == pytest.approx(total, abs=1e-6)
    first, second = rows[:6], rows[6:]
    assert sum(row["loss"] for row in second) < sum(row["loss"] for row in first)


def test_evaluations_are_logged_once_per_epoch(trained, metrics):
    rows = [row for row in metrics(trained.folder) if "split" in row]
    assert [row["step"] for row in rows] == [6, 12]
    for row in rows:
        assert row["split"] == "validation"
        assert all(0 <= row[name] <= 1 for name in ("accuracy", "macro_f1", "firing_rate"))


def test_a_fresh_start_leaves_no_energy_report_of_the_model_before(run, tmp_path):
    folder = tmp_path / "again"
    folder.mkdir()
    for name in ("energy.json", "energy.md"):
        (folder / name).write_text("of another model")
    run(into=folder, train=ONE_STEP)
    assert not list(folder.glob("energy.*"))


def test_the_model_loads_by_both_doors(trained):
    folder = trained.folder / "model"
    ours, theirs = snlp_zoo.load(folder), AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = AutoTokenizer.from_pretrained(folder)(["grum lumi kalan", "sola"], padding=True, return_tensors="pt")
    inputs.pop("token_type_ids")
    with torch.no_grad():
        logits = ours(**inputs).logits
        assert torch.equal(theirs(**inputs).logits, logits)
        assert torch.equal(snlp_zoo.load(trained.folder)(**inputs).logits, logits)  # the run folder serves too
    assert ours.config.label_names == ["negative", "positive"]
    assert not ours.training


def test_only_the_student_is_saved(trained):
    model = snlp_zoo.load(trained.folder)
    assert tensors(trained.folder / "model").keys() == model.state_dict().keys()
    checkpoint = max((trained.folder / "checkpoints").iterdir())
    assert tensors(checkpoint).keys() == {f"student.{name}" for name in model.state_dict()}


def test_a_pipeline_classifies_with_the_folder(trained):
    classify = pipeline("text-classification", model=str(trained.folder / "model"), device="cpu")
    answers = classify(["grum vosh drel kalan", "lumi sola fenn"])
    assert [answer["label"] for answer in answers] == ["negative", "positive"]


def test_a_second_run_gives_the_same_numbers(trained, run):
    torch.manual_seed(123)  # whatever was drawn before
    folder, summary = run()
    timeless = {"seconds", "teacher_seconds", "path"}
    assert {k: v for k, v in summary.items() if k not in timeless} == {
        k: v for k, v in trained.summary.items() if k not in timeless
    }
    assert (folder / "metrics.jsonl").read_bytes() == (trained.folder / "metrics.jsonl").read_bytes()
    weights = "model/model.safetensors"
    assert (folder / weights).read_bytes() == (trained.folder / weights).read_bytes()


def test_another_seed_gives_other_numbers(trained, run, losses):
    folder, _ = run(train=QUICK | {"seed": 1})
    assert losses(folder) != losses(trained.folder)[:4]


def test_the_checkpoint_of_the_best_evaluation_is_kept(run, metrics, monkeypatch):
    scores = iter([0.5, 0.9, 0.7])
    real = snlp_zoo.train.loop.evaluate

    def evaluate(accelerator, model, batches, label):
        found = real(accelerator, model, batches, label)
        student = hasattr(model.config, "time_steps")  # the teacher may be tuned here too
        return {"accuracy": next(scores)} if label == "validate" and student else found

    monkeypatch.setattr(snlp_zoo.train.loop, "evaluate", evaluate)
    folder, _ = run(train={"max_steps": 6, "eval_steps": 2, "save_steps": 2, "keep_checkpoints": 3})
    best = tensors(folder / "checkpoints" / "step_0000004")
    saved = tensors(folder / "model")
    assert all(torch.equal(saved[name], best[f"student.{name}"]) for name in saved)


def test_old_checkpoints_go(run):
    folder, _ = run(train={"max_steps": 5, "eval_steps": 5, "save_steps": 1, "keep_checkpoints": 2})
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_0000004", "step_0000005"]


def test_a_fresh_start_in_an_old_folder_leaves_nothing_of_the_old_run(run, metrics):
    folder, _ = run(train={"max_steps": 4, "eval_steps": 2, "save_steps": 1})
    run(into=folder, train={"max_steps": 2, "eval_steps": 2, "save_steps": 1})
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_0000001", "step_0000002"]
    assert max(row["step"] for row in metrics(folder)) == 2


# ---- the teacher ----


def test_the_tuned_teacher_is_cached_and_reused(run, own_cache):
    first, summary = run(train=ONE_STEP)
    (cached,) = (own_cache / "teachers").iterdir()
    stamp = (cached / "model.safetensors").stat().st_mtime_ns
    assert (first / "teacher" / "metrics.jsonl").is_file()
    second, again = run(train=ONE_STEP)
    assert not (second / "teacher").exists()
    assert (cached / "model.safetensors").stat().st_mtime_ns == stamp
    assert again["teacher_accuracy"] == summary["teacher_accuracy"]
    run(train=ONE_STEP, teacher={"train": {"seed": 1, "max_steps": 1}})
    assert len(list((own_cache / "teachers").iterdir())) == 2  # other settings, another teacher


def test_other_weights_or_another_precision_are_another_teacher(run, own_cache, teacher_folder, tmp_path):
    folder = shutil.copytree(teacher_folder, tmp_path / "own")
    settings = {"train": ONE_STEP, "teacher": {"name": str(folder), "train": ONE_STEP}}

    def tuned_after(**more):
        run(**settings | more)
        return len(list((own_cache / "teachers").iterdir()))

    assert tuned_after() == 1
    file = folder / "model.safetensors"
    size = file.stat().st_size
    save_file({name: tensor + 0.1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert file.stat().st_size == size
    assert tuned_after() == 2
    assert tuned_after(train=ONE_STEP | {"mixed_precision": "bf16"}) == 3
    assert tuned_after() == 3


def test_a_teacher_is_tuned_alike_whatever_was_drawn_before(run, own_cache, monkeypatch, tmp_path, losses):
    curves = []
    for seed in (1, 2):
        monkeypatch.setenv("SNLP_ZOO_CACHE", str(tmp_path / f"cache{seed}"))
        torch.manual_seed(seed)
        folder, _ = run(train=ONE_STEP, teacher={"train": QUICK | {"logging_steps": 1}})
        curves.append(losses(folder / "teacher"))
    assert curves[0] == curves[1]


def test_head_tuning_leaves_the_encoder_alone(run, own_cache, teacher_folder):
    run(train=ONE_STEP, teacher={"tune": "head", "train": QUICK})
    (cached,) = (own_cache / "teachers").iterdir()
    before, after = tensors(teacher_folder), tensors(cached)
    same = {name for name in before if torch.equal(before[name], after[f"bert.{name}"])}
    assert same == {name for name in before if not name.startswith("pooler")}


def test_a_teacher_is_tuned_with_the_dropout_asked_for_whatever_it_calls_it(
    run, own_cache, teacher_folder, monkeypatch, tmp_path
):
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64}
    tokenizer, rates = AutoTokenizer.from_pretrained(teacher_folder), []
    tokenizer.save_pretrained(tmp_path / "other")
    DistilBertModel(DistilBertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "other")
    real = Trainer.run

    def noting(trainer, resume, label):
        modules = trainer.distiller.student.modules()
        rates.append({module.p for module in modules if isinstance(module, torch.nn.Dropout)})
        return real(trainer, resume, label)

    monkeypatch.setattr(Trainer, "run", noting)
    own = {"name": str(tmp_path / "other"), "dropout": 0.25, "train": ONE_STEP}
    run(train=ONE_STEP, model={"init_from": "scratch"}, teacher=own)
    assert rates[0] == {0.25}


def test_an_untuned_teacher_is_taken_as_it_is(run, own_cache, make_classifier):
    folder, summary = run(train=ONE_STEP, teacher={"name": str(make_classifier(2)), "tune": "none"})
    assert not own_cache.exists()
    assert not (folder / "teacher").exists()
    assert "teacher_accuracy" in summary


def test_an_untuned_teacher_saved_in_half_precision_is_one_of_single_precision(make_classifier, run, monkeypatch):
    folder, seen = make_classifier(2), []
    BertForSequenceClassification.from_pretrained(folder).half().save_pretrained(folder)
    real = snlp_zoo.train.run.prepare_teacher
    monkeypatch.setattr(snlp_zoo.train.run, "prepare_teacher", lambda *given: seen.append(real(*given)) or seen[-1])
    run(train=ONE_STEP, teacher={"name": str(folder), "tune": "none"})
    assert seen[0].dtype == torch.float32


def test_an_untuned_teacher_of_another_task_is_refused(run, make_classifier):
    with pytest.raises(RecipeError, match="3 classes, the data 2"):
        run(teacher={"name": str(make_classifier(3)), "tune": "none"})


def test_an_untuned_teacher_without_a_classifier_is_refused(run):
    with pytest.raises(RecipeError, match=r"no classifier \(there is no classifier.bias, classifier.weight\)"):
        run(teacher={"tune": "none"})


def test_an_untuned_teacher_with_the_classes_in_another_order_is_refused(run, make_classifier):
    folder = make_classifier(2)
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": "POSITIVE", "1": "NEGATIVE"}, "label2id": {"POSITIVE": 0, "NEGATIVE": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    own = {"name": str(folder), "tune": "none"}
    with pytest.raises(RecipeError, match=r"\['POSITIVE', 'NEGATIVE'\], the data \['negative', 'positive'\]"):
        run(train=ONE_STEP, teacher=own)
    run(train=ONE_STEP, teacher=own, data={"label_names": ["positive", "negative"]})


def test_a_teacher_without_a_tokenizer_is_refused(run, teacher_folder, tmp_path):
    shutil.copytree(teacher_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*", "vocab*"))
    with pytest.raises(RecipeError, match="bare' has no tokenizer beside its weights"):
        run(teacher={"name": str(tmp_path / "bare")})


@pytest.mark.parametrize("name", ["./no-such-folder", "nobody/no-such-model"])
def test_a_teacher_that_is_not_there(run, name, tmp_path):
    with pytest.raises(RecipeError, match="no-such"):
        run(teacher={"name": name})
    assert not list(tmp_path.glob("run*"))


@pytest.fixture
def make_classifier(teacher_folder, tmp_path):
    def make(classes):
        folder = tmp_path / f"classifier{classes}"
        BertForSequenceClassification.from_pretrained(teacher_folder, num_labels=classes).save_pretrained(folder)
        AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(folder)
        return folder

    return make


# ---- what a recipe can ask for ----


def test_every_objective_with_a_narrower_student(run, metrics, losses):
    """Projections bridge the widths; they are trained and not saved."""
    names = ["forward_kl", "reverse_kl", "logit_mse", "cross_entropy", "hidden_mse", "embedding_mse", "attention_mse"]
    folder, _ = run(
        model={"config": {"hidden_size": 16, "num_hidden_layers": 1}},
        objectives=dict.fromkeys(names, 1.0),
        train={"epochs": 1, "save_steps": 6},
    )
    rows = [row for row in metrics(folder) if "loss" in row]
    assert all(row[name] > 0 for row in rows for name in names)
    for name in ("embedding_mse", "hidden_mse", "attention_mse"):
        assert rows[-1][name] < rows[0][name]
    checkpoint = tensors(folder / "checkpoints" / "step_0000006")
    assert checkpoint["projection.layers.0.weight"].shape == (32, 16)
    assert not [name for name in tensors(folder / "model") if "projection" in name]


def test_frozen_embeddings_stay(run, teacher_folder):
    folder, _ = run(train=QUICK | {"freeze_embeddings": True}, model={"config": {"num_attention_heads": 4}})
    saved, trained_one = tensors(folder / "model"), "spikelm.layers.0.mlp.up.weight"
    embeddings = {name for name in saved if name.startswith("spikelm.embeddings.")}
    assert len(embeddings) >= 5
    free, _ = run(train=QUICK, model={"config": {"num_attention_heads": 4}})
    loose = tensors(free / "model")
    start, _ = run(train=ONE_STEP | {"learning_rate": 1e-12}, model={"config": {"num_attention_heads": 4}})
    first = tensors(start / "model")
    assert all(torch.allclose(saved[name], first[name], atol=1e-9) for name in embeddings)
    assert not any(torch.allclose(loose[name], first[name], atol=1e-9) for name in embeddings if "weight" in name)
    assert not torch.allclose(saved[trained_one], first[trained_one], atol=1e-4)


def test_the_student_starts_from_the_teacher_only_if_asked(run):
    lazy = ONE_STEP | {"learning_rate": 1e-12}
    copied, _ = run(train=lazy)
    fresh, _ = run(train=lazy, model={"init_from": "scratch"})
    (cached,) = (
        path
        for path in (teacher_module.cache_folder() / "teachers").iterdir()
        if torch.allclose(
            tensors(path)["bert.embeddings.word_embeddings.weight"],
            tensors(copied / "model")["spikelm.embeddings.word_embeddings.weight"],
            atol=1e-9,
        )
    )
    theirs, name = tensors(cached), "layers.1.attention.query.weight"
    theirs = theirs["bert.encoder.layer.1.attention.self.query.weight"]
    assert torch.allclose(tensors(copied / "model")[f"spikelm.{name}"], theirs, atol=1e-9)
    assert not torch.allclose(tensors(fresh / "model")[f"spikelm.{name}"], theirs, atol=1e-3)


def test_early_stopping(run, trained, metrics, monkeypatch):
    real, scores = snlp_zoo.train.loop.evaluate, iter([0.5, 0.9, 0.9, 0.8, 0.99])

    def evaluate(accelerator, model, batches, label):
        return {"accuracy": next(scores)} if label == "validate" else real(accelerator, model, batches, label)

    monkeypatch.setattr(snlp_zoo.train.loop, "evaluate", evaluate)
    folder, summary = run(train={"eval_steps": 2, "save_steps": 2, "early_stopping_patience": 2})
    assert [row["accuracy"] for row in metrics(folder) if "split" in row] == [0.5, 0.9, 0.9, 0.8]
    assert max(row["step"] for row in metrics(folder)) == 8
    assert summary["student_accuracy"] >= 0


def test_another_metric_chooses_the_best_model(run, trained, metrics, monkeypatch):
    real, scores = snlp_zoo.train.loop.evaluate, iter([(0.9, 0.1), (0.5, 0.4), (0.8, 0.3)])

    def evaluate(accelerator, model, batches, label):
        if label != "validate":
            return real(accelerator, model, batches, label)
        return dict(zip(("accuracy", "matthews"), next(scores), strict=True))

    seen, save = [], snlp_zoo.train.loop.replace_folder
    monkeypatch.setattr(snlp_zoo.train.loop, "evaluate", evaluate)
    monkeypatch.setattr(snlp_zoo.train.loop, "replace_folder", lambda *a: (seen.append(len(seen)), save(*a)))
    settings = {"eval_steps": 2, "metric_for_best_model": "matthews", "early_stopping_patience": 1}
    folder, _ = run(train=settings)
    assert [row["matthews"] for row in metrics(folder) if "split" in row] == [0.1, 0.4, 0.3]
    assert len(seen) == 2  # saved at the first and the second, not at the third


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train": {"metric_for_best_model": "pearson"}},
            "^train.metric_for_best_model: there is no 'pearson' here; use ",
        ),
        (
            {"teacher": {"train": {"metric_for_best_model": "spearman"}}},
            "^teacher.train.metric_for_best_model: .*accuracy",
        ),
        ({"train": {"metric_for_best_model": "bleu"}}, "train.metric_for_best_model"),
        (
            {"train": {"metric_for_best_model": "f1"}, "data": {"label": None}, "objectives": {"hidden_mse": 1.0}},
            "for classifiers, not for text without labels",
        ),
    ],
)
def test_a_metric_that_there_is_not(run, tmp_path, changes, message):
    with pytest.raises(RecipeError, match=message):
        run(into=tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_regression(run, make_data, metrics, data_folder):
    def rated(count, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            good, bad = torch.randint(0, 4, (2,), generator=generator).tolist()
            yield " ".join(["lumi"] * good + ["kalan"] + ["grum"] * bad), f"{(good - bad) / 3 + 0.001:.3f}"

    data = make_data(train=list(rated(96, 1)), dev=list(rated(32, 2)), test=list(rated(32, 3)))
    folder, summary = run(
        data={"source": str(data), "overlap": "report"},
        objectives={"logit_mse": 1.0, "cross_entropy": 0.5},
        train={"epochs": 4},
    )
    assert summary["student_pearson"] > 0.7
    assert {"teacher_pearson", "student_spearman", "firing_rate"} <= summary.keys()
    assert "baseline_accuracy" not in summary
    assert all({"pearson", "spearman"} <= row.keys() for row in metrics(folder) if "split" in row)
    model = snlp_zoo.load(folder)
    assert model.classifier.out_features == 1
    assert model.config.problem_type == "regression"
    assert evaluate_checkpoint(str(folder), str(data))["pearson"] == pytest.approx(summary["student_pearson"])
    with pytest.raises(DataError, match=r"gives numbers, and the labels of .* are classes"):
        evaluate_checkpoint(str(folder), str(data_folder))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]),
        ("cosine", [0.5, 1.0, 0.8535534, 0.5, 0.1464466, 0.0]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules(run, metrics, schedule, expected):
    settings = {"epochs": 1, "batch_size": 16, "warmup_ratio": 1 / 3, "schedule": schedule, "learning_rate": 1e-3}
    folder, _ = run(train=settings)
    rates = [row["learning_rate"] for row in metrics(folder) if "loss" in row]
    assert rates == pytest.approx([1e-3 * share for share in expected], abs=1e-9)


def test_max_steps_leaves_the_schedule_alone(run, metrics):
    settings = {"epochs": 1, "batch_size": 16, "warmup_ratio": 1 / 3, "learning_rate": 1e-3}
    whole, _ = run(train=settings)
    stopped, _ = run(train=settings | {"max_steps": 3})
    losses = [[row["loss"] for row in metrics(folder) if "loss" in row] for folder in (whole, stopped)]
    assert losses[1] == losses[0][:3]


def test_logging_steps(run, metrics):
    folder, _ = run(train={"max_steps": 7, "eval_steps": 7, "logging_steps": 3})
    assert [row["step"] for row in metrics(folder) if "loss" in row] == [3, 6, 7]


def test_a_loss_that_is_not_finite_is_told_and_the_run_ends(run):
    with pytest.raises(DataError, match=r"not finite at step \d+.*cross_entropy.*train.learning_rate"):
        run(train={"learning_rate": 1e30, "max_grad_norm": 1e30, "warmup_ratio": 0.0})


def test_a_model_with_too_few_positions_is_refused_before_anything_is_written(run, tmp_path):
    with pytest.raises(RecipeError, match=r"max_length 65.*64 positions"):
        run(data={"max_length": 65})
    assert not list(tmp_path.glob("run*"))


def test_a_teacher_with_too_few_positions_is_refused_before_anything_is_written(run, tmp_path):
    with pytest.raises(RecipeError, match=r"max_length 65 is more than the teacher's 64 positions"):
        run(data={"max_length": 65}, model={"config": {"max_position_embeddings": 128}})
    assert not list(tmp_path.glob("run*"))


def test_embeddings_of_another_width_that_nothing_projects_are_refused(run, tmp_path):
    narrow = {"init_from": "scratch", "config": {"hidden_size": 16}}
    with pytest.raises(RecipeError, match=r"projection 'normed' leaves .* student's width 16 with the teacher's 32"):
        run(projection="normed", model=narrow, objectives={"embedding_mse": 1.0, "forward_kl": 1.0})
    assert not list(tmp_path.glob("run*"))


def test_a_vocabulary_that_is_too_small_is_refused(run, tmp_path):
    with pytest.raises(RecipeError, match="vocab_size 20"):
        run(model={"config": {"vocab_size": 20}})
    assert not list(tmp_path.glob("run*"))


def test_bfloat16_and_then_another_precision_in_one_process(run, losses, trained):
    mixed, summary = run(train=QUICK | {"mixed_precision": "bf16"})
    exact, _ = run(train=QUICK)
    assert losses(exact) != losses(mixed)
    assert losses(mixed)[0] == pytest.approx(losses(exact)[0], rel=0.1)
    assert summary["parameters"] == trained.summary["parameters"]


# ---- accumulation ----


class _HalvedBatches:
    """Every batch of a batch sampler as two halves, so that both loaders see the same examples per step."""

    def __init__(self, whole):
        self.whole, self.batch_size, self.drop_last = whole, whole.batch_size // 2, False

    @property
    def sampler(self):
        return self.whole

    def set_epoch(self, epoch):
        self.whole.set_epoch(epoch)

    def __len__(self):
        return 2 * len(self.whole)

    def __iter__(self):
        for batch in self.whole:
            yield batch[: len(batch) // 2]
            yield batch[len(batch) // 2 :]


@pytest.mark.parametrize("spiking", [False, True])
def test_accumulating_two_halves_equals_the_whole_batch(teacher_folder, tmp_path, losses, spiking):
    """Unequal lengths: a mean over tokens is not the mean of the halves' means."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    lengths = [3 + (7 * i) % 17 for i in range(64)]
    rows = [[2, *(5 + (i * 5 + j * 3) % 25 for j in range(length)), 3] for i, length in enumerate(lengths)]
    data = Tokenised(rows, None, [i % 2 for i in range(64)], 0)
    objectives = {"cross_entropy": 0.3, "forward_kl": 0.5, "hidden_mse": 1.0, "attention_mse": 1.0}

    def curve(accumulation):
        torch.manual_seed(0)
        teacher = BertForSequenceClassification.from_pretrained(teacher_folder, attn_implementation="eager")
        config = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        if spiking:  # amplitudes are measured per forward: measure them once, then keep them
            config |= {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "alpha_mode": "first_batch"}
            student = snlp_zoo.build("spikelm_tiny", num_labels=2, **config).train()
            student(torch.tensor([rows[0]]))
        else:
            student = BertForSequenceClassification.from_pretrained(
                teacher_folder, attn_implementation="eager", **config
            )
        torch.manual_seed(1)
        torch.nn.init.normal_(student.classifier.weight)
        whole = loader(data, tokenizer, 16, seed=3, shuffle=True, drop_last=True)
        if accumulation == 2:
            sampler = _HalvedBatches(whole.batch_sampler)
            whole = DataLoader(whole.dataset, batch_sampler=sampler, collate_fn=whole.collate_fn)
        folder = tmp_path / f"accumulate{accumulation}"
        folder.mkdir()
        accelerator = make_accelerator("no")
        Trainer(
            accelerator,
            Distiller(student, teacher.to(accelerator.device), {name: {} for name in objectives}),
            (whole, loader(data, tokenizer, 64, shuffle=False, drop_last=False)),
            TrainPart(epochs=2, gradient_accumulation_steps=accumulation, logging_steps=1, learning_rate=1e-3),
            objectives,
            folder,
            lambda target, weights, _: student.save_pretrained(target, state_dict=weights),
        ).run(False, "test")
        return losses(folder)

    whole, halves = curve(1), curve(2)
    assert len(whole) == 8
    assert halves == pytest.approx(whole, abs=1e-5)


def test_a_tracker_gets_what_the_log_gets(run, metrics):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = run(train={"max_steps": 3, "tracker": "tensorboard"})
    read = [EventAccumulator(str(path)).Reload() for path in folder.glob("*/events.out.tfevents.*")]
    (found,) = [log.Scalars("loss") for log in read if "loss" in log.Tags()["scalars"]]
    rows = [row for row in metrics(folder) if "loss" in row]
    assert [event.step for event in found] == [row["step"] for row in rows] == [1, 2, 3]
    assert [event.value for event in found] == pytest.approx([row["loss"] for row in rows], abs=1e-6)


def test_a_tracker_that_is_not_installed_is_refused(make_recipe, monkeypatch):
    monkeypatch.setattr(snlp_zoo.train.parts, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r": train.tracker: 'trackio' is not installed; pip install trackio"):
        load_recipe(str(make_recipe(train={"tracker": "trackio"})))


def test_an_epoch_whose_last_window_is_not_full_is_counted_right(run, metrics):
    """Six batches in windows of four: two steps an epoch, the second over two batches."""
    folder, _ = run(train={"gradient_accumulation_steps": 4})
    rows = [row["step"] for row in metrics(folder) if "loss" in row]
    assert rows == [1, 2, 3, 4]
    progress = json.loads((folder / "checkpoints" / "step_0000004" / "progress.json").read_text())["progress"]
    assert (progress["step"], progress["epoch"], progress["done"]) == (4, 1, True)


def test_distill_by_default_goes_to_runs(make_recipe):
    summary = distill(str(make_recipe()), overrides=["train.max_steps=1", "baseline=false"])
    assert Path(summary["path"]) == Path("runs/tiny/model")
    assert Path(summary["path"], "config.json").is_file()
    assert "baseline_accuracy" not in summary


def test_text_without_labels_teaches_angles_tables_and_rates(run, metrics):
    objectives = {"cosine": 1.0, "embedding_table_mse": 1.0, "spike_rate": {"weight": 1.0, "target": 0.2}}
    folder, summary = run(
        model={"init_from": "scratch"}, data={"label": None}, objectives=objectives, train={"epochs": 3}
    )
    rows = [row for row in metrics(folder) if "loss" in row]
    for name in objectives:
        assert rows[-1][name] < rows[0][name], name
    assert 0 < summary["firing_rate"] < 1


def test_a_dense_student_of_text_without_labels_has_no_firing_rate(recipe_content, metrics, tmp_path):
    config = {"spiking": False, "hidden_size": 32, "num_hidden_layers": 2}
    model = {"model_type": "spikegpt", "config": config, "init_from": "scratch"}
    content = recipe_content | {"model": model, "data": recipe_content["data"] | {"label": None}, "train": ONE_STEP}
    recipe = tmp_path / "dense.yaml"
    recipe.write_text(json.dumps(content | {"objectives": {"hidden_mse": 1.0}}))
    summary = distill(str(recipe), output_dir=tmp_path / "dense")
    (row,) = (row for row in metrics(tmp_path / "dense") if "split" in row)
    assert list(row) == ["step", "split", "negative_loss", "hidden_mse"]
    assert "firing_rate" not in summary


def test_a_run_without_words_for_a_baseline_ends_well(run, make_data, caplog):
    rows = [
        (f"{word} {cue}", label) for word, cue, label in zip("abcd", "efgh", ["negative", "positive"] * 2, strict=True)
    ]
    _, summary = run(train=ONE_STEP | {"batch_size": 2}, data={"source": str(make_data(train=rows))})
    assert not any(key.startswith("baseline") for key in summary)
    assert "there is no bag-of-words baseline: " in caplog.text


@pytest.mark.parametrize("file", ["", "train.tsv"])
def test_a_run_is_evaluated_on_its_own_test_split(run, data_folder, tmp_path, file):
    """Which data.seed carved from train; another seed's was trained on."""
    (tmp_path / "alone").mkdir()
    shutil.copy(data_folder / "train.tsv", tmp_path / "alone")
    source = str(tmp_path / "alone" / file)
    folder, summary = run(train=ONE_STEP, data={"source": source, "seed": 3, "disjoint": True, "test_size": 7})
    found = evaluate_checkpoint(str(folder), source)
    assert evaluate_checkpoint(str(folder), f"{tmp_path}/./alone/{file}")["accuracy"] == found["accuracy"]
    assert found["examples"] == summary["test_examples"] == 7
    assert found["accuracy"] == summary["student_accuracy"]
    assert found["firing_rate"] == pytest.approx(summary["firing_rate"], abs=1e-6)
