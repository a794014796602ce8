import copy
import os
import pickle
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from spikingjelly.activation_based import functional
from torch import nn
from torch.utils.checkpoint import checkpoint

from snlp_zoo.layers import ElasticBiSpike, SpikingLinear
from snlp_zoo.layers.neurons import amplitudes_updated
from snlp_zoo.ops import elastic_bispike
from snlp_zoo.ops.bispike import elastic_bispike_reference

MODES = ["first_batch", "ema", "learned"]
T, B, N, D = 4, 3, 6, 8


def batch(seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, B, N, D, generator=generator) * scale
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [0] * 5 + [1]])
    return x, mask


def loop_amplitudes(x, mask, *, k=2.0, beta=0.25, reset="symmetric"):
    """alpha[t] = k mean|m[t]| over real tokens, from the reference, one step after another."""
    v, alphas = torch.zeros_like(x[0]), []
    for x_t in x:
        m = (v + x_t).abs()
        alpha = k * (m.mean() if mask is None else m[mask.bool()].mean())
        v = elastic_bispike_reference(x_t[None], v, alpha[None], beta=beta, reset=reset).v
        alphas.append(alpha)
    return torch.stack(alphas)


class Checkpointed(nn.Module):
    """A spiking layer as our models use it, recomputed for the backward."""

    def __init__(self, **options):
        super().__init__()
        self.layer = SpikingLinear(D, D, time_steps=T, **options)  # the weights make sure that the neuron runs again
        nn.init.eye_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x, mask):
        with amplitudes_updated(self):
            return checkpoint(self.layer, x, mask, use_reentrant=False)


def trained_states(rows):
    """Name -> state after three training batches of which this process sees only `rows`."""
    nets = {mode: ElasticBiSpike(T, alpha_mode=mode, momentum=0.5) for mode in MODES}
    nets["checkpointed"] = Checkpointed(momentum=0.5)
    for seed in range(3):
        x, mask = batch(seed, scale=1.0 + seed)
        for net in nets.values():
            net(x[:, rows].clone().requires_grad_(), mask=mask[rows]).sum().backward()
            functional.reset_net(net)
    states = {f"{name}.{key}": v for name, net in nets.items() for key, v in net.state_dict().items()}
    return {key: v for key, v in states.items() if not key.endswith((".weight", ".bias"))}


def states_of_rank(rank, store):
    """`trained_states` as one of two processes with one and two of the three rows."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    try:
        return trained_states([slice(0, 1), slice(1, 3)][rank])
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":  # the second process of the last test
    torch.save(states_of_rank(1, sys.argv[1]), sys.argv[2])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reset", ["symmetric", "reference"])
@pytest.mark.parametrize(("k", "beta"), [(2.0, 0.25), (3.5, 0.9), (1.0, 0.0)])
def test_first_training_batch_sets_the_amplitudes(mode, reset, k, beta):
    node = ElasticBiSpike(T, firing_k=k, beta=beta, reset=reset, alpha_mode=mode)
    x, mask = batch()
    spikes = node(x, mask=mask)
    expected = loop_amplitudes(x, mask, k=k, beta=beta, reset=reset)
    torch.testing.assert_close(node.alpha.detach(), expected)
    assert node.initialized
    same = elastic_bispike(x, torch.zeros_like(x[0]), node.alpha.detach(), beta=beta, reset=reset).spikes
    torch.testing.assert_close(spikes.detach(), same)


def test_spikes_are_minus_alpha_zero_alpha():
    node = ElasticBiSpike(T)
    spikes = node(batch()[0])
    for s, alpha in zip(spikes, node.alpha, strict=True):
        torch.testing.assert_close(s.unique(), torch.tensor([-alpha, 0.0, alpha]))


def test_padding_does_not_change_the_amplitudes():
    (x, mask), nodes = batch(), [ElasticBiSpike(T, momentum=0.5) for _ in range(3)]
    loud = torch.where(mask.bool()[..., None], x, 100.0)
    for _ in range(3):
        nodes[0](x, mask=mask)
        nodes[1](loud, mask=mask)
        nodes[2](loud)
        for node in nodes:
            functional.reset_net(node)
    torch.testing.assert_close(nodes[0].alpha, nodes[1].alpha)
    assert (nodes[2].alpha > 10 * nodes[0].alpha).all()


def test_first_batch_mode_is_frozen_afterwards():
    node = ElasticBiSpike(T, alpha_mode="first_batch")
    node(batch()[0])
    alpha = node.alpha.clone()
    for seed in (1, 2):
        functional.reset_net(node)
        node(batch(seed, scale=9.0)[0])
    assert torch.equal(node.alpha, alpha)


def test_ema_mode_follows_one_forward_later():
    node = ElasticBiSpike(T, momentum=0.75)
    small, large = batch(0)[0], batch(1, scale=5.0)[0]

    def forward(x):
        functional.reset_net(node)
        node(x)
        return node.alpha.clone()

    first = forward(small)
    assert torch.allclose(forward(small), first)  # moved by what it was set from: nothing
    assert torch.allclose(forward(large), first)
    measured = loop_magnitudes(large, first)
    torch.testing.assert_close(node.magnitude, measured)
    torch.testing.assert_close(forward(small), 0.75 * first + 0.25 * 2.0 * measured)


def loop_magnitudes(x, alpha):
    v, means = torch.zeros_like(x[0]), []
    for x_t, alpha_t in zip(x, alpha, strict=True):
        means.append((v + x_t).abs().mean())
        v = elastic_bispike_reference(x_t[None], v, alpha_t[None], beta=0.25, reset="symmetric").v
    return torch.stack(means)


def test_ema_settles_on_a_new_scale():
    node = ElasticBiSpike(T, momentum=0.5)
    node(batch(0)[0])
    x = batch(1, scale=5.0)[0]
    for _ in range(40):
        functional.reset_net(node)
        node(x)
    torch.testing.assert_close(node.alpha, loop_amplitudes(x, None), rtol=1e-4, atol=0)


def test_learned_mode_scales_the_lsq_gradient():
    node = ElasticBiSpike(T, alpha_mode="learned")
    x, mask = batch()
    node(x, mask=mask)
    assert node.alpha.grad is None
    functional.reset_net(node)
    weights = torch.randn_like(x)
    (weights * node(x, mask=mask)).sum().backward()
    alpha = node.alpha.detach().clone().requires_grad_()
    spikes, _ = elastic_bispike_reference(x, torch.zeros_like(x[0]), alpha, beta=0.25, reset="symmetric")
    (weights * spikes).sum().backward()
    torch.testing.assert_close(node.alpha.grad, alpha.grad / (B * N * D) ** 0.5)
    assert "alpha" in dict(node.named_parameters())


@pytest.mark.parametrize("mode", ["first_batch", "ema"])
def test_fixed_amplitudes_are_buffers(mode):
    node = ElasticBiSpike(T, alpha_mode=mode)
    assert not list(node.parameters())
    assert set(node.state_dict()) == {"alpha", "initialized", "magnitude"}


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_never_moves_the_amplitudes(mode):
    node = ElasticBiSpike(T, alpha_mode=mode).eval()
    node(batch()[0])
    assert node.alpha.tolist() == [1] * T
    assert not node.initialized
    node.train()
    for seed in (1, 2):
        functional.reset_net(node)
        node(batch(seed)[0])
    before = copy.deepcopy(node.state_dict())
    node.eval()
    for seed in (3, 4):
        functional.reset_net(node)
        node(batch(seed, scale=7.0)[0])
    assert all(torch.equal(before[key], value) for key, value in node.state_dict().items())


@pytest.mark.parametrize("mode", MODES)
def test_loaded_amplitudes_are_not_measured_again(mode):
    node = ElasticBiSpike(T, alpha_mode=mode)
    node(batch()[0])
    other = ElasticBiSpike(T, alpha_mode=mode)
    other.load_state_dict(node.state_dict())
    assert torch.equal(other.alpha, node.alpha)
    assert other.initialized
    x = batch(1, scale=9.0)[0]
    functional.reset_net(node)
    assert torch.equal(other(x), node(x))
    assert torch.equal(other.alpha, node.alpha)


def test_loading_fresh_weights_measures_again():
    node = ElasticBiSpike(T)
    node(batch()[0])
    node.load_state_dict(ElasticBiSpike(T).state_dict())
    functional.reset_net(node)
    x = batch(1, scale=9.0)[0]
    node(x)
    torch.testing.assert_close(node.alpha, loop_amplitudes(x, None))


@pytest.mark.parametrize("mode", MODES)
def test_copies_and_pickles_keep_the_amplitudes(mode):
    node = ElasticBiSpike(T, alpha_mode=mode)
    node(batch()[0])
    functional.reset_net(node)
    for other in (copy.deepcopy(node), pickle.loads(pickle.dumps(node))):  # noqa: S301
        assert all(torch.equal(value, node.state_dict()[key]) for key, value in other.state_dict().items())
        x = batch(1, scale=9.0)[0]
        other.train()(x)
        assert not torch.equal(other.v, torch.zeros(()))
        assert node.v == 0.0


def test_amplitudes_repeat_when_a_sequence_runs_on():
    node = ElasticBiSpike(2, beta=0.0).eval()
    node.alpha.copy_(torch.tensor([1.0, 4.0]))
    assert node(torch.full((5, 1), 9.0)).flatten().tolist() == [1, 4, 1, 4, 1]
    assert node(torch.full((2, 1), 9.0)).flatten().tolist() == [4, 1]
    assert node(torch.full((3, 1), 9.0), from_rest=True).flatten().tolist() == [1, 4, 1]
    functional.reset_net(node)
    assert node(torch.full((1, 1), 9.0)).flatten().tolist() == [1]


def test_checkpointing_gives_equal_spikes_gradients_and_amplitudes():
    x, mask = batch()
    plain, recomputed = ElasticBiSpike(T, momentum=0.5), Checkpointed(momentum=0.5)
    for seed in range(3):
        x = batch(seed, scale=1.0 + seed)[0]
        inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
        outputs = plain(inputs[0], mask=mask), recomputed(inputs[1], mask=mask)
        functional.reset_net(plain)
        grads = [torch.autograd.grad((o * x).sum(), i)[0] for o, i in zip(outputs, inputs, strict=True)]
        assert torch.equal(*outputs)
        assert torch.equal(*grads)
        assert torch.equal(plain.alpha, recomputed.layer.neuron.alpha)
        assert torch.equal(plain.magnitude, recomputed.layer.neuron.magnitude)


def test_a_net_updates_every_node_once_per_forward():
    net = nn.Sequential(
        SpikingLinear(D, D, time_steps=T, momentum=0.5), SpikingLinear(D, D, time_steps=T, momentum=0.5)
    )
    for seed in range(2):
        with amplitudes_updated(net):
            net(batch(seed)[0])
    nodes = [layer.neuron for layer in net]
    expected = [0.5 * node.alpha + 0.5 * node.firing_k * node.magnitude for node in nodes]
    with amplitudes_updated(net):
        got = [node.alpha.clone() for node in nodes]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("scale", [0.0, 1e-30])
def test_silent_first_batch_keeps_everything_finite(scale):
    node = ElasticBiSpike(T)
    x = torch.full((T, B, N, D), scale, requires_grad=True)
    spikes = node(x)
    spikes.sum().backward()
    assert spikes.isfinite().all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_is_silent_at_first_can_be_heard_later(mode):
    node = ElasticBiSpike(T, alpha_mode=mode)
    x, _ = batch()
    node(x.masked_fill(torch.arange(T).view(T, 1, 1, 1) == 0, 0), from_rest=True)
    assert node.alpha[0] == 1
    node.zero_grad()
    x.requires_grad_()
    spikes = node(x, from_rest=True)
    spikes.sum().backward()
    assert spikes[0].abs().max() == 1
    assert x.grad[0].any()
    assert mode != "learned" or node.alpha.grad[0] != 0


def test_an_amplitude_that_half_precision_would_make_0():
    node = ElasticBiSpike(T).half()
    x = torch.ones(T, 1, 1, 1000, dtype=torch.float16)
    x[0] = torch.arange(1000) < 1
    node(1e-6 * x, from_rest=True)
    assert node.alpha[0] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha_mode": "frozen"}, "unknown alpha_mode 'frozen'; use one of first_batch, ema, learned"),
        ({"time_steps": 0}, "time_steps must be >= 1"),
        ({"firing_k": 0.0}, "firing_k > 0"),
        ({"firing_k": float("nan")}, "firing_k > 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ElasticBiSpike(**options)


def test_unknown_reset_is_an_error():
    with pytest.raises(ValueError, match="unknown reset 'hard'"):
        ElasticBiSpike(reset="hard")(torch.zeros(4, 2))


def test_two_processes_with_parts_of_a_batch_equal_one_with_all_of_it(tmp_path):
    store, result = str(tmp_path / "store"), tmp_path / "state.pt"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    second = subprocess.Popen([sys.executable, __file__, store, str(result)], env=environment)
    try:
        first = states_of_rank(0, store)
        assert second.wait(timeout=60) == 0
    finally:
        second.kill()
        second.wait()
    expected = trained_states(slice(None))
    for got in (first, torch.load(result)):
        assert got.keys() == expected.keys()
        for key, value in got.items():
            torch.testing.assert_close(value, expected[key], msg=lambda m, key=key: f"{key}: {m}")
