import pytest
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
)

from snlp_zoo import registry
from snlp_zoo.checked import read_yaml
from snlp_zoo.errors import CheckpointError, RecipeError
from snlp_zoo.layers import SpikeLinear
from snlp_zoo.models.configuration import SpikingConfig
from snlp_zoo.models.converted import spike_layers


@pytest.fixture
def saved(tmp_path):
    model = registry.build("spikelm_tiny")
    model.save_pretrained(tmp_path / "run" / "model")
    return model, tmp_path / "run"


def entry_file(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_entries_are_the_files():
    names = registry.list_entries()
    assert names == sorted(path.stem for path in registry.zoo_folder().glob("*.yaml"))
    assert "spikelm_tiny" in names


@pytest.mark.parametrize("name", registry.list_entries())
def test_every_entry_is_valid(name):
    entry = registry.load_entry(name)
    config = registry.build_config(entry.model_type, entry.config)
    assert config.model_type == entry.model_type
    assert entry.task in registry.family(entry.model_type)
    assert entry.source["paper"].startswith("arXiv:")
    assert len((registry.zoo_folder() / f"{name}.yaml").read_text().splitlines()) <= 40
    text = (registry.zoo_folder() / f"{name}.yaml").read_text()
    assert yaml.safe_load(text).keys() <= registry.Entry.model_fields.keys()


def test_an_entry_that_is_converted():
    model = registry.build("spiking_llama_tiny", task="sequence-classification", num_labels=3, hidden_size=16)
    assert type(model) is LlamaForSequenceClassification
    assert (model.config.hidden_size, model.score.out_features, model.training) == (16, 3, False)
    assert len(spike_layers(model)) == 14
    assert model.config.quantization_config.code == "bitwise"
    mixer = registry.build("spiking_mamba_tiny").backbone.layers[0].mixer
    kinds = [type(layer) for layer in (mixer.in_proj, mixer.out_proj, mixer.x_proj, mixer.dt_proj)]
    assert kinds == [SpikeLinear, SpikeLinear, torch.nn.Linear, torch.nn.Linear]


@pytest.mark.parametrize("name", registry.list_entries())
def test_every_family_has_a_tiny_entry(name):
    model_type = registry.load_entry(name).model_type
    tiny = [n for n in registry.list_entries() if n.endswith("_tiny")]
    assert model_type in {registry.load_entry(n).model_type for n in tiny}


def test_every_class_is_found_by_the_auto_classes():
    registry.register()
    registry.register()  # twice is once
    autos = {
        "sequence-classification": AutoModelForSequenceClassification,
        "masked-lm": AutoModelForMaskedLM,
        "causal-lm": AutoModelForCausalLM,
        "encoder": AutoModel,
    }
    for model_type, classes in registry.model_classes().items():
        config = AutoConfig.for_model(model_type)
        assert type(config) is classes["config"]
        assert issubclass(classes["config"], SpikingConfig)
        for task, model_class in classes.items():
            if task != "config":
                with torch.device("meta"):
                    assert type(autos[task].from_config(config)) is model_class


def test_a_class_or_a_model_says_its_task():
    for classes in registry.model_classes().values():
        for task, model_class in classes.items():
            assert task == "config" or registry.task_of(model_class) == task
    assert registry.task_of(registry.build("spikebert_tiny", task="masked-lm")) == "masked-lm"
    assert registry.task_of(BertForSequenceClassification) == "sequence-classification"
    assert registry.task_of(torch.nn.Linear) == "encoder"


def test_build_takes_task_and_overrides():
    model = registry.build("spikelm_tiny", task="masked-lm", time_steps=2, num_hidden_layers=1)
    assert type(model).__name__ == "SpikeLMForMaskedLM"
    assert (model.config.time_steps, model.config.num_hidden_layers) == (2, 1)
    assert not model.training
    assert registry.build("spikelm_tiny", num_labels=5).classifier.out_features == 5


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ("spikelm_tny", {}, "unknown zoo entry 'spikelm_tny'; did you mean spikelm_tiny"),
        ("xyz", {}, "unknown zoo entry 'xyz'; known are .*spikelm_tiny"),
        ("spikelm_tiny", {"task": "masked_lm"}, "unknown task 'masked_lm'; did you mean masked-lm"),
        ("spikelm_tiny", {"task": "config"}, "unknown task 'config'"),
        ("spikelm_tiny", {"fireing_k": 2.0}, "no config field 'fireing_k'; did you mean 'firing_k'"),
        ("spikelm_tiny", {"hidden_size": 33}, "hidden_size 33 must be a multiple of num_attention_heads 2"),
        ("spikelm_tiny", {"vocab_size": 10**9}, "vocab_size must be between 1 and 2000000, got 1000000000"),
        ("spikelm_tiny", {"time_steps": "four"}, "time_steps"),
        ("spikelm_tiny", {"time_steps": 2.5}, "time_steps"),
        ("spikelm_tiny", {"time_steps": True}, "time_steps"),
        ("spiking_llama_tiny", {"hiden_size": 8}, "llama has no config field 'hiden_size'; did you mean 'hidden_size'"),
        ("spiking_llama_tiny", {"hidden_size": "a"}, "hidden_size"),
        ("spiking_llama_tiny", {"task": "masked-lm"}, "unknown task 'masked-lm'"),
    ],
)
def test_build_errors(arguments, options, message):
    with pytest.raises(RecipeError, match=message) as error:
        registry.build(arguments, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_type: spikelm\nconfig: {}\nconfg: {}", "mine.yaml: confg: unknown key; did you mean 'config'"),
        ("model_type: spikelm", "config: Field required"),
        ("model_type: spikelm\nconfig: 3", r"config: .*\(got 3\)"),
        ("model_type: spikelm\nconfig: {}\ntask: translate", "task: .*'sequence-classification'"),
        ("model_type: spikelmm\nconfig: {}", "unknown model_type 'spikelmm'; did you mean spikelm"),
        ("model_type: llama\nconfig: {}", "model_type 'llama' is dense; add 'convert: {}' to make it spike"),
        ("model_type: spikelm\nconfig: {}\nconvert: {}", "model_type 'spikelm' spikes already; leave 'convert' out"),
        ("model_type: lama\nconfig: {}\nconvert: {}", "unknown model_type 'lama'; did you mean llama"),
        ("model_type: llama\nconfig: {}\nconvert: {cod: gif}", "convert: unknown option of to_spiking 'cod'; .* code"),
        ("model_type: llama\nconfig: {}\nconvert: {salient: true}", "convert: unknown option of to_spiking 'salient'"),
        ("model_type: llama\nconfig: {}\nconvert: {max_count: 0}", "convert: max_count must be at least 1"),
        ("model_type: llama\nconfig: {}\nconvert: {max_count: a}", r"convert: max_count: .*integer \(got 'a'\)"),
        (
            "model_type: llama\nconfig: {}\nconvert: {threshold_scale: .nan}",
            "convert: threshold_scale must be positive",
        ),
        ("- a\n- b", "must hold 'key: value' lines at the top, found list"),
        ("", "found NoneType"),
        ("model_type: [", "is not valid YAML"),
        ("model_type: spikelm\nconfig: {tau: 1,\n  tau: 2}", "is not valid YAML: 'tau' stands twice .*line 3"),
        ("model_type: !!python/object/apply:os.getcwd []\nconfig: {}", "is not valid YAML"),
    ],
)
def test_entry_errors(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message) as error:
        registry.load_entry("mine", entry_file(tmp_path, text))
    assert "\n" not in str(error.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot read .*missing\.yaml"):
        read_yaml(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(RecipeError, match=r"binary\.yaml"):
        read_yaml(tmp_path / "binary.yaml")


def test_an_entry_of_ones_own(tmp_path):
    path = entry_file(tmp_path, "model_type: spikelm\ntask: masked-lm\nconfig: {time_steps: 2}\n")
    entry = registry.load_entry("mine", path)
    assert (entry.task, entry.config) == ("masked-lm", {"time_steps": 2})


@pytest.mark.parametrize("folder", ["run", "run/model"])
def test_load_takes_a_run_or_a_model_folder(saved, folder, tmp_path):
    model, _ = saved
    loaded = registry.load(tmp_path / folder)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_load_finds_a_trained_entry(saved, monkeypatch, tmp_path):
    model, run = saved
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    run.rename(tmp_path / "runs" / "spikelm_tiny")
    ids = torch.arange(5, 9)[None]
    assert torch.equal(registry.load("spikelm_tiny")(ids).logits, model(ids).logits)


def test_load_passes_options_on(saved):
    assert next(registry.load(saved[1], dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("spikelm_tiny", "no trained checkpoint in runs/spikelm_tiny; use snlp_zoo.build"),
        ("spikelm_tiny_tweets", "; train it with 'snlp-zoo distill spikelm_tiny_tweets' or use snlp_zoo.build"),
        ("spikelm_tinny", "no folder and no zoo entry called 'spikelm_tinny'; did you mean the zoo entry spikelm_tiny"),
        ("xyz", "no folder and no zoo entry called 'xyz'$"),
        ("empty", "empty is not a saved model: it has no config.json"),
    ],
)
def test_nothing_to_load(monkeypatch, tmp_path, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=message):
        registry.load(name)


def test_foreign_model(tmp_path):
    BertConfig(architectures=["BertModel"]).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds a BertModel, not a model of this zoo"):
        registry.load(tmp_path)


def test_damaged_checkpoints(saved):
    _, run = saved
    weights, config = run / "model" / "model.safetensors", run / "model" / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot load"):
        registry.load(run)
    weights.unlink()
    with pytest.raises(CheckpointError, match="cannot load"):
        registry.load(run)
    weights.write_bytes(whole)
    config.write_text(config.read_text()[:-20])
    with pytest.raises(CheckpointError, match="cannot load"):
        registry.load(run)


def test_pickled_weights_are_refused(saved):
    model, run = saved
    (run / "model" / "model.safetensors").unlink()
    torch.save(model.state_dict(), run / "model" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot load"):
        registry.load(run)


def test_a_folder_without_a_tokenizer(tmp_path):
    registry.build("spikegpt_tiny").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="its files are missing; save the one that"):
        registry.load_tokenizer(tmp_path)


def test_missing_and_misshapen_weights(saved, tmp_path):
    model, _ = saved
    state = model.state_dict()
    state.pop("classifier.weight")
    model.save_pretrained(tmp_path / "short", state_dict=state)
    with pytest.raises(CheckpointError, match=r"weights are missing or misshapen: classifier\.weight"):
        registry.load(tmp_path / "short")
    model.config.num_labels = 7
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="classifier"):
        registry.load(tmp_path / "other")


def test_a_config_from_elsewhere_cannot_ask_for_the_moon(saved):
    _, run = saved
    config = run / "model" / "config.json"
    config.write_text(config.read_text().replace('"time_steps": 4', '"time_steps": 400000000'))
    with pytest.raises(CheckpointError, match="time_steps must be between 1 and 1024"):
        registry.load(run)


def test_what_a_conversion_returns_is_no_option():
    with pytest.raises(RecipeError, match="unknown option of to_spiking 'return'"):
        registry.conversion({"return": None})
