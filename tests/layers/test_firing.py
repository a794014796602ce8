import copy

import pytest
import torch
from spikingjelly.activation_based import functional
from torch import nn

from snlp_zoo.layers import ElasticBiSpike, IFNode, LIFNode
from snlp_zoo.layers.firing import firing_rates_recorded
from snlp_zoo.registry import build


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


def rates_and_gradient(node, current, mask, weights):
    """The rates of one neuron's site, and the gradient of their weighted sum at its spikes."""
    seen = []
    node.register_forward_hook(lambda module, inputs, spikes: spikes.retain_grad() or seen.append(spikes))
    with firing_rates_recorded(nn.Sequential(node), mask) as rates:
        node(current, from_rest=True)
    (rates["spike_rates"]["0"] * weights).sum().backward()
    return rates["spike_rates"]["0"], seen[0].detach(), seen[0].grad


MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])
WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 3.0])


def test_the_gradient_of_a_rate_is_that_of_the_mean_spike_for_unsigned_spikes():
    current = torch.randn(4, 2, 3, 5, requires_grad=True)
    rate, spikes, grad = rates_and_gradient(LIFNode(), current, MASK, WEIGHTS)
    share = (
        MASK[None, :, :, None] * WEIGHTS.view(-1, 1, 1, 1) / (4 * 5)
    )  # of each neuron on a real token, silent or not
    torch.testing.assert_close(grad, share.expand_as(grad))
    torch.testing.assert_close(rate, (spikes * MASK[None, :, :, None]).sum((1, 2, 3)) / 20)
    assert current.grad.any()


def test_the_gradient_of_a_rate_is_that_of_the_mean_magnitude_for_signed_spikes():
    node = ElasticBiSpike(4).train()
    rate, spikes, grad = rates_and_gradient(node, torch.randn(4, 2, 3, 5, requires_grad=True), MASK, WEIGHTS)
    assert spikes.min() < 0 < spikes.max()
    s = spikes.clone().requires_grad_()
    amplitude = node.alpha.view(-1, 1, 1, 1)
    share = (s.abs() / amplitude * MASK[None, :, :, None]).sum((1, 2, 3)) / 20
    torch.testing.assert_close(rate, share)
    (share * WEIGHTS).sum().backward()
    torch.testing.assert_close(grad, s.grad)


def test_rates_are_equal_with_and_without_gradients_and_finite_without_tokens():
    net = nn.Sequential(LIFNode(), ElasticBiSpike(4))
    x = torch.randn(4, 2, 3, 5).mul(2).requires_grad_()

    def rates_of(mask):
        functional.reset_net(net)
        with firing_rates_recorded(net, mask) as rates:
            net(x)
        return [*rates["spike_rates"].values(), rates["firing_rate"]]

    net(x)  # measures amplitudes
    net.eval()
    differentiable = rates_of(MASK)
    with torch.no_grad():
        plain = rates_of(MASK)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(differentiable, plain, strict=True))
    assert all(rate.requires_grad for rate in differentiable)
    assert not any(rate.requires_grad for rate in plain)
    assert not any(rate.any() for rate in rates_of(torch.zeros_like(MASK)))  # 0, not NaN


def test_rates_learn_through_a_model_whose_layers_are_computed_again():
    """The second time, for the backward, nobody watches them."""
    plain = build("spikelm_tiny").train()
    batch = {"input_ids": torch.randint(5, 120, (2, 12))}
    plain(**batch)  # measures amplitudes
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable()
    for model in (plain, checkpointed):
        rates = model(**batch, output_spike_rates=True).spike_rates
        torch.stack([rate.mean() for rate in rates.values()]).square().mean().backward()
    ours, theirs = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (plain, checkpointed))
    torch.testing.assert_close(ours, theirs)
    assert all(ours[f"spikelm.layers.{layer}.attention.query.weight"].any() for layer in range(2))
    assert all(grad.isfinite().all() for grad in ours.values())
