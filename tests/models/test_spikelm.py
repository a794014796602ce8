import logging

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
)

from snlp_zoo.layers import ElasticBiSpike, LIFNode
from snlp_zoo.layers.neurons import BaseNode
from snlp_zoo.models.configuration import make_config
from snlp_zoo.models.configuration_spikelm import SpikeLMConfig
from snlp_zoo.models.modeling_spikelm import SpikeLMForMaskedLM, SpikeLMForSequenceClassification, SpikeLMModel
from snlp_zoo.models.transfer import spread_layers
from snlp_zoo.registry import build, load_entry

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
}
IDS = torch.randint(1, 50, (3, 9), generator=torch.Generator().manual_seed(5))
MASK = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] * 7 + [0] * 2])


def make_teacher(teacher_class=BertForSequenceClassification, **sizes):
    """A teacher whose biases and norms are not at their trivial initial values."""
    torch.manual_seed(1)
    teacher = teacher_class(BertConfig(**SIZES | sizes)).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return teacher


@pytest.fixture
def identity_neurons(monkeypatch):
    monkeypatch.setattr(ElasticBiSpike, "forward", lambda self, x, **options: x)


def test_base_has_the_published_number_of_parameters():
    with torch.device("meta"):
        encoder = build("spikelm_base", task="encoder")
    assert sum(p.numel() for p in encoder.parameters()) == 109_482_240
    nodes = [module for module in encoder.modules() if isinstance(module, ElasticBiSpike)]
    assert len(nodes) == 8 * 12  # six linear inputs, keys and values
    assert sum(node.alpha.numel() for node in nodes) == 384


def test_base_has_the_published_sizes():
    config = SpikeLMConfig(**load_entry("spikelm_base").config)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (12, 768, 12)
    assert (config.intermediate_size, config.vocab_size, config.time_steps) == (3072, 30522, 4)
    assert (config.firing_k, config.membrane_beta) == (2.0, 0.25)


@pytest.mark.parametrize("time_steps", [1, 3])
def test_equals_bert_when_neurons_pass_everything(identity_neurons, time_steps):
    bert = make_teacher(BertModel)
    model = SpikeLMModel.from_teacher(bert, time_steps=time_steps).eval()
    expected = bert(IDS, attention_mask=MASK, output_hidden_states=True)
    got = model(IDS, attention_mask=MASK, output_hidden_states=True)
    real = MASK.bool()
    for one, other in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(one[real], other[real], rtol=0, atol=1e-5)
    torch.testing.assert_close(got.last_hidden_state[real], expected.last_hidden_state[real], rtol=0, atol=1e-5)
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, rtol=0, atol=1e-5)


def test_equals_bert_with_segments_and_positions(identity_neurons):
    bert = make_teacher(BertModel)
    model = SpikeLMModel.from_teacher(bert, time_steps=1).eval()
    segments, positions = (IDS > 25).long(), torch.arange(8, -1, -1).expand(3, -1)
    expected = bert(IDS, token_type_ids=segments, position_ids=positions).last_hidden_state
    got = model(IDS, token_type_ids=segments, position_ids=positions).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("teacher_class", "student_class"),
    [(BertForSequenceClassification, SpikeLMForSequenceClassification), (BertForMaskedLM, SpikeLMForMaskedLM)],
)
def test_heads_equal_berts(identity_neurons, teacher_class, student_class):
    teacher = make_teacher(teacher_class)
    student = student_class.from_teacher(teacher, time_steps=1).eval()
    got, expected = student(IDS, attention_mask=MASK).logits, teacher(IDS, attention_mask=MASK).logits
    if got.ndim == 3:
        got, expected = got[MASK.bool()], expected[MASK.bool()]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_attention_probabilities_equal_berts(identity_neurons):
    teacher = make_teacher(BertModel)
    teacher.set_attn_implementation("eager")
    student = SpikeLMModel.from_teacher(teacher, time_steps=2).eval()
    got = student(IDS, attention_mask=MASK, output_attentions=True).attentions
    expected = teacher(IDS, attention_mask=MASK, output_attentions=True).attentions
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one[:, :, 0], other[:, :, 0], rtol=0, atol=1e-5)
        assert (one.transpose(-1, -2)[MASK.unsqueeze(1).expand(-1, 3, -1) == 0] == 0).all()  # padding is not attended


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("reset", ["symmetric", "reference"])
def test_membrane_plays_no_part_in_a_single_step(beta, reset):
    torch.manual_seed(2)
    plain = build("spikelm_tiny", time_steps=1)
    torch.manual_seed(2)
    other = build("spikelm_tiny", time_steps=1, membrane_beta=beta, reset=reset)
    for model in (plain, other):
        model.train()(IDS)
        model.eval()
    assert torch.equal(other(IDS).logits, plain(IDS).logits)


def test_beta_matters_with_several_steps():
    torch.manual_seed(2)
    plain = build("spikelm_tiny")
    torch.manual_seed(2)
    other = build("spikelm_tiny", membrane_beta=0.9)
    for model in (plain, other):
        model.train()(IDS)
        model.eval()
    assert not torch.equal(other(IDS).logits, plain(IDS).logits)


def test_keys_and_values_are_memoryless_spikes():
    model = build("spikelm_tiny")
    attention = model.base_model.layers[0].attention
    assert attention.key_spikes.beta == attention.value_spikes.beta == 0.0
    assert attention.key.neuron.beta == 0.25


def test_binary_neurons_take_the_place_of_ternary_ones():
    model = build("spikelm_tiny", neuron="lif", tau=3, v_threshold=0.5)
    nodes = {name: module for name, module in model.named_modules() if isinstance(module, BaseNode)}
    assert nodes.keys() == {
        name for name, module in build("spikelm_tiny").named_modules() if isinstance(module, BaseNode)
    }
    for name, node in nodes.items():
        assert (type(node), node.tau, node.v_reset) == (LIFNode, 3.0, 0.0)
        assert node.v_threshold == (0.25 if name.endswith("attention.output.neuron") else 0.5)
    assert not any(name.endswith("alpha") for name in model.state_dict())


def test_from_teacher_copies_everything_bert_has():
    teacher = make_teacher()
    student = SpikeLMForSequenceClassification.from_teacher(teacher)
    report = student.transfer_report
    assert report.not_copied == {}
    assert sorted(report.copied) == sorted(name for name, _ in student.named_parameters())
    theirs, ours = teacher.bert.encoder.layer[4], student.spikelm.layers[4]
    for one, other in [
        (ours.attention.query, theirs.attention.self.query),
        (ours.attention.key, theirs.attention.self.key),
        (ours.attention.value, theirs.attention.self.value),
        (ours.attention.output, theirs.attention.output.dense),
        (ours.attention.norm, theirs.attention.output.LayerNorm),
        (ours.mlp.up, theirs.intermediate.dense),
        (ours.mlp.down, theirs.output.dense),
        (ours.mlp.norm, theirs.output.LayerNorm),
        (student.classifier, teacher.classifier),
        (student.spikelm.pooler.dense, teacher.bert.pooler.dense),
    ]:
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.bias, other.bias)
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)


def test_from_teacher_leaves_the_teacher_alone():
    teacher = make_teacher()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    student = SpikeLMForSequenceClassification.from_teacher(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_from_teacher_takes_sizes_labels_and_settings():
    teacher = make_teacher()
    teacher.config.id2label = {0: "bad", 1: "good", 2: "neither"}
    teacher.config.hidden_dropout_prob = 0.4
    student = SpikeLMForSequenceClassification.from_teacher(teacher, num_hidden_layers=3, time_steps=2, firing_k=3.0)
    config = student.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (24, 3, 50)
    assert (config.time_steps, config.firing_k, config.hidden_dropout_prob) == (2, 3.0, 0.1)
    assert config.id2label == {0: "bad", 1: "good", 2: "neither"}
    assert config.num_labels == 3


def test_other_classes_than_the_teachers_have_neither_its_names_nor_its_loss():
    teacher = make_teacher()
    teacher.config.problem_type = "single_label_classification"  # as its first loss leaves it
    named = SpikeLMForSequenceClassification.from_teacher(teacher, id2label={0: "a", 1: "b", 2: "c"}).config
    assert named.id2label == {0: "a", 1: "b", 2: "c"}
    assert named.label2id in (None, {"a": 0, "b": 1, "c": 2})
    student = SpikeLMForSequenceClassification.from_teacher(teacher, num_labels=1).eval()
    output = student(torch.ones(2, 5, dtype=torch.long), labels=torch.tensor([3.0, 4.0]))
    assert torch.allclose(output.loss, (output.logits[:, 0] - torch.tensor([3.0, 4.0])).square().mean())


@pytest.mark.parametrize(
    ("students", "teachers", "expected"),
    [(3, 6, [1, 3, 5]), (6, 6, [0, 1, 2, 3, 4, 5]), (4, 12, [2, 5, 8, 11]), (1, 6, [5]), (4, 6, [0, 2, 3, 5])],
)
def test_spread_layers(students, teachers, expected):
    assert spread_layers(students, teachers) == expected


def test_a_deeper_student_repeats_layers():
    spread = spread_layers(5, 2)
    assert spread == sorted(spread)
    assert (spread[0], spread[-1]) == (0, 1)


def test_a_shallower_student_takes_spread_layers():
    teacher = make_teacher()
    student = SpikeLMForSequenceClassification.from_teacher(teacher, num_hidden_layers=3)
    for ours, theirs in zip(student.spikelm.layers, (1, 3, 5), strict=True):
        assert torch.equal(ours.mlp.up.weight, teacher.bert.encoder.layer[theirs].intermediate.dense.weight)


def test_report_and_warning_say_what_was_not_copied(caplog):
    teacher = make_teacher(BertModel)
    with caplog.at_level(logging.WARNING, logger="snlp_zoo.models.base"):
        student = SpikeLMForSequenceClassification.from_teacher(teacher, intermediate_size=48)
    not_copied = student.transfer_report.not_copied
    assert not_copied["classifier.weight"] == "the teacher has no such weight"
    assert not_copied["spikelm.layers.0.mlp.up.weight"] == "shape (48, 24), the teacher's is (40, 24)"
    assert "spikelm.layers.5.attention.query.weight" in student.transfer_report.copied
    assert "classifier.weight (the teacher has no such weight)" in caplog.text
    assert not set(not_copied) & set(student.transfer_report.copied)
    assert set(not_copied) | set(student.transfer_report.copied) == {name for name, _ in student.named_parameters()}


def test_another_number_of_labels_keeps_a_fresh_head():
    student = SpikeLMForSequenceClassification.from_teacher(make_teacher(), num_labels=5)
    assert student.classifier.out_features == 5
    assert set(student.transfer_report.not_copied) == {"classifier.weight", "classifier.bias"}


def test_masked_lm_student_stays_tied():
    student = SpikeLMForMaskedLM.from_teacher(make_teacher(BertForMaskedLM))
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    left = set(student.transfer_report.not_copied)
    assert left <= {"spikelm.pooler.dense.weight", "spikelm.pooler.dense.bias"}


def test_from_teacher_in_half_precision_gives_float32():
    teacher = make_teacher().bfloat16()
    student = SpikeLMForSequenceClassification.from_teacher(teacher)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert torch.equal(student.classifier.weight, teacher.classifier.weight.float())


def test_from_teacher_errors():
    with pytest.raises(ValueError, match="spikelm has no config field 'time_step'; did you mean 'time_steps'"):
        SpikeLMModel.from_teacher(make_teacher(), time_step=2)
    torch.manual_seed(0)
    stranger = DistilBertModel(DistilBertConfig(vocab_size=50, dim=24, n_layers=2, n_heads=3, hidden_dim=40))
    with pytest.raises(ValueError, match=r"no layer of the teacher \(DistilBertModel\) fits SpikeLMModel"):
        SpikeLMModel.from_teacher(stranger, **SIZES | {"hidden_size": 36})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reset": "hard"}, "reset must be one of symmetric, reference, got 'hard'"),
        ({"alpha_mode": "frozen"}, "alpha_mode must be one of first_batch, ema, learned, got 'frozen'"),
        ({"firing_k": 0.0}, "firing_k must be positive"),
        ({"firing_k": float("nan")}, "firing_k must be positive"),
        ({"membrane_beta": 1.5}, r"membrane_beta and alpha_momentum in \[0, 1\]"),
        ({"alpha_momentum": -0.1}, r"membrane_beta and alpha_momentum in \[0, 1\]"),
        ({"neuron": "ternary"}, "neuron must be one of elastic, lif, got 'ternary'"),
        ({"tau": 1}, "tau must be above 1 and v_threshold positive, got 1 and 1.0"),
        ({"v_threshold": 0.0}, "tau must be above 1 and v_threshold positive"),
        ({"time_steps": 0}, "time_steps must be between 1 and 1024, got 0"),
        ({"vocab_size": 10**9}, "vocab_size must be between"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be between"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "must be a multiple of num_attention_heads 4"),
    ],
)
def test_config_bounds(values, message):
    with pytest.raises(ValueError, match=message):
        make_config(SpikeLMConfig, **values)


@pytest.mark.parametrize("mode", ["first_batch", "ema", "learned"])
def test_alpha_modes_train_and_come_back(mode, tmp_path):
    model = build("spikelm_tiny", alpha_mode=mode, num_hidden_layers=1).train()
    outputs = model(IDS, labels=torch.tensor([0, 1, 0]))
    outputs.loss.backward()
    nodes = {name: module for name, module in model.named_modules() if isinstance(module, ElasticBiSpike)}
    assert all(node.initialized for node in nodes.values())
    if mode == "learned":
        model.zero_grad()
        model(IDS, labels=torch.tensor([0, 1, 0])).loss.backward()
        assert all(node.alpha.grad.any() for node in nodes.values())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for name, node in nodes.items():
        assert torch.equal(loaded.get_submodule(name).alpha, node.alpha)
    loaded.train()(IDS)
    for name, node in nodes.items() if mode != "ema" else ():
        assert torch.equal(loaded.get_submodule(name).alpha, node.alpha)  # not measured again


def test_released_settings_run():
    model = build("spikelm_tiny", reset="reference", alpha_mode="first_batch").train()
    model(IDS, labels=torch.tensor([0, 1, 0])).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_padding_does_not_move_the_amplitudes():
    models = []
    for pad in (0, 5):
        torch.manual_seed(3)
        model = build("spikelm_tiny").train()
        ids = torch.cat([IDS, IDS.new_full((3, pad), 7)], 1)
        mask = torch.cat([MASK, MASK.new_zeros(3, pad)], 1)
        for _ in range(2):
            model(ids, attention_mask=mask)
        models.append(model)
    for one, other in zip(models[0].buffers(), models[1].buffers(), strict=True):
        if one.shape == (4,):
            torch.testing.assert_close(one, other)


def test_training_compiles_into_one_graph():
    model = build("spikelm_tiny").train()
    ids, labels = torch.randint(1, 120, (4, 12)), torch.arange(4) % 2
    with torch.no_grad():
        model(ids)  # amplitudes are measured once, outside
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = []
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
