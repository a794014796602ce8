from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from snlp_zoo.distill.matching import (
    NormedProjection,
    Projection,
    SharedProjection,
    attention_scores_recorded,
    layer_pairs,
    matched,
    score_projections,
)
from snlp_zoo.errors import RecipeError
from snlp_zoo.registry import build


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (3, 6, [(1, 2), (2, 4), (3, 6)]),
        (6, 12, [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12)]),
        (4, 12, [(1, 3), (2, 6), (3, 9), (4, 12)]),
        (1, 6, [(1, 6)]),
        (2, 2, [(1, 1), (2, 2)]),
        (2, 3, [(1, 1), (2, 3)]),
    ],
)
def test_layer_pairs_by_hand(student, teacher, expected):
    assert layer_pairs(student, teacher) == expected


@pytest.mark.parametrize(
    ("student", "teacher", "layer_map", "layers"),
    [
        (6, 12, "skip", [1, 3, 5, 7, 9, 11]),  # SpikeBERT as released: hidden_states[1:][::2]
        (3, 12, "skip", [1, 5, 9]),
        (12, 12, "skip", list(range(1, 13))),
        (5, 12, "skip", [1, 3, 5, 8, 10]),
        (6, 3, "skip", [1, 1, 2, 2, 3, 3]),
        (6, 3, "spread", [1, 1, 1, 2, 2, 3]),
        (3, 6, [6, 1, 1], [6, 1, 1]),
    ],
)
def test_layer_maps_by_hand(student, teacher, layer_map, layers):
    assert layer_pairs(student, teacher, layer_map) == [(i + 1, layer) for i, layer in enumerate(layers)]


@pytest.mark.parametrize("student", range(1, 13))
@pytest.mark.parametrize("teacher", range(1, 13))
def test_any_depth_skips_in_any_depth(student, teacher):
    layers = [j for _, j in layer_pairs(student, teacher, "skip")]
    assert layers == sorted(layers)
    assert (len(layers), layers[0]) == (student, 1)
    assert layers[-1] <= teacher
    assert len(set(layers)) == min(student, teacher)


@pytest.mark.parametrize(
    ("layer_map", "message"),
    [
        ([1, 2], r"layer_map \[1, 2\] must name one of the teacher's layers 1 to 6 for each of the student's 3"),
        ([1, 2, 7], r"\[1, 2, 7\].* 1 to 6"),
        ([0, 1, 2], r"\[0, 1, 2\].* 1 to 6"),
        ([1, 2, "3"], "use 'spread', 'skip', or a list"),
        ("every", "layer_map is 'every'; use 'spread', 'skip'"),
    ],
)
def test_no_such_layer_map(layer_map, message):
    with pytest.raises(RecipeError, match=message):
        layer_pairs(3, 6, layer_map)


@pytest.mark.parametrize("student", range(1, 13))
@pytest.mark.parametrize("teacher", range(1, 13))
def test_any_depth_learns_from_any_depth(student, teacher):
    pairs = layer_pairs(student, teacher)
    assert [i for i, _ in pairs] == list(range(1, student + 1))
    layers = [j for _, j in pairs]
    assert layers == sorted(layers)
    assert 1 <= layers[0] <= layers[-1] == teacher
    if student <= teacher:
        assert len(set(layers)) == student


def outputs(layers):
    """Every state, attention and score tensor holds the number of its layer; the embeddings are 0."""
    states = tuple(torch.tensor(float(i)) for i in range(layers + 1))
    return SimpleNamespace(hidden_states=states, attentions=states[1:], attention_scores=states[1:], logits=3)


@pytest.mark.parametrize(
    ("student", "teacher", "layer_map", "layers"),
    [
        (3, 6, "spread", [2, 4, 6]),
        (3, 6, "skip", [1, 3, 5]),
        (4, 2, "spread", [1, 1, 1, 2]),
        (4, 2, "skip", [1, 1, 2, 2]),
        (2, 3, [3, 1], [3, 1]),
    ],
)
def test_a_teacher_s_outputs_are_matched(student, teacher, layer_map, layers):
    got = matched(outputs(teacher), student, layer_map)
    assert [int(x) for x in got.hidden_states] == [0, *layers]
    assert [int(x) for x in got.attentions] == [int(x) for x in got.attention_scores] == layers
    assert got.logits == 3
    assert [j for _, j in layer_pairs(student, len(got.attentions))] == list(range(1, student + 1))  # layer on layer


def test_what_a_teacher_does_not_give_is_left_out():
    assert matched(SimpleNamespace(hidden_states=None, logits=1), 3, "skip") == SimpleNamespace(
        hidden_states=None, logits=1
    )


def test_equal_widths_need_no_parameters():
    projection = Projection(3, 8, 8)
    states = tuple(torch.randn(2, 5, 8) for _ in range(3))
    assert projection(states) is states
    assert not list(projection.parameters())


def test_each_state_has_a_linear_map_of_its_own():
    projection = Projection(3, 4, 6)
    states = tuple(torch.randn(2, 5, 4) for _ in range(3))
    projected = projection(states)
    assert [tuple(state.shape) for state in projected] == [(2, 5, 6)] * 3
    for layer, state, got in zip(projection.layers, states, projected, strict=True):
        torch.testing.assert_close(got, state @ layer.weight.T + layer.bias)
    assert len({layer.weight.data_ptr() for layer in projection.layers}) == 3


def test_gradients_reach_the_student_and_the_map():
    projection = Projection(2, 4, 6)
    states = tuple(torch.randn(2, 5, 4, requires_grad=True) for _ in range(2))
    sum(state.square().sum() for state in projection(states)).backward()
    assert all(tensor.grad.any() for tensor in (*states, *projection.parameters()))


def test_another_number_of_states_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        Projection(3, 4, 6)(tuple(torch.zeros(1, 1, 4) for _ in range(2)))


@pytest.mark.parametrize("width", [4, 6])
def test_the_shared_map_is_one_affine_map_for_all_states(width):
    projection = SharedProjection(4, width)
    states = tuple(torch.rand(2, 5, 4) for _ in range(3))
    with torch.no_grad():
        projection.layer.bias -= 1.0
    for state, got in zip(states, projection(states), strict=True):
        torch.testing.assert_close(got, state @ projection.layer.weight.T + projection.layer.bias)
        assert got.shape == (2, 5, width)
    assert [p.shape for p in projection.parameters()] == [(width, 4), (width,)]


def test_the_shared_map_of_equal_widths_starts_as_the_identity_and_learns():
    projection, state = SharedProjection(4, 4), torch.rand(2, 5, 4)
    assert torch.equal(projection((state,))[0], state)
    projection((state,))[0].square().sum().backward()
    assert all(parameter.grad.any() for parameter in projection.parameters())


@pytest.fixture
def bert():
    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16)
    return BertModel(config, add_pooling_layer=False).eval()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_teachers_scores_are_what_its_softmax_sees(bert, implementation):
    ids = torch.randint(1, 30, (2, 5))
    bert.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = bert(ids, output_attentions=True).attentions
        bert.set_attn_implementation(implementation)
        with attention_scores_recorded(bert) as scores:
            bert(ids)
    assert [tuple(score.shape) for score in scores] == [(2, 2, 5, 5)] * 3
    for score, attention in zip(scores, attentions, strict=True):
        torch.testing.assert_close(score.softmax(-1), attention)


def test_nothing_stays_on_the_teacher(bert):
    with pytest.raises(ZeroDivisionError), attention_scores_recorded(bert):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in bert.modules())


def test_a_teacher_without_query_and_key_is_an_error():
    teacher = GPT2Model(GPT2Config(vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(RecipeError, match=r"attention_score_mse needs .*attention\.self\.query.*GPT2Model has none"):
        score_projections(teacher)


def test_a_normed_map_for_each_layer_as_in_spikebert():
    with torch.device("meta"):
        taps = NormedProjection(12, 768, 768)
        student = build("spikebert_12l")
    assert sum(p.numel() for module in (student, taps) for p in module.parameters()) == 114_561_026
    taps = NormedProjection(2, 4, 6)
    states = tuple(torch.randn(2, 3, 4) for _ in range(3))
    embedded, *mapped = taps(states)
    assert embedded is states[0]
    for layer, state, out in zip(taps.layers, states[1:], mapped, strict=True):
        expected = torch.nn.functional.layer_norm(layer[0](state), (6,))
        torch.testing.assert_close(out, expected)
