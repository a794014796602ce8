import pytest
import torch

from snlp_zoo.layers import count_codes
from snlp_zoo.layers.count_codes import CODES, alphabet, decode, encode, events, steps, weights

SIGNS = [True, False]
ALPHABETS = {"binary": (0, 1), "ternary": (-1, 1)}
SPEC = torch.tensor([5, -5, 0, 7, -8, 3])  # its golden counts


def whole_numbers(largest, signed):
    return torch.arange(-largest if signed else 0, largest + 1)


@pytest.mark.parametrize("signed", SIGNS)
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("largest", [1, 2, 3, 4, 7, 8, 15, 31, 64, 100, 255, 256, 300])
def test_every_number_in_range_is_recomposed(code, signed, largest):
    counts = whole_numbers(largest, signed)
    for levels in (2, 3, 4, 16) if code in ("multi_level", "gif") else (4,):
        time_steps = steps(code, largest, levels, signed)
        spikes = encode(counts, code, time_steps, levels, signed)
        assert spikes.shape == (time_steps, *counts.shape)
        assert torch.equal(decode(spikes, code, levels, signed), counts)
        assert torch.equal(spikes, encode(counts, code, None, levels, signed))  # so many steps are taken anyway
        low, high = ALPHABETS.get(alphabet(code, signed), (1 - levels, levels - 1))
        assert spikes.min() >= (low if signed else 0)
        assert spikes.max() <= high
        assert torch.equal(events(counts, code, levels, time_steps), (spikes != 0).sum(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("code", CODES)
def test_trains_have_the_shape_and_dtype_of_counts(code, dtype):
    counts = whole_numbers(7, True).to(dtype).view(3, 5)
    spikes = encode(counts, code)
    assert (spikes.dtype, spikes.shape[1:]) == (dtype, counts.shape)
    assert torch.equal(decode(spikes.float(), code), counts.float())


@pytest.mark.parametrize(
    ("code", "signed", "table"),  # T for N of 1, 7, 8, 255, 256 as the module's table says
    [
        ("unary", True, [2, 14, 16, 510, 512]),
        ("unary", False, [1, 7, 8, 255, 256]),
        ("ternary", True, [1, 7, 8, 255, 256]),
        ("ttfs", True, [1, 7, 8, 255, 256]),
        ("bitwise", True, [1, 3, 4, 8, 9]),  # 256 needs nine bits
        ("twos_complement", True, [2, 4, 5, 9, 10]),
        ("multi_level", True, [1, 2, 2, 4, 5]),
        ("gif", True, [1, 3, 3, 85, 86]),
    ],
)
def test_time_steps(code, signed, table):
    assert [steps(code, largest, 4, signed) for largest in (1, 7, 8, 255, 256)] == table
    assert steps(code, 0, 4, signed) == steps(code, 1, 4, signed)


def test_golden_numbers_of_bitwise():
    spikes = encode(SPEC, "bitwise")
    assert spikes.shape == (4, 6)
    assert spikes.abs().sum() == 10
    assert spikes[:, 1].tolist() == [0, -1, 0, -1]
    assert torch.equal(decode(spikes, "bitwise"), SPEC)


def test_golden_number_of_twos_complement():
    assert encode(torch.tensor([-5]), "twos_complement", 4)[:, 0].tolist() == [1, 0, 1, 1]
    assert weights("twos_complement", 4) == [-8, 4, 2, 1]


def test_unary_gives_positive_counts_before_negative_ones():
    assert encode(torch.tensor([2, -3, 0]), "unary", 6).T.tolist() == [
        [1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1],
        [0, 0, 0, 0, 0, 0],
    ]
    assert encode(torch.tensor([2]), "unary", 3, signed=False)[:, 0].tolist() == [1, 1, 0]


def test_a_larger_number_fires_earlier_and_once_in_time_to_first_spike():
    counts = whole_numbers(100, True)
    spikes = encode(counts, "ttfs")
    assert spikes.abs().sum(0).tolist() == (counts != 0).long().tolist()
    times = spikes[:, counts > 0].abs().argmax(0)
    assert (times.diff() < 0).all()


def test_multi_level_steps_are_digits_and_gif_steps_are_filled():
    assert encode(torch.tensor([27, -6]), "multi_level", levels=4).T.tolist() == [[1, 2, 3], [0, -1, -2]]
    assert encode(torch.tensor([7, -2]), "gif", levels=4).T.tolist() == [[3, 3, 1], [-2, 0, 0]]


@pytest.mark.parametrize("code", CODES)
def test_what_steps_cannot_hold_is_cut_off(code):
    time_steps = steps(code, 7)
    if code in ("unary", "ternary", "gif", "multi_level", "bitwise"):
        held = decode(encode(torch.tensor([1000]), code, time_steps), code)
        assert held == decode(encode(torch.tensor([999]), code, time_steps), code)
        assert 7 <= held <= 15


@pytest.mark.parametrize("code", CODES)
def test_no_numbers_at_all(code):
    spikes = encode(torch.zeros(0, 3), code)
    assert spikes.shape[1:] == (0, 3)
    assert events(torch.zeros(0, 3), code).shape == (0, 3)


def test_errors():
    with pytest.raises(ValueError, match=r"unknown spike code 'morse', known are unary, .*gif"):
        encode(SPEC, "morse")
    with pytest.raises(ValueError, match="levels must be at least 2, got 1"):
        encode(SPEC, "gif", levels=1)
    with pytest.raises(ValueError, match=r"whole numbers, got 0\.5"):
        encode(torch.tensor([1.0, 0.5]), "bitwise")
    with pytest.raises(ValueError, match="not negative where signed is False, got -8"):
        encode(SPEC, "unary", signed=False)
    with pytest.raises(ValueError, match="whole numbers, got nan"):
        encode(torch.tensor([float("nan")]), "bitwise")
    with pytest.raises(ValueError, match="whole numbers, got inf"):
        encode(torch.tensor([float("inf")]), "bitwise")
    with pytest.raises(ValueError, match=r"signed unary takes an even number of steps, .*, got 3"):
        encode(SPEC, "unary", time_steps=3)
    count_codes.check_code("bitwise", 1)  # it has no levels


@pytest.mark.parametrize(
    ("code", "decoded"),
    [
        ("unary", [1, -1, 1]),
        ("ternary", [2, -2, 2]),
        ("bitwise", [3, -3, 3]),
        ("twos_complement", [1, -2, 1]),
        ("ttfs", [2, -2, 2]),
        ("multi_level", [5, -5, 9]),
        ("gif", [5, -5, 6]),
    ],
)
def test_every_code_cuts_off_at_its_own_limit(code, decoded):
    assert decode(encode(torch.tensor([5, -5, 9]), code, time_steps=2), code).tolist() == decoded
