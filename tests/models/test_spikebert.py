"""SpikeBERT: the paper's equations, counts, and what the corrections correct. What all models share: test_contract."""

import pytest
import torch
from spikingjelly.activation_based.neuron import LIFNode as TheirLIF
from torch.nn.functional import layer_norm, linear
from transformers import BertConfig, BertModel

from snlp_zoo.energy import estimate, verify_spikes
from snlp_zoo.layers import TernaryLIFNode, fold_amplitude
from snlp_zoo.models.configuration_spikebert import SpikeBertConfig
from snlp_zoo.models.modeling_spikebert import SpikeBertForSequenceClassification, SpikeBertModel
from snlp_zoo.registry import build

LENGTH = 10


def make(**changes):
    torch.manual_seed(0)
    return build("spikebert_tiny", **changes)


def ids(batch=2, length=LENGTH):
    return torch.randint(5, 120, (batch, length), generator=torch.Generator().manual_seed(1))


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_published_sizes():
    with torch.device("meta"):
        model = build("spikebert_12l")
        shallow = build("spikebert_12l", num_hidden_layers=6)
    assert parameters(model) == 107_455_490
    assert (model.config.num_attention_heads, model.config.num_hidden_layers, model.config.time_steps) == (8, 12, 4)
    assert parameters(shallow) == 64_863_746
    assert parameters(model.base_model.layers[0]) == 7_098_624


def by_the_equations(model, input_ids):
    """Equations of the paper on SpikingJelly's own neuron; the model's weights, no mask, no positions."""
    config, weights = model.config, model.state_dict()

    def lif(x, v_threshold):
        node = TheirLIF(tau=config.tau, v_threshold=v_threshold, v_reset=0.0, detach_reset=True, step_mode="m")
        return node.to(x)(x)

    def project(x, name):
        y = linear(x, weights[f"{name}.linear.weight"], weights[f"{name}.linear.bias"])
        norm = weights[f"{name}.norm.weight"], weights[f"{name}.norm.bias"]
        return lif(layer_norm(y, y.shape[-1:], *norm, 1e-5), config.v_threshold)

    def heads(x):
        return x.unflatten(-1, (config.num_attention_heads, -1)).transpose(-2, -3)

    embedded = weights["spikebert.embeddings.word_embeddings.weight"][input_ids]
    x = (embedded >= 0).to(embedded).expand(config.time_steps, *embedded.shape)
    for i in range(config.num_hidden_layers):
        layer = f"spikebert.layers.{i}"
        query, key, value = (heads(project(x, f"{layer}.attention.{name}")) for name in ("query", "key", "value"))
        mixed = (query @ key.transpose(-1, -2)) @ value * 0.125
        spikes = lif(mixed.transpose(-2, -3).flatten(-2), config.v_threshold / 2)
        x = x + project(spikes, f"{layer}.attention.output")
        assert set(x.unique().tolist()) <= set(range(2 + 2 * i + 1))
        x = x + project(project(x, f"{layer}.mlp.up"), f"{layer}.mlp.down")
    norm = weights["spikebert.norm.weight"], weights["spikebert.norm.bias"]
    pooled = layer_norm(x, x.shape[-1:], *norm, 1e-5).mean(2)
    return linear(pooled, weights["classifier.weight"], weights["classifier.bias"]).mean(0)


@pytest.mark.parametrize("changes", [{}, {"tau": 3.0, "v_threshold": 0.4}, {"num_attention_heads": 8}])
def test_equals_the_papers_equations(changes):
    model = make(fidelity="released", **changes).double()
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, by_the_equations(model, ids()))


def test_residual_stream_counts_spikes():
    model = make(num_hidden_layers=3).base_model
    seen = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, __, output: seen.append(output[0].unique()))
    model(ids())
    assert len(seen) == 3
    for i, values in enumerate(seen, start=1):
        assert set(values.tolist()) <= set(range(1 + 2 * i + 1))
    assert seen[-1].max() > 1  # counts, no longer spikes


@pytest.mark.parametrize("use_position_embeddings", [False, True])
def test_order_matters_only_with_positions(use_position_embeddings):
    model = make(use_position_embeddings=use_position_embeddings)
    permuted = ids()[:, torch.randperm(LENGTH, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        same = torch.allclose(model(ids()).logits, model(permuted).logits, atol=1e-5)
    assert same == (not use_position_embeddings)


def test_released_wiring_lets_padding_in():
    released, corrected = make(fidelity="released"), make(use_position_embeddings=False)
    corrected.load_state_dict(released.state_dict())
    padded = torch.cat([ids(), torch.zeros(2, 4, dtype=torch.long)], 1)
    mask = (padded > 0).long()
    with torch.no_grad():
        plain = corrected(ids()).logits
        torch.testing.assert_close(released(ids()).logits, plain)
        torch.testing.assert_close(corrected(padded, attention_mask=mask).logits, plain)
        assert (released(padded, attention_mask=mask).logits - plain).abs().max() > 1e-3


def test_positions_are_the_corrections_alone():
    assert SpikeBertConfig().use_position_embeddings is True
    assert SpikeBertConfig(fidelity="released").use_position_embeddings is False
    assert SpikeBertConfig(fidelity="released", use_position_embeddings=True).use_position_embeddings is True
    assert make(fidelity="released").base_model.embeddings.position_embeddings is None


def test_embeddings_are_binarised_at_zero():
    model = make(use_position_embeddings=False).base_model
    seen = []
    model.binarise.register_forward_hook(lambda _, __, spikes: seen.append(spikes))
    model(ids())
    embedded = model.embeddings.word_embeddings(ids())
    expected = (embedded >= 0).float()
    assert torch.equal(seen[0], expected.expand(4, *expected.shape))
    assert 0.4 < expected.mean() < 0.6


@pytest.mark.parametrize(("fidelity", "std"), [("corrected", 0.02), ("released", 1.0)])
def test_initial_embeddings(fidelity, std):
    tables = make(fidelity=fidelity, use_position_embeddings=True).base_model.embeddings
    for table in (tables.word_embeddings, tables.position_embeddings):
        assert table.weight.std().item() == pytest.approx(std, rel=0.1)


def test_attentions_are_scaled_coincidences():
    model = make()
    seen = []
    for name in ("query", "key"):
        getattr(model.base_model.layers[0].attention, name).register_forward_hook(lambda _, __, s: seen.append(s))
    mask = torch.ones_like(ids())
    mask[1, -3:] = 0
    with torch.no_grad():
        first = model(ids(), attention_mask=mask, output_attentions=True).attentions[0]
    query, key = (x.unflatten(-1, (2, -1)).transpose(-2, -3) for x in seen)
    expected = (query @ key.transpose(-1, -2)).mean(0) / 8 * mask[:, None, None, :]
    torch.testing.assert_close(first, expected)


def test_pooled_over_real_tokens():
    model = make().base_model
    mask = torch.ones_like(ids())
    mask[0, 4:] = 0
    with torch.no_grad():
        output = model(ids(), attention_mask=mask)
    torch.testing.assert_close(output.pooler_output[0], output.last_hidden_state[0, :4].mean(0))


def test_starts_from_a_teachers_linear_layers():
    teacher = BertModel(
        BertConfig(vocab_size=120, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
    )
    student = SpikeBertForSequenceClassification.from_teacher(teacher, num_hidden_layers=2)
    theirs, ours = teacher.encoder.layer[1], student.base_model.layers[0]
    assert torch.equal(ours.attention.query.linear.weight, theirs.attention.self.query.weight)
    assert torch.equal(ours.attention.output.linear.bias, theirs.attention.output.dense.bias)
    assert torch.equal(ours.mlp.down.linear.weight, theirs.output.dense.weight)
    assert torch.equal(student.base_model.embeddings.word_embeddings.weight, teacher.embeddings.word_embeddings.weight)
    assert "spikebert.layers.0.mlp.up.norm.weight" in student.transfer_report.not_copied


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "sssa"}, "attention must be one of ssa"),
        ({"neuron": "izhikevich"}, "neuron must be one of lif"),
        ({"surrogate": "gauss"}, "surrogate must be one of"),
        ({"fidelity": "exact"}, "fidelity must be one of corrected, released"),
        ({"tau": 1.0}, "tau must be above 1"),
        ({"v_threshold": 0.0}, "v_threshold positive"),
        ({"attention_probs_dropout_prob": 0.9}, r"attention_probs_dropout_prob must be 0, got 0\.9"),
        ({"neuron_backend": "cuda"}, "neuron_backend must be one of auto, torch, triton, cupy, got 'cuda'"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size 30 must be a multiple of num_attention_heads 4"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        SpikeBertConfig(**changes)


@pytest.mark.parametrize("bits", [1.58, 1])
def test_low_bit_weights_pack(bits):
    from snlp_zoo.layers import pack

    model = make(weight_bits=bits).eval()
    with torch.no_grad():
        before = model(ids()).logits
        torch.testing.assert_close(pack(model)(ids()).logits, before, rtol=0, atol=1e-4)


def test_encoder_alone_is_the_same():
    head = make()
    encoder = SpikeBertModel(head.config)
    encoder.load_state_dict(head.base_model.state_dict())
    with torch.no_grad():
        pooled = encoder.eval()(ids()).pooler_output
        torch.testing.assert_close(head.classifier(pooled), head(ids()).logits)


def test_ternary_spikes_stay_whole_in_the_residual_stream_and_fold():
    """Amplitudes are learned where a linear layer takes them, and only there: trained models stay spike-driven."""
    model = make(neuron="ternary")
    nodes = {name: node for name, node in model.named_modules() if isinstance(node, TernaryLIFNode)}
    learned = {name for name, node in nodes.items() if isinstance(node.amplitude, torch.nn.Parameter)}
    assert {name.partition("layers.")[2][2:] for name in learned} == {"attention.attention.neuron", "mlp.up.neuron"}
    with torch.no_grad():
        for i, name in enumerate(sorted(learned)):
            nodes[name].amplitude.fill_(0.7 + 0.2 * i)
    batch = {"input_ids": ids()}
    found = verify_spikes(model, batch)
    assert found.ok, found.failures
    assert found.spike_driven_fraction > 0.999
    with torch.no_grad():
        before = model(**batch).logits
        torch.testing.assert_close(fold_amplitude(model)(**batch).logits, before, rtol=0, atol=1e-5)
    amplitudes = [row for row in estimate(model, batch).layers if row["role"] == "amplitude"]
    assert amplitudes == []


@pytest.mark.parametrize(
    ("changes", "ending", "start"),
    [
        ({"neuron": "ternary"}, "mlp.up.neuron.amplitude", 1.0),
        ({"neuron": "plif"}, "query.neuron.w", 0.0),
        ({"learnable_surrogate": True}, "query.neuron.surrogate_log_alpha", 0.6931472),
        ({"attention": "linear"}, "decay.logit", 2.1972246),
        ({"attention": "axnor"}, "a.logit", -2.1972246),
    ],
)
def test_what_a_checkpoint_lacks_starts_afresh(changes, ending, start, tmp_path):
    make().save_pretrained(tmp_path)
    loaded = SpikeBertForSequenceClassification.from_pretrained(tmp_path, allow_missing=True, **changes)
    found = {name: tensor for name, tensor in loaded.state_dict().items() if name.endswith(ending)}
    assert len(found) == 2
    for tensor in found.values():
        torch.testing.assert_close(tensor, torch.full_like(tensor, start))
