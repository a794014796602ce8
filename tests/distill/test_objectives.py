import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from snlp_zoo.distill.objectives import (
    OBJECTIVES,
    attention_mse,
    attention_score_mse,
    cosine,
    count_units,
    cross_entropy,
    embedding_mse,
    embedding_table_mse,
    forward_kl,
    hidden_mse,
    logit_mse,
    relative_hidden_mse,
    reverse_kl,
    spike_rate,
)
from snlp_zoo.errors import RecipeError

B, N, D, H, L, C, V, T = 3, 5, 4, 2, 2, 3, 7, 4
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
LOGIT_OBJECTIVES = ["forward_kl", "reverse_kl", "head_tail_kl", "wasserstein", "logit_mse"]
STATE_OBJECTIVES = ["hidden_mse", "cosine", "embedding_mse"]
OWN_OBJECTIVES = ["cross_entropy", "l2wrap", "spike_rate"]  # without a teacher


def make_outputs(seed, *, layers=L, heads=H, width=D, per_token=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    return SimpleNamespace(
        logits=draw(B, N, C) if per_token else draw(B, C),
        hidden_states=tuple(draw(B, N, width) for _ in range(layers + 1)),
        attentions=tuple(draw(B, heads, N, N) for _ in range(layers)),
        attention_scores=tuple(draw(B, heads, N, N) for _ in range(layers)),
        embedding_table=draw(V, width),
        spike_rates={f"layers.{i}": draw(T) for i in range(layers)},
    )


def replaced(outputs, **changes):
    """The same outputs but for some of them."""
    return SimpleNamespace(**(vars(outputs) | changes))


def make_batch(per_token=False):
    labels = torch.randint(C, (B, N)).masked_fill(MASK == 0, -100) if per_token else torch.tensor([0, 2, 1])
    return {"attention_mask": MASK, "labels": labels}


def logits_of(student, teacher):
    as_tensors = [torch.tensor(x, dtype=torch.float64) for x in (student, teacher)]
    return [SimpleNamespace(logits=x) for x in as_tensors]


def overwrite_padding(outputs):
    """The same outputs with rubbish in every padded position."""
    pad = MASK == 0
    pairs = pad[:, None, :, None] | pad[:, None, None, :]
    logits = outputs.logits.detach()
    return replaced(
        outputs,
        logits=logits.masked_fill(pad[..., None], 1e3) if logits.ndim == 3 else logits,
        hidden_states=tuple(x.detach().masked_fill(pad[..., None], 1e3) for x in outputs.hidden_states),
        attentions=tuple(x.detach().masked_fill(pairs, 1e3) for x in outputs.attentions),
        attention_scores=tuple(x.detach().masked_fill(pairs, 1e3) for x in outputs.attention_scores),
    )


def test_kl_values_by_hand():
    # student (1/2, 1/2), teacher (3/4, 1/4)
    student, teacher = logits_of([[0.0, 0.0]], [[math.log(3.0), 0.0]])
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert forward_kl(student, teacher, {}).item() == pytest.approx(forward, abs=1e-6)
    assert reverse_kl(student, teacher, {}).item() == pytest.approx(reverse, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_kl_with_temperature_against_torch(temperature):
    student, teacher = make_outputs(0), make_outputs(1)
    p, q = ((x.logits / temperature).softmax(-1) for x in (teacher, student))
    expected = temperature**2 * F.kl_div(q.log(), p, reduction="batchmean")
    torch.testing.assert_close(forward_kl(student, teacher, {}, temperature=temperature), expected)
    expected = temperature**2 * F.kl_div(p.log(), q, reduction="batchmean")
    torch.testing.assert_close(reverse_kl(student, teacher, {}, temperature=temperature), expected)


def test_kl_is_a_mean_over_real_tokens():
    student, teacher = make_outputs(0, per_token=True), make_outputs(1, per_token=True)
    real = MASK.bool()
    rows = [SimpleNamespace(logits=x.logits[real]) for x in (student, teacher)]
    for objective in (forward_kl, reverse_kl, logit_mse):
        torch.testing.assert_close(objective(student, teacher, make_batch()), objective(*rows, {}))


def test_kl_survives_extreme_logits():
    student, teacher = logits_of([[1e4, -1e4, 0.0]], [[-1e4, 1e4, 0.0]])
    student.logits.requires_grad_()
    loss = forward_kl(student, teacher, {})
    loss.backward()
    assert loss.isfinite()
    assert student.logits.grad.isfinite().all()


def test_relative_hidden_mse_by_hand():
    states = torch.tensor([[[3.0, 1.0], [0.0, 20.0]]]), torch.tensor([[[1.0, 1.0], [0.0, 10.0]]])
    student, teacher = (SimpleNamespace(hidden_states=(state, state)) for state in states)
    batch = {"attention_mask": torch.ones(1, 2)}
    assert hidden_mse(student, teacher, batch).item() == pytest.approx((2 + 50) / 2)
    assert relative_hidden_mse(student, teacher, batch).item() == pytest.approx((2 / 1 + 50 / 50) / 2)


def test_logit_mse_by_hand():
    student, teacher = logits_of([[1.0, 2.0], [0.0, 0.0]], [[1.0, 0.0], [3.0, 1.0]])
    assert logit_mse(student, teacher, {}).item() == pytest.approx((4 + 9 + 1) / 4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("per_token", [False, True])
def test_cross_entropy_against_torch(per_token, smoothing):
    student, batch = make_outputs(0, per_token=per_token), make_batch(per_token)
    got = cross_entropy(student, None, batch, label_smoothing=smoothing)
    keep = batch["labels"] != -100
    expected = F.cross_entropy(student.logits[keep], batch["labels"][keep], label_smoothing=smoothing)
    torch.testing.assert_close(got, expected)


def test_cross_entropy_of_a_single_example_by_hand():
    (student, _) = logits_of([[math.log(3.0), 0.0]], [[0.0, 0.0]])
    got = cross_entropy(student, None, {"labels": torch.tensor([1])})
    assert got.item() == pytest.approx(math.log(4), abs=1e-6)


def test_floating_labels_are_regression_targets():
    student = SimpleNamespace(logits=torch.tensor([[1.0], [4.0]]))
    got = cross_entropy(student, None, {"labels": torch.tensor([0.0, 2.0], dtype=torch.float64)})
    assert got.item() == pytest.approx((1 + 4) / 2)


def test_hidden_mse_against_the_formula():
    student, teacher = make_outputs(0), make_outputs(1)
    expected = 0.0
    for layer in (1, 2):
        difference = (student.hidden_states[layer] - teacher.hidden_states[layer])[MASK.bool()]
        expected += difference.square().mean() / 2
    torch.testing.assert_close(hidden_mse(student, teacher, make_batch()), expected)


def test_hidden_mse_matches_spread_layers():
    student, teacher = make_outputs(0, layers=2), make_outputs(1, layers=6)
    for ours, theirs in ((1, 3), (2, 6)):
        teacher.hidden_states = tuple(
            student.hidden_states[ours] if i == theirs else x for i, x in enumerate(teacher.hidden_states)
        )
    assert hidden_mse(student, teacher, make_batch()) == 0


def test_embedding_mse_against_the_formula():
    student, teacher = make_outputs(0), make_outputs(1, layers=5)
    difference = (student.hidden_states[0] - teacher.hidden_states[0])[MASK.bool()]
    torch.testing.assert_close(embedding_mse(student, teacher, make_batch()), difference.square().mean())


def test_attention_mse_against_the_formula():
    student, teacher = make_outputs(0), make_outputs(1)
    expected = 0.0
    for s, t in zip(student.attentions, teacher.attentions, strict=True):
        pairs = [(s[b, :, :n, :n] - t[b, :, :n, :n]).square().mean(0).flatten() for b, n in enumerate((5, 3, 1))]
        expected += torch.cat(pairs).mean() / 2
    torch.testing.assert_close(attention_mse(student, teacher, make_batch()), expected)


def test_attention_score_mse_is_attention_mse_of_the_scores():
    student, teacher = make_outputs(0, layers=2, heads=2), make_outputs(1, layers=4, heads=3)
    moved = [SimpleNamespace(attentions=outputs.attention_scores) for outputs in (student, teacher)]
    got = attention_score_mse(student, teacher, make_batch())
    assert got == attention_mse(*moved, make_batch())
    assert got != attention_mse(student, teacher, make_batch())


def test_a_mask_in_the_scores_costs_nothing():
    student, teacher = make_outputs(0), make_outputs(1)
    expected = attention_score_mse(student, teacher, make_batch())
    minus = torch.zeros(B, 1, 1, N).masked_fill(MASK[:, None, None] == 0, -torch.inf)
    masked = SimpleNamespace(attention_scores=tuple(x + minus for x in student.attention_scores))
    got = attention_score_mse(masked, teacher, make_batch())
    assert got == expected
    got.backward()
    assert all(x.grad.isfinite().all() for x in student.attention_scores)


def test_attention_mse_averages_over_heads_where_their_numbers_differ():
    student, teacher = make_outputs(0, heads=2), make_outputs(1, heads=3)
    averaged = [
        SimpleNamespace(attentions=tuple(a.mean(1, keepdim=True) for a in outputs.attentions))
        for outputs in (student, teacher)
    ]
    expected = attention_mse(*averaged, make_batch())
    torch.testing.assert_close(attention_mse(student, teacher, make_batch()), expected)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n not in OWN_OBJECTIVES])
def test_zero_for_equal_outputs_and_positive_otherwise(name, per_token):
    student, teacher = make_outputs(0, per_token=per_token), make_outputs(1, per_token=per_token)
    function, batch = OBJECTIVES[name].function, make_batch(per_token)
    assert function(student, student, batch).item() == pytest.approx(0, abs=1e-6)
    assert function(student, teacher, batch) > 0


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_changes_nothing(name, per_token):
    student, teacher = make_outputs(0, per_token=per_token), make_outputs(1, per_token=per_token)
    function, batch = OBJECTIVES[name].function, make_batch(per_token)
    got = function(overwrite_padding(student), overwrite_padding(teacher), batch)
    torch.testing.assert_close(got, function(student, teacher, batch))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_finite_and_stay_out_of_padding(name, per_token):
    student, teacher = make_outputs(0, per_token=per_token), make_outputs(1, per_token=per_token)
    loss = OBJECTIVES[name].function(student, teacher, make_batch(per_token))
    assert loss.shape == ()
    loss.backward()
    tensors = [student.logits, *student.hidden_states, *student.attentions, *student.attention_scores]
    tensors += [student.embedding_table, *student.spike_rates.values()]
    grads = [x.grad for x in tensors if x.grad is not None]
    assert grads
    for grad in grads:
        assert grad.isfinite().all()
        assert grad.any()
        if grad.shape[:2] == (B, N):
            assert not grad[MASK == 0].any()


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_half_precision_is_computed_in_float32(name, per_token):
    student, teacher = (make_outputs(seed, per_token=per_token, dtype=torch.bfloat16) for seed in (0, 1))
    function, batch = OBJECTIVES[name].function, make_batch(per_token)
    got = function(student, teacher, batch)
    wide = [
        SimpleNamespace(
            logits=x.logits.float(),
            hidden_states=tuple(h.float() for h in x.hidden_states),
            attentions=tuple(a.float() for a in x.attentions),
            attention_scores=tuple(a.float() for a in x.attention_scores),
            embedding_table=x.embedding_table.float(),
            spike_rates={site: rate.float() for site, rate in x.spike_rates.items()},
        )
        for x in (student, teacher)
    ]
    assert got.dtype == torch.float32
    assert torch.equal(got, function(*wide, batch))


@pytest.mark.parametrize("name", [*STATE_OBJECTIVES, "attention_mse", "attention_score_mse"])
def test_a_batch_without_tokens_is_zero(name):
    student, teacher = make_outputs(0), make_outputs(1)
    loss = OBJECTIVES[name].function(student, teacher, {"attention_mask": torch.zeros_like(MASK)})
    assert loss == 0


@pytest.mark.parametrize("name", LOGIT_OBJECTIVES)
def test_other_classes_are_an_error(name):
    student, teacher = make_outputs(0), make_outputs(1)
    teacher.logits = torch.randn(B, C + 1)
    with pytest.raises(ValueError, match=r"student logits \(3, 3\) and teacher logits \(3, 4\) differ"):
        OBJECTIVES[name].function(student, teacher, make_batch())


@pytest.mark.parametrize("name", LOGIT_OBJECTIVES)
def test_one_logit_is_not_spread_over_many(name):
    student, teacher = make_outputs(0), make_outputs(1)
    teacher.logits = torch.randn(B, 1)
    with pytest.raises(ValueError, match="differ"):
        OBJECTIVES[name].function(student, teacher, make_batch())


@pytest.mark.parametrize("name", STATE_OBJECTIVES)
@pytest.mark.parametrize("width", [6, 1])
def test_other_widths_are_an_error(name, width):
    student, teacher = make_outputs(0), make_outputs(1, width=width)
    with pytest.raises(ValueError, match=r"student state \(3, 5, 4\) .* differ in shape; project the student first"):
        OBJECTIVES[name].function(student, teacher, make_batch())


def test_options_are_the_keyword_arguments():
    options = {name: objective.options() for name, objective in OBJECTIVES.items()}
    assert options["forward_kl"] == options["reverse_kl"] == ["temperature"]
    assert options["cross_entropy"] == ["label_smoothing"]
    assert options["head_tail_kl"] == ["temperature", "delta", "head", "tail", "head_weight", "tail_weight"]
    assert options["wasserstein"] == ["cost", "epsilon", "iterations"]
    assert options["spike_rate"] == ["target"]
    assert options["cosine"] == options["embedding_table_mse"] == []
    assert options["hidden_mse"] == options["attention_mse"] == options["logit_mse"] == []


def test_the_table_says_what_each_objective_needs():
    assert {name for name, objective in OBJECTIVES.items() if not objective.needs_teacher} == set(OWN_OBJECTIVES)
    labelled = {name for name, objective in OBJECTIVES.items() if objective.needs_labels}
    assert labelled == {"cross_entropy", "l2wrap", *LOGIT_OBJECTIVES}
    for name, objective in OBJECTIVES.items():
        student, teacher = make_outputs(0), make_outputs(1)
        optional = {"hidden_states", "attentions", "attention_scores", "embedding_table", "spike_rates"}
        for output in optional - set(objective.needs):
            setattr(student, output, None)
            setattr(teacher, output, None)
        assert objective.function(student, teacher if objective.needs_teacher else None, make_batch()).isfinite(), name


@pytest.mark.parametrize(
    ("unit", "per_token", "count"),
    [
        ("logit", False, B),
        ("logit", True, 9),
        ("label", False, B),
        ("label", True, 9),
        ("token", False, 9),
        ("token", True, 9),
        ("pair", False, 25 + 9 + 1),
        ("text", False, B),
        ("text", True, B),
    ],
)
def test_count_units(unit, per_token, count):
    got = count_units(unit, make_batch(per_token), per_token=per_token)
    assert got.item() == count
    assert got.is_floating_point()
    assert got.shape == ()


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_parts_weighted_by_their_units_make_up_the_whole(name, per_token):
    objective = OBJECTIVES[name]
    student, teacher, batch = (
        make_outputs(0, per_token=per_token),
        make_outputs(1, per_token=per_token),
        make_batch(per_token),
    )
    total, units = 0.0, 0.0
    for rows in (slice(0, 1), slice(1, 3)):
        part = [
            replaced(
                x,
                logits=x.logits[rows],
                hidden_states=tuple(h[rows] for h in x.hidden_states),
                attentions=tuple(a[rows] for a in x.attentions),
                attention_scores=tuple(a[rows] for a in x.attention_scores),
            )
            for x in (student, teacher)
        ]
        part_batch = {key: value[rows] for key, value in batch.items()}
        weight = count_units(objective.unit, part_batch, per_token=per_token)
        total, units = total + weight * objective.function(*part, part_batch), units + weight
    torch.testing.assert_close(total / units, objective.function(student, teacher, batch))


def test_cosine_by_hand():
    states = [
        torch.tensor([[[3.0, 4.0], [1.0, 0.0], [1.0, 1.0]]]),
        torch.tensor([[[4.0, 3.0], [-2.0, 0.0], [9.0, 9.0]]]),
    ]
    student, teacher = (SimpleNamespace(hidden_states=(torch.zeros(1, 3, 2), x, x)) for x in states)
    batch = {"attention_mask": torch.tensor([[1, 1, 0]])}
    assert cosine(student, teacher, batch).item() == pytest.approx(((1 - 24 / 25) + 2) / 2)


def test_cosine_matches_spread_layers_and_ignores_lengths():
    student, teacher = make_outputs(0, layers=2), make_outputs(1, layers=6)
    states = [torch.full((B, N, D), torch.nan)] * 7
    states[3], states[6] = 5 * student.hidden_states[1], 0.1 * student.hidden_states[2]
    assert cosine(student, replaced(teacher, hidden_states=tuple(states)), make_batch()).item() == pytest.approx(
        0, abs=1e-6
    )


def test_cosine_of_a_silent_token_is_one_and_has_a_finite_gradient():
    silent = torch.zeros(B, N, D, requires_grad=True)
    student, teacher = SimpleNamespace(hidden_states=(silent, silent)), make_outputs(1, layers=1)
    loss = cosine(student, teacher, make_batch())
    loss.backward()
    assert loss == 1
    assert silent.grad.isfinite().all()


def test_embedding_table_mse_by_hand_and_needs_equal_tables():
    student, teacher = (SimpleNamespace(embedding_table=torch.tensor(x)) for x in ([[1.0, 2.0]] * 3, [[1.0, 5.0]] * 3))
    assert embedding_table_mse(student, teacher, {}).item() == 4.5
    for shape in ((4, 2), (3, 1)):
        teacher = SimpleNamespace(embedding_table=torch.zeros(shape))
        message = (
            rf"student's table \(3, 2\) and the teacher's \({shape[0]}, {shape[1]}\) differ in vocabulary or width"
        )
        with pytest.raises(RecipeError, match=message):
            embedding_table_mse(student, teacher, {})


def test_spike_rate_by_hand():
    first, second = torch.tensor([0.2, 0.4], requires_grad=True), torch.tensor([0.0, 0.2], requires_grad=True)
    student = SimpleNamespace(spike_rates={"a": first, "b": second})
    loss = spike_rate(student, None, {}, target=0.25)
    assert loss.item() == pytest.approx((0.05**2 + 0.15**2) / 2)
    loss.backward()
    assert first.grad.tolist() == pytest.approx([0.05 / 2] * 2)
    assert second.grad.tolist() == pytest.approx([-0.15 / 2] * 2)


def test_spike_rate_errors():
    student = SimpleNamespace(spike_rates={"a": torch.tensor([0.2])})
    with pytest.raises(RecipeError, match=r"target is a share of neurons, in \[0, 1\], got 1\.5"):
        spike_rate(student, None, {}, target=1.5)
    with pytest.raises(RecipeError, match="this student's spikes have no gradient"):
        spike_rate(student, None, {})
    with torch.no_grad():
        assert spike_rate(student, None, {}).item() == pytest.approx(0.01)


def test_the_spike_rate_of_parts_is_that_of_the_whole_and_their_variance():
    parts, weights = torch.rand(3, L, T, requires_grad=True), torch.tensor([0.5, 0.2, 0.3])  # of real tokens

    def loss(rates):
        return spike_rate(SimpleNamespace(spike_rates={str(i): rate for i, rate in enumerate(rates)}), None, {})

    whole = torch.tensordot(weights, parts, 1)
    spread = (weights[:, None] * (parts.mean(-1) - whole.mean(-1)).square()).sum(0).mean()
    got = sum(weight * loss(part) for weight, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(got, loss(whole) + spread)
    assert spread > 0.01
