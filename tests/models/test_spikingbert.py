import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from snlp_zoo.errors import ConvergenceError, RecipeError
from snlp_zoo.layers import pack
from snlp_zoo.layers.equilibrium import AverageRate, Settling, Spikes
from snlp_zoo.models import modeling_spikingbert
from snlp_zoo.models.configuration_spikingbert import SpikingBertConfig
from snlp_zoo.models.modeling_spikingbert import SpikingBertForSequenceClassification, SpikingBertModel
from snlp_zoo.registry import build, load

VARIANTS = pytest.mark.parametrize(
    "options",
    [{}, {"leak": 0.9}, {"feedback": True}, {"attention": "linear"}, {"feedback": True, "leak": 0.9, "v_init": 0.5}],
)


def make(task="sequence-classification", **options):
    torch.manual_seed(0)
    return build("spikingbert_tiny", task=task, **options)


def make_batch(rows=3, tokens=9):
    ids = torch.randint(5, 120, (rows, tokens))
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[1:, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_parameter_counts_as_published():
    with torch.device("meta"):
        count = {n: SpikingBertModel(SpikingBertConfig(num_hidden_layers=n)).num_parameters() for n in (1, 2, 4)}
    assert count[4] == 52_188_672
    assert count[2] == 38_012_928
    assert count[2] - count[1] == 7_087_872


def test_t_conv_is_time_steps():
    config = SpikingBertConfig(t_conv=7)
    assert config.time_steps == config.t_conv == 7
    assert SpikingBertConfig().t_conv == 80
    assert make(t_conv=3).config.time_steps == 3


def test_no_gradient_goes_through_the_simulation_and_all_of_it_through_the_steady_state():
    """Without feedback the gradient is plain autograd's of the network of steady rates, exactly."""
    model, batch = make().train(), make_batch()
    weight = torch.randn(32)
    encoder = model.base_model
    (encoder(**batch).last_hidden_state * weight).sum().backward()
    got = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    model.zero_grad()
    current, mask = encoder.embed(batch["input_ids"], batch["attention_mask"], None, None, None)
    states, _, _ = encoder._equilibrium(current, mask, {}, None, False)
    (states[-1] * weight).sum().backward()
    assert len(got) == len(dict(encoder.named_parameters()))
    for name, parameter in encoder.named_parameters():
        assert torch.equal(parameter.grad, got[name]), name


@VARIANTS
def test_values_are_the_measured_rates_with_and_without_gradient(options):
    model, batch = make("encoder", **options), make_batch()
    with_gradient = model(**batch, output_hidden_states=True)
    with torch.no_grad():
        without = model(**batch, output_hidden_states=True)
    for one, other in zip(with_gradient.hidden_states, without.hidden_states, strict=True):
        assert torch.equal(one, other)
        assert one.min() >= 0
        assert one.max() <= 1
    if "leak" not in options:
        assert torch.equal(without.last_hidden_state * 4, (without.last_hidden_state * 4).round())


@VARIANTS
def test_any_chunk_gives_the_same_simulation(options, monkeypatch):
    model, batch = make("encoder", **options, time_steps=7), make_batch()
    with torch.no_grad():
        expected = model(**batch, output_spike_rates=True)
        monkeypatch.setattr(modeling_spikingbert, "CHUNK", 3)
        got = model(**batch, output_spike_rates=True)
    torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state)
    assert {len(rate) for rate in got.spike_rates.values()} == {7}
    torch.testing.assert_close(got.spike_rates, expected.spike_rates)


def test_training_memory_does_not_depend_on_t(saved_for_backward):
    kept = {}
    for steps in (2, 16, 64):
        model = make(time_steps=steps).train()
        with saved_for_backward() as saved:
            model(**make_batch(), labels=torch.tensor([0, 1, 0]))
        kept[steps] = saved.nbytes
    assert kept[2] == kept[16] == kept[64] > 0


@VARIANTS
def test_padding_changes_nothing_in_any_variant(options):
    model, batch = make(**options), make_batch(2)
    longer = {key: torch.cat([value, value.new_zeros(2, 4)], 1) for key, value in batch.items()}
    with torch.no_grad():
        torch.testing.assert_close(model(**longer).logits, model(**batch).logits)


@VARIANTS
def test_every_variant_trains(options):
    model = make(**options, v_threshold=1.0).train()
    losses = []
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    batch = make_batch(8)
    for _ in range(30):
        loss = model(**batch, labels=torch.arange(8) % 2).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-3:]) / 3 < losses[0] - 0.05


def test_steady_rates_predict_the_measured_ones():
    """Random network of two layers, D = 64, N = 16: floors of the nonlinear layers, 1 / T for the linear ones."""
    torch.manual_seed(0)
    config = SpikingBertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, vocab_size=100
    )
    model = SpikingBertModel(config).eval()
    ids = torch.randint(0, 100, (4, 16))
    errors = {}
    with torch.no_grad():
        current, mask = model.embed(ids, None, None, None, None)
        steady, _, _ = model._equilibrium(current, mask, {}, None, False)
        first = model.layers[0].attention
        for steps in (16, 125):
            rates = model.simulate(current, mask, steps, {}, False, None, model.pool).rates
            errors[steps] = [(a - b).abs().mean().item() for a, b in zip(rates, steady, strict=True)]
            key, fire = AverageRate(), Spikes({}, mask)
            key.add(fire(first.key_neuron, first.key(fire(model.input_neuron, current.expand(steps, *current.shape)))))
            errors[steps].append((key.value - (first.key(steady[0])).clamp(0, 1)).abs().mean().item())
    assert max(errors[125]) < 0.04
    assert errors[125][0] < 0.004
    assert errors[125][-1] < 0.004
    assert all(late < early for late, early in zip(errors[125], errors[16], strict=True))


def test_feedback_gradient_is_that_of_the_unrolled_iteration():
    model = make("encoder", feedback=True, tolerance=1e-12, max_iter=200).double()
    nn.init.normal_(model.feedback.weight, std=0.002)  # unrolling converges where f contracts
    batch, weight = make_batch(), torch.randn(32, dtype=torch.float64)
    (model(**batch).last_hidden_state * weight).sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    current, mask = model.embed(batch["input_ids"], batch["attention_mask"], None, None, None)
    plain = copy.copy(model)
    last = torch.zeros_like(current)
    for _ in range(60):  # the same network, fed back by hand
        plain.__dict__["_modules"] = model._modules | {"feedback": None}
        last = plain._equilibrium(current + model.feedback(last), mask, {}, None, False)[0][-1]
    (last * weight).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, got[name], rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_feedback_changes_the_answer_one_step_later():
    model, batch = make("encoder", feedback=True), make_batch()
    nn.init.constant_(model.feedback.weight, 0.5)
    without = make("encoder")
    without.load_state_dict({k: v for k, v in model.state_dict().items() if "feedback" not in k})
    with torch.no_grad():
        one, other = (m(**batch, time_steps=1).last_hidden_state for m in (model, without))
        assert torch.equal(one, other)
        assert not torch.equal(model(**batch).last_hidden_state, without(**batch).last_hidden_state)


def test_feedback_that_does_not_converge_is_one_clear_error():
    model = make(feedback=True, max_iter=3, tolerance=1e-6)
    nn.init.normal_(model.base_model.feedback.weight, std=20)
    with pytest.raises(ConvergenceError, match=r"spikingbert feedback: .*residual .*max_iter"):
        model(**make_batch(), labels=torch.tensor([0, 1, 0]))


def test_time_steps_may_change_at_call_time():
    model, batch = make(), make_batch()
    with torch.no_grad():
        more = model(**batch, time_steps=9, output_spike_rates=True, output_hidden_states=True)
        assert {len(rate) for rate in more.spike_rates.values()} == {9}
        torch.testing.assert_close(more.hidden_states[-1] * 9, (more.hidden_states[-1] * 9).round())
        assert torch.equal(make(time_steps=9)(**batch).logits, more.logits)
        with pytest.raises(ValueError, match="time_steps must be at least 1, got 0"):
            model(**batch, time_steps=0)


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("task", ["sequence-classification", "masked-lm", "encoder"])
def test_early_exit_gives_each_text_what_it_had_when_it_settled(task, feedback):
    model, batch = make(task, feedback=feedback, time_steps=60), make_batch(5)
    with torch.no_grad():
        tolerance = 0.2 if task == "encoder" else 0.02
        early = model(**batch, early_exit=tolerance, output_hidden_states=True)
        assert early.steps_used.shape == (5,)
        assert early.steps_used.dtype == torch.int64
        assert early.steps_used.min() > Settling.WINDOW
        assert early.steps_used.min() < 60
        assert early.steps_used.max() <= 60
        for row, steps in enumerate(early.steps_used.tolist()):
            alone = {key: value[row : row + 1] for key, value in batch.items()}
            full = model(**alone, time_steps=steps, output_hidden_states=True)
            torch.testing.assert_close(early.hidden_states[-1][row], full.hidden_states[-1][0])
        assert model(**batch).steps_used is None
        tighter = model(**batch, early_exit=tolerance / 4).steps_used
        assert model(**batch, early_exit=1e-9, time_steps=4).steps_used.tolist() == [4] * 5  # the window is longer
    assert tighter.sum() > early.steps_used.sum()


def test_attention_scores_are_the_steady_states():
    model, batch = make("encoder"), make_batch()
    output = model(**batch, output_attention_scores=True, output_attentions=True)
    assert [score.shape for score in output.attention_scores] == [(3, 2, 9, 9)] * 2
    real = batch["attention_mask"].bool()
    assert not output.attentions[0][1, :, :, ~real[1]].any()
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(3, 2, 9))
    torch.testing.assert_close(output.attention_scores[0][0].softmax(-1), output.attentions[0][0])
    assert output.attention_scores[0].requires_grad
    assert model(**batch).attention_scores is None


def test_starts_from_a_teacher():
    torch.manual_seed(0)
    teacher = BertModel(
        BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
    )
    student = SpikingBertForSequenceClassification.from_teacher(teacher, num_hidden_layers=2, time_steps=3)
    assert torch.equal(student.spikingbert.layers[0].mlp.up.weight, teacher.encoder.layer[1].intermediate.dense.weight)
    assert set(student.transfer_report.not_copied) == {"classifier.weight", "classifier.bias"}


def test_dropout_is_the_same_network_in_both_passes():
    """With dropout the steady state still predicts the measured rates of the input neurons and the first keys."""
    model = make("encoder", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5, time_steps=400).train()
    batch = make_batch()
    masks = {}
    with torch.no_grad():
        current, mask = model.embed(batch["input_ids"], batch["attention_mask"], None, None, None)
        rates = model.simulate(current, mask, 400, masks, False, None, model.pool).rates
        steady, _, _ = model._equilibrium(current, mask, masks, None, False)
        other, _, _ = model._equilibrium(current, mask, {}, None, False)
    assert len(masks) == 2 * 3
    real = mask.bool()
    for layer in (1, 2):
        same = (rates[layer] - steady[layer])[real].abs().mean()
        assert same < 0.5 * (rates[layer] - other[layer])[real].abs().mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t_conv": 0}, "time_steps must be between 1 and"),
        ({"leak": 0.0}, r"leak in \(0, 1\] and v_init in \[0, 1\); got 0.5, 0.0 and 0.0"),
        ({"leak": 1.5}, r"got 0.5, 1.5 and 0.0"),
        ({"v_init": 1.0}, r"got 0.5, 1.0 and 1.0"),
        ({"v_threshold": 0}, "v_threshold must be positive"),
        ({"attention": "hard"}, "attention must be one of softmax, linear, got 'hard'"),
        ({"max_iter": 0}, "max_iter must be between 1 and 10000"),
        ({"t_con": 4}, "has no config field 't_con'; did you mean 't_conv'"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(RecipeError, match=message):
        make(**options)


def test_saved_and_loaded_with_every_option(tmp_path):
    model = make(feedback=True, leak=0.9, attention="linear", t_conv=5)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.config.t_conv == 5
    with torch.no_grad():
        batch = make_batch()
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("bits", [1.58, 1])
def test_packed_weights_give_the_same_spikes(bits, tmp_path):
    model, batch = make(weight_bits=bits, time_steps=16), make_batch()
    with torch.no_grad():
        expected, size = model(**batch, output_hidden_states=True), 4 * model.num_parameters()
        pack(model).save_pretrained(tmp_path)
        got = load(tmp_path)(**batch, output_hidden_states=True)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.hidden_states, expected.hidden_states, rtol=0, atol=1e-5)
    assert (tmp_path / "model.safetensors").stat().st_size < 0.6 * size
