"""The command line as a user sees it: exit code, what is on standard output, what is on standard error."""

import json
import logging
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from snlp_zoo import registry
from snlp_zoo.cli import main


class Answer(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capfd, monkeypatch):
    """Function: run the command line in this process."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])  # as in a fresh process: main() sets up logging itself
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments):
        capfd.readouterr()
        root.handlers.clear()
        monkeypatch.setattr(sys, "argv", ["snlp-zoo", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return Answer(code, *capfd.readouterr())

    return run


@pytest.fixture
def fails(cli):
    """Function: the one sentence the command complains with."""

    def run(*arguments):
        answer = cli(*arguments)
        assert answer.code == 2
        assert answer.out == ""
        lines = answer.err.splitlines()
        assert len(lines) == 1, answer.err
        assert lines[0].startswith("snlp-zoo: ")
        assert len(lines[0]) < 600
        return lines[0]

    return run


@pytest.fixture
def distil_fails(fails, make_recipe, tmp_path):
    """Function: distil by the recipe with changes; nothing may be left behind."""

    def run(*arguments, **changes):
        text = fails("distill", make_recipe(**changes), "--output-dir", tmp_path / "out", *arguments)
        assert not (tmp_path / "out").exists()
        return text

    return run


@pytest.fixture
def model_copy(trained, tmp_path):
    return shutil.copytree(trained.folder / "model", tmp_path / "copy")


def document(answer):
    assert answer.code == 0, answer.err
    return json.loads(answer.out)  # exactly one


# ---- commands ----


def test_list(cli):
    rows = document(cli("list", "--json"))["entries"]
    assert [row["name"] for row in rows] == registry.list_entries()
    assert {
        "name": "spikelm_tiny_tweets",
        "model_type": "spikelm",
        "recipe": "distill_tweets",
        "shipped": False,
    } in rows
    table = cli("list")
    assert table.code == 0
    assert all(name in table.out for name in registry.list_entries())


def test_list_in_a_process_of_its_own(python):
    done = python("-m", "snlp_zoo", "list", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["entries"]
    assert done.stderr == ""


def test_a_full_disk_is_one_sentence(python):
    with open("/dev/full", "w") as full:
        done = python("-m", "snlp_zoo", "list", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr == "snlp-zoo: No space left on device; make room\n"


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["table", "json"])
def test_a_pipe_that_nobody_reads_is_no_error(python, options):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        done = python("-m", "snlp_zoo", "list", *options, capture_output=False, stdout=pipe, stderr=subprocess.PIPE)
    assert done.stderr == ""


def test_info(cli):
    found = document(cli("info", "spikelm_tiny", "--json"))
    assert found["parameters"] == registry.build("spikelm_tiny").num_parameters()
    assert found["config"]["time_steps"] == 4
    table = cli("info", "spikelm_tiny").out
    assert f"{found['parameters']}" in table
    assert "2406.03287" in table


def test_info_says_results_in_words(cli):
    shown = cli("info", "spikelm_mini_sst2").out
    (result,) = document(cli("info", "spikelm_mini_sst2", "--json"))["results"]
    for said in (
        "SST-2, validation, accuracy",
        f"{100 * result['value']:.1f} % +- {100 * result['deviation']:.1f} % (4 runs of 3 seeds)",
        f"teacher {100 * result['teacher_value']:.1f} %",
        "paper 87.0 %",
        f"{result['energy']['products']:.2f}x products",
        result["hardware"],
        f"commit {result['commit']}",
    ):
        assert said in shown
    assert "{" not in shown


def test_distill_prints_one_json_document_and_its_progress_elsewhere(cli, make_recipe, tmp_path):
    recipe = make_recipe(train={"max_steps": 2, "eval_steps": 2})
    answer = cli("distill", recipe, "--output-dir", tmp_path / "out", "--json", "--set", "train.seed=3")
    summary = document(answer)
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["train"]["seed"] == 3
    assert "distil" in answer.err


def test_distill_prints_a_table(cli, make_recipe):
    answer = cli("distill", make_recipe(train={"max_steps": 2}), "--set", "baseline=false", "--output-dir", "here")
    assert answer.code == 0, answer.err
    for words in ("accuracy", "firing rate", "parameters", "40 test examples", "saved in here/model"):
        assert words in answer.out


def test_distill_prints_losses_and_every_stage(cli, make_recipe):
    general = {"name": "general", "data": {"label": None}, "objectives": {"hidden_mse": 1.0}}
    recipe = make_recipe(train={"max_steps": 1}, stages=[general, {"name": "task"}])
    answer = cli("distill", recipe, "--set", "baseline=false", "--output-dir", "here")
    assert answer.code == 0, answer.err
    for words in ("1_general: negative loss", "accuracy", "40 test examples", "saved in here/model"):
        assert words in answer.out
    answer = cli("distill", "here/1_general/recipe.yaml", "--output-dir", "alone")
    assert answer.code == 0, answer.err
    for words in ("32 validation examples", "negative loss", "hidden mse", "firing rate", "saved in alone/model"):
        assert words in " ".join(answer.out.split())  # a narrow table folds its title


def test_an_encoder_does_not_predict(fails, make_recipe, cli):
    general = {"data": {"label": None}, "objectives": {"hidden_mse": 1.0}, "train": {"max_steps": 1}}
    assert cli("distill", make_recipe(**general), "--output-dir", "here").code == 0
    for command in (["predict", "here", "lumi"], ["evaluate", "here", "--data", "x.tsv"]):
        assert "SpikeLMModel, which has no classifier; train it on a task" in fails(*command)


def test_distill_resumes(cli, make_recipe, tmp_path):
    arguments = ("distill", make_recipe(train={"max_steps": 2}), "--output-dir", "out", "--json")
    first = document(cli(*arguments))
    again = document(cli(*arguments, "--resume"))
    assert again["student_accuracy"] == first["student_accuracy"]


def test_evaluate(cli, trained, data_folder):
    arguments = ("evaluate", trained.folder / "model", "--data", data_folder / "test.tsv")
    scores = document(cli(*arguments, "--json"))
    assert (scores["examples"], scores["truncated"]) == (40, 0)
    for name in ("accuracy", "macro_f1"):
        assert scores[name] == pytest.approx(trained.summary[f"student_{name}"])
    assert scores["firing_rate"] == pytest.approx(trained.summary["firing_rate"], abs=1e-5)
    assert f"{100 * scores['accuracy']:.1f} %" in cli(*arguments).out


def test_a_long_path_stands_on_one_line(cli, trained, data_folder, tmp_path):
    folder = shutil.copytree(trained.folder / "model", tmp_path / ("long" * 40))
    for command in (("evaluate", folder, "--data", data_folder / "test.tsv"), ("predict", folder, "lumi")):
        assert str(folder) in cli(*command).out.splitlines()


def test_evaluate_reads_other_columns(cli, trained, tmp_path):
    (tmp_path / "x.csv").write_text("tweet,mood\ngrum vosh,negative\nlumi sola,positive\n")
    columns = ("--text", "tweet", "--label", "mood")
    assert document(cli("evaluate", trained.folder, "--data", "x.csv", *columns, "--json"))["examples"] == 2


def test_evaluate_says_how_many_texts_were_cut(cli, trained, tmp_path):
    (tmp_path / "long.tsv").write_text(f"text\tlabel\n{'lumi ' * 100}\tpositive\ngrum\tnegative\n{'sola ' * 31}\t1\n")
    answer = cli("evaluate", trained.folder, "--data", "long.tsv", "--json")
    assert document(answer)["truncated"] == 2
    assert "2 of 3 texts were cut at 32 tokens" in answer.err


def test_predict(cli, trained):
    texts = ("grum vosh drel kalan", "lumi sola fenn")
    rows = document(cli("predict", trained.folder, *texts, "--json"))["predictions"]
    assert [row["text"] for row in rows] == list(texts)
    assert [row["label"] for row in rows] == ["negative", "positive"]
    assert all(0.5 <= row["score"] <= 1 and 0 < row["firing_rate"] < 1 and not row["truncated"] for row in rows)
    table = cli("predict", trained.folder, *texts).out
    assert "negative" in table
    assert f"{rows[1]['score']:.3f}" in table


def test_predict_pairs(cli, trained):
    answer = cli("predict", trained.folder, "grum vosh", "lumi", "--pair", "kalan drel", "--pair", "sola fenn")
    assert "grum vosh | kalan drel" in answer.out
    assert "lumi | sola fenn" in answer.out


def test_predict_shows_texts_as_they_are(cli, trained):
    text = "lumi :smile: [red]sola[/red]"
    assert text in cli("predict", trained.folder, text).out


def test_predict_shows_the_beginning_of_a_long_text(cli, trained):
    words = [f"w{number}" for number in range(1000)]
    table = cli("predict", trained.folder, " ".join(words)).out
    assert "w0 w1" in table
    assert "w50" in table
    assert "w200" not in table
    assert document(cli("predict", trained.folder, " ".join(words), "--json"))["predictions"][0]["text"].endswith(
        "w999"
    )


def test_predict_says_which_text_was_cut(cli, trained):
    answer = cli("predict", trained.folder, "lumi", "sola " * 50, "--json")
    assert [row["truncated"] for row in document(answer)["predictions"]] == [False, True]
    assert "text 2 has 52 tokens and was cut at 32" in answer.err


def test_doctor(cli):
    report = document(cli("doctor", "--json"))
    assert report["problems"] == []
    assert report["packages"]["torch"]
    assert report["backends"]["lif"]["reason"]
    table = cli("doctor")
    assert table.code == 0
    assert "none found" in table.out


def test_distill_says_where_and_how_many_texts_were_cut(cli, make_recipe, make_data):
    long = [("lumi " * 40, "positive"), ("grum", "negative")] * 8
    recipe = make_recipe(data={"source": str(make_data(train=long))}, train={"max_steps": 1})
    answer = cli("distill", recipe, "--output-dir", "out", "--json")
    assert document(answer)
    assert "train: 8 of 16 texts were cut at 32 tokens" in answer.err
    assert "test:" not in answer.err


# ---- mistakes ----


@pytest.mark.parametrize("command", ["info", "distill", "predict", "evaluate"])
def test_unknown_entry(fails, command):
    more = {"predict": ["text"], "evaluate": ["--data", "x.tsv"]}.get(command, [])
    text = fails(command, "spikelm_tinny", *more)
    assert "spikelm_tinny" in text
    assert "spikelm_tiny" in text


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_an_entry_that_was_not_trained(fails, command):
    more = ["text"] if command == "predict" else ["--data", "x.tsv"]
    assert "snlp-zoo distill spikelm_tiny_tweets" in fails(command, "spikelm_tiny_tweets", *more)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.batch_sise=8", "did you mean 'batch_size'?"),
        ("train.batch_size=x", "train.batch_size"),
        ("model.config.hidden_sise=32", "'hidden_size'"),
        ("model.config.hidden_size=wide", "wide"),
        ("objectives.forward_kll=1", "forward_kl"),
        ("objectives.hidden_mse.weigth=1", "weight"),
        ("data.source=no/such.tsv", "no/such.tsv"),
        ("data.source=nothing_like_this", "nothing_like_this"),
        ("data.max_length=65", "64 positions"),
        ("teacher.name=./nowhere", "./nowhere"),
        ("train.epochs", "key=value"),
    ],
)
def test_mistakes_in_a_recipe(distil_fails, override, expected):
    assert expected in distil_fails("--set", override)


def test_a_column_that_is_missing(distil_fails):
    text = distil_fails("--set", "data.text=txt")
    assert "'txt'" in text
    assert "Nearest: text" in text


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_an_empty_text(distil_fails, make_data, split):
    rows = [("lumi", "positive"), ("grum", "negative"), ("  ", "negative"), ("sola", "positive")]
    text = distil_fails(data={"source": str(make_data(**{split: rows}))})
    assert f"{split}.tsv, line 4" in text
    assert "empty" in text


def test_a_label_out_of_range(distil_fails, make_data):
    text = distil_fails(data={"source": str(make_data(test=[("lumi", "positive"), ("grum", "5")]))})
    assert "test.tsv, line 3" in text
    assert "'5'" in text


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("text\tmood\nlumi\tpositive\n", "'label'"),
        ("text\tlabel\n \tpositive\n", "line 2"),
        ("text\tlabel\nlumi\tangry\n", "'angry'"),
        ("text\tlabel\nlumi\t2\n", "'2'"),
        ("text\tlabel\nlumi\n", "line 2"),
        ("text\tlabel\n", "no rows"),
    ],
)
def test_data_that_cannot_be_evaluated(fails, trained, tmp_path, rows, expected):
    (tmp_path / "x.tsv").write_text(rows)
    text = fails("evaluate", trained.folder, "--data", "x.tsv")
    assert "x.tsv" in text
    assert expected in text


@pytest.mark.parametrize("text", ["", "  \t "])
def test_predict_of_an_empty_text(fails, trained, text):
    assert "text 2 of 2 is empty" in fails("predict", trained.folder, "lumi", text)


def test_predict_of_bytes_that_are_no_text(fails, trained):
    assert "text 2 of 2 has half of a surrogate pair, or is not UTF-8" in fails(
        "predict", trained.folder, "a", "\udcff"
    )


@pytest.mark.parametrize(
    "command", [("predict", "x" * 300, "a"), ("train", "x" * 300), ("convert", "x" * 300, "there")], ids=lambda c: c[0]
)
def test_a_name_that_is_too_long(fails, command):
    assert "File name too long" in fails(*command)


def test_other_processes_leave_it_to_the_first_to_say_what_is_wrong(fails, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    waited = []
    monkeypatch.setattr("snlp_zoo.cli.time", SimpleNamespace(sleep=waited.append))
    for name in ("x" * 300, "nothing"):
        fails("train", name)
        assert waited.pop() > 10


def test_too_little_memory_on_a_gpu_is_one_sentence(fails, monkeypatch):
    def run():  # what torch says there
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 384.00 MiB. GPU 0 has a total capacity of 139.80 GiB of which 87.50 "
            "MiB is free. Process 485 has 66.00 MiB memory in use."
        )

    monkeypatch.setattr("snlp_zoo.cli.app", run)
    assert fails() == (
        "snlp-zoo: CUDA out of memory. Tried to allocate 384.00 MiB. Take fewer or shorter texts at once: "
        "train.batch_size, data.max_length"
    )


def test_a_folder_that_is_a_file(fails, trained, tmp_path):
    (tmp_path / "file").write_text("mine")
    run = ("energy", trained.folder, "--text", "lumi", "--output-dir")
    assert "file: File exists" in fails(*run, "file")
    assert "file/below: Not a directory" in fails(*run, "file/below")
    assert "file: File exists" in fails("plots", trained.folder, "--text", "lumi", "--output-dir", "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("option", ["--window", "--separator"])
def test_options_of_language_models_are_not_for_classifiers(fails, trained, data_folder, option):
    text = fails("evaluate", trained.folder, "--data", data_folder / "test.tsv", option, 3)
    assert "window and separator are of language models" in text


def test_tweets_are_for_models_with_their_classes(fails, trained):
    text = fails("evaluate", trained.folder, "--data", "tweets")
    assert "got ['negative', 'positive']; leave label_names out, or name a model of these classes" in text


def test_no_such_recipe_file(fails):
    assert "no/such/recipe.yaml" in fails("distill", "no/such/recipe.yaml")


def test_a_recipe_that_is_not_yaml(fails, tmp_path):
    (tmp_path / "x.yaml").write_text("train: [1, 2\n")
    assert "x.yaml is not valid YAML" in fails("distill", "x.yaml")


def test_an_output_folder_that_cannot_be_made(fails, make_recipe, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in ("file", "file/below"):
        text = fails("distill", make_recipe(), "--output-dir", folder)
        assert "cannot write" in text
        assert "--output-dir" in text
    assert (tmp_path / "file").read_text() == "mine"


def test_nothing_to_resume(distil_fails):
    assert "nothing to resume" in distil_fails("--resume")


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _flip_the_header(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[4] ^= 0xFF
    path.write_bytes(data)


def _empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def _without_weights(folder):
    (folder / "model.safetensors").unlink()


def _without_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _with_a_smaller_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.weight"] = tensors["classifier.weight"][:, :16].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _config_that_is_not_json(folder):
    (folder / "config.json").write_text("{oops")


def _config_of_another_kind(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"time_steps": "two"}))


def _another_model(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
    (folder / "config.json").write_text(json.dumps(config))


def _tokenizer_that_is_not_json(folder):
    (folder / "tokenizer.json").write_text("{oops")


def _without_a_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


DAMAGES = [
    _truncate,
    _flip_the_header,
    _empty,
    _without_weights,
    _without_a_tensor,
    _with_a_smaller_tensor,
    _config_that_is_not_json,
    _config_of_another_kind,
    _another_model,
    _tokenizer_that_is_not_json,
    _without_a_tokenizer,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda function: function.__name__.strip("_"))
def test_a_damaged_checkpoint(fails, model_copy, data_folder, damage):
    damage(model_copy)
    assert "copy" in fails("predict", model_copy, "lumi")
    assert "copy" in fails("evaluate", model_copy, "--data", data_folder / "test.tsv")


def test_a_folder_that_is_no_model(fails, tmp_path):
    (tmp_path / "folder").mkdir()
    assert "no config.json" in fails("predict", "folder", "lumi")


@pytest.mark.parametrize(
    "arguments",
    [
        ["info"],
        ["distil", "spikelm_tiny"],
        ["list", "--jsn"],
        ["distill", "spikelm_tiny_tweets", "--set"],
        ["evaluate", "spikelm_tiny"],
        ["predict", "spikelm_tiny"],
    ],
)
def test_usage_errors(cli, arguments):
    answer = cli(*arguments)
    assert answer.code == 2
    assert answer.out == ""
    assert "Error" in answer.err


def test_help(cli):
    answer = cli("--help")
    assert answer.code == 0
    for command in ("list", "info", "distill", "evaluate", "predict", "doctor"):
        assert command in answer.out
