import pytest
import torch
from torch import nn

from snlp_zoo.layers import SpikeLinear
from snlp_zoo.layers.spike_statistics import LARGEST, SpikeCounts, spikes_counted


def test_counts_of_the_golden_token():
    layer = SpikeLinear(4, 3)
    found = SpikeCounts.of(layer, torch.tensor([[0.1, -0.5, 2.0, -0.05]]))  # n = 0, -2, 9, 0; 9 is 1001
    assert (found.values, found.spikes, found.cut, found.largest) == (4, 3, 0, 9)
    assert found.histogram.nonzero().flatten().tolist() == [0, 2, 9]
    assert found.zero_share == 0.5
    assert found.spikes_per_value == 0.75
    layer.max_count = 3  # of which 9 is cut to 3, which is 11
    found = SpikeCounts.of(layer, torch.tensor([[0.1, -0.5, 2.0, -0.05]]))
    assert (found.spikes, found.cut, found.largest) == (3, 1, 3)
    layer.max_count = 2  # -2 is at the limit, and not cut
    assert SpikeCounts.of(layer, torch.tensor([[0.1, -0.5, 2.0, -0.05]])).cut == 1


@pytest.mark.parametrize("options", [{"code": "ttfs"}, {"code": "twos_complement"}, {"symmetric": False}, {}])
def test_spikes_are_those_that_the_layer_emits(options):
    layer, x = SpikeLinear(32, 3, **options), torch.randn(5, 7, 32)
    found = SpikeCounts.of(layer, x)
    counts = layer.spiked(x).counts
    emitted = sum(int((spikes != 0).sum()) for _, spikes in layer.spike_trains(counts))
    assert found.spikes == emitted > 0
    assert found.histogram.sum() == found.values == x.numel()


def test_large_counts_are_in_the_last_place_and_batches_add_up():
    layer = SpikeLinear(1000, 1)
    x = torch.zeros(2, 1000)
    x[:, 0], x[1, 1] = 1.0, 0.5
    both = SpikeCounts.of(layer, x)
    assert both.largest == 3000
    assert both.histogram[LARGEST] == 3
    added = SpikeCounts.of(layer, x[:1]) + SpikeCounts.of(layer, x[1:])
    for name, value in vars(both).items():
        assert torch.equal(torch.as_tensor(getattr(added, name)), torch.as_tensor(value))
    assert SpikeCounts.of(layer, x[:0]).histogram.sum() == SpikeCounts.of(layer, x[:0]).values == 0
    assert SpikeCounts().zero_share == SpikeCounts().spikes_per_value == 0


def test_layers_are_watched_by_name_and_left_alone():
    model = nn.Sequential(SpikeLinear(8, 8), nn.GELU(), nn.ModuleDict({"inner": SpikeLinear(8, 4)})["inner"])
    x = torch.randn(3, 8)
    with spikes_counted(model) as found, torch.no_grad():
        assert found == {}
        model(x)
        model(x[:1])
    assert found.keys() == {"0", "2"}
    assert found["0"].values == found["2"].values == 32
    model(x)
    assert found["0"].values == 32
    assert not any(layer._forward_pre_hooks for layer in model)
