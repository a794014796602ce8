"""A converted model under lm-evaluation-harness, on a task that lies in a folder."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from snlp_zoo.convert import to_spiking

END, WORDS = 0, [f"w{i}" for i in range(2, 40)]
TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
doc_to_text: "{text}"
"""
CHOICE = """
task: local_choice
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
"""
TEXT = """
task: local_text
output_type: loglikelihood_rolling
doc_to_target: "{{context}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""


def spiking_model():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=2 + len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    return to_spiking(LlamaForCausalLM(config).eval())


def word_tokenizer():
    made = Tokenizer(models.WordLevel({"[END]": END, "[UNK]": 1} | {w: i + 2 for i, w in enumerate(WORDS)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "[END]", "pad_token": "[END]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


@torch.no_grad()
def log_likelihood(model, context, words):
    """Of words after the context, by hand."""
    ids = torch.tensor([[2 + WORDS.index(word) if word else END for word in [*context, *words]]])
    log_probabilities = model(ids).logits.log_softmax(-1)[0, len(context) - 1 : -1]
    return log_probabilities.gather(1, ids[0, len(context) :, None]).sum().item()


def documents():
    generator = torch.Generator().manual_seed(4)
    for row in range(12):
        picked = [WORDS[i] for i in torch.randint(len(WORDS), (10,), generator=generator)]
        yield {"context": " ".join(picked[: 3 + row % 3]), "choices": [picked[6], " ".join(picked[7:9]), picked[9]],
               "label": row % 3}  # fmt: skip


def test_harness_agrees_with_hand_counts(tmp_path):
    import lm_eval  # here: it takes seconds
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    documents_ = list(documents())
    data, tasks = tmp_path / "test.jsonl", tmp_path / "tasks"
    tasks.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in documents_))
    for name, rest, text in (("choice", CHOICE, "{{context}}"), ("text", TEXT, "")):
        (tasks / f"{name}.yaml").write_text(TASK.format(data=data, cache=tmp_path / "cache", text=text) + rest)
    model, tokenizer = spiking_model(), word_tokenizer()
    harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=5, max_length=32)
    found = lm_eval.simple_evaluate(
        harness,
        tasks=["local_choice", "local_text"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )

    right, total, words, size = 0, 0.0, 0, 0
    samples = {sample["doc_id"]: sample for sample in found["samples"]["local_choice"]}
    for number, row in enumerate(documents_):
        context = row["context"].split()
        scores = [log_likelihood(model, context, choice.split()) for choice in row["choices"]]
        assert [score for score, _ in samples[number]["filtered_resps"]] == pytest.approx(scores, abs=1e-4)
        right += max(range(3), key=scores.__getitem__) == row["label"]
        total += log_likelihood(model, [None], context)
        words += len(context)
        size += len(row["context"].encode())
    assert 0 < right < len(documents_)
    assert found["results"]["local_choice"]["acc,none"] == right / len(documents_)
    scores = found["results"]["local_text"]
    assert scores["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=1e-5)
    assert scores["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-5)
