"""From a distilled run to the Hub and back, as a user does it."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from typer.testing import CliRunner

import snlp_zoo
from snlp_zoo import cli
from snlp_zoo.energy import estimate
from snlp_zoo.energy.report import STATEMENT
from snlp_zoo.errors import CheckpointError, HubError
from snlp_zoo.hub.card import make_results, read_run
from snlp_zoo.hub.client import digest, travels

FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
IDS = [[2, 5, 6, 7, 3]]


def publish(folder, options="", repo="user/m"):
    return f"from dataclasses import asdict; answer = asdict(snlp_zoo.publish({str(folder)!r}, {repo!r}{options}))"


@pytest.fixture
def run_folder(trained, tmp_path):
    """A copy of the finished run, with an energy report and a projection."""
    folder = shutil.copytree(trained.folder, tmp_path / "run")
    report = estimate(snlp_zoo.load(folder / "model"), {"input_ids": torch.tensor(IDS)})
    (folder / "energy.md").write_text(report.to_markdown() + "\n")
    (folder / "model" / "projection.safetensors").write_bytes(b"the distillation's alone")
    return folder


def test_from_a_run_to_the_hub_and_back(hub, client, run_folder, trained, data_folder):
    report = client.run(publish(run_folder, repo="user/tiny"), "hf_write")
    model = run_folder / "model"
    expected = FILES | {f".eval_results/{next(iter(report['files'].keys() - FILES)).partition('/')[2]}"}
    head = hub.head("user/tiny")
    assert set(report["files"]) == expected == head.keys() - {".gitattributes"}
    assert report["commit"] == hub.repo("user/tiny")["branches"]["main"]
    for name in FILES - {"README.md"}:
        assert head[name] == digest(model / name, like="0" * 64)
        assert report["files"][name] == (model / name).stat().st_size
    assert "projection.safetensors" in report["left_out"]
    assert sum(line.startswith("POST") and "/commit/" in line for line in hub.log()) == 1

    local = snlp_zoo.load(model)(torch.tensor(IDS)).logits.tolist()
    answer = client.run(f"""
import json
from transformers import AutoModelForSequenceClassification, pipeline
from typer.testing import CliRunner
from snlp_zoo.cli import app
from snlp_zoo.hub import find_checkpoint
from snlp_zoo.predict import predict
from snlp_zoo.train.saved import evaluate_checkpoint
from snlp_zoo.train.student import copy_student
ids = torch.tensor({IDS})
auto = AutoModelForSequenceClassification.from_pretrained("user/tiny")
start = snlp_zoo.load("user/tiny", revision="{report["commit"]}", verify=True)
answer = {{
    "auto": auto.eval()(ids).logits.tolist(),
    "load": snlp_zoo.load("user/tiny", revision="main")(ids).logits.tolist(),
    "pipeline": pipeline("text-classification", model="user/tiny")("lumi sola")[0],
    "predict": predict("user/tiny", ["lumi sola"], verify=True)[0],
    "scores": evaluate_checkpoint("user/tiny", {str(data_folder / "test.tsv")!r}, revision="main"),
    "cli": json.loads(CliRunner().invoke(app, ["predict", "user/tiny", "lumi sola", "--verify", "--json"]).stdout),
    "not copied": copy_student(start, "user/tiny"),
    "files": sorted(path.name for path in find_checkpoint("user/tiny").iterdir()),
}}
""")
    assert answer["auto"] == answer["load"] == local
    assert answer["predict"]["label"] == answer["pipeline"]["label"]
    assert answer["predict"]["score"] == pytest.approx(answer["pipeline"]["score"], abs=1e-6)
    assert answer["cli"]["predictions"] == [answer["predict"]]
    assert answer["scores"]["accuracy"] == pytest.approx(trained.summary["student_accuracy"])
    assert answer["not copied"] == []
    assert set(answer["files"]) == FILES | {".eval_results"}


def test_the_card_says_what_the_run_says(run_folder, trained):
    report = snlp_zoo.publish(run_folder, "user/tiny", dry_run=True)
    assert report.commit is None
    card = ModelCard(report.card)
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.base_model is None  # a local folder is no model of the Hub
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["accuracy"] == trained.summary["student_accuracy"]
    assert {result.dataset_split for result in card.data.eval_results} == {"test"}
    weights = digest(run_folder / "model" / "model.safetensors", like="0" * 64)
    for words in (
        f"{trained.summary['parameters']:,}",
        "time steps T | 2",
        weights,
        f"\n\n## Energy\n\n{STATEMENT}\n",
        "| all operations | ",
    ):
        assert words in report.card
    assert f"{100 * trained.summary['firing_rate']:.1f} %" in report.card
    assert f"bag of words {trained.summary['baseline_accuracy']:.4f}" in report.card
    assert str(run_folder.parent) not in report.card  # no path of this machine
    assert str(trained.recipe.parent.parent) not in report.card
    (run_folder / "energy.md").unlink()
    assert "Energy" not in snlp_zoo.publish(run_folder, "user/tiny", dry_run=True).card


def test_a_link_out_of_the_folder_is_not_published(run_folder, tmp_path):
    (tmp_path / "secret").write_text("not for others")
    (run_folder / "model" / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="points outside its folder"):
        snlp_zoo.publish(run_folder, "user/tiny", dry_run=True)


def test_folders_of_a_repository_are_left_alone():
    assert travels("model-00001-of-00002.safetensors")
    assert travels(".eval_results/sst2.yaml")
    assert not travels("model-v1/weights.safetensors")
    assert not travels(".eval_results/old/sst2.yaml")


def test_a_teacher_and_data_set_of_the_hub_are_linked(run_folder):
    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text())
    recipe["teacher"]["name"], recipe["data"]["source"] = "google-bert/bert-base-uncased", "stanfordnlp/sst2"
    (run_folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    report = snlp_zoo.publish(run_folder / "model", "user/tiny", dry_run=True)
    data = ModelCard(report.card).data
    assert data.base_model == "google-bert/bert-base-uncased"
    assert data.datasets == ["stanfordnlp/sst2"]
    assert ".eval_results/stanfordnlp_sst2.yaml" in report.files


def test_results_are_in_the_hub_s_own_form(run_folder, trained):
    ((path, text),) = make_results(read_run(run_folder / "model")).items()
    entries = {entry.task_id: entry for entry in parse_eval_result_entries(yaml.safe_load(text))}
    assert path.startswith(".eval_results/data")
    assert entries["accuracy"].value == trained.summary["student_accuracy"]
    assert entries["accuracy"].notes == "test split, not a data set of the Hub"


def test_the_code_on_the_card_runs(hub, client, saved):
    report = client.run(publish(saved), "hf_write")
    code = report["card"].partition("```python\n")[2].partition("```")[0]
    assert client.run(code + "\nanswer = [type(model).__name__, len(tokenizer)]") == [
        "SpikeLMForSequenceClassification",
        7,
    ]


def test_dry_run_prints_files_sizes_and_card_without_a_network(saved, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    arguments = ["publish", str(saved), "user/m", "--dry-run"]
    table = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert table.exit_code == 0
    for name in FILES - {"README.md"}:
        assert f"{(saved / name).stat().st_size:,}" in next(line for line in table.output.splitlines() if name in line)
    assert "training_args.bin" in table.output
    assert "license: apache-2.0" in table.output
    document = json.loads(CliRunner().invoke(cli.app, [*arguments, "--json"]).stdout)
    assert set(document["files"]) == FILES
    assert document == asdict(snlp_zoo.publish(saved, "user/m", dry_run=True)) | {"url": document["url"]}


def test_publishing_twice_makes_one_commit_and_a_new_model_replaces_the_old(hub, client, saved, tmp_path):
    first = client.run(publish(saved), "hf_write")["commit"]
    assert client.run(publish(saved), "hf_write")["commit"] == first
    assert len(hub.repo("user/m")["commits"]) == 2  # the repository's own first one, and ours
    model = snlp_zoo.load(saved)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    client.run(publish(tmp_path / "shards"), "hf_write")
    shards = {name for name in hub.head("user/m") if "safetensors" in name}
    assert "model.safetensors" not in shards
    assert "model.safetensors.index.json" in shards
    assert len(shards) > 2
    logits = client.run(f"answer = snlp_zoo.load('user/m', verify=True)(torch.tensor({IDS})).logits.tolist()")
    assert logits == model(torch.tensor(IDS)).logits.tolist()
    client.run(publish(saved), "hf_write")
    assert {name for name in hub.head("user/m") if "safetensors" in name} == {"model.safetensors"}
    assert "tokenizer.json" in hub.head("user/m")


def test_a_trained_entry_tells_its_paper_and_a_staged_run_its_last_stage(saved, run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, tmp_path / "runs" / "spikelm_tiny" / "model")
    assert "arXiv:2406.03287" in snlp_zoo.publish("spikelm_tiny", "user/m", dry_run=True).card
    own = yaml.safe_load((run_folder / "recipe.yaml").read_text())
    last = own | {"name": "tiny/2_task", "data": own["data"] | {"source": "nyu-mll/glue"}}
    (run_folder / "2_task").mkdir()
    (run_folder / "2_task" / "recipe.yaml").write_text(yaml.safe_dump(last))
    (run_folder / "recipe.yaml").write_text(yaml.safe_dump(own | {"stages": [{"name": "general"}, {"name": "task"}]}))
    data = ModelCard(snlp_zoo.publish(run_folder, "user/m", dry_run=True).card).data
    assert data.datasets == ["nyu-mll/glue"]


def test_branches_and_private_repositories(hub, client, client_error, saved):
    report = client.run(publish(saved, ", private=True, revision='v1'"), "hf_write")
    assert hub.repo("user/m")["private"]
    assert set(hub.head("user/m")) == {".gitattributes"}
    assert hub.repo("user/m")["branches"]["v1"] == report["commit"]
    load = "answer = snlp_zoo.load('user/m', revision='v1').num_parameters()"
    assert client.run(load, "hf_read") > 0
    client.forget()
    with pytest.raises(client_error, match="hf auth login") as caught:
        client.run(load)
    assert caught.value.kind == "HubError"
    with pytest.raises(client_error, match="is not a saved model"):
        client.run("snlp_zoo.load('user/m')", "hf_read")
    client.run(publish(saved, repo="user/open"), "hf_write")
    with pytest.raises(client_error, match="is public"):
        client.run(publish(saved, ", private=True", repo="user/open"), "hf_write")


def test_only_known_files_are_fetched_and_none_lands_outside(hub, client, client_error, saved):
    client.run(publish(saved), "hf_write")
    hub.plant(
        "user/m", **{"pytorch_model.bin": "pickle", "modeling_x.py": "print(1)", "checkpoint-1/config.json": "{}"}
    )
    found = (
        "from snlp_zoo.hub import find_checkpoint; answer = sorted(p.name for p in find_checkpoint('user/m').iterdir())"
    )
    assert set(client.run(found)) == FILES
    hub.plant("user/m", **{"model-/../../../../../../evil.safetensors": "outside"})
    with pytest.raises(client_error) as caught:
        client.run(found)
    assert caught.value.kind == "HubError"
    assert not list(client.cache.parent.rglob("evil.safetensors*"))


def test_what_cannot_be_loaded_or_named_is_not_published(saved, tmp_path):
    damaged = shutil.copytree(saved, tmp_path / "damaged")
    data = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(data[:1000])
    with pytest.raises(CheckpointError, match="cannot load"):
        snlp_zoo.publish(damaged, "user/m", dry_run=True)
    for name in ("m", "user/m/x", "user/", "../m", "user/m m"):
        with pytest.raises(HubError, match="write it as user/name"):
            snlp_zoo.publish(saved, name, dry_run=True)
    for licence in ("", "My Own", "mit\ntags: []"):
        with pytest.raises(HubError, match="licence"):
            snlp_zoo.publish(saved, "user/m", licence=licence, dry_run=True)


def test_offline_nothing_is_published(saved):
    with pytest.raises(HubError, match="HF_HUB_OFFLINE keeps user/m out of reach"):
        snlp_zoo.publish(saved, "user/m")


def test_local_folders_have_no_record_to_verify(saved):
    with pytest.raises(CheckpointError, match="local folder"):
        snlp_zoo.load(saved, verify=True)
    with pytest.raises(CheckpointError, match="local folder"):
        snlp_zoo.load(saved, revision="v1")
