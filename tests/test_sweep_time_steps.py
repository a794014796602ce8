import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from snlp_zoo.registry import build

TOOL = Path(__file__).parent.parent / "tools" / "sweep_time_steps.py"


@pytest.fixture
def trained(tmp_path):
    """A saved classifier with a tokenizer, and labelled texts."""
    torch.manual_seed(0)
    model = build("spikingbert_tiny", num_labels=2)
    model.config.id2label, model.config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    model.save_pretrained(tmp_path / "model")
    words = ["[PAD]", "[UNK]", "a", "fine", "film", "dull"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))  # noqa: S106
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", model_max_length=64)  # noqa: S106
    tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "test.tsv"
    data.write_text("text\tlabel\na fine film\tgood\ndull\tbad\na dull film\tbad\n")
    return tmp_path, data


@pytest.fixture
def sweep(trained, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("sweep_time_steps", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(model=trained[0]):
        monkeypatch.setattr(sys, "argv", [str(TOOL), str(model), "--data", str(trained[1])])
        tool.main()
        return tool, capsys.readouterr().out.splitlines()

    return run


def test_long_texts_are_cut_at_the_models_positions(trained, sweep):
    trained[1].write_text("text\tlabel\n" + "fine film " * 60 + "\tgood\ndull\tbad\n")
    assert len(sweep()[1]) == 15


def test_mistakes_are_told(trained, sweep):
    with pytest.raises(SystemExit, match="no folder and no zoo entry called 'nowhere'"):
        sweep("nowhere")
    build("spikelm_tiny", num_labels=2).save_pretrained(trained[0] / "model")
    with pytest.raises(SystemExit, match="is a SpikeLMForSequenceClassification; only SpikingBERT takes any T"):
        sweep()


def test_a_row_for_every_t_and_every_tolerance(sweep):
    tool, lines = sweep()
    assert [line.split()[0] for line in lines] == [
        "T", *map(str, tool.STEPS), "tolerance", *map(str, tool.TOLERANCES)
    ]  # fmt: skip
    assert lines[len(tool.STEPS)].split()[3] == "1.0000"  # the largest T agrees with itself
    assert all(0 <= float(line.split()[1]) <= 1 for line in lines[1 : len(tool.STEPS) + 1])
    assert all(4 < float(line.split()[5]) <= 128 for line in lines[-len(tool.TOLERANCES) :])
