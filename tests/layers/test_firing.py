import pytest
import torch
from torch import nn

from snlp_zoo.layers import IFNode
from snlp_zoo.layers.firing import firing_rates_recorded


def test_firing_rates_count_real_tokens_only():
    net = nn.Sequential(IFNode(), nn.Identity(), IFNode(v_threshold=2.0))
    x = torch.zeros(2, 2, 3, 4)  # [T, B, N, D]
    x[0, 0, 0] = 1.5  # one token fires in all its 4 channels, at step 0
    x[:, 1, 2] = 9.0  # padding
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with firing_rates_recorded(net, mask) as rates:
        net(x)
    assert rates["spike_rates"]["0"].tolist() == pytest.approx([4 / 20, 0])
    assert rates["spike_rates"]["2"].tolist() == [0, 0]
    assert rates["firing_rate"].item() == pytest.approx(4 / 80)
    assert not net[0]._forward_hooks


def test_firing_rates_are_not_recorded_unless_enabled():
    net = nn.Sequential(IFNode())
    with firing_rates_recorded(net, torch.ones(1, 1), enabled=False) as rates:
        assert not net[0]._forward_hooks
        net(torch.ones(2, 1, 1, 3))
    assert rates == {}


def test_firing_rates_hooks_go_away_after_an_error():
    net = nn.Sequential(IFNode())
    with pytest.raises(RuntimeError, match="stop"), firing_rates_recorded(net, torch.ones(1, 1)):
        raise RuntimeError("stop")
    assert not net[0]._forward_hooks
