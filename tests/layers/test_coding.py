import math

import pytest
import torch

from snlp_zoo.energy.kinds import Tag, contradiction
from snlp_zoo.layers import (
    Bernoulli,
    BitPlane,
    Direct,
    IFNode,
    MultiLevel,
    Poisson,
    Signed,
    TimeToFirstSpike,
    Unary,
    make_coding,
)
from snlp_zoo.layers.coding import _CODINGS, count_and_residual, last_membrane

EVERY_T = pytest.mark.parametrize("time_steps", [1, 4, 8])
DETERMINISTIC = [
    *[("unary", {"spread": spread}) for spread in (False, True)],
    ("time_to_first_spike", {}),
    ("bit_plane", {}),
    *[("multi_level", {"levels": 3, "positional": positional}) for positional in (False, True)],
]
every_code = pytest.mark.parametrize(("name", "options"), DETERMINISTIC)


def levels_of(coding):
    """Every value a code can hold, and how many there are."""
    if isinstance(coding, Signed):
        positive = levels_of(coding.inner)
        return torch.cat([-positive.flip(0)[:-1], positive])
    return torch.arange(coding.scale + 1) / coding.scale


def test_encode_repeats_without_a_copy():
    z = torch.randn(2, 3, requires_grad=True)
    x = Direct(4).encode(z)
    assert x.shape == (4, 2, 3)
    assert all(torch.equal(step, z) for step in x)
    assert x.untyped_storage().data_ptr() == z.untyped_storage().data_ptr()
    x.sum().backward()
    assert torch.equal(z.grad, torch.full((2, 3), 4.0))


def test_decode_is_the_mean_over_time():
    x = torch.randn(4, 2, 3)
    torch.testing.assert_close(Direct(4).decode(x), x.sum(0) / 4)


@pytest.mark.parametrize("time_steps", [1, 2, 8])
def test_decode_undoes_encode(time_steps):
    z = torch.randn(5)
    assert torch.equal(Direct(time_steps).decode(Direct(time_steps).encode(z)), z)  # powers of two: exact


def test_errors():
    with pytest.raises(ValueError, match="time_steps must be at least 1, got 0"):
        Direct(0)
    with pytest.raises(ValueError, match="expected 4 time steps on axis 0, got 3"):
        Direct(4).decode(torch.zeros(3, 2))


@EVERY_T
@every_code
@pytest.mark.parametrize("signed", [False, True])
def test_the_levels_of_a_code_come_back_exactly(name, options, time_steps, signed):
    coding = Signed(time_steps, name, **options) if signed else make_coding(name, time_steps, **options)
    levels = levels_of(coding)
    spikes = coding.encode(levels)
    assert spikes.shape == (time_steps, len(levels))
    assert spikes.dtype == levels.dtype
    assert torch.equal(coding.decode(spikes), levels)
    wide = coding.encode(levels.double().view(-1, 1))
    assert torch.equal(wide.squeeze(-1), spikes.double())


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("unary", {}, 9),
        ("time_to_first_spike", {}, 8),
        ("bit_plane", {}, 256),
        ("multi_level", {"levels": 3}, 17),
        ("multi_level", {"levels": 3, "positional": True}, 3**8),
    ],
)
def test_how_many_levels_a_code_has(name, options, count):
    coding = make_coding(name, 8, **options)
    assert len(coding.decode(coding.encode(torch.linspace(0, 1, 50_001))).unique()) == count
    signed = Signed(8, name, **options)
    assert len(signed.decode(signed.encode(torch.linspace(-1, 1, 100_001))).unique()) == 2 * count - 1


@EVERY_T
@every_code
def test_the_error_is_half_a_level_or_a_whole_one_where_it_rounds_down(name, options, time_steps):
    coding, z = make_coding(name, time_steps, **options), torch.rand(2000)
    error = z - coding.decode(coding.encode(z))
    if name != "time_to_first_spike":
        assert error.abs().max() <= 0.5 / coding.scale + 1e-6
    elif time_steps > 1:
        assert error.min() >= -1e-6
        assert error.max() < 1 / coding.scale


@pytest.mark.parametrize("spread", [False, True])
@EVERY_T
def test_a_rate_is_its_number_of_spikes(time_steps, spread):
    z = torch.rand(1000)
    spikes = Unary(time_steps, spread=spread).encode(z)
    assert torch.equal(spikes.sum(0), (time_steps * z).round())


def test_unary_trains_by_hand():
    z = torch.tensor([0.0, 0.5, 0.75, 1.0])
    assert Unary(4).encode(z).T.tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert Unary(4, spread=True).encode(z).T.tolist() == [[0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]]


@EVERY_T
def test_first_spike_times_are_the_formula_and_larger_values_come_earlier(time_steps):
    z = torch.cat([torch.zeros(1), torch.rand(1000).sort().values, torch.ones(1)])
    spikes = TimeToFirstSpike(time_steps).encode(z)
    assert torch.equal(spikes.sum(0), (z > 0).float())  # one at most, none for 0
    times = spikes[:, z > 0].argmax(0)
    assert torch.equal(times, ((1 - z[z > 0].double()) * (time_steps - 1)).ceil().long())
    assert (times.diff() <= 0).all()
    assert times[-1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("time_steps", [4, 8, 12])
def test_first_spike_times_of_levels_that_half_precision_rounds(time_steps, dtype):
    coding = TimeToFirstSpike(time_steps)
    levels = levels_of(coding).to(dtype)
    assert torch.equal(coding.decode(coding.encode(levels)), levels)
    assert TimeToFirstSpike(500).encode(torch.ones(1, dtype=dtype))[0] == 1


def test_only_the_first_spike_is_read():
    spikes = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], requires_grad=True)
    value = TimeToFirstSpike(5).decode(spikes)
    assert value.tolist() == [0.75, 1.0]


def test_eight_bit_planes_are_a_byte():
    pixels = torch.arange(256, dtype=torch.uint8)
    spikes = BitPlane(8).encode(pixels.float() / 255)
    bits = torch.stack([pixels >> shift & 1 for shift in range(7, -1, -1)])
    assert torch.equal(spikes.to(torch.uint8), bits)  # energy is spent on ones only
    assert torch.equal((BitPlane(8).decode(spikes) * 255).round().to(torch.uint8), pixels)


@pytest.mark.parametrize("levels", [2, 3])
def test_high_digits_first_allow_an_early_exit(levels):
    coding, z = MultiLevel(8, levels=levels, positional=True), torch.rand(500)
    spikes, exact = coding.encode(z), coding.decode(coding.encode(z))
    for steps in range(1, 8):
        early = torch.cat([spikes[:steps], torch.zeros_like(spikes[steps:])])
        assert ((exact - coding.decode(early)).abs() < float(levels) ** -steps).all()


@pytest.mark.parametrize("time_steps", [16, 23, 24])
def test_as_many_bits_as_float32_has(time_steps):
    coding = BitPlane(time_steps)
    n = torch.cat([torch.randint(0, 2**time_steps, (5000,)), torch.tensor([0, 2**time_steps - 1])])
    z = n.double() / (2**time_steps - 1)
    spikes = coding.encode(z)
    assert torch.equal((coding.decode(spikes) * (2**time_steps - 1)).round().long(), n)
    with pytest.raises(ValueError, match=r"BitPlane: 25 steps of 2 levels are 33554432 values, float32 tells 16777216"):
        BitPlane(25)


@pytest.mark.parametrize(("coding", "rate"), [(Bernoulli, lambda z: z), (Poisson, lambda z: 1 - math.exp(-z))])
def test_random_codes_fire_as_often_as_they_should(coding, rate):
    generator, samples, time_steps = torch.Generator().manual_seed(0), 20_000, 8
    for z in (0.0, 0.1, 0.5, 0.9, 1.0):
        spikes = coding(time_steps).encode(torch.full((samples,), z), generator)
        p, trials = rate(z), samples * time_steps
        assert abs(spikes.mean().item() - p) <= 4 * math.sqrt(p * (1 - p) / trials) + 1e-9, z
        steps = spikes.mean(1)  # independent over steps, each of them fair
        assert (steps - p).abs().max() <= 5 * math.sqrt(p * (1 - p) / samples) + 1e-6
        assert spikes.mean(0).var().item() == pytest.approx(p * (1 - p) / time_steps, rel=0.1, abs=1e-9)


@pytest.mark.parametrize("name", ["bernoulli", "poisson"])
def test_a_generator_repeats_random_spikes(name):
    z, coding = torch.rand(50), make_coding(name, 8)
    draws = [coding.encode(z, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    signed = [Signed(8, name).encode(-z, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    assert torch.equal(signed[0], -draws[0])
    assert torch.equal(signed[1], -draws[2])


def test_random_codes_are_decoded_to_the_value_with_many_steps():
    z = torch.linspace(0, 1, 11)
    generator = torch.Generator().manual_seed(0)
    for name in ("bernoulli", "poisson"):
        coding = make_coding(name, 20_000)
        values = coding.decode(coding.encode(z, generator))
        assert (values - z).abs().max() < 4 * math.sqrt(math.e / 20_000), name  # Poisson: variance (e^z - 1) / T
        assert 0 <= values.min() <= values.max() <= 1


def test_signed_spikes_are_a_pair_of_polarities():
    z = torch.tensor([-1.0, -0.5, 0.0, 0.25, 1.0])
    coding = Signed(4)
    spikes = coding.encode(z)
    assert spikes.T.tolist() == [[-1] * 4, [-1, -1, 0, 0], [0] * 4, [1, 0, 0, 0], [1] * 4]
    plus, minus = spikes.clamp_min(0), -spikes.clamp_max(0)
    assert not (plus * minus).any()
    assert torch.equal(Unary(4).decode(plus) - Unary(4).decode(minus), z)
    assert torch.equal(coding.encode(-z), -spikes)


@pytest.mark.parametrize("inner", [name for name in _CODINGS if name != "signed"])
def test_spikes_are_of_the_declared_kind(inner):
    z = torch.rand(100) * 0.99 + 0.01
    for coding, values in ((make_coding(inner, 4), z), (Signed(4, inner), torch.cat([z, -z]))):
        spikes = coding.encode(values)
        assert contradiction(spikes, Tag(coding.spike_kind)) is None
        if coding.spike_kind != "real":
            assert contradiction(2 * spikes - 0.5, Tag(coding.spike_kind)) is not None
    kinds = {"direct": "real", "multi_level": "integer"}
    assert make_coding(inner, 4).spike_kind == kinds.get(inner, "binary")
    assert Signed(4, inner).spike_kind == kinds.get(inner, "ternary")


@EVERY_T
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("name", "options"), [*DETERMINISTIC, ("direct", {}), ("bernoulli", {})])
def test_the_gradient_of_a_round_trip_is_one(name, options, time_steps, signed):
    coding = Signed(time_steps, name, **options) if signed else make_coding(name, time_steps, **options)
    z = torch.cat([torch.tensor([0.0, 1.0]), torch.rand(20)])
    if signed:
        z = torch.cat([z, -z])
    z.requires_grad_()
    coding.decode(coding.encode(z)).sum().backward()
    torch.testing.assert_close(z.grad, torch.ones_like(z))


def test_the_gradient_of_random_spikes_is_that_of_their_expectation():
    z, upstream = torch.rand(20, dtype=torch.float64).requires_grad_(), torch.randn(6, 20, dtype=torch.float64)
    (Bernoulli(6).encode(z) * upstream).sum().backward()
    torch.testing.assert_close(z.grad, upstream.sum(0))
    z.grad = None
    (Poisson(6).encode(z) * upstream).sum().backward()
    torch.testing.assert_close(z.grad, upstream.sum(0) * (-z.detach()).exp())


@pytest.mark.parametrize("name", _CODINGS)
def test_half_precision_and_no_elements(name):
    coding = make_coding(name, 4)
    spikes = coding.encode(torch.tensor([0.0, 0.25, 1.0], dtype=torch.bfloat16))
    assert spikes.dtype == coding.decode(spikes).dtype == torch.bfloat16
    assert coding.decode(coding.encode(torch.zeros(0, 3))).shape == (0, 3)


def test_spikes_may_be_whole_numbers():
    assert Unary(4).decode(torch.tensor([[True], [True], [False], [False]])).item() == 0.5
    assert BitPlane(2).decode(torch.tensor([[1], [0]])).item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", [name for name in _CODINGS if name != "direct"])
def test_values_out_of_range_are_an_error(name):
    coding = make_coding(name, 4)
    lowest = "-1" if name == "signed" else "0"
    for bad, seen in (([0.5, 1.25], r"0\.5 to 1\.25"), ([-1.5, 0.5], r"-1\.5 to 0\.5"), ([0.5, math.nan], "nan")):
        pattern = rf"{type(coding).__name__} codes values in \[{lowest}, 1\], got .*{seen}.*; scale them first"
        with pytest.raises(ValueError, match=pattern):
            coding.encode(torch.tensor(bad))
    with pytest.raises(ValueError, match=r"codes floating-point values, got torch\.int64"):
        coding.encode(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="expected 4 time steps on axis 0, got 3"):
        coding.decode(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="time_steps must be at least 1, got 0"):
        make_coding(name, 0)


def test_signed_is_named_as_the_way_out():
    with pytest.raises(ValueError, match=r"Bernoulli .* got -0\.5 to 0\.5; .* or use Signed for \[-1, 1\]"):
        Bernoulli(4).encode(torch.tensor([-0.5, 0.5]))


def test_codes_by_name():
    assert {name: type(make_coding(name, 2)) for name in _CODINGS} == _CODINGS
    assert make_coding("signed", 2, inner="multi_level", levels=5).inner.levels == 5
    with pytest.raises(
        ValueError, match=r"unknown coding 'bernouli', known are direct, .*; did you mean 'bernoulli'\?"
    ):
        make_coding("bernouli", 2)
    with pytest.raises(ValueError, match="unknown coding 'poison'"):
        Signed(2, "poison")
    with pytest.raises(TypeError, match="levels"):
        make_coding("unary", 2, levels=3)
    with pytest.raises(ValueError, match="levels must be at least 2, got 1"):
        MultiLevel(2, levels=1)


def test_the_membrane_of_a_readout_by_hand():
    current = torch.tensor([1.0, 2.0, 4.0])
    assert last_membrane(current).item() == 7
    assert last_membrane(current, leak=0.5).item() == 0.25 + 1 + 4
    assert last_membrane(torch.tensor([True, True, False]), leak=0.5).item() == 0.75
    with pytest.raises(ValueError, match=r"leak must be in \(0, 1\], got 0"):
        last_membrane(current, leak=0)


@pytest.mark.parametrize("v_threshold", [1.0, 0.75])
def test_count_and_residual_are_all_an_if_neuron_received(v_threshold):
    node = IFNode(v_threshold=v_threshold, v_reset=None)
    current, membranes = torch.randn(16, 200).double(), {}
    spikes = node(current, state=membranes)
    total = current.sum(0)
    torch.testing.assert_close(count_and_residual(spikes, membranes[node], v_threshold), total)
    assert (v_threshold * spikes.sum(0) - total).abs().max() > v_threshold / 2  # which the count alone is not
