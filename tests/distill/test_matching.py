import pytest
import torch

from snlp_zoo.distill.matching import Projection, layer_pairs


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
