"""One suite for every model: what holds for all of them holds here, parametrised over every tiny zoo entry."""

import copy
import inspect
import json
from collections.abc import Mapping

import pytest
import torch
from spikingjelly.activation_based.neuron import BaseNode
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, PreTrainedTokenizerFast, pipeline

import snlp_zoo  # noqa: F401  (makes the models known to the Auto classes)
from snlp_zoo import registry
from snlp_zoo.errors import RecipeError
from snlp_zoo.layers import ATTENTIONS, ElasticBiSpike, TernaryLIFNode
from snlp_zoo.registry import model_classes

# "<entry>+<name>": an entry with these changes
VARIANTS = {name: {"attention": name} for name in ATTENTIONS if name != "ssa"} | {
    "ternary": {"neuron": "ternary"},
    "learned": {"neuron": "plif", "learnable_surrogate": True},
}
SPIKELM_VARIANTS = {"lif": {"neuron": "lif", "v_threshold": 0.05}}
CAUSAL_VARIANTS = {"driven": {"wiring": "spike_driven", "v_threshold": 0.25}, "dense": {"spiking": False}}


def load_entry(name):
    return registry.load_entry(name.partition("+")[0])


def build(name, **overrides):
    entry, _, variant = name.partition("+")
    return registry.build(entry, **(VARIANTS | SPIKELM_VARIANTS | CAUSAL_VARIANTS).get(variant, {}) | overrides)


ENTRIES = {name: load_entry(name) for name in registry.list_entries() if "_tiny" in name}
TINY = [name for name, entry in ENTRIES.items() if entry.recipe is None and entry.convert is None]
TINY += [f"spikebert_tiny+{variant}" for variant in VARIANTS]
TINY += [f"spikelm_tiny+{variant}" for variant in SPIKELM_VARIANTS]
TINY += [f"spikegpt_tiny+{variant}" for variant in CAUSAL_VARIANTS]
TASKS = [(name, task) for name in TINY for task in model_classes()[load_entry(name).model_type] if task != "config"]
TRAINABLE = [(name, task) for name, task in TASKS if task != "encoder"]
every_task = pytest.mark.parametrize(("entry", "task"), TASKS)
every_trainable = pytest.mark.parametrize(("entry", "task"), TRAINABLE)
every_masked_lm = pytest.mark.parametrize("entry", [name for name, task in TASKS if task == "masked-lm"])
every_entry = pytest.mark.parametrize("entry", TINY)
CAUSAL = {name for name, task in TASKS if task == "causal-lm"}
every_causal = pytest.mark.parametrize("entry", sorted(CAUSAL))
every_encoder = pytest.mark.parametrize("entry", [name for name in TINY if name not in CAUSAL])
every_spiking = pytest.mark.parametrize("entry", [name for name in TINY if not name.endswith("+dense")])
B, N = 3, 9


def make_batch(model, *, batch=B, length=N, padding=(0, 4, 1)):
    ids = torch.randint(5, model.config.vocab_size, (batch, length))
    mask = torch.ones(batch, length, dtype=torch.long)
    for row, pad in enumerate(padding[:batch]):
        mask[row, length - pad :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def labelled(model, task, batch):
    if task in ("masked-lm", "causal-lm"):
        return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    return batch | {"labels": torch.arange(len(batch["input_ids"])) % model.config.num_labels}


def make(entry, task="sequence-classification", **overrides):
    """A model whose amplitudes have seen one training batch, in evaluation mode; what starts at zero has moved."""
    torch.manual_seed(0)
    model = build(entry, task=task, **overrides)
    if entry in CAUSAL:
        awaken(model)
    with torch.no_grad():
        model.train()(**make_batch(model, batch=8, padding=()))
    return model.eval()


def awaken(model):
    """Matrices that are zero before the first step of training, so that nothing fires, get random values."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5)


def result(model, batch):
    """The model's main output: logits, or hidden states of an encoder."""
    with torch.no_grad():
        outputs = model(**batch)
    return outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]


def weights_equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def spiking_nodes(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseNode)}


def enable_checkpointing(model):
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # transformers renamed it
    getattr(model, next(name for name in names if hasattr(model, name)))()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def close(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_there_is_something_to_test():
    assert TINY
    assert {load_entry(name).model_type for name in TINY} == set(model_classes())


@every_task
def test_output_shapes(entry, task):
    model = make(entry, task)
    batch = make_batch(model)
    weighs = not entry.endswith("+sdsa") and entry not in CAUSAL  # sdsa gates values and weighs none
    outputs = model(**batch, output_hidden_states=True, **({"output_attentions": True} if weighs else {}))
    config = model.config
    last = {
        "sequence-classification": (B, config.num_labels),
        "masked-lm": (B, N, config.vocab_size),
        "causal-lm": (B, N, config.vocab_size),
        "encoder": (B, N, config.hidden_size),
    }[task]
    assert result(model, batch).shape == last
    assert len(outputs.hidden_states) == config.num_hidden_layers + 1
    assert {tuple(state.shape) for state in outputs.hidden_states} == {(B, N, config.hidden_size)}
    if weighs:
        assert {tuple(a.shape) for a in outputs.attentions} == {(B, config.num_attention_heads, N, N)}
    elif entry in CAUSAL:
        assert outputs.attentions is None
    else:
        with pytest.raises(ValueError, match="has no attention weights"):
            model(**batch, output_attentions=True)
    if task == "encoder":
        assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)


@every_task
def test_outputs_are_optional_and_come_as_tuples_too(entry, task):
    model = make(entry, task)
    batch = make_batch(model)
    outputs = model(**batch)
    assert outputs.hidden_states is outputs.attentions is outputs.spike_rates is outputs.firing_rate is None
    assert torch.equal(model(**batch, return_dict=False)[0], outputs[0])
    model.config.output_hidden_states = True
    model.config.output_spike_rates = True
    assert model(**batch).hidden_states is not None
    assert model(**batch).spike_rates is not None
    assert model(**batch, output_hidden_states=False, output_spike_rates=False).spike_rates is None


@every_spiking
@pytest.mark.parametrize("training", [False, True])
def test_spikes_stay_in_their_alphabet(entry, training):
    model = make(entry).train(training)
    seen = {}
    for name, node in spiking_nodes(model).items():
        node.register_forward_hook(lambda module, _, spikes, name=name: seen.update({name: (module, spikes)}))
    model(**make_batch(model))
    assert seen.keys() == spiking_nodes(model).keys()
    for name, (node, spikes) in seen.items():
        for t, values in enumerate(spikes):
            alphabet = {0.0, 1.0}
            if isinstance(node, ElasticBiSpike | TernaryLIFNode):
                amplitude = (node.alpha[t] if isinstance(node, ElasticBiSpike) else node.amplitude).item()
                alphabet = {-amplitude, 0.0, amplitude}
            assert set(values.unique().tolist()) <= alphabet, name
        assert spikes.any(), f"{name} is silent"


@every_trainable
def test_every_parameter_gets_a_gradient(entry, task):
    model = make(entry, task).train()
    model(**labelled(model, task, make_batch(model))).loss.backward()
    for name, parameter in model.named_parameters():
        if task == "masked-lm" and ".pooler." in name:
            continue  # predicts tokens, not sequences
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@every_task
def test_two_forwards_are_equal(entry, task):
    model = make(entry, task)
    batch = make_batch(model)
    assert torch.equal(result(model, batch), result(model, batch))


@every_task
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(entry, task, side):
    model = make(entry, task)
    batch = make_batch(model, batch=2, padding=())
    padding = torch.zeros(2, 5, dtype=torch.long)
    padded = {k: torch.cat([padding, v] if side == "left" else [v, padding], 1) for k, v in batch.items()}
    padded["input_ids"][padded["attention_mask"] == 0] = 7  # whatever stands there
    got, expected = result(model, padded), result(model, batch)
    if task != "sequence-classification":
        got = got[:, 5:] if side == "left" else got[:, :-5]
    close(got, expected)


@every_task
def test_batch_companions_change_nothing(entry, task):
    model = make(entry, task)
    batch = make_batch(model, padding=())
    together = result(model, batch)
    for row in range(B):
        close(together[row : row + 1], result(model, {key: value[row : row + 1] for key, value in batch.items()}))


@every_task
def test_missing_mask_means_no_padding(entry, task):
    model = make(entry, task)
    batch = make_batch(model, padding=())
    assert torch.equal(result(model, {"input_ids": batch["input_ids"]}), result(model, batch))


@every_task
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_a_mask_of_another_dtype_means_the_same(entry, task, dtype):
    model = make(entry, task)
    batch = make_batch(model)
    expected = result(model, batch)
    assert torch.equal(result(model, batch | {"attention_mask": batch["attention_mask"].to(dtype)}), expected)


@every_entry
def test_embeddings_in_place_of_ids(entry):
    model = make(entry)
    batch = make_batch(model)
    embeds = {
        "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]),
        "attention_mask": batch["attention_mask"],
    }
    close(result(model, embeds), result(model, batch))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(**batch, inputs_embeds=embeds["inputs_embeds"])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


@every_encoder
def test_too_many_tokens_say_what_to_do(entry):
    model = make(entry)
    with pytest.raises(ValueError, match="truncation=True"):
        model(torch.ones(1, model.config.max_position_embeddings + 1, dtype=torch.long))


@every_entry
def test_input_errors_say_what_to_do(entry):
    model, ids = make(entry), torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, N\] = \(1, 4\), got \(1, 3\)"):
        model(ids, attention_mask=ids[:, :3])
    with pytest.raises(ValueError, match=r"input_ids are \[B, N\], inputs_embeds \[B, N, D\]; got shape \(4,\)"):
        model(ids[0])
    with pytest.raises(ValueError, match=r"there are no tokens to read, the input's shape is \(1, 0\)") as caught:
        model(ids[:, :0])
    assert ("after a cache" in str(caught.value)) == (entry in CAUSAL)
    for wrong in (-1, model.config.vocab_size):
        with pytest.raises(ValueError, match=f"token id {wrong} is not in the vocabulary of {model.config.vocab_size}"):
            model(ids * wrong)


@every_task
def test_saved_and_loaded_through_the_auto_class(entry, task, tmp_path):
    model = make(entry, task)
    batch = make_batch(model)
    model.save_pretrained(tmp_path)
    auto = registry.TASKS[task][1]
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert weights_equal(loaded, model)
    assert torch.equal(result(loaded, batch), result(model, batch))
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    saved, again = (m.config.to_dict() | {"_name_or_path": ""} for m in (model, loaded))
    assert again == saved


@every_task
def test_sharded_checkpoint(entry, task, tmp_path):
    model = make(entry, task)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert weights_equal(type(model).from_pretrained(tmp_path), model)


@every_task
def test_bf16_checkpoint(entry, task, tmp_path):
    model = make(entry, task)
    batch = make_batch(model)
    model.save_pretrained(tmp_path / "wide")
    model.bfloat16().save_pretrained(tmp_path / "narrow")
    expected = result(model, batch)
    assert expected.dtype == torch.bfloat16
    for folder in ("wide", "narrow"):
        loaded = type(model).from_pretrained(tmp_path / folder, dtype=torch.bfloat16)
        assert torch.equal(result(loaded, batch), expected)
    assert next(type(model).from_pretrained(tmp_path / "narrow").parameters()).dtype == torch.bfloat16


@every_task
def test_loading_reinitialises_nothing(entry, task, tmp_path):
    torch.manual_seed(0)
    model = build(entry, task=task)
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert {kind: list(keys) for kind, keys in report.items() if keys} == {}
    assert weights_equal(loaded, model)


@every_entry
def test_head_and_encoder_exchange_weights(entry, tmp_path):
    classes = model_classes()[load_entry(entry).model_type]
    head = make(entry)
    head.save_pretrained(tmp_path / "head")
    encoder = classes["encoder"].from_pretrained(tmp_path / "head")
    assert weights_equal(encoder, head.base_model)
    encoder.save_pretrained(tmp_path / "encoder")
    assert weights_equal(classes["sequence-classification"].from_pretrained(tmp_path / "encoder").base_model, encoder)


@every_masked_lm
def test_embeddings_are_tied_resized_and_saved(entry, tmp_path):
    model = make(entry, "masked-lm")
    batch = make_batch(model)
    before = result(model, batch)

    def tied(model):
        return model.get_output_embeddings().weight is model.get_input_embeddings().weight

    assert tied(model)
    vocab_size = model.config.vocab_size
    model.resize_token_embeddings(vocab_size + 6)
    assert tied(model)
    assert model.config.vocab_size == vocab_size + 6
    after = result(model, batch)
    assert after.shape[-1] == vocab_size + 6
    close(after[..., :vocab_size], before)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert tied(loaded)
    assert torch.equal(result(loaded, batch), after)


@every_trainable
def test_activation_checkpointing_changes_no_gradient_and_no_state(entry, task):
    plain = make(entry, task).train()
    checkpointed = copy.deepcopy(plain)
    enable_checkpointing(checkpointed)
    for _ in range(2):
        batch = labelled(plain, task, make_batch(plain))
        for model in (plain, checkpointed):
            model.zero_grad()
            torch.manual_seed(1)  # of what draws
            model(**batch).loss.backward()
        for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
            torch.testing.assert_close(other.grad, one.grad, msg=lambda m, name=name: f"{name}: {m}")
        assert weights_equal(plain, checkpointed)


@every_entry
def test_activation_checkpointing_of_a_fresh_model(entry):
    torch.manual_seed(0)
    plain = build(entry, task="sequence-classification").train()
    checkpointed = copy.deepcopy(plain)
    enable_checkpointing(checkpointed)
    batch = labelled(plain, "sequence-classification", make_batch(plain))
    grads = []
    for model in (plain, checkpointed):
        torch.manual_seed(1)  # of what draws
        grads.append(torch.autograd.grad(model(**batch).loss, list(model.parameters())))
    torch.testing.assert_close(grads[1], grads[0])
    assert weights_equal(plain, checkpointed)


@every_entry
def test_compiles(entry):
    model = make(entry, num_hidden_layers=1, **({} if entry in CAUSAL else {"time_steps": 2}))
    batch = make_batch(model)
    try:
        close(result(torch.compile(model, backend="aot_eager"), batch), result(model, batch))
    finally:
        torch._dynamo.reset()


@every_entry
def test_compiles_as_one_graph(entry):
    model = make(entry, num_hidden_layers=1, **({} if entry in CAUSAL else {"time_steps": 2}))
    ids = make_batch(model)["input_ids"]
    try:
        with torch.no_grad():
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            close(result(compiled, {"input_ids": ids}), result(model, {"input_ids": ids}))
    finally:
        torch._dynamo.reset()


@every_entry
def test_pipeline(entry, tmp_path):
    model = make(entry)
    model.config.id2label, model.config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    model.save_pretrained(tmp_path)
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "fine", "film", "dull"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))  # noqa: S106
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * (entry not in CAUSAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", model_input_names=names)  # noqa: S106
    tokenizer.save_pretrained(tmp_path)
    classify = pipeline("text-classification", model=str(tmp_path), device="cpu")
    texts = ["a fine film", "dull"]
    got = classify(texts, batch_size=2)
    for text, answer in zip(texts, got, strict=True):
        ids = torch.tensor([[1, *(words.index(word) for word in text.split()), 2]])
        probabilities = result(model, {"input_ids": ids}).softmax(-1)[0]
        assert answer["label"] == ["bad", "good"][probabilities.argmax()]
        assert answer["score"] == pytest.approx(probabilities.max().item(), abs=1e-5)


@every_encoder
def test_time_steps_are_bounded(entry):
    with pytest.raises(RecipeError, match="has no config field 'time_stepz'; did you mean 'time_steps'"):
        build(entry, time_stepz=2)
    with pytest.raises(RecipeError, match="time_steps must be between 1 and"):
        build(entry, time_steps=0)


@every_entry
def test_unknown_config_key_is_an_error(entry):
    with pytest.raises(RecipeError, match="has no config field 'hidden_sise'; did you mean 'hidden_size'"):
        build(entry, hidden_sise=2)
    with pytest.raises(RecipeError, match="hidden_size"):
        build(entry, hidden_size="wide")


@every_spiking
def test_spike_rates_are_shares_of_real_tokens(entry):
    model = make(entry)
    batch = make_batch(model, batch=1, padding=())
    rates = {}
    for pad in (0, 6):
        padded = {key: torch.cat([value, value.new_zeros(1, pad)], 1) for key, value in batch.items()}
        outputs = model(**padded, output_spike_rates=True)
        rates[pad] = outputs.spike_rates | {"mean": outputs.firing_rate}
    assert isinstance(outputs.spike_rates, Mapping)
    assert set(outputs.spike_rates) == set(spiking_nodes(model.base_model))
    for name, rate in rates[0].items():
        assert 0 <= rate.min() <= rate.max() <= 1
        close(rates[6][name], rate)
    assert {len(rate) for rate in outputs.spike_rates.values()} == {model.config.time_steps}
    assert 0 < outputs.firing_rate < 1


@every_trainable
def test_one_step_of_training_lowers_the_loss(entry, task):
    model = make(entry, task)
    batch = labelled(model, task, make_batch(model))
    before = model(**batch).loss
    before.backward()
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    assert model(**batch).loss < before


@every_entry
@pytest.mark.parametrize(
    "overrides", [{"time_steps": 1}, {"num_hidden_layers": 1}, {"num_labels": 1}, {"num_labels": 3}]
)
def test_small_variants(entry, overrides):
    if entry in CAUSAL and "time_steps" in overrides:
        with pytest.raises(RecipeError, match="has no config field 'time_steps'"):
            build(entry, **overrides)
        return
    model = make(entry, **overrides).train()
    batch = make_batch(model)
    labels = torch.rand(B) if model.config.num_labels == 1 else torch.arange(B) % model.config.num_labels
    outputs = model(**batch, labels=labels)
    assert outputs.logits.shape == (B, model.config.num_labels)
    outputs.loss.backward()
    assert outputs.loss.isfinite()


@every_task
def test_a_single_token(entry, task):
    model = make(entry, task)
    assert result(model, make_batch(model, batch=1, length=1, padding=())).isfinite().all()


@pytest.mark.parametrize(("entry", "task"), [pair for pair in TASKS if pair[0] not in CAUSAL])
def test_longest_sequence(entry, task):
    model = make(entry, task)
    length = model.config.max_position_embeddings
    assert result(model, make_batch(model, batch=1, length=length, padding=())).isfinite().all()


@every_task
def test_an_all_padding_row_does_no_harm(entry, task):
    model = make(entry, task)
    batch = make_batch(model, padding=())
    expected = result(model, batch)
    batch["attention_mask"][2] = 0
    got = result(model, batch)
    assert got.isfinite().all()
    close(got[:2], expected[:2])


@every_task
def test_initialisation_follows_the_seed(entry, task):
    built = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        built.append(build(entry, task=task))
    assert weights_equal(built[0], built[1])
    assert not weights_equal(built[0], built[2])


@every_task
def test_pickles_and_copies(entry, task):
    model = make(entry, task)
    batch = make_batch(model)
    assert torch.equal(result(copy.deepcopy(model), batch), result(model, batch))


@every_task
def test_forward_names_every_argument(entry, task):
    model = build(entry, task=task)
    kinds = {p.kind for p in inspect.signature(type(model).forward).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds  # a typo must not be swallowed
    with pytest.raises(TypeError, match="attention_maks"):
        model(**make_batch(model) | {"attention_maks": 1})


@every_causal
def test_the_future_is_not_seen(entry):
    model = make(entry, "causal-lm").double()
    ids = make_batch(model, padding=())["input_ids"]
    whole = result(model, {"input_ids": ids})
    for length in (1, N // 2, N - 1):
        close(result(model, {"input_ids": ids[:, :length]}), whole[:, :length])
        other = ids.clone()
        other[:, length:] = (ids[:, length:] + 1) % model.config.vocab_size
        changed = result(model, {"input_ids": other})
        close(changed[:, :length], whole[:, :length])
        assert not torch.allclose(changed[:, length:], whole[:, length:])


@every_causal
@pytest.mark.parametrize("side", ["left", "right", "within"])
def test_padding_freezes_the_state(entry, side):
    """Outputs and state of a padded batch are those of its texts alone, also when it is read in two pieces."""
    model = make(entry, "causal-lm").double()
    ids = make_batch(model, padding=())["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, {"left": slice(0, 4), "right": slice(5, N), "within": slice(2, 6)}[side]] = 0
    mask[2, {"left": slice(0, 1), "right": slice(8, N), "within": slice(4, 5)}[side]] = 0
    whole = model(ids, attention_mask=mask)
    first = model(ids[:, :5], attention_mask=mask[:, :5])
    second = model(ids[:, 5:], attention_mask=mask, past_key_values=first.past_key_values)
    for row in range(B):
        real = mask[row] == 1
        alone = model(ids[row : row + 1, real])
        close(whole.logits[row, real], alone.logits[0])
        close(torch.cat([first.logits, second.logits], 1)[row, real], alone.logits[0])
        for state, again, single in zip(
            *(output.past_key_values.states for output in (whole, second, alone)), strict=True
        ):
            for name, expected in single.items():
                close(state[name][row], expected[0])
                close(again[name][row], expected[0])


@every_causal
def test_padding_predicts_nothing(entry):
    model = make(entry, "causal-lm").double()
    ids = make_batch(model, padding=())["input_ids"]
    padding = torch.full((B, 4), 7)
    for sides in ([padding, ids], [ids, padding], [padding, ids, padding]):
        padded = torch.cat(sides, 1)
        mask = torch.cat([torch.full_like(part, part is ids) for part in sides], 1)
        loss = model(padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100)).loss
        torch.testing.assert_close(loss, model(ids, labels=ids).loss)


@every_causal
def test_logits_of_the_last_tokens(entry):
    model = make(entry, "causal-lm")
    ids = make_batch(model, padding=())["input_ids"]
    close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])
    for options in ({"logits_to_keep": -1}, {"logits_to_keep": 2, "labels": ids}):
        with pytest.raises(ValueError, match="logits_to_keep must be at least 0, and 0 with labels, got"):
            model(ids, **options)


@every_causal
def test_no_state_outlives_a_training_forward(entry):
    model = make(entry, "causal-lm").train()
    batch = make_batch(model)
    assert model(**batch).past_key_values is None
    assert model(**batch, use_cache=True).past_key_values is not None
    assert model.eval()(**batch).past_key_values is not None
    assert model(**batch, use_cache=False).past_key_values is None
