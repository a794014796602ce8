"""Several stages in one command: each an ordinary run, each starting from the one before, resumable anywhere."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

import snlp_zoo
from snlp_zoo.errors import CheckpointError, DataError, RecipeError
from snlp_zoo.train.loop import Trainer
from snlp_zoo.train.recipe import load_recipe
from snlp_zoo.train.run import distill
from snlp_zoo.train.saved import evaluate_checkpoint

STATES = {"hidden_mse": 1.0, "embedding_mse": 0.5}
STAGES = [
    {"name": "general", "data": {"label": None}, "train": {"eval_steps": 3, "save_steps": 2}},
    {"name": "task", "train": {"epochs": 1, "save_steps": 4}},
    {"name": "prediction", "objectives": {"forward_kl": 1.0}, "train": {"save_steps": 2}},
]
FOLDERS = ["1_general", "2_task", "3_prediction"]


@pytest.fixture(scope="module")
def content(recipe_content, data_folder, tmp_path_factory):
    """Steps: 7 on 112 unlabelled texts, 6 on the task, 4 to predict."""
    text = tmp_path_factory.mktemp("text") / "more.txt"
    text.write_text("".join(f"{line}\n\n" for line in ["lumi kalan", "grum tedor mopim sola", "fenn", "vosh"] * 4))
    own = {"objectives": STATES, "projection": "shared", "stages": yaml.safe_load(yaml.safe_dump(STAGES))}
    own["stages"][0]["data"]["source"] = [str(data_folder), str(text)]
    own["train"] = recipe_content["train"] | {"epochs": 1}
    own["stages"][2]["train"]["max_steps"] = 4
    return recipe_content | own


@pytest.fixture
def staged(content, tmp_path):
    """Function: run the stages with changes (of whole keys) into a folder -> (folder, summary)."""

    def start(into=None, resume=False, **changes):
        path = tmp_path / "staged.yaml"
        path.write_text(yaml.safe_dump(content | changes))
        folder = into or tmp_path / "run"
        return folder, distill(str(path), output_dir=folder, resume=resume)

    return start


@pytest.fixture(scope="module")
def finished(content, tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    (root / "staged.yaml").write_text(yaml.safe_dump(content))
    return root / "run", distill(str(root / "staged.yaml"), output_dir=root / "run")


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def same_files(folder, other):
    for stage in FOLDERS:
        for name in ("metrics.jsonl", "model/model.safetensors", "model/config.json"):
            assert (folder / stage / name).read_bytes() == (other / stage / name).read_bytes(), (stage, name)
    assert (folder / "model/model.safetensors").read_bytes() == (other / "model/model.safetensors").read_bytes()


def timeless(summary):
    kept = {key: value for key, value in summary.items() if key not in ("seconds", "teacher_seconds", "path")}
    return kept | {"stages": [timeless(stage) for stage in summary["stages"]]} if "stages" in summary else kept


# ---- a finished run ----


def test_each_stage_is_a_run_and_the_last_one_is_the_runs_own(finished):
    folder, summary = finished
    for stage in FOLDERS:
        names = {path.name for path in (folder / stage).iterdir()}
        assert {"recipe.yaml", "metrics.jsonl", "summary.json", "model", "checkpoints"} <= names
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["stages"] == [json.loads((folder / stage / "summary.json").read_text()) for stage in FOLDERS]
    assert [stage["name"] for stage in summary["stages"]] == [f"tiny/{stage}" for stage in FOLDERS]
    assert summary["name"] == "tiny"
    assert summary["path"] == str(folder / "model")
    assert summary["student_accuracy"] == summary["stages"][-1]["student_accuracy"]
    assert summary["seconds"] == pytest.approx(sum(stage["seconds"] for stage in summary["stages"]), abs=0.1)
    assert (folder / "model/model.safetensors").read_bytes() == (
        folder / "3_prediction/model/model.safetensors"
    ).read_bytes()
    assert snlp_zoo.load(folder).config.label_names == ["negative", "positive"]


def test_a_stages_recipe_can_be_run_by_itself(finished):
    folder, _ = finished
    recipe = load_recipe(str(folder / "3_prediction" / "recipe.yaml"))
    assert list(recipe.objectives) == ["forward_kl"]
    assert recipe.model.init_from == str(folder / "2_task")
    assert recipe.stages == []
    assert load_recipe(str(folder / "1_general" / "recipe.yaml")).model.init_from == "teacher"


def test_only_the_last_stage_has_a_baseline(finished):
    assert ["baseline_accuracy" in stage for stage in finished[1]["stages"]] == [False, False, True]


def test_general_distillation_scores_by_its_loss(finished, metrics):
    folder, summary = finished
    rows = [row for row in metrics(folder / "1_general") if "split" in row]
    assert [row["step"] for row in rows] == [3, 6, 7]
    for row in rows:
        assert list(row)[:3] == ["step", "split", "negative_loss"]  # the third decides which student is best
        scores = {"negative_loss", "hidden_mse", "embedding_mse", "firing_rate", "effective_domain"}
        assert set(row) - {"step", "split"} == scores
        assert row["negative_loss"] == pytest.approx(-(row["hidden_mse"] + 0.5 * row["embedding_mse"]), abs=1e-6)
        assert 0 < row["firing_rate"] < 1
    best = max(rows, key=lambda row: row["negative_loss"])
    general = summary["stages"][0]
    assert best["step"] > 3
    assert general["student_negative_loss"] == best["negative_loss"]
    assert general["validation_examples"] == 32  # the folder's own split
    assert not {"test_examples", "baseline_accuracy", "teacher_accuracy"} & general.keys()
    assert not (folder / "1_general" / "teacher").exists()  # it was not tuned


def test_general_distillation_gives_an_encoder(finished):
    folder, _ = finished
    encoder = snlp_zoo.load(folder / "1_general")
    assert type(encoder).__name__ == "SpikeLMModel"
    with pytest.raises(CheckpointError, match=r"holds a SpikeLMModel, which has no classifier; train it on a task"):
        evaluate_checkpoint(str(folder / "1_general"), "x.tsv")


def test_each_stage_starts_from_the_one_before(staged, content, finished):
    """With a learning rate of nothing the weights are those of the finished stage before."""
    still = {"train": {"learning_rate": 1e-12, "max_steps": 1}}
    stages = [content["stages"][0], {"name": "task"} | still, {"name": "prediction"} | still]
    folder, _ = staged(stages=stages)
    assert weights(folder / FOLDERS[0]).keys() == weights(finished[0] / FOLDERS[0]).keys()
    first, second, third = (weights(folder / stage) for stage in FOLDERS)
    name = "layers.0.mlp.up.weight"
    assert torch.equal(first[name], weights(finished[0] / FOLDERS[0])[name])
    assert torch.allclose(second[f"spikelm.{name}"], first[name], atol=1e-9)
    assert torch.allclose(third[f"spikelm.{name}"], first[name], atol=1e-9)
    assert torch.allclose(third["classifier.weight"], second["classifier.weight"], atol=1e-9)


def test_a_stage_may_say_where_it_starts(staged, content):
    still = {"train": {"learning_rate": 1e-12, "max_steps": 1}}
    stages = [content["stages"][0], {"name": "task", "model": {"init_from": "scratch"}} | still]
    folder, _ = staged(stages=stages)
    name = "layers.0.mlp.up.weight"
    fresh, first = weights(folder / "2_task")[f"spikelm.{name}"], weights(folder / "1_general")[name]
    assert not torch.allclose(fresh, first, atol=1e-3)


# ---- resume ----


@pytest.mark.parametrize(
    ("step", "done"),
    [
        pytest.param(1, 0, id="before-anything"),
        pytest.param(6, 0, id="in-the-first-stage"),
        pytest.param(8, 1, id="at-the-start-of-the-second"),
        pytest.param(13, 1, id="in-the-second"),
        pytest.param(17, 2, id="in-the-third"),
    ],
)
def test_resume_goes_on_in_the_right_stage(finished, staged, stop_at, monkeypatch, tmp_path, step, done):
    real, folder = Trainer._step, tmp_path / "run"
    stop_at(step)
    with pytest.raises(stop_at.error):
        staged()
    monkeypatch.setattr(Trainer, "_step", real)
    stamps = [(folder / stage / "summary.json").stat().st_mtime_ns for stage in FOLDERS[:done]]
    assert not any((folder / stage / "summary.json").exists() for stage in FOLDERS[done:])
    assert not (folder / "summary.json").exists()
    torch.manual_seed(321)
    _, summary = staged(resume=True)
    assert [(folder / stage / "summary.json").stat().st_mtime_ns for stage in FOLDERS[:done]] == stamps
    same_files(folder, finished[0])
    assert timeless(summary) == timeless(finished[1])


def test_resuming_a_finished_run_does_nothing(finished, staged, stop_at, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    stop_at(1)
    _, summary = staged(resume=True)
    assert timeless(summary) == timeless(finished[1])
    assert summary["seconds"] == finished[1]["seconds"]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == stamps


def test_a_run_stopped_before_its_model_was_in_place_does_not_keep_an_older_one(finished, staged, stop_at, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    (folder / "summary.json").unlink()
    shutil.copytree(folder / "1_general" / "model", folder / "model", dirs_exist_ok=True)
    stop_at(1)
    staged(resume=True)
    same_files(folder, finished[0])


def test_a_fresh_start_in_an_old_folder_does_every_stage_again(finished, staged, stop_at, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    stop_at(8)
    with pytest.raises(stop_at.error):
        staged()
    assert [(folder / stage / "summary.json").exists() for stage in FOLDERS] == [True, False, False]
    assert not (folder / "3_prediction" / "checkpoints").exists()
    assert not (folder / "summary.json").exists()


def test_a_lost_stage_is_done_again_with_all_after_it(finished, staged, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(folder / "2_task")
    old = (folder / "3_prediction" / "summary.json").stat().st_mtime_ns
    staged(resume=True)
    same_files(folder, finished[0])
    assert (folder / "3_prediction" / "summary.json").stat().st_mtime_ns > old


# ---- mistakes ----


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"objectives": {"forward_kll": 1}},
            RecipeError,
            "stage 'last': .*'forward_kll'.*forward_kl",
        ),
        ({"objectives": {"attention_score_mse": 1}}, RecipeError, "'spikelm' does not give the attention scores"),
        ({"train": {"batch_sise": 1}}, RecipeError, "stage 'last': train.batch_sise: unknown key; .*'batch_size'"),
        ({"model": {"config": {"time_stepps": 1}}}, RecipeError, "time_stepps.*time_steps"),
        ({"model": {"init_from": "no/such"}}, CheckpointError, "no/such"),
        ({"model": {"init_from": "spikelm_mini_158_sst2"}}, RecipeError, "packed for inference"),
        ({"model": 3}, RecipeError, "stage 'last': model"),
        ({"data": {"source": "no/such.tsv"}}, DataError, "no/such.tsv"),
        (
            {"data": {"source": "./nowhere"}},
            DataError,
            r"^stages\.last\.data\.source: \./nowhere: no such file or folder",
        ),
        (
            {"data": {"transfer": {"source": ["test.txt", "~/no"]}}},
            DataError,
            r"^stages\.last\.data\.transfer\.source: test\.txt: no such file",
        ),
        (
            {"data": {"source": "nowhere"}},
            DataError,
            r"^stage 'last', whose texts --set stages\.last\.data\.source changes: 'nowhere' is no local file",
        ),
        (
            {"data": {"text": "txet", "transfer": {"source": "tweets"}}},
            DataError,
            r"--set data\.source or stages\.last\.data\.transfer\.source changes: .*no column 'txet'",
        ),
        ({"data": {"max_length": 65}}, RecipeError, "max_length 65.*64 positions"),
        (
            {"data": {"label": None}, "objectives": {"forward_kl": 1, "hidden_mse": 1}},
            RecipeError,
            "forward_kl cannot be",
        ),
        ({"data": {"source": ["a", "b"]}}, RecipeError, "may be lists only for text without labels"),
        ({"teacher": {"name": "./nowhere"}}, RecipeError, "./nowhere"),
        ({"objectvies": {}}, RecipeError, "key of stage 'last'.* 'objectvies'; did you mean objectives"),
        ({"stages": []}, RecipeError, "stage 'last' holds stages"),
        ({"name": "general"}, RecipeError, "name of its own, .*got 'general'"),
        ({"name": "a/b"}, RecipeError, "'a/b'"),
    ],
)
def test_a_mistake_in_any_stage_is_told_before_the_first_is_trained(content, staged, tmp_path, change, error, message):
    with pytest.raises(error, match=message) as caught:
        staged(stages=[*content["stages"], {"name": "last"} | change])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_missing_path_is_told_before_any_stage_fetches_its_texts(content, staged):
    general = content["stages"][0] | {"data": {"label": None, "source": ["hub/name"]}}
    missing = content["data"] | {"source": "/nowhere"}
    with pytest.raises(DataError, match=r"^data\.source: /nowhere: no such file or folder; check the path\.$"):
        staged(stages=[general, *content["stages"][1:]], data=missing)
    with pytest.raises(
        DataError, match=r"^stage 'general', whose texts --set stages\.general\.data\.source changes: 'hub"
    ):
        staged(stages=[general, *content["stages"][1:]])


def test_a_teacher_without_scores_is_told_before_anything_is_trained(content, staged, tmp_path, monkeypatch):
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertModel

    sizes = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64}
    tokenizer = AutoTokenizer.from_pretrained(content["teacher"]["name"])
    DistilBertModel(DistilBertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr("snlp_zoo.train.student.gives_attention_scores", lambda encoder: True)
    scores = {"objectives": {"attention_score_mse": 1.0}}
    staged_with_bert = {"name": "last"} | scores | {"teacher": {"name": str(tmp_path / "teacher")}}
    with pytest.raises(RecipeError, match=r"attention\.self\.query.*DistilBertModel has none"):
        staged(stages=[*content["stages"], staged_with_bert])
    assert not (tmp_path / "run").exists()


def test_a_stage_goes_on_with_the_projection_of_the_one_before(finished, staged, monkeypatch):
    before = load_file(finished[0] / "1_general" / "model" / "projection.safetensors")
    assert not torch.equal(before["layer.weight"], torch.eye(len(before["layer.weight"])))
    seen = []
    run = Trainer.run

    def watched(self, *args):
        if hasattr(self.distiller.projection, "layer"):
            seen.append({name: tensor.clone() for name, tensor in self.distiller.projection.state_dict().items()})
        return run(self, *args)

    monkeypatch.setattr(Trainer, "run", watched)
    folder, _ = staged()
    after_general = load_file(folder / "1_general" / "model" / "projection.safetensors")
    torch.testing.assert_close(seen[-1], after_general, rtol=0, atol=0)
    assert not (folder / "model" / "projection.safetensors").exists()
