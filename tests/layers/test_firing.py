import copy

import pytest
import torch
from spikingjelly.activation_based import functional
from torch import nn

import snlp_zoo
from snlp_zoo.layers import ElasticBiSpike, IFNode, LIFNode, ParametricLIFNode, TernaryLIFNode
from snlp_zoo.layers.firing import effective_domain_recorded, firing_rates_recorded, membranes_watched
from snlp_zoo.layers.neurons import set_surrogate_temperature
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


def over_tokens(node):
    node.over_tokens = True
    return node


@pytest.mark.parametrize("parts", [(3,), (1, 2), (1, 1, 1)])
def test_firing_rates_of_a_neuron_over_tokens_have_one_step(parts):
    net = nn.Sequential(over_tokens(LIFNode(tau=2.0)))
    x = torch.zeros(3, 2, 4)  # [N, B, D]
    x[:, 0] = 1.5  # fires at every second token: 1.5 / 2, then 1.125
    x[2, 1] = 9.0  # padding
    with firing_rates_recorded(net, torch.tensor([[1, 1, 1], [1, 1, 0]])) as rates:
        state = {}
        for part in x.split(parts):
            net[0](part, state=state)
    assert rates["spike_rates"]["0"].tolist() == pytest.approx([4 / 20])
    assert rates["firing_rate"].item() == pytest.approx(4 / 20)


@pytest.mark.parametrize("parts", [(3,), (2, 1)])
def test_effective_domain_of_a_neuron_over_tokens_leaves_padding_out(parts):
    net = nn.Sequential(over_tokens(LIFNode(surrogate_function="rect")))
    x = torch.full((3, 2, 4), -20.0)  # [N, B, D]: far below the threshold
    x[0, 0], x[2, 1] = 2.0, 22.0  # at the threshold; padding
    with effective_domain_recorded(net, torch.tensor([[1, 1, 1], [1, 1, 0]])) as shares:
        state = {}
        for part in x.split(parts):
            net[0](part, state=state)
    assert shares["0"].item() == pytest.approx(1 / 5)


@pytest.mark.parametrize("given", [False, True])
def test_membranes_of_a_neuron_over_tokens_start_where_its_state_ended(given):
    net, seen = nn.Sequential(over_tokens(LIFNode())), []
    node, x = net[0], 2 * torch.rand(6, 2, 4)  # [N, B, D]
    state = {node: torch.zeros(2, 4)}
    whole = node.membranes(x, None)
    with membranes_watched(net, lambda name, node, spikes, membranes, step: seen.append(membranes)):
        for part in x.split(3) if given else (x,):
            node(part, state=state)
    torch.testing.assert_close(torch.cat(seen), whole)


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


def domain(node, membranes, mask=None):
    """The effective domain of a node without a leak that gets these membranes at its one step, [B, N, D]."""
    with effective_domain_recorded(
        nn.Sequential(node), torch.ones(membranes.shape[:2]) if mask is None else mask
    ) as seen:
        node(membranes.unsqueeze(0), from_rest=True)
    assert not node._forward_hooks
    assert not node._forward_pre_hooks
    return seen["0"].item()


# |z| where the surrogate has fallen to a hundredth of its peak, from its formula
REACH = {
    "atan": 99**0.5 / 3.141592653589793,  # alpha 2: 1 / (1 + (pi z)^2)
    "sigmoid": 5.98645 / 4,  # alpha 4: sigmoid'(5.98645) = 0.01 / 4
    "triangular": 0.99,
    "fast_sigmoid": 9.0,  # 1 / (1 + 9)^2
    "rect": 0.5,
}


@pytest.mark.parametrize("name", REACH)
def test_effective_domain_ends_where_the_surrogate_does(name):
    reach = REACH[name]
    node = IFNode(surrogate_function=name)  # no leak: the membrane is the current
    z = torch.tensor([0.0, 0.999 * reach, -0.999 * reach, 1.001 * reach, -1.001 * reach]).view(1, 1, 5)
    assert domain(node, 1 + z) == pytest.approx(3 / 5)
    set_surrogate_temperature(node, 2.0)
    assert domain(node, 1 + 2 * z) == pytest.approx(3 / 5)
    assert domain(node, 1 + z) == 1


def test_effective_domain_by_hand():
    mask = torch.tensor([[1, 1], [1, 0]])
    membranes = torch.full((2, 2, 4), 0.9)
    membranes[0, 0, :3] = -9.0  # 3 of the 12 real ones are far from the threshold
    membranes[1, 1] = -9.0  # padding
    assert domain(IFNode(surrogate_function="rect"), membranes, mask) == pytest.approx(9 / 12)
    assert domain(IFNode(surrogate_function="ste"), membranes, mask) == 1


def test_effective_domain_of_two_thresholds():
    membranes = torch.tensor([0.0, 0.6, 1.4, 1.6, -0.1, -0.3, -0.9, -1.1]).view(1, 2, 4)
    node = TernaryLIFNode(tau=1.0, v_threshold_negative=0.5, surrogate_function="rect", amplitude=3.0)
    assert domain(node, membranes) == pytest.approx(6 / 8)  # [0.5, 1.5] or [-1, 0]


def test_effective_domain_of_elastic_bispike():
    node = ElasticBiSpike(1).eval()
    node.alpha.fill_(2.0)
    assert domain(node, torch.tensor([1.9, -1.9, 2.1, -2.1, 0.0]).view(1, 1, 5)) == pytest.approx(3 / 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_membranes_of_elastic_bispike_are_those_that_fired(dtype):
    node = ElasticBiSpike(4).eval()
    node.alpha.copy_(torch.tensor([0.5, 3.0, 1.0, 2.0]))
    current = (torch.randn(4, 2, 3, 5) * 2).to(dtype)
    seen = []
    with membranes_watched(node, lambda *call: seen.append(call)):
        node(current[:1])
        node(current[1:])
    spikes, membranes = (torch.cat([call[i] for call in seen]) for i in (2, 3))
    assert [call[4] for call in seen] == [0, 1]  # the step each call began with
    alpha = node.alpha.view(4, 1, 1, 1)
    assert torch.equal(spikes != 0, membranes.abs() > alpha / 2)
    inside = torch.cat([node.reached(call[3], call[4]) for call in seen])
    assert torch.equal(inside, membranes.abs() <= alpha)


def test_effective_domain_over_time_sees_the_resets():
    """Currents 2, 2 at tau 2: h = 1, 1 after a hard reset; without one the second would be 1.5."""
    node, current = LIFNode(surrogate_function="rect"), torch.full((2, 1, 1, 1), 2.0)
    with effective_domain_recorded(node, torch.ones(1, 1)) as seen:
        node(current)
    assert seen == {"": 1}
    soft = LIFNode(v_reset=None, surrogate_function=node.surrogate_function, decay_input=False)
    with effective_domain_recorded(soft, torch.ones(1, 1)) as seen:
        soft(current)  # h = 2, then 1 / 2 + 2
    assert seen[""] == 0


@pytest.mark.parametrize("make", [LIFNode, IFNode, ParametricLIFNode, TernaryLIFNode, ElasticBiSpike])
def test_effective_domain_is_the_same_in_pieces_and_from_rest(make):
    node, mask = make().eval(), torch.ones(2, 3)
    current, shares = torch.randn(4, 2, 3, 5) * 3, []
    with effective_domain_recorded(node, mask) as seen:
        whole = node(current, from_rest=True)
    shares.append(seen[""])
    with effective_domain_recorded(node, mask) as seen:
        pieces = torch.cat([node(current[:1]), node(current[1:])])
    shares.append(seen[""])
    assert torch.equal(whole, pieces)
    if make is not ElasticBiSpike:
        membranes = {}
        with effective_domain_recorded(node, mask) as seen:
            for part in (current[:1], current[1:]):
                node(part, state=membranes)
        shares.append(seen[""])
    assert 0 < shares[0] < 1
    assert all(share == shares[0] for share in shares)


def test_effective_domain_needs_the_time_axis_and_is_off_unless_enabled():
    node = LIFNode(step_mode="s")
    with pytest.raises(ValueError, match="step_mode is 's'"), effective_domain_recorded(node, torch.ones(1, 1)):
        node(torch.ones(1, 1, 3))
    assert not node._forward_hooks
    with effective_domain_recorded(node, torch.ones(1, 1), enabled=False) as seen:
        node(torch.ones(1, 1, 3))
    assert seen == {}


@pytest.mark.parametrize("entry", ["spikelm_tiny", "spikingbert_tiny"])
def test_effective_domain_of_every_layer_while_training(entry):
    torch.manual_seed(0)
    model = snlp_zoo.build(entry).train()
    ids, mask = torch.randint(5, 100, (2, 6)), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    model(ids, mask)  # amplitudes have seen a batch
    with effective_domain_recorded(model.base_model, mask) as seen:
        model(ids, mask).logits.sum().backward()
    sites = model.eval()(ids, mask, output_spike_rates=True).spike_rates
    assert seen.keys() == set(sites)
    assert all(0 < share <= 1 and share.ndim == 0 and not share.requires_grad for share in seen.values())


def test_a_rate_has_no_gradient_for_a_ternary_amplitude():
    """Nor does its value depend on it."""
    for options in ({}, {"channels": 5}, {"time_steps": 4}, {"time_steps": 4, "channels": 5}):
        node = TernaryLIFNode(amplitude=1.3, **options)
        current = torch.randn(4, 2, 3, 5, requires_grad=True)
        with firing_rates_recorded(nn.Sequential(node), MASK) as rates:
            spikes = node(current, from_rest=True)
        (rates["spike_rates"]["0"].sum() + 0 * spikes.sum()).backward()
        assert current.grad.any()
        assert node.amplitude.grad.abs().max() < 1e-6


def test_the_gradient_of_a_rate_where_one_neuron_stands_for_all_tokens():
    """As a spike-driven attention's gate does: its spikes count for every real token."""
    current = torch.randn(4, 2, 1, 5, requires_grad=True)
    rate, _, grad = rates_and_gradient(LIFNode(), current, MASK, WEIGHTS)
    expected = MASK.sum(1).view(1, 2, 1, 1) * WEIGHTS.view(-1, 1, 1, 1) / (4 * 5)
    torch.testing.assert_close(grad, expected.expand_as(grad))
    assert len(rate) == 4
