import copy
import math
import pickle
from itertools import product

import pytest
import torch
from spikingjelly.activation_based import functional, monitor, neuron, op_counter, surrogate
from spikingjelly.activation_based.model.parametric_lif_net import MNISTNet
from torch import nn

from snlp_zoo.layers import ElasticBiSpike, IFNode, LIFNode, ParametricLIFNode, TernaryLIFNode, make_neuron
from snlp_zoo.ops import Surrogate

PAIRS = {
    "lif": (LIFNode, neuron.LIFNode, {"tau": 2.5}),
    "if": (IFNode, neuron.IFNode, {}),
    "plif": (ParametricLIFNode, neuron.ParametricLIFNode, {"init_tau": 2.5}),
}
SURROGATES = {
    "atan": surrogate.ATan,
    "sigmoid": surrogate.Sigmoid,
    "triangular": surrogate.PiecewiseQuadratic,
    "rect": surrogate.Rect,
    "ste": surrogate.DeterministicPass,
}
EVERY = [LIFNode, IFNode, ParametricLIFNode, TernaryLIFNode, ElasticBiSpike]


def run(node, x):
    """Spikes, last membrane and gradients of x and of the node's parameters, over two calls without a reset."""
    x = x.clone().requires_grad_()
    spikes = torch.cat([node(x[:3]), node(x[3:])])
    weights = torch.randn(spikes.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    inputs = [x, *node.parameters()]
    return [spikes, node.v, *torch.autograd.grad((weights * spikes).sum() + node.v.sum(), inputs)]


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("kind", PAIRS)
def test_equals_spikingjelly(kind, name):
    ours, theirs, options = PAIRS[kind]
    decays = (True, False) if kind != "if" else (None,)
    for v_reset, detach, decay in product((0.0, -0.2, None), (True, False), decays):
        setting = options | {"v_reset": v_reset, "detach_reset": detach, "step_mode": "m", "v_threshold": 0.8}
        setting |= {} if decay is None else {"decay_input": decay}
        x = torch.randn(7, 2, 5, dtype=torch.float64) + 0.4
        expected = run(theirs(surrogate_function=SURROGATES[name](), **setting).double(), x)
        for function in (name, Surrogate(name), SURROGATES[name]()):
            got = run(ours(surrogate_function=function, **setting).double(), x)
            assert torch.equal(got[0], expected[0])
            for one, other in zip(got[1:], expected[1:], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_spikingjelly_surrogate_keeps_its_steepness():
    x = torch.randn(5, 4, dtype=torch.float64)
    expected = run(neuron.LIFNode(surrogate_function=surrogate.ATan(alpha=5.0), detach_reset=True, step_mode="m"), x)
    got = run(LIFNode(surrogate_function=surrogate.ATan(alpha=5.0)), x)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_unknown_spikingjelly_surrogate():
    node = LIFNode(surrogate_function=surrogate.LeakyKReLU())
    with pytest.raises(ValueError, match="no counterpart of SpikingJelly's LeakyKReLU; use one of ATan, "):
        node(torch.zeros(2, 3))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("node_class", EVERY)
def test_single_steps_equal_multi_step(node_class, training):
    multi, single = node_class(step_mode="m").train(training), node_class(step_mode="s").train(training)
    for _ in range(3):
        x = torch.randn(4, 2, 5, requires_grad=True)
        expected, got = multi(x), torch.stack([single(x_t) for x_t in x])
        assert torch.equal(got, expected)
        assert torch.equal(single.v, multi.v)
        weights = torch.randn_like(expected)
        torch.testing.assert_close(*(torch.autograd.grad((weights * s).sum(), x) for s in (got, expected)))
        functional.reset_net(multi)
        functional.reset_net(single)
    for one, other in zip(multi.state_dict().values(), single.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("node_class", EVERY)
def test_reset_net_forgets(node_class):
    node, x = node_class().eval(), torch.randn(4, 2, 50)
    first = node(x)
    assert node.v.any()
    assert not torch.equal(node(x), first)
    functional.reset_net(node)
    assert node.v == 0.0
    assert torch.equal(node(x), first)


@pytest.mark.parametrize("node_class", EVERY)
def test_from_rest_leaves_no_state(node_class):
    node, x = node_class().eval(), torch.randn(4, 2, 5)
    assert torch.equal(node(x, from_rest=True), node(x, from_rest=True))
    assert node.v == 0.0
    expected = node(x)
    v = node.v
    assert torch.equal(node(x, from_rest=True), expected)
    assert node.v is v


def test_from_rest_starts_at_the_resting_potential():
    node, x = LIFNode(v_reset=-0.5), torch.randn(4, 6)
    assert torch.equal(node(x, from_rest=True), node(x))


def test_from_rest_needs_multi_step():
    with pytest.raises(ValueError, match="needs step_mode='m'"):
        LIFNode(step_mode="s")(torch.zeros(3), from_rest=True)


@pytest.mark.parametrize("node_class", EVERY)
def test_another_batch_shape_starts_at_rest(node_class):
    node = node_class().eval()
    node(torch.randn(4, 3, 5))
    functional.reset_net(node)
    x = torch.randn(4, 2, 5)
    assert torch.equal(node(x), node(x, from_rest=True))


@pytest.mark.parametrize("node_class", EVERY)
def test_stored_membranes(node_class):
    node, plain = node_class(store_v_seq=True).eval(), node_class().eval()
    x = torch.randn(4, 2, 5)
    assert torch.equal(node(x), plain(x))
    assert node.v_seq.shape == x.shape
    assert torch.equal(node.v_seq[-1], plain.v)
    functional.reset_net(plain)
    for x_t, v in zip(x, node.v_seq, strict=True):
        plain(x_t[None])
        assert torch.equal(plain.v, v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("node_class", EVERY)
def test_half_precision_input_keeps_a_float32_membrane(node_class, dtype):
    node, wide = node_class().eval(), node_class().eval()
    x = torch.randn(4, 2, 5).to(dtype)
    for x_part in (x[:2], x[2:]):
        assert torch.equal(node(x_part).float(), wide(x_part.float()))
    assert node.v.dtype == torch.float32
    assert torch.equal(node.v, wide.v)
    assert node(x).dtype == dtype


@pytest.mark.parametrize("node_class", EVERY)
def test_copies_and_pickles(node_class):
    node, x = node_class().eval(), torch.randn(4, 2, 5)
    expected = node(x, from_rest=True)
    with torch.no_grad():
        node(x)
    for other in (copy.deepcopy(node), pickle.loads(pickle.dumps(node))):  # noqa: S301
        assert torch.equal(other.v, node.v)
        assert torch.equal(other(x, from_rest=True), expected)


@pytest.mark.parametrize("node_class", EVERY)
def test_spikingjelly_monitors_see_the_spikes(node_class):
    net, x = nn.Sequential(nn.Linear(5, 6), node_class(), nn.Linear(6, 3), node_class()).eval(), torch.randn(4, 2, 5)
    with monitor.OutputMonitor(net, node_class) as spikes, monitor.AttributeMonitor("v", False, net, node_class) as v:
        out = net(x)
        assert spikes.monitored_layers == ["1", "3"]
        assert torch.equal(spikes["3"][0], out)
        assert torch.equal(v["1"][0], net[1].v)


@pytest.mark.parametrize("kind", PAIRS)
def test_spikingjelly_op_counter_counts_our_spikes(kind):
    ours, _, options = PAIRS[kind]
    net = nn.Sequential(nn.Linear(16, 16), ours(**options), nn.Linear(16, 10)).eval()
    x = torch.randn(4, 1, 16) * 3
    counters = [op_counter.SynOpCounter(), op_counter.MACCounter()]
    with op_counter.DispatchCounterMode(counters), torch.no_grad():
        net(x)
    functional.reset_net(net)
    spikes = int(net[1](net[0](x)).sum())
    assert spikes > 0
    assert counters[0].get_total() == spikes * 10  # binary input: one addition per spike and output
    assert counters[1].get_total() == 4 * 16 * 16  # real input: dense


@pytest.mark.parametrize("node_class", EVERY)
def test_runs_inside_a_network_spikingjelly_wrote(node_class):
    net = MNISTNet(channels=2, spiking_neuron=node_class)
    functional.set_step_mode(net, "m")
    x = torch.rand(4, 2, 1, 28, 28)
    out = net(x)
    assert out.shape == (4, 2, 10)
    out.square().mean().backward() if out.any() else out.sum().backward()
    grads = {name: p.grad for name, p in net.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    assert grads["conv_fc.0.weight"].any()
    functional.reset_net(net)
    net.eval()
    first = net(x)
    functional.reset_net(net)
    assert torch.equal(net(x), first)


def test_single_step_network_equals_multi_step():
    net = MNISTNet(channels=2, spiking_neuron=LIFNode, step_mode="s").eval()
    x = torch.rand(4, 1, 1, 28, 28)
    expected = torch.stack([net(x_t) for x_t in x])
    functional.reset_net(net)
    functional.set_step_mode(net, "m")
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize(
    ("kind", "node_class"),
    [
        ("lif", LIFNode),
        ("if", IFNode),
        ("plif", ParametricLIFNode),
        ("ternary", TernaryLIFNode),
        ("elastic", ElasticBiSpike),
    ],
)
def test_make_neuron(kind, node_class):
    assert type(make_neuron(kind)) is node_class
    assert make_neuron("lif", tau=3.0).tau == 3.0


def test_make_neuron_errors():
    with pytest.raises(ValueError, match=r"unknown neuron 'ternry', known are lif, .*did you mean 'ternary'"):
        make_neuron("ternry")
    with pytest.raises(TypeError, match="tua"):
        make_neuron("lif", tua=2.0)


def test_parametric_tau_starts_where_asked():
    node = ParametricLIFNode(init_tau=3.0)
    assert 1 / node.w.sigmoid().item() == pytest.approx(3.0)
    assert math.isfinite(node.w.item())
