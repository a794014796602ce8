"""Where the spikes are, on wirings small enough to see: each way to be wrong is found out."""

import pytest
import torch
from torch import nn

from snlp_zoo.energy import estimate, verify_spikes
from snlp_zoo.energy.report import count
from snlp_zoo.errors import EnergyError
from snlp_zoo.layers import BitLinear, ElasticBiSpike, IFNode, LIFNode

T, N, D, M = 3, 5, 8, 6


class Toy(nn.Module):
    """ids -> embed -> T steps -> `wiring` -> mean over T. `wiring` is a function of the toy and x [T, B, N, D]."""

    spike_driven = ("out",)

    def __init__(self, wiring, node=None, bits=32):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.wiring = nn.Embedding(100, D), wiring
        self.node = node or LIFNode(v_threshold=0.1)
        self.other, self.third = LIFNode(v_threshold=0.2), LIFNode(v_threshold=0.05)
        self.inner, self.out = nn.Linear(D, D), BitLinear(D, M, bits=bits)

    def forward(self, input_ids, attention_mask):
        return self.wiring(self, self.embed(input_ids).expand(T, -1, -1, -1)).mean(0)


def fire(node, x):
    return node(x, from_rest=True)


def toy_batch(n=N):
    return {"input_ids": torch.arange(5, 5 + n).unsqueeze(0)}


def product(toy, name="out"):
    counter, *_ = count(toy, toy_batch())
    return next(row for row in counter.rows.values() if (row.name, row.role) == (name, "matmul"))


def plain(toy, x):
    return toy.out(fire(toy.node, x))


def test_binary_spikes():
    row = product(Toy(plain))
    assert 0 < row.nnz < T * N * D
    assert (row.kind, row.ac, row.mac) == ("binary x real", row.nnz * M, 0)
    found = verify_spikes(Toy(plain), toy_batch())
    assert found.ok
    assert (found.products[0].sources, found.spike_driven_fraction) == (("node",), 1)


@pytest.mark.parametrize("change", [lambda s: s + 0.1 * torch.randn_like(s), lambda s: 2 * s, lambda s: s - 0.5])
@pytest.mark.parametrize("node", [LIFNode(v_threshold=0.1), ElasticBiSpike(T)])
def test_a_neuron_that_is_dense_after_all(node, change):
    toy = Toy(plain, node)
    toy.node.register_forward_hook(lambda _, __, spikes: change(spikes) if node.spike_kind == "binary" else
                                   change(spikes) + torch.rand_like(spikes))  # fmt: skip
    found = verify_spikes(toy, toy_batch())
    assert not found.ok
    assert found.failures["node"].startswith(f"declared {node.spike_kind}")
    with pytest.raises(EnergyError, match=f"node: declared {node.spike_kind}"):
        estimate(toy, toy_batch())


@pytest.mark.parametrize("entry", ["spikelm_tiny", "spikingbert_tiny"])
def test_every_neuron_of_the_zoo_made_dense_is_found(entry, model_of, batch_of):
    model = model_of(entry)
    names = [name for name, module in model.named_modules() if hasattr(module, "spike_kind")]
    assert verify_spikes(model, batch_of(7)).ok
    for name in names:
        node = model.get_submodule(name)
        handle = node.register_forward_hook(lambda _, inputs, __: inputs[0] * 1.0)
        assert name in verify_spikes(model, batch_of(7)).failures, name
        handle.remove()


def test_spikes_overwritten_behind_the_counter():
    def wiring(toy, x):
        spikes = fire(toy.node, x)
        spikes.detach().add_(0.25)  # the same memory by another name
        return toy.out(spikes)

    found = verify_spikes(Toy(wiring), toy_batch())
    assert "out <- node" in found.failures


def test_a_real_path_that_holds_zeros_and_ones_by_chance():
    def wiring(toy, x):
        fire(toy.node, x)
        return toy.out((x > 0).to(x.dtype))

    row = product(Toy(wiring))
    assert (row.kind, row.ac, row.mac) == ("real x real", 0, T * N * D * M)
    found = verify_spikes(Toy(wiring), toy_batch())
    assert found.failures == {"out": "declared spike-driven, but it multiplies real x real"}


def test_a_silent_real_path_is_not_spikes():
    row = product(Toy(lambda toy, x: fire(toy.node, x) @ torch.zeros(D, M) + toy.out(x * 0)))
    assert (row.kind, row.mac) == ("real x real", T * N * D * M)


def residual(toy, x):
    spikes = fire(toy.node, x)
    total = spikes + fire(toy.other, spikes) + fire(toy.third, x)
    toy.seen = total
    return toy.out(total)


def test_a_residual_of_spikes_is_integers():
    """SpikeBERT's wiring: the sum of two and more spike trains enters the next layer."""
    toy = Toy(residual)
    row = product(toy)
    assert toy.seen.max() >= 2
    assert row.kind == "integer x real"
    assert row.ac == int(toy.seen.sum()) * M  # unrolled; never one per nonzero
    assert row.alternative["mul"] == int((toy.seen != 0).sum()) * M
    assert row.ac > row.nnz * M
    pj = next(layer["pj"] for layer in estimate(toy, toy_batch(), memory="none").layers if layer["role"] == "matmul")
    assert pj == pytest.approx(min(0.9 * row.ac, 4.6 * row.alternative["mul"]))


def test_integers_times_low_bit_weights_choose_the_cheaper_way():
    toy = Toy(residual, bits=1)
    row = product(toy)
    assert row.kind == "integer x lowbit"
    bits = 3 if toy.seen.max() == 3 else 2  # of values up to 2 or 3, with a sign
    assert row.ac == int(toy.seen.sum()) * M
    assert row.alternative["imul8"] == pytest.approx(int((toy.seen != 0).sum()) * M * bits / 8)


def test_spikes_times_one_number_stay_spikes():
    row = product(Toy(lambda toy, x: toy.out(fire(toy.node, x) * 0.37)))
    assert (row.kind, row.ac, row.mac) == ("scaled x real", row.nnz * M, 0)
    row = product(Toy(lambda toy, x: toy.out(fire(toy.node, x) * x)))
    assert (row.kind, row.ac) == ("real x real", 0)


def test_a_gate_behind_the_products_drives_nothing():
    """SpikeGPT's published wiring: spikes are multiplied onto products that never saw them."""

    def wiring(toy, x):
        return toy.out(toy.inner(x)) * fire(toy.node, x)[..., :M]

    report = estimate(Toy(wiring), toy_batch())
    assert report.spike_driven_fraction == 0
    assert report.totals["ac"] == 0
    assert report.totals["mac"] == T * N * (D * D + D * M)
    assert not verify_spikes(Toy(wiring), toy_batch()).ok


def test_spikes_side_by_side_stay_spikes():
    def wiring(toy, x):
        return toy.out(torch.cat([fire(toy.node, x)[..., :4], fire(toy.other, x)[..., 4:]], -1))

    row = product(Toy(wiring))
    assert (row.kind, row.ac, row.mac) == ("binary x real", row.nnz * M, 0)
    mixed = product(Toy(lambda toy, x: toy.out(torch.cat([fire(toy.node, x)[..., :4], x[..., 4:]], -1))))
    assert mixed.kind == "real x real"


def test_a_buffer_that_was_filled_with_data_is_no_weight():
    def wiring(toy, x):
        fire(toy.node, x)
        toy.state[:, :, :N] = x
        return toy.out(toy.state)

    toy = Toy(wiring)
    toy.register_buffer("state", torch.zeros(T, 1, N + 1, D))
    row = product(toy)
    assert (row.kind, row.mac, row.weight_bits) == ("real x real", T * (N + 1) * D * M, 32)


@pytest.mark.parametrize("make", ["new_zeros", "clone"])
def test_data_written_into_a_tensor_made_of_a_weight_is_no_weight(make):
    def wiring(toy, x):
        fire(toy.node, x)
        weight = toy.inner.weight
        kept = weight.new_zeros(T, 1, N, D) if make == "new_zeros" else weight[:N].clone().expand(T, 1, N, D).clone()
        kept[0] = x[0]
        return toy.out(kept)

    toy = Toy(wiring)
    assert (product(toy).kind, product(toy).mac) == ("real x real", T * N * D * M)
    assert not verify_spikes(toy, toy_batch()).ok


def test_what_follows_the_readout_is_charged_to_the_dense_network_too():
    def wiring(norm):
        def run(toy, x):
            y = toy.out(fire(toy.node, x)).mean(0)
            return (nn.functional.layer_norm(y, (M,)) if norm else y).unsqueeze(0)

        return run

    plain, normed = (estimate(Toy(wiring(norm)), toy_batch()).energy_pj["all_ops"] for norm in (False, True))
    added = {side: normed[side] - plain[side] for side in ("spiking", "dense_fp32")}
    assert added["spiking"] == pytest.approx(added["dense_fp32"])
    assert added["spiking"] > 0


def test_a_scale_of_any_shape_leaves_spikes_what_they_are():
    def wiring(toy, x):
        return toy.out(fire(toy.node, x) * toy.scale)

    toy = Toy(wiring)
    toy.scale = nn.Parameter(torch.full((1, 1, 1, 1), 0.37))
    assert product(toy).kind == "scaled x real"
    assert verify_spikes(toy, toy_batch()).ok


def test_real_numbers_times_low_bit_weights_are_not_driven_by_spikes():
    toy = Toy(lambda toy, x: toy.out(x + 0 * fire(toy.node, x)), bits=1.58)
    report = estimate(toy, toy_batch())
    layer = next(layer for layer in report.layers if (layer["name"], layer["role"]) == ("out", "matmul"))
    assert layer["ac"] > 0
    assert layer["spike_driven"] is False
    assert "products of spikes" not in report.to_markdown()


@pytest.mark.parametrize("claimed", [-0.1, 7.0, float("nan")])
def test_a_claim_is_a_fraction(claimed):
    with pytest.raises(EnergyError, match="between 0 and 1"):
        verify_spikes(Toy(plain), toy_batch(), claimed)


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(EnergyError, match="inference_mode"):
        verify_spikes(Toy(plain), toy_batch())


def test_two_spike_trains_add_where_they_coincide():
    def wiring(toy, x):
        toy.pair = fire(toy.node, x), fire(toy.other, x)
        return toy.pair[0] @ toy.pair[1].transpose(-1, -2)

    toy = Toy(wiring)
    row = product(toy, " @ node x other")
    both = toy.pair[0] @ toy.pair[1].transpose(-1, -2)
    assert (row.ac, set(row.counts)) == (int(both.sum()), {"iadd"})


def test_real_inputs_of_low_bit_weights_are_not_spikes():
    toy = Toy(lambda toy, x: toy.out(x + 0 * fire(toy.node, x)), bits=1.58)
    row = product(toy)
    weights = int((toy.out.quantised_weight() != 0).sum())
    assert (row.kind, row.ac, row.mac) == ("real x lowbit", T * N * weights, 0)
    assert estimate(toy, toy_batch()).spike_driven_fraction == 0


def test_operations_without_a_price_are_listed_with_their_place():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.tan(x)

    toy = Toy(lambda toy, x: plain(toy, torch.fft.fft(toy.odd(x)).real))
    toy.odd = Odd()
    with pytest.raises(EnergyError, match=r"without a price: tan in odd, _fft\w+ in Toy; add"):
        estimate(toy, toy_batch())


def test_causal_fused_attention_is_refused():
    def wiring(toy, x):
        x = fire(toy.node, x)
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    with pytest.raises(EnergyError, match="fused causal or grouped attention is not counted"):
        estimate(Toy(wiring), toy_batch())


def test_fused_attention_counts_as_written_out():
    def written_out(toy, x):
        q, k, v = toy.inner(x), fire(toy.node, x), fire(toy.other, x)
        return (q @ k.transpose(-1, -2) * D**-0.5).softmax(-1) @ v

    def fused(toy, x):
        return nn.functional.scaled_dot_product_attention(toy.inner(x), fire(toy.node, x), fire(toy.other, x))

    one, other = (estimate(Toy(wiring), toy_batch()) for wiring in (written_out, fused))
    assert one.totals == pytest.approx(other.totals)
    assert [layer["name"] for layer in one.layers] == [layer["name"] for layer in other.layers]


def test_without_a_leak_a_neuron_only_adds():
    for node, multiplications in ((IFNode(), 0), (LIFNode(), 2)):
        counter, *_ = count(Toy(plain, node), toy_batch())
        row = counter.rows["node", "neuron", True]
        assert row.counts["mul"] == multiplications * T * N * D
        assert row.counts["add"] == 2 * T * N * D


def test_a_model_without_spikes():
    with pytest.raises(EnergyError, match="no spiking neuron"):
        estimate(Toy(lambda toy, x: toy.out(x)), toy_batch())


def test_single_steps_are_refused():
    with pytest.raises(EnergyError, match="step_mode is 's'"):
        estimate(Toy(lambda toy, x: toy.out(toy.node(x)), LIFNode(step_mode="s")), toy_batch())


def test_a_published_fraction_must_hold(model_of, batch_of):
    model, batch = model_of("spikelm_tiny"), batch_of(9)
    found = verify_spikes(model, batch)
    assert verify_spikes(model, batch, found.spike_driven_fraction - 0.009).ok
    wrong = verify_spikes(model, batch, found.spike_driven_fraction - 0.011)
    assert wrong.failures.keys() == {"spike_driven_fraction"}
    assert [p.layer for p in found.products if not p.claimed] == ["spikelm.pooler.dense", "classifier"]
    assert not any(p.spike_driven for p in found.products if not p.claimed)
