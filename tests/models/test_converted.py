"""Models of transformers whose linear layers spike: what they compute, and that they stay models of transformers."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, PreTrainedTokenizerFast, pipeline
from transformers.models.mamba import modeling_mamba

import snlp_zoo
from snlp_zoo.convert import to_spiking
from snlp_zoo.errors import CheckpointError, ConversionError
from snlp_zoo.layers import SpikeLinear, pack
from snlp_zoo.models.converted import (
    SpikingConversionConfig,
    is_converted,
    set_mode,
    set_window,
    spike_layers,
    target_layers,
)

VOCABULARY = 99
_BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = _BERT | {"num_key_value_heads": 2}
_SEQ2SEQ = {"d_model": 32, "decoder_start_token_id": 1}
_BART = {f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in
         {"ffn_dim": 48, "layers": 1, "attention_heads": 4}.items()}  # fmt: skip
MODELS = {  # class, sizes, Auto class, how many layers are converted
    "llama": ("LlamaForCausalLM", _LLAMA | {"tie_word_embeddings": True}, "AutoModelForCausalLM", 14),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4}, "AutoModelForCausalLM", 8),
    "qwen2": ("Qwen2ForCausalLM", _LLAMA, "AutoModelForCausalLM", 14),  # its q, k and v have biases
    "mamba": ("MambaForCausalLM", {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}, "AutoModelForCausalLM",
              4),
    "bert": ("BertForMaskedLM", _BERT, "AutoModelForMaskedLM", 12),
    "classifier": ("BertForSequenceClassification", _BERT, "AutoModelForSequenceClassification", 13),
    "t5": ("T5ForConditionalGeneration", _SEQ2SEQ | {"d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
           "AutoModelForSeq2SeqLM", 16),
    "bart": ("BartForConditionalGeneration", _SEQ2SEQ | _BART, "AutoModelForSeq2SeqLM", 16),
}  # fmt: skip
DECODERS = ("llama", "gpt2", "qwen2")
GENERATING = (*DECODERS, "t5", "bart")


def dense(name, dtype=torch.float64):
    """A random model in evaluation, with weights so large that its tokens matter."""
    kind, sizes, _, _ = MODELS[name]
    model_class = getattr(transformers, kind)
    config = model_class.config_class(
        vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=None, pad_token_id=0, initializer_range=0.1, **sizes
    )
    torch.manual_seed(1)
    return model_class(config).to(dtype).eval()


def converted(name, dtype=torch.float64, **options):
    return to_spiking(dense(name, dtype), **options)


def token_ids(*shape):
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model, ids=None, **inputs):
    ids = token_ids(2, 9) if ids is None else ids
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :5]
    return model(input_ids=ids, **inputs).logits


def distance(model, other):
    return ((logits(model) - logits(other)).norm() / logits(other).norm()).item()


def auto_class(name):
    return getattr(transformers, MODELS[name][2])


# ---- what is converted, and how near it is --------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "error"), [(1, 0.29), (3, 0.087), (15, 0.016)])
def test_errors_of_a_random_llama(scale, error):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=199,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 199, (4, 32))
    expected = logits(model, ids)
    found = logits(to_spiking(model, threshold_scale=scale), ids)
    assert ((found - expected).norm() / expected.norm()).item() == pytest.approx(error, rel=0.2)


@pytest.mark.parametrize("name", MODELS)
def test_many_spikes_reproduce_the_dense_model(name):
    model = dense(name)
    assert distance(to_spiking(copy.deepcopy(model), threshold_scale=3000, max_count=10**7), model) < 1e-3
    assert 1e-3 < distance(to_spiking(copy.deepcopy(model)), model) < 0.6


@pytest.mark.parametrize("name", MODELS)
def test_layers_outside_the_base_model_stay_and_nothing_else_changes(name):
    model = dense(name)
    before = model.state_dict()
    spiking = to_spiking(copy.deepcopy(model))
    layers = spike_layers(spiking)
    assert len(layers) == MODELS[name][3]
    assert not any("head" in layer or layer in ("cls", "classifier") for layer in layers)
    after = spiking.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert type(spiking) is type(model)


@pytest.mark.parametrize("name", MODELS)
def test_modes_are_equal(name):
    for options in ({"code": "twos_complement"}, {"code": "gif", "max_count": 5}, {"symmetric": False}):
        model = converted(name, **options)
        counted = logits(model)
        set_mode(model, "spikes")
        assert torch.equal(logits(model), counted)


def test_tied_embeddings_stay_tied_and_are_written_once(tmp_path):
    model = converted("llama", torch.float32)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  (no mapping)
    for tied in (model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert tied.lm_head.weight.data_ptr() == tied.model.embed_tokens.weight.data_ptr()
        assert not isinstance(tied.lm_head, SpikeLinear)


def test_a_tied_head_keeps_its_bits(tmp_path):
    everything = converted("llama", targets="all")
    assert everything.lm_head.weight is everything.model.embed_tokens.weight
    dense("llama", torch.float32).save_pretrained(tmp_path)
    for convert in (
        lambda: converted("llama", targets="all", weight_bits=8),
        lambda: auto_class("llama").from_pretrained(
            tmp_path, quantization_config=SpikingConversionConfig(targets="all", weight_bits=8)
        ),
    ):
        with pytest.raises(ConversionError, match="shares the embeddings' weight, which has no 8 bits"):
            convert()
    assert is_converted(converted("qwen2", targets="all", weight_bits=8).lm_head)


def test_a_configuration_that_is_shared_belongs_to_the_other_model_still():
    model = dense("llama")
    other = transformers.LlamaForCausalLM(model.config)
    to_spiking(model)
    assert getattr(other.config, "quantization_config", None) is None
    assert model.config is model.model.config is model.model.layers[0].self_attn.config
    twin = copy.deepcopy(model)
    twin.config = model.config
    set_window(model, 3)
    assert twin.config.quantization_config.max_count is None


# ---- generation -----------------------------------------------------------------------------------------------------


def generated(model, ids=None, **options):
    ids = token_ids(2, 6) if ids is None else ids
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True} | options
    return model.generate(ids, attention_mask=(ids != 0).long(), output_logits=True, **options)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", GENERATING)
def test_generation_with_a_cache_is_generation_without(name, beams):
    model = converted(name)
    with_cache, without = (generated(model, use_cache=cache, num_beams=beams) for cache in (True, False))
    assert torch.equal(with_cache.sequences, without.sequences)
    for one, other in zip(with_cache.logits, without.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [*DECODERS, "mamba"])
def test_left_padded_batches_are_their_singles(name):
    model = converted(name)
    ids = token_ids(2, 6)
    ids[1, :3] = 0
    batch = generated(model, ids)
    for row, single in enumerate((ids[:1], ids[1:, 3:])):
        alone = generated(model, single)
        assert torch.equal(batch.sequences[row, 6:], alone.sequences[0, single.shape[1] :])
        torch.testing.assert_close(batch.logits[0][row], alone.logits[0][0], rtol=1e-6, atol=1e-6)


def test_padding_and_companions_change_nothing_in_an_encoder():
    model = converted("classifier")
    ids = token_ids(3, 7)
    padded = torch.cat([ids, torch.zeros(3, 4, dtype=torch.long)], 1)
    alone = torch.cat([logits(model, row[None]) for row in ids])
    torch.testing.assert_close(logits(model, padded, attention_mask=(padded != 0).long()), alone, rtol=1e-9, atol=1e-9)


def tokenizer():
    words = {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))  # noqa: S106  (no password)
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special, return_token_type_ids=False)


@pytest.mark.parametrize(
    ("task", "name", "text"),
    [
        ("text-generation", "llama", "w3 w4 w5"),
        ("text-generation", "mamba", "w3 w4 w5"),
        ("fill-mask", "bert", "w3 [MASK] w5"),
        ("text-classification", "classifier", "w3 w4 w5"),
    ],
)
def test_pipelines(task, name, text, tmp_path):
    model = converted(name, torch.float32)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    options = {"max_new_tokens": 4, "do_sample": False} if task == "text-generation" else {}
    loaded = pipeline(task, model=str(tmp_path))
    assert is_converted(loaded.model)
    here = pipeline(task, model=model, tokenizer=tokenizer())
    assert loaded(text, **options) == here(text, **options)


# ---- saving and loading ---------------------------------------------------------------------------------------------

STORED = {
    "plain": {},
    "int8": {"weight_bits": 8},
    "options": {"code": "gif", "levels": 3, "symmetric": False, "max_count": 9, "threshold_scale": 2.5},
    "int8 in integers": {"weight_bits": 8, "max_count": 100},
    "ternary": {"weight_bits": 1.58},
    "signs": {"weight_bits": 1},
}


@pytest.fixture
def no_network(monkeypatch):
    def connect(*_):
        raise AssertionError("the network was reached for")

    monkeypatch.setattr("socket.socket.connect", connect)


@pytest.mark.parametrize(
    ("name", "stored"),
    [(name, stored) for name in MODELS for stored in ("plain", "int8")]
    + [(name, stored) for name in ("llama", "gpt2") for stored in list(STORED)[2:]]
    + [("bart", "options")],
)
def test_saved_and_loaded(name, stored, tmp_path, no_network):
    options = STORED[stored]
    dense(name, torch.float32).save_pretrained(tmp_path / "dense")
    model = converted(name, torch.float32, **options)
    expected = logits(model)
    model.save_pretrained(tmp_path / "spiking", max_shard_size="20KB")
    assert (tmp_path / "spiking" / "model.safetensors.index.json").is_file()
    loaded, info = auto_class(name).from_pretrained(tmp_path / "spiking", output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is type(model)
    assert str(loaded) == str(model)
    assert torch.equal(logits(loaded), expected)
    on_the_way = auto_class(name).from_pretrained(
        tmp_path / "dense", quantization_config=SpikingConversionConfig(**options)
    )
    assert torch.equal(logits(on_the_way), expected)
    on_the_way.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(auto_class(name).from_pretrained(tmp_path / "again")), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mamba"])
def test_packed_models(name, tmp_path):
    model = converted(name, torch.float32, weight_bits=1.58)
    unpacked = logits(model)
    expected = logits(pack(model))
    torch.testing.assert_close(expected, unpacked, rtol=1e-2, atol=1e-2)
    model.save_pretrained(tmp_path)
    held = json.loads((tmp_path / "config.json").read_text())
    assert held["quantization_config"]["packed"]
    assert "packed" not in held
    loaded = auto_class(name).from_pretrained(tmp_path)
    assert all(layer.packed for layer in spike_layers(loaded).values())
    assert torch.equal(logits(loaded), expected)
    with pytest.raises(ValueError, match="converted and keeps its embeddings"):
        pack(converted("llama", weight_bits=1), int8_embeddings=True)
    with pytest.raises(ValueError, match="no low-bit layers"):
        pack(converted("llama", weight_bits=8))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models(dtype, bits, tmp_path):
    converted("llama", torch.float32, weight_bits=bits).save_pretrained(tmp_path / "wide")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=dtype)
    layer = model.model.layers[0].mlp.up_proj
    assert model.lm_head.weight.dtype == dtype
    assert (layer.weight_scale.dtype == torch.float32) if bits == 8 else (layer.weight.dtype == dtype)
    assert logits(model).dtype == dtype
    model.save_pretrained(tmp_path / "narrow")
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "narrow")), logits(model))
    assert logits(model.float()).dtype == torch.float32


def test_salient_channels_are_saved(tmp_path):
    config = SpikingConversionConfig(salient=True)
    model = dense("gpt2", torch.float32)
    dense_logits = logits(model)
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ConversionError, match="salient channels are found by calibration"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    model = to_spiking(model)
    plain = logits(model)
    model.config.quantization_config = config
    for layer in spike_layers(model).values():
        layer.mark_salient(torch.ones(layer.in_features, dtype=torch.bool), 4)
    finer = logits(model)
    assert (finer - dense_logits).norm() < 0.2 * (plain - dense_logits).norm()
    model.save_pretrained(tmp_path / "spiking")
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "spiking")), finer)


@pytest.mark.parametrize("targets", ["all-but-head", "all", ["model.layers.0.*", "*.q_proj"]])
def test_a_base_model_of_a_causal_checkpoint(targets, tmp_path):
    model = converted("llama", torch.float32, targets=targets)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert str(base) == str(model.model)
    with torch.no_grad():
        ids = token_ids(2, 5)
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("bits", [32, 8])
def test_layers_on_disk(bits, tmp_path):
    model = converted("llama", torch.float32, weight_bits=bits)
    expected = logits(model)
    model.save_pretrained(tmp_path / "model")
    load = transformers.AutoModelForCausalLM.from_pretrained
    assert torch.equal(logits(load(tmp_path / "model", device_map="auto")), expected)
    places = {"model.layers.1": "disk"} | dict.fromkeys(
        ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    )
    spread = load(tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk", offload_buffers=True)
    layer = spread.model.layers[1].mlp.up_proj
    assert (layer.weight_int8 if bits == 8 else layer.weight).is_meta
    assert torch.equal(logits(spread), expected)
    if bits == 32:
        dense("llama", torch.float32).save_pretrained(tmp_path / "dense")
        spread = load(tmp_path / "dense", device_map=places, offload_folder=tmp_path / "disk")
        with pytest.raises(ConversionError, match="spread over devices already; convert it before"):
            to_spiking(spread)


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_a_step_lowers_the_loss(name):
    model, ids = converted(name, torch.float32, max_count=3).train(), token_ids(4, 12)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(layer.weight.grad.abs().sum() > 0 for layer in spike_layers(model).values())


def test_activation_checkpointing_gives_equal_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = converted("llama", max_count=3).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        ids = token_ids(2, 6)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_compiled_models_are_the_same():
    torch.compiler.reset()
    model = converted("llama")
    torch.testing.assert_close(logits(torch.compile(model, backend="aot_eager")), logits(model))


# ---- changes after conversion ---------------------------------------------------------------------------------------


def test_what_is_set_is_what_is_saved(tmp_path):
    model = converted("llama", torch.float32)
    set_window(model, max_count=3, threshold_scale=1.4)
    layers = spike_layers(model).values()
    assert {(layer.max_count, layer.threshold_scale) for layer in layers} == {(3, 1.4)}
    set_window(model, max_count=1)
    set_mode(model, "spikes")
    assert {(layer.max_count, layer.threshold_scale, layer.mode) for layer in layers} == {(1, 1.4, "spikes")}
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert str(loaded) == str(model)
    assert {layer.mode for layer in spike_layers(loaded).values()} == {"spikes"}
    assert torch.equal(logits(loaded), logits(model))
    set_window(loaded, None)  # a model that was loaded has its configuration too
    assert loaded.config.quantization_config.max_count is None
    inside = torch.nn.Sequential(SpikeLinear(4, 4), torch.nn.Linear(4, 4))
    set_window(inside, 7)
    assert inside[0].max_count == 7


def test_settings_are_checked_before_anything_changes():
    model = converted("llama")
    for call, message in (
        (lambda: set_mode(model, "both"), "unknown mode 'both', known are count, spikes"),
        (lambda: set_window(model, 0), "max_count must be at least 1"),
        (lambda: set_window(model, 3, -1), r"threshold_scale must be positive, got -1\.0"),
        (lambda: set_mode(dense("llama"), "spikes"), "LlamaForCausalLM has no SpikeLinear; convert it first"),
        (lambda: set_window(torch.nn.Linear(2, 2), 3), "Linear has no SpikeLinear"),
    ):
        with pytest.raises(ConversionError, match=message):
            call()
    assert {(layer.mode, layer.max_count, layer.threshold_scale) for layer in spike_layers(model).values()} == {
        ("count", None, 3.0)
    }


# ---- Mamba ----------------------------------------------------------------------------------------------------------


def test_mamba_layers():
    kinds = {name.rpartition(".")[2] for name in spike_layers(converted("mamba"))}
    assert kinds == {"in_proj", "out_proj"}
    everything = {name.rpartition(".")[2] for name in target_layers(dense("mamba"), "all")}
    assert everything == {"in_proj", "out_proj", "x_proj", "lm_head"}  # of dt_proj only the weight is used


def test_counts_are_rounded_not_floored():
    layer = SpikeLinear(6, 1, threshold_scale=1.0, max_count=2, code="ternary").double()
    x = torch.tensor([[0.6, -0.6, 0.4, 1.6, -1.7, 1.1]], dtype=torch.float64)  # mean |x| is 1
    counts = layer.spiked(x).counts
    assert torch.equal(counts, x.round().clamp(-2, 2))
    assert torch.equal(sum(spikes for _, spikes in layer.spike_trains(counts)), counts)


def test_mamba_steps_are_the_full_forward():
    model, ids = converted("mamba"), token_ids(2, 10)
    full = logits(model, ids)
    with torch.no_grad():
        out = model(ids[:, :4], use_cache=True)
        steps = [out.logits[:, -1]]
        for position in range(4, 10):
            out = model(ids[:, position : position + 1], cache_params=out.cache_params, use_cache=True)
            steps.append(out.logits[:, -1])
    torch.testing.assert_close(torch.stack(steps, 1), full[:, 3:], rtol=1e-4, atol=1e-4)  # norms and scan: float32
    assert torch.equal(generated(model).sequences, generated(model, use_cache=False).sequences)


@pytest.mark.parametrize("how", ["converted", "copied", "pickled", "loaded"])
def test_a_cached_mamba_refuses_several_tokens(how, tmp_path):
    model = converted("mamba", torch.float32)
    if how == "copied":
        model = copy.deepcopy(model)
    elif how == "pickled":
        model = pickle.loads(pickle.dumps(model))  # noqa: S301  (its own)
    elif how == "loaded":
        model.save_pretrained(tmp_path)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = token_ids(1, 4)
    with torch.no_grad():
        cache = model(ids, use_cache=True).cache_params
        with pytest.raises(ValueError, match="one token at a time, got 4"):
            model(ids, cache_params=cache, use_cache=True)


def test_a_fused_kernel_does_not_pass_by_the_neurons(monkeypatch):
    def fused(*_, **__):
        raise AssertionError("out_proj was not called")

    monkeypatch.setattr(modeling_mamba, "mamba_inner_fn", fused)
    with pytest.raises(AssertionError, match="out_proj was not called"):  # what a dense model does
        dense("mamba").train()(token_ids(1, 3), use_cache=False)
    model = converted("mamba").train()
    model(token_ids(1, 3), use_cache=False).logits.sum().backward()
    assert model.backbone.layers[0].mixer.out_proj.weight.grad is not None
    assert model.training


def test_a_head_of_another_shape_starts_afresh_if_asked(tmp_path):
    converted("classifier", torch.float32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    names = {"id2label": dict(enumerate("abcde")), "label2id": {name: i for i, name in enumerate("abcde")}}
    (tmp_path / "config.json").write_text(json.dumps(config | names))
    with pytest.raises(CheckpointError, match=r"misshapen: classifier.*ignore_mismatched_sizes=True"):
        snlp_zoo.load(tmp_path)
    assert snlp_zoo.load(tmp_path, ignore_mismatched_sizes=True)(torch.ones(1, 3).long()).logits.shape == (1, 5)
