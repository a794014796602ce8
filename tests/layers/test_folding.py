"""Folded networks compute what they computed, or say what stands in the way and stay as they are."""

import pytest
import torch
from torch import nn

import snlp_zoo
from snlp_zoo.errors import FoldError
from snlp_zoo.layers import BitLinear, ElasticBiSpike, LIFNode, SpikingLinear, TernaryLIFNode, fold_amplitude, pack

T, B, N, D, M = 4, 2, 5, 8, 6


class Toy(nn.Module):
    """x [T, B, N, D] -> node -> `wiring`, a function of the toy, x and the node's spikes."""

    def __init__(self, wiring, bits=32, **options):
        super().__init__()
        torch.manual_seed(0)
        self.wiring = wiring
        self.node, self.second = (TernaryLIFNode(v_threshold=0.4, **options) for _ in range(2))
        self.out, self.other = BitLinear(D, M, bits=bits), nn.Linear(D, M)
        self.norm, self.inner = nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x):
        return self.wiring(self, x, self.node(x, from_rest=True))


def toy(wiring, *, amplitude=None, dtype=torch.float32, **options):
    made = Toy(wiring, **options).to(dtype)
    for node in (made.node, made.second) if "second" in wiring.__code__.co_names else (made.node,):
        node.amplitude.data.uniform_(0.3, 2) if amplitude is None else node.amplitude.data.fill_(amplitude)
    return made


def inputs(dtype=torch.float32):
    return torch.randn(T, B, N, D, dtype=dtype, generator=torch.Generator().manual_seed(1)) * 2


def state(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def assert_folds(model, tolerance=1e-5, x=None):
    x = inputs(next(model.parameters()).dtype) if x is None else x
    before, kept = model(x).detach(), state(model)
    assert before.any()
    assert fold_amplitude(model, x=x) is model
    torch.testing.assert_close(model(x).detach(), before, rtol=tolerance, atol=tolerance)
    assert state(model).keys() == kept.keys()
    assert all(x.shape == kept[name].shape for name, x in state(model).items())
    return kept


def assert_refused(model, *messages, **batch):
    kept, trained = state(model), {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(FoldError) as error:
        fold_amplitude(model, **batch or {"x": inputs()})
    for message in messages:
        assert message in str(error.value)
    assert all(torch.equal(x, kept[name]) for name, x in state(model).items())
    assert trained == {name: p.requires_grad for name, p in model.named_parameters()}
    return str(error.value)


def plain(toy, x, s):
    return toy.out(s)


def heads(toy, x, s):
    """Split into heads, reordered, and put together again."""
    s = s.unflatten(-1, (2, D // 2)).transpose(-2, -3)
    return toy.out(s.transpose(-2, -3).flatten(-2))


def shuffled(toy, x, s):
    return toy.out(torch.cat([s[..., D // 2 :], s[..., : D // 2]], -1).permute(1, 0, 2, 3).contiguous())


def picked(toy, x, s):
    return toy.out(s[:, :, torch.tensor([0, 2])]) + toy.out(s[:, :, 0]).unsqueeze(2)


def two_layers(toy, x, s):
    return toy.out(s) + toy.other(s.detach().clone())


def two_neurons(toy, x, s):
    return toy.out(torch.cat([s[..., :3], toy.second(toy.inner(x), from_rest=True)[..., 3:]], -1))


def in_a_row(toy, x, s):
    return toy.out(toy.second(toy.inner(s), from_rest=True))


WIRINGS = [plain, heads, shuffled, picked, two_layers, two_neurons, in_a_row]


@pytest.mark.parametrize("channels", [None, D])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_outputs_stay(wiring, channels):
    model = toy(wiring, channels=channels)
    kept = assert_folds(model)
    node, out = model.node, model.out
    assert (node.amplitude == 1).all()
    assert not node.amplitude.requires_grad
    assert torch.equal(out.bias, kept["out.bias"])
    if wiring is plain:
        torch.testing.assert_close(out.weight, kept["out.weight"] * kept["node.amplitude"])


@pytest.mark.parametrize("channels", [None, D])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_in_float64_outputs_stay_to_fourteen_digits(wiring, channels):
    assert_folds(toy(wiring, channels=channels, dtype=torch.float64), 1e-13)


def test_a_power_of_two_is_exact():
    assert_folds(toy(in_a_row, amplitude=0.5), 0)


def test_each_channel_goes_to_its_own_column():
    model = toy(shuffled, channels=D)
    kept = assert_folds(model)
    order = torch.tensor([*range(D // 2, D), *range(D // 2)])
    torch.testing.assert_close(model.out.weight, kept["out.weight"] * kept["node.amplitude"][order])


@pytest.mark.parametrize("channels", [None, D])
def test_amplitudes_of_steps_fold_only_if_they_are_equal(channels):
    assert_folds(toy(plain, amplitude=0.7, time_steps=T, channels=channels))
    model = toy(plain, amplitude=0.7, time_steps=T, channels=channels)
    model.node.amplitude.data[1] = 0.8
    message = assert_refused(model, "node its amplitudes differ between time steps")
    assert "node feeds" not in message


def test_a_negative_amplitude_folds_too():
    assert_folds(toy(plain, amplitude=-0.7))


def residual(toy, x, s):
    return toy.out(x + s)


def after_norm(toy, x, s):
    return toy.out(toy.norm(s))


def product(toy, x, s):
    return toy.out(s) + (s @ toy.inner(x).transpose(-1, -2) @ x)[..., :M]


def scaled_in_place(toy, x, s):
    s.mul_(0.5)
    return toy.out(s)


def output(toy, x, s):
    return {"hidden_states": (x, s), "logits": toy.out(s)}


def nothing(toy, x, s):
    return toy.out(x)


def several_channels(toy, x, s):
    return toy.out(s.transpose(-1, -2)[:, :, :, torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])])


def also_real(toy, x, s):
    return toy.out(s) + toy.out(x)


def weight_in_the_open(toy, x, s):
    return toy.out(s) + x @ toy.out.weight.mT


def joined_with_real(toy, x, s):
    return toy.out(torch.cat([s[..., :3], x[..., 3:]], -1))


def as_integers(toy, x, s):
    return toy.out(s.long().to(x.dtype))


def another_neuron(toy, x, s):
    return toy.out(toy.second(s, from_rest=True))


@pytest.mark.parametrize(
    ("wiring", "message"),
    [
        (residual, "node feeds add in Toy"),
        (after_norm, "node feeds native_layer_norm in norm"),
        (product, "node feeds bmm in Toy"),
        (scaled_in_place, "node feeds mul_ in Toy"),
        (output, "node is the model's output"),
        (nothing, "node feeds no linear layer"),
        (several_channels, "node feeds out, whose inputs have several amplitudes"),
        (also_real, "node feeds out, which gets other inputs too"),
        (weight_in_the_open, "node feeds out, whose weight is used elsewhere, or computed"),
        (joined_with_real, "node feeds cat in Toy"),
        (as_integers, "node feeds _to_copy in Toy"),
        (another_neuron, "node feeds sub in second"),
    ],
)
def test_what_makes_it_inexact_is_named(wiring, message):
    model = toy(wiring, channels=D)
    model.second.amplitude.data.fill_(1)  # nothing to fold there
    assert_refused(model, message)


def test_all_that_cannot_be_folded_is_named_and_nothing_is_changed():
    def wiring(toy, x, s):
        return toy.out(s) + toy.other(toy.norm(toy.second(toy.inner(s) + s, from_rest=True)))

    message = assert_refused(toy(wiring), "node feeds add in Toy", "second feeds native_layer_norm in norm")
    assert "and none was" in message


def test_a_shared_weight_is_refused():
    model = toy(two_layers)
    model.other.weight = model.out.weight
    assert_refused(model, "node feeds out, whose weight is used elsewhere", "feeds other, whose weight")


def test_a_computed_weight_is_refused():
    model = toy(plain)
    nn.utils.parametrizations.weight_norm(model.out)
    assert_refused(model, "node feeds out, whose weight is used elsewhere, or computed")


def test_half_precision_weights_are_refused():
    model = toy(plain, amplitude=0.7).bfloat16()
    assert_refused(model, "node feeds out, whose bfloat16 weight would be rounded", x=inputs(torch.bfloat16))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bits", [1.58, 1])
def test_low_bit_weights_take_one_amplitude(bits, packed):
    model = toy(plain, amplitude=0.7, bits=bits)
    model = pack(model) if packed else model
    before = state(model)
    assert_folds(model, x=inputs())
    if packed:
        assert torch.equal(model.out.weight_packed, before["out.weight_packed"])
        torch.testing.assert_close(model.out.weight_scale, 0.7 * before["out.weight_scale"])
    assert_refused(toy(plain, bits=bits, channels=D), "whose low-bit weight has one positive scale for all its inputs")
    assert_refused(toy(plain, bits=bits, amplitude=-0.7), "whose low-bit weight has one positive scale")


def test_low_bit_weights_that_would_be_rounded_otherwise_are_refused():
    """Rounding has an epsilon of 1e-5 besides the scale: a latent weight that close to a half can change its sign."""
    model = toy(plain, amplitude=0.5, bits=1.58)
    weight = model.out.weight.data
    for _ in range(20):  # on the border, while the mean that makes it moves along
        weight[0, 0] = 0.5 * (weight.abs().mean() + 1e-5) * (1 + 1e-6)
    assert_refused(
        model, "node feeds out, 1 of whose low-bit weights would be rounded otherwise (pack the model first)"
    )
    assert_folds(pack(model), x=inputs())


def test_elastic_bispike_stays_where_it_is():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.free = SpikingLinear(D, M, time_steps=T), ElasticBiSpike(T)

        def forward(self, x):
            return self.linear(self.free(x, from_rest=True))

    model = Net()
    model(inputs())
    message = assert_refused(model.eval(), "linear.neuron its amplitudes are its thresholds too")
    assert "free its amplitudes are its thresholds too" in message


def test_what_has_no_amplitude_is_left_alone():
    model = nn.Sequential(nn.Linear(D, D), LIFNode(), nn.Linear(D, M))
    kept = state(model)
    assert fold_amplitude(model) is model
    assert all(torch.equal(x, kept[name]) for name, x in state(model).items())


def test_folding_twice_changes_nothing_more():
    model = toy(in_a_row)
    assert_folds(model)
    kept = state(model)
    fold_amplitude(model, x=inputs())
    assert all(torch.equal(x, kept[name]) for name, x in state(model).items())


def test_a_folded_model_saves_and_loads():
    model = toy(in_a_row, channels=D)
    assert_folds(model)
    fresh = toy(in_a_row, channels=D)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(inputs()), model(inputs()))
    assert fold_amplitude(fresh) is fresh  # nothing to do: no inputs needed


def test_modes_membranes_and_hooks_are_left_as_they_were():
    model = nn.Sequential(nn.Linear(D, D), TernaryLIFNode(amplitude=0.5, v_threshold=0.3), nn.Linear(D, M))
    model.train()[2].eval()
    model(inputs())
    v = model[1].v
    fold_amplitude(model, input=inputs()[:, :1])
    assert model[1].v is v
    assert [m.training for m in model] == [True, True, False]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_single_steps_too():
    nodes = {"step_mode": "s", "amplitude": 0.7, "v_threshold": 0.3}
    model = nn.Sequential(nn.Linear(D, D), TernaryLIFNode(**nodes), nn.Linear(D, M))
    x = inputs()[0, 0, 0]
    before = model(x)
    model[1].reset()
    fold_amplitude(model, input=x)
    torch.testing.assert_close(model(x), before)


def test_example_inputs_are_asked_for():
    with pytest.raises(FoldError, match=r"Toy needs example inputs: fold_amplitude\(model, name=tensor"):
        fold_amplitude(toy(plain))


def test_a_transformers_model_needs_no_example():
    """SpikeLM with ternary neurons before its last layers; amplitudes of 1 are left elsewhere."""
    model = snlp_zoo.build("spikelm_tiny")
    torch.manual_seed(0)
    for layer in model.base_model.layers:
        inner, outer = layer.mlp.up.out_features, layer.mlp.down.out_features
        node = TernaryLIFNode(v_threshold=0.2, channels=inner)
        node.amplitude.data.uniform_(0.3, 2)
        layer.mlp.down = FromRest(node, nn.Linear(inner, outer))
    for module in model.modules():
        if isinstance(module, ElasticBiSpike):
            module.alpha.fill_(1)
            module.initialized.fill_(True)
    ids = torch.randint(5, 100, (2, 9))
    model.eval().double()
    before = model(ids).logits
    fold_amplitude(model)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-12, atol=1e-12)
    assert all((layer.mlp.down.node.amplitude == 1).all() for layer in model.base_model.layers)


class FromRest(nn.Module):
    def __init__(self, node, linear):
        super().__init__()
        self.node, self.linear = node, linear

    def forward(self, x, mask):
        return self.linear(self.node(x, from_rest=True))
