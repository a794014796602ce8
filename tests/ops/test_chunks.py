import pytest
import torch

from snlp_zoo.ops import chunks, elastic_bispike, lif
from snlp_zoo.ops.bispike import elastic_bispike_measured


def ternary(current, v_init):
    return elastic_bispike(current, v_init, torch.linspace(0.5, 1.5, len(current)), backend="torch")


def binary(current, v_init):
    return lif(current, v_init, tau=torch.linspace(1.5, 4, current.shape[-1]), v_threshold=0.8, backend="torch")


@pytest.mark.parametrize("elements", [1, 13, 40])
@pytest.mark.parametrize("op", [ternary, binary])
def test_chunks_change_nothing(op, elements, monkeypatch):
    current, v_init = torch.randn(4, 3, 7, 5, requires_grad=True), torch.randn(3, 7, 5, requires_grad=True)

    def outcome():
        output = op(current, v_init)
        return [*output, *torch.autograd.grad([o.sum() for o in output], [current, v_init])]

    whole = outcome()
    monkeypatch.setattr(chunks, "ELEMENTS", elements)
    for got, expected in zip(outcome(), whole, strict=True):
        assert torch.equal(got, expected)


def test_measured_totals_do_not_depend_on_chunks(monkeypatch):
    current, mask = torch.randn(4, 3, 7, 5), torch.rand(3, 7) < 0.6
    _, whole = elastic_bispike_measured(current, None, torch.ones(4), mask, backend="torch")
    monkeypatch.setattr(chunks, "ELEMENTS", 13)
    assert torch.equal(elastic_bispike_measured(current, None, torch.ones(4), mask, backend="torch")[1], whole)


def test_padding_may_hold_anything():
    current, mask = torch.randn(2, 3, 5), torch.tensor([1, 0, 1])
    expected = elastic_bispike_measured(current, None, torch.ones(2), mask, backend="torch")[1]
    current[:, 1] = torch.nan
    assert torch.equal(elastic_bispike_measured(current, None, torch.ones(2), mask, backend="torch")[1], expected)


def test_wide_spikes_of_a_half_input_keep_the_amplitude():
    current, alpha = torch.full((1, 4), 9.0, dtype=torch.bfloat16, requires_grad=True), torch.tensor([0.7])
    spikes, _ = elastic_bispike(current, None, alpha, spike_dtype=torch.float32, backend="torch")
    assert spikes.tolist() == [alpha.tolist() * 4]
    assert torch.autograd.grad(spikes.sum(), current)[0].dtype == torch.bfloat16
