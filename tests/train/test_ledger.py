"""tools/ledger.py on real runs: it gathers what runs and `snlp-zoo energy` say, and what it writes reads back."""

import json
import shlex
import shutil
import statistics
import sys
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner

from snlp_zoo import cli, registry
from snlp_zoo.checked import parse_yaml
from snlp_zoo.errors import RecipeError

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def ledger(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    yield import_module("ledger")
    sys.modules.pop("ledger")


@pytest.fixture
def zoo(monkeypatch, tmp_path):
    """A zoo of one entry with two results, the first of them the paper's alone."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    content = (registry.zoo_folder() / "spikelm_tiny.yaml").read_text()
    results = """# measured by hand
results:
  - {dataset: SST-2, metric: accuracy, paper: {value: 0.87, parameters: 1.09e+8, time_steps: 4}}
  - dataset: RTE  # small
    metric: accuracy
    value: 0.6
"""
    (folder / "mine.yaml").write_text(content + results)
    monkeypatch.setattr(registry, "zoo_folder", lambda: folder)
    return folder / "mine.yaml"


def test_runs_of_several_seeds_are_one_record(ledger, trained, run, data_folder, capsys):
    second, _ = run(train={"seed": 1})
    unfinished = second.parent
    (record,) = ledger.collect([second, trained.folder, unfinished], number=5)
    assert f"{unfinished}: left out" in capsys.readouterr().err
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (trained.folder, second)]
    scores = [summary["student_accuracy"] for summary in summaries]
    assert record["value"] == pytest.approx(statistics.mean(scores), abs=1e-5)
    assert record["deviation"] == pytest.approx(statistics.stdev(scores), abs=1e-5)
    assert (record["least"], record["most"]) == pytest.approx((min(scores), max(scores)), abs=1e-5)
    assert record["seeds"] == [0, 1]
    assert record["teacher_value"] == pytest.approx(summaries[0]["teacher_accuracy"], abs=1e-5)
    assert record["firing_rate"] == pytest.approx(statistics.mean(s["firing_rate"] for s in summaries), abs=1e-5)
    assert (record["time_steps"], record["bits"]) == (2, 32)
    assert record["parameters"] == summaries[0]["parameters"]
    trained_for = [summary["seconds"] - summary["teacher_seconds"] for summary in summaries]
    assert record["minutes"] == pytest.approx(statistics.mean(trained_for) / 60, abs=0.01)
    assert record["split"] == "test"
    assert "command" not in record  # no entry of the zoo is called like this
    arguments = ["energy", str(trained.folder), "--data", str(data_folder / "test.tsv"), "--limit", "5", "--json"]
    report = json.loads(CliRunner().invoke(cli.app, arguments, catch_exceptions=False).stdout)
    ratios = {name: report["ratios"][level]["dense_fp32"] for name, level in ledger.LEVELS.items()}
    assert record["energy"] == pytest.approx({**ratios, "texts": 5, "seed": 0}, abs=1e-3)
    assert record["spike_driven_fraction"] == pytest.approx(report["spike_driven_fraction"], abs=1e-4)


def test_a_dense_control_has_no_energy(ledger, trained, tmp_path, capsys):
    registry.build("spikegpt_tiny", spiking=False, vocab_size=200).save_pretrained(tmp_path / "model")
    registry.load_tokenizer(trained.folder / "model").save_pretrained(tmp_path / "model")
    recipe = ledger.load_recipe(str(trained.folder / "recipe.yaml"))
    assert ledger.energy_of(tmp_path, recipe, 0, 2) == {}
    assert str(tmp_path) in capsys.readouterr().err


def test_runs_that_differ_in_more_than_their_seeds_are_refused(ledger, trained, run):
    other, _ = run(train={"seed": 1, "learning_rate": 1e-4})
    with pytest.raises(SystemExit, match=r"differ in train\.learning_rate, not in their seeds alone"):
        ledger.collect([trained.folder, other])


def test_the_command_names_what_differs_from_the_entry(ledger):
    load = import_module("snlp_zoo.train.recipe").load_recipe
    assert ledger.command_of(load("spikelm_tiny_tweets", ["train.seed=2"])) == "snlp-zoo train spikelm_tiny_tweets"
    changed = load("spikingbert_mini_sst2", ["stages.task.train.epochs=9", "data.source=/somewhere/sst2"])
    assert ledger.command_of(changed) == "snlp-zoo train spikingbert_mini_sst2 --set stages.task.train.epochs=9"
    assert ledger.dataset_of(changed) == "SST-2"
    more = load(
        "spikelm_mini_sst2",
        [
            "data.source=/somewhere/sst2",
            "stages.general.data.source=[/somewhere/my texts.txt]",
            "stages.task.data.transfer.source=[/somewhere/reviews.txt]",
        ],
    )
    assert shlex.split(ledger.command_of(more)) == [
        *("snlp-zoo", "train", "spikelm_mini_sst2"),
        *("--set", 'stages.general.data.source=["my texts.txt"]'),
        *("--set", 'stages.task.data.transfer.source=["reviews.txt"]'),
    ]
    novels = ledger.command_of(load("spikegpt_mini", ["data.source=[/somewhere/novels.txt]"]))
    assert shlex.split(novels) == ["snlp-zoo", "train", "spikegpt_mini", "--set", 'data.source=["novels.txt"]']
    classifier = load("spikegpt_mini_sst2", ["data.source=/somewhere/SST-2"])  # its first stage is a language model
    assert ledger.command_of(classifier) == "snlp-zoo train spikegpt_mini_sst2"


@pytest.mark.parametrize(
    "changes",
    [
        ["stages.general=null"],
        ["stages.task.objectives={cross_entropy: 1.0}"],
        ["stages.task.model.init_from=scratch", "model.config.time_steps=2"],
        ["stages.task.data.augment={copies: 2}", "stages.task.train.steps=9"],
        ["stages.task.data={disjoint: false}", "train.seed=3"],
    ],
)
def test_the_command_makes_the_run_anew_whatever_was_left_out(ledger, changes):
    load = import_module("snlp_zoo.train.recipe").load_recipe
    changed = load("spikelm_mini_sst2", changes)
    *_, options = ledger.command_of(changed).partition("spikelm_mini_sst2")
    again = load("spikelm_mini_sst2", [word for word in shlex.split(options) if word != "--set"])
    assert ledger.settings(again) == ledger.settings(changed) != ledger.settings(load("spikelm_mini_sst2"))


def test_energy_of_pairs_knows_which_text_is_the_second(ledger, trained, tmp_path, monkeypatch):
    (tmp_path / "pairs").mkdir()
    for split in ("train", "dev", "test"):
        rows = "text\tother\tlabel\n" + "lumi kalan\tgrum tedor\tpositive\nvosh\tfenn\tnegative\n" * 4
        (tmp_path / "pairs" / f"{split}.tsv").write_text(rows)
    changes = [f"data.source={tmp_path / 'pairs'}", "data.text_pair=other"]
    seen, real = [], ledger.estimate
    monkeypatch.setattr(ledger, "estimate", lambda model, batch: seen.append(batch) or real(model, batch))
    ledger.energy_of(trained.folder, ledger.load_recipe(str(trained.recipe), changes), 0, 2)
    (batch,) = seen
    assert batch["token_type_ids"].sum(1).tolist() == [3, 2]  # its words and the separator after them


def test_a_run_counts_once_and_two_of_one_seed_twice(ledger, trained, run, monkeypatch):
    monkeypatch.chdir(trained.folder.parent)
    with pytest.raises(SystemExit, match=f"{trained.folder}.*named more than once"):
        ledger.collect([trained.folder, Path(trained.folder.name)])
    again, _ = run()
    (record,) = ledger.collect([trained.folder, again], number=2)
    assert record["seeds"] == [0, 0]
    assert record["deviation"] == 0  # on a CPU a seed gives the same numbers


def test_runs_from_two_machines_are_pooled_as_if_from_one(ledger, trained, tmp_path, zoo):
    folders = [tmp_path / str(seed) for seed in range(3)]
    for seed, folder in enumerate(folders):  # one run, with scores and seeds of three
        shutil.copytree(trained.folder, folder)
        recipe = parse_yaml((folder / "recipe.yaml").read_text())
        recipe["train"] = recipe.get("train", {}) | {"seed": seed}
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
        summary = json.loads((folder / "summary.json").read_text())
        summary |= {"student_accuracy": (0.9, 0.86, 0.81)[seed], "firing_rate": 0.1 + seed / 9, "seconds": 600.0 + seed}
        (folder / "summary.json").write_text(json.dumps(summary))
    groups = [folders[:1], folders[1:], folders]
    first, others, whole = (
        {**record, "entry": "mine", "hardware": "2 CPU cores", "commit": str(len(group))}
        for group in groups
        for record in ledger.collect(group, number=2)
    )
    ledger.write([first])
    ledger.write([others | {"hardware": "4 CPU cores"}], join=True)
    result = registry.load_entry("mine").results[-1]
    for name, value in whole.items():
        if name in ("value", "deviation", "firing_rate", "minutes"):
            assert getattr(result, name) == pytest.approx(value, abs=0.01 if name == "minutes" else 2e-5), name
        elif name in ("least", "most", "seeds", "teacher_value", "teacher_minutes", "energy", "overlap"):
            assert result.model_dump(exclude_none=True)[name] == value, name
    assert (result.hardware, result.commit) == ("2 CPU cores; 4 CPU cores", "2")
    with pytest.raises(SystemExit, match="mine: what the zoo has differs in bits, command; write without --join"):
        ledger.write([others | {"command": "another", "bits": 1}], join=True)
    ledger.write([others | {"dataset": "MR"}], join=True)  # joined with nothing
    assert registry.load_entry("mine").results[-1].runs == [1, 2]


def test_written_results_replace_their_like_and_leave_the_rest(ledger, zoo):
    before = zoo.read_text()
    record = {"entry": "mine", "dataset": "sst2", "metric": "accuracy", "value": 0.89, "seeds": [0, 1, 2]}
    record |= {"deviation": 0.002, "energy": {"products": 5.1, "texts": 16, "seed": 0}, "commit": "516e290142"}
    ledger.write([record, record | {"dataset": "CoLA", "metric": "matthews", "value": 0.4}])
    first, kept, new = registry.load_entry("mine").results
    assert (first.value, first.runs, first.energy.products, first.commit) == (0.89, [0, 1, 2], 5.1, "516e290142")
    assert (first.dataset, first.paper.value, first.paper.time_steps) == ("SST-2", 0.87, 4)
    assert (kept.dataset, kept.value) == ("RTE", 0.6)
    assert (new.dataset, new.value, new.paper) == ("CoLA", 0.4, None)
    after = zoo.read_text()
    head, _, _ = before.partition("  - {dataset")
    assert after.startswith(head)
    assert "  - dataset: RTE  # small\n    metric: accuracy\n    value: 0.6\n" in after
    ledger.write([record, record | {"dataset": "CoLA", "metric": "matthews", "value": 0.4}])
    assert zoo.read_text() == after


@pytest.mark.parametrize("start", ["", "results: []\n", "results:\n- {dataset: RTE, metric: accuracy}\n# end\n"])
def test_results_are_put_into_any_file(ledger, zoo, start):
    _, _, own = zoo.read_text().partition("# measured")[0].partition("\n")
    zoo.write_text(own + start + "description: mine\n")
    ledger.write([{"entry": "mine", "dataset": "SST-2", "metric": "accuracy", "value": 0.5}])
    found = registry.load_entry("mine")
    assert found.description == "mine"
    assert [result.dataset for result in found.results] == [*(["RTE"] if "RTE" in start else []), "SST-2"]
    assert zoo.read_text().count("# end") == start.count("# end")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("valu: 0.5", r"results\.2\.valu: unknown key; did you mean 'value'"),
        ("paper: {valeu: 0.5}", r"results\.2\.paper\.valeu: unknown key; did you mean 'value'"),
        ("energy: {product: 2}", r"energy\.product: unknown key; did you mean 'products'"),
        ("value: .nan", "finite"),
        ("firing_rate: 18.6", "less than or equal to 1"),
    ],
)
def test_a_result_is_checked(zoo, wrong, said):
    zoo.write_text(zoo.read_text() + f"  - dataset: MR\n    metric: accuracy\n    {wrong}\n")
    with pytest.raises(RecipeError, match=said):
        registry.load_entry("mine")


def test_a_papers_value_is_put_beside_ours_where_the_file_names_none(ledger, zoo):
    record = {"entry": "mine", "metric": "accuracy", "value": 0.5, "time_steps": 1, "bits": 32}
    ledger.write([record | {"dataset": "SST-2"}, record | {"dataset": "RTE"}, record | {"dataset": "tweets"}])
    sst2, rte, tweets = registry.load_entry("mine").results
    assert sst2.paper.value == 0.87  # the file's own, not that of T = 1
    assert (rte.paper.value, rte.paper.parameters, rte.paper.time_steps) == (0.653, 109e6, 1)
    assert tweets.paper is None
