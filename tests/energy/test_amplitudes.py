"""What an amplitude costs, and that folding it away costs nothing."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from snlp_zoo.energy import estimate, verify_spikes
from snlp_zoo.energy.record import record
from snlp_zoo.energy.report import count
from snlp_zoo.layers import TernaryLIFNode, fold_amplitude
from snlp_zoo.pareto import varied

T, N, D, M = 3, 5, 8, 6
BATCH = {"input_ids": torch.arange(5, 5 + N).unsqueeze(0)}


class Net(nn.Module):
    """ids -> embed -> T steps -> ternary neuron -> linear -> mean over T."""

    spike_driven = ("out",)

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(100, D), nn.Linear(D, M)
        self.node = TernaryLIFNode(v_threshold=0.1, **options)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids).expand(T, -1, -1, -1)
        return self.out(self.node(x, from_rest=True)).mean(0)


def rows(net):
    counter, *_ = count(net, BATCH)
    assert not counter.problems
    return {(row.name, row.role): row for row in counter.rows.values()}


def test_an_amplitude_is_one_multiplication_per_output_and_none_when_folded():
    net = Net(amplitude=0.7)
    before, energy = rows(net), estimate(net, BATCH, memory="none")
    product = before["out", "matmul"]
    assert (product.kind, product.ac, product.mac) == ("ternary x real", product.nnz * M, 0)
    assert before["out", "amplitude"].counts == {"mul": T * N * M}
    fold_amplitude(net, **BATCH)
    after, folded = rows(net), estimate(net, BATCH, memory="none")
    assert ("out", "amplitude") not in after
    assert not any(layer["role"] == "amplitude" for layer in folded.layers)
    assert after["out", "matmul"] == product
    assert after["node", "neuron"] == before["node", "neuron"]
    assert energy.totals["pj"] - folded.totals["pj"] == pytest.approx(3.7 * T * N * M)
    assert verify_spikes(net, BATCH).ok


def test_an_amplitude_of_one_costs_nothing_from_the_start():
    assert ("out", "amplitude") not in rows(Net())
    assert ("out", "amplitude") not in rows(Net(channels=D, time_steps=T))


def test_amplitudes_of_steps_cost_what_one_does():
    net = Net(time_steps=T)
    net.node.amplitude.data = torch.tensor([0.5, 1.0, 2.0])
    found = rows(net)
    assert found["out", "amplitude"].counts == {"mul": T * N * M}
    assert found["out", "matmul"].kind == "ternary x real"


def test_spikes_with_an_amplitude_of_their_channel_are_real_numbers_until_folded():
    net = Net(channels=D)
    net.node.amplitude.data.uniform_(0.5, 2)
    dense = rows(net)["out", "matmul"]
    assert (dense.kind, dense.ac, dense.mac) == ("real x real", 0, T * N * D * M)
    assert estimate(net, BATCH).spike_driven_fraction == 0
    found = verify_spikes(net, BATCH)
    assert found.failures == {"out": "declared spike-driven, but it multiplies real x real"}
    fold_amplitude(net, **BATCH)
    product = rows(net)["out", "matmul"]
    assert (product.kind, product.ac, product.mac) == ("ternary x real", product.nnz * M, 0)
    assert verify_spikes(net, BATCH).ok
    assert estimate(net, BATCH).spike_driven_fraction == 1


def test_channels_that_agree_are_one_amplitude():
    found = rows(Net(channels=D, amplitude=0.7))
    assert found["out", "matmul"].kind == "ternary x real"
    assert found["out", "amplitude"].counts == {"mul": T * N * M}


@pytest.mark.parametrize("amplitude", [0.7, 1.0])
def test_a_neuron_that_gives_something_else_is_found_out(amplitude):
    net = Net(amplitude=amplitude)
    net.node.register_forward_hook(lambda _, __, spikes: spikes + 0.1 * torch.rand_like(spikes))
    found = verify_spikes(net, BATCH)
    assert found.failures["node"].startswith("declared ternary {-a, 0, a}, but")


def test_a_swept_threshold_moves_both_and_leaves_amplitudes():
    net = Net(v_threshold_negative=0.3, amplitude=0.7)
    net.config = SimpleNamespace(time_steps=T)
    made = varied(net, T, 2.0)
    assert made.node.thresholds() == (0.2, 0.6)
    assert made.node.amplitude.item() == net.node.amplitude.item()
    assert net.node.thresholds() == (0.1, 0.3)


def test_recorded_membranes_are_in_units_of_the_threshold_of_their_sign_and_channel():
    net = Net(channels=D, v_threshold_negative=[0.05 * (i + 1) for i in range(D)])
    found = record(net, BATCH)["node"]
    assert found.spikes.unique().tolist() == [-1, 0, 1]
    assert torch.equal(found.spikes, (found.membranes >= 1).float() - (found.membranes <= -1).float())
    assert found.threshold.tolist() == [1] * T
    assert found.ternary
