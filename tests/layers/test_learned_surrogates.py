import copy
import math

import pytest
import torch
from spikingjelly.activation_based import surrogate
from torch import nn

from snlp_zoo.layers import IFNode, LIFNode, ParametricLIFNode, TernaryLIFNode
from snlp_zoo.layers.neurons import set_surrogate_temperature
from snlp_zoo.ops import SURROGATES, Surrogate

EVERY = [LIFNode, IFNode, ParametricLIFNode, TernaryLIFNode]


def grads(node, current):
    current = current.clone().requires_grad_()
    weights = torch.randn(current.shape, generator=torch.Generator().manual_seed(1))
    (node(current, from_rest=True) * weights).sum().backward()
    return current.grad


def fit(node, steps=60):
    """A tiny network learns which of two patterns it sees."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), node, nn.Linear(12, 2))
    x = torch.randn(64, 6)
    labels = (x[:, 0] * x[:, 1] > 0).long()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02, weight_decay=0)
    losses = []
    for _ in range(steps):
        current = net[0](x).expand(4, -1, -1)
        loss = nn.functional.cross_entropy(net[2](node(current, from_rest=True)).mean(0), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("node_class", EVERY)
def test_training_moves_the_steepness(node_class, name):
    node = node_class(surrogate_function=name, learnable_surrogate=True)
    before = node.effective_surrogate().alpha.item()
    assert before == pytest.approx(Surrogate(name).alpha)
    losses = fit(node)
    after = node.effective_surrogate().alpha.item()
    assert after > 0
    assert abs(after / before - 1) > 0.02
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("node_class", EVERY)
def test_at_its_start_a_learnable_surrogate_changes_nothing(node_class):
    current = torch.randn(4, 3, 50)
    learned = node_class(surrogate_function=Surrogate("atan", 3.0), learnable_surrogate=True)
    expected = grads(node_class(surrogate_function=Surrogate("atan", 3.0)), current)
    torch.testing.assert_close(grads(learned, current), expected)


def test_the_parameter_has_one_axis_and_is_saved():
    node = LIFNode(learnable_surrogate=True)
    assert {name: tuple(p.shape) for name, p in node.named_parameters()} == {"surrogate_log_alpha": (1,)}
    node.surrogate_log_alpha.data.fill_(math.log(5))
    other = LIFNode(learnable_surrogate=True)
    other.load_state_dict(node.state_dict())
    assert other.effective_surrogate().alpha.item() == pytest.approx(5)
    assert not LIFNode().state_dict()
    assert not list(LIFNode().parameters())


@pytest.mark.parametrize("node_class", EVERY)
def test_a_parameter_given_to_spikingjellys_surrogate_is_trained(node_class):
    alpha = nn.Parameter(torch.tensor(2.0))
    node = node_class(surrogate_function=surrogate.ATan(alpha=alpha))
    assert [p for p in node.parameters() if p is alpha]
    grads(node, torch.randn(4, 3, 50))
    assert alpha.grad.abs() > 0
    with pytest.raises(ValueError, match="starts from a number, but the surrogate's alpha is a tensor"):
        node_class(surrogate_function=surrogate.ATan(alpha=alpha), learnable_surrogate=True)


@pytest.mark.parametrize("learnable", [True, False])
@pytest.mark.parametrize("node_class", EVERY)
def test_temperature_divides_the_steepness(node_class, learnable):
    net = nn.Sequential(node_class(surrogate_function="atan", learnable_surrogate=learnable), nn.Sequential(IFNode()))
    current, saved = torch.randn(4, 3, 50), set(net.state_dict())
    set_surrogate_temperature(net, 4)
    assert [net[0].surrogate_temperature, net[1][0].surrogate_temperature] == [4.0, 4.0]
    assert set(net.state_dict()) == saved
    alphas = [torch.as_tensor(node.effective_surrogate().alpha).item() for node in (net[0], net[1][0])]
    assert alphas == pytest.approx([0.5, 0.5])
    expected = grads(node_class(surrogate_function=Surrogate("atan", 0.5)), current)
    torch.testing.assert_close(grads(net[0], current), expected)
    spikes = net[0](current, from_rest=True)
    set_surrogate_temperature(net, 1.0)
    assert torch.equal(net[0](current, from_rest=True), spikes)  # only the backward knows the temperature
    assert copy.deepcopy(net)[0].surrogate_temperature == 1


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_temperature_must_be_positive(value):
    with pytest.raises(ValueError, match="temperature is positive, got"):
        set_surrogate_temperature(LIFNode(), value)


def test_a_learned_steepness_sees_the_temperature():
    """d alpha_eff / d log_alpha = alpha / temperature: at a higher temperature another point of another curve."""
    node, current = IFNode(learnable_surrogate=True), torch.tensor([[1.3]])
    set_surrogate_temperature(node, 2.0)
    node(current, from_rest=True).sum().backward()
    alpha = torch.tensor(1.0, requires_grad=True)  # atan's default 2, divided by 2
    (torch.atan(math.pi / 2 * alpha * 0.3) / math.pi).backward()
    assert node.surrogate_log_alpha.grad.item() == pytest.approx(alpha.grad.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_learns_in_either_precision(dtype):
    node = LIFNode(learnable_surrogate=True).to(dtype)
    current = torch.randn(4, 3, 50).to(dtype).requires_grad_()
    node(current, from_rest=True).float().square().sum().backward()
    assert node.surrogate_log_alpha.grad.dtype == dtype
    assert node.surrogate_log_alpha.grad.abs() > 0


def test_activation_checkpointing_gives_equal_gradients():
    node, current = LIFNode(learnable_surrogate=True), torch.randn(4, 3, 50)

    def run(checkpointed):
        node.zero_grad()
        x = current.clone().requires_grad_()
        call = lambda x: node(x, from_rest=True)  # noqa: E731
        out = torch.utils.checkpoint.checkpoint(call, x, use_reentrant=False) if checkpointed else call(x)
        (out * current).sum().backward()
        return x.grad, node.surrogate_log_alpha.grad

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)
