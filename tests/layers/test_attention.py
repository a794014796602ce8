"""Spiking attention: golden matrices, equal forms, padding, causality, steps, chance."""

import pytest
import torch
from torch import nn

from snlp_zoo.layers import (
    ATTENTIONS,
    BernoulliNode,
    ElasticBiSpike,
    LIFNode,
    SpikingformerSelfAttention,
    SpikingSelfAttention,
    make_attention,
)
from snlp_zoo.layers.firing import firing_rates_recorded
from snlp_zoo.layers.mixing import linear, mix, quadratic

T, B, N, H, E = 3, 2, 7, 2, 4
D = H * E
Q = torch.tensor([[1.0, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 0]])
K = torch.tensor([[1.0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0]])
V = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
OPTIONS = {  # every variant, each way it can be built
    "ssa": {},
    "ssa-mean": {"scale": None},
    "sdsa": {},
    "axnor": {"a": [0.1, 0.7]},
    "xnor": {"a": 1.0, "learnable": False, "scale": None},
    "stochastic": {},
    "stochastic-never": {"sample_intermediate": False},
    "linear": {"decay": 0.5, "learnable": False},
    "linear-learned": {"decay": [0.8, 0.95]},
}
every_variant = pytest.mark.parametrize("variant", OPTIONS)
both_ways = pytest.mark.parametrize("causal", [False, True])


def neuron(share):
    return LIFNode(v_threshold=0.3 * share)


def build(variant, causal=False, heads=H):
    name = {"xnor": "axnor"}.get(variant, variant.partition("-")[0])
    return make_attention(name, heads, neuron, causal, **OPTIONS[variant]).double().eval()


def spikes(*shape, rate=0.4, dtype=torch.float64):
    return (torch.rand(shape) < rate).to(dtype)


def qkv(*shape, **options):
    return [spikes(*shape, **options) for _ in range(3)]


def seen(tokens, mask=None):
    return (torch.ones(1, tokens) if mask is None else mask).long().cumsum(-1)[:, None, :, None]


def scores(attention, query, key):
    """The matrix that values are multiplied with, before the scale: what comes of one-hot values."""
    query, key = query.expand(1, 1, H, -1, -1), key.expand(1, 1, H, -1, -1)
    value = torch.eye(key.shape[-2], dtype=query.dtype).expand(1, 1, H, -1, -1)
    return attention.mix(query, key, value, seen(key.shape[-2]))[0, 0, 0]


def test_golden_ssa():
    expected = torch.tensor([[2.0, 0, 2], [0, 0, 1], [2, 0, 1]])
    assert torch.equal(scores(build("ssa"), Q, K), 0.125 * expected)
    assert torch.equal(scores(build("ssa", causal=True), Q, K), 0.125 * expected.tril())
    for form in (quadratic, linear):
        mixed = form(Q[None, None, None], K[None, None, None], V[None, None, None], seen(3), False)
        assert mixed.squeeze().tolist() == [[4, 2], [1, 1], [3, 1]]


def test_golden_axnor():
    expected = torch.tensor([[2, 0.5, 2.5], [0, 1.5, 2], [2.5, 1, 1.5]])
    attention = make_attention("axnor", H, neuron, scale=1.0, a=0.5)
    assert torch.equal(scores(attention, Q, K), expected)
    fixed = make_attention("axnor", H, neuron, scale=1.0, a=1, learnable=False, causal=True)
    hamming = (Q.unsqueeze(1) != K).sum(-1)
    assert torch.equal(scores(fixed, Q, K), (4 - hamming).float().tril())


def test_axnor_is_the_product_of_features():
    """phi(x) = [x, sqrt(a) (1 - x)], and its default a is 0.1 in every head."""
    attention = make_attention("axnor", H, neuron, scale=1.0)
    query, key = spikes(6, 5, dtype=torch.float32), spikes(6, 5, dtype=torch.float32)
    features = [torch.cat([x, 0.1**0.5 * (1 - x)], -1) for x in (query, key)]
    torch.testing.assert_close(scores(attention, query, key), features[0] @ features[1].T)
    assert attention.a().shape == (H, 1, 1)


def test_sdsa_by_hand():
    """A gate's current is how often key and value met; at threshold 0.75 and tau = 2 two meetings open it, one not."""
    value = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 1]])
    query, key, value = (x[None, None] for x in (Q, K, value))  # K * value: 1000, 0000, 1000
    assert build("sdsa").mix(key, key, value, seen(3)).tolist() == [[[[2, 0, 0, 0]]]]
    assert build("sdsa", causal=True).mix(key, key, value, seen(3))[0, 0, :, 0].tolist() == [1, 1, 2]
    for causal, first in ((False, [1, 0, 1]), (True, [0, 0, 1])):
        attention = make_attention("sdsa", 1, lambda share: LIFNode(v_threshold=1.5 * share), causal)
        out = attention(query, key, value)[0, 0]
        assert out[:, 0].tolist() == first  # the query's own spikes in that channel are 1 0 1
        assert not out[:, 1:].any()


def test_stochastic_in_evaluation_integrates_the_expectation():
    query, key, value = qkv(1, B, N, D)
    query, key, value = (x.expand(16, -1, -1, -1) for x in (query, key, value))
    rate = build("stochastic")(query, key, value).mean(0)
    heads = [x[0].unflatten(-1, (H, E)).transpose(1, 2) for x in (query, key, value)]
    expected = (heads[0] @ heads[1].mT @ heads[2] / (E * N)).transpose(1, 2).flatten(2)
    assert (rate - expected).abs().max() < 1 / 16


@both_ways
def test_stochastic_in_evaluation_keeps_the_mean_of_rare_spikes(causal):
    """At p of some hundredths rounding each neuron's sum over T = 4 would silence nearly all of them."""
    attention, inputs = build("stochastic", causal, heads=4), qkv(4, 8, 64, 64, rate=0.3)
    heads = (x.unflatten(-1, (4, 16)).transpose(-2, -3) for x in inputs)
    expected = attention.mix(*heads, seen(64))
    assert expected.mean() < 0.04
    assert attention(*inputs).mean().item() == pytest.approx(expected.mean().item(), rel=0.05)


def test_linear_by_hand():
    """Every query, key and value fires once: what is left is the sum of powers of the decay."""
    ones = torch.ones(1, 1, 1, 4, 1)
    decay = torch.full((1, 1, 1), 0.5)
    for form in (quadratic, linear):
        assert form(ones, ones, ones, seen(4), True, decay).flatten().tolist() == [1, 1.5, 1.75, 1.875]
        assert form(ones, ones, ones, seen(4), False, decay).flatten().tolist() == [1.875, 2.25, 2.25, 1.875]


@both_ways
@pytest.mark.parametrize("decayed", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("tokens", "width"), [(1, 4), (4, 4), (5, 4), (37, 8), (3, 16), (200, 64)])
def test_both_forms_are_equal_to_the_last_bit(dtype, tokens, width, decayed, causal):
    if decayed and tokens > (22 if dtype == torch.float32 else 45):
        tokens = 17  # 2^-tokens must fit into the mantissa with the counts
    query, key, value = qkv(2, 2, H, tokens, width, dtype=dtype)
    decay = None if decayed is None else torch.tensor([0.5, 1.0], dtype=dtype).view(H, 1, 1)
    results = [form(query, key, value, seen(tokens), causal, decay) for form in (quadratic, linear, mix)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert results[0].any()


@both_ways
def test_both_forms_agree_with_any_decay_and_with_signs(causal):
    query, key, value = (torch.randint(-1, 2, (2, 2, H, 30, 4)).double() for _ in range(3))
    mask = torch.rand(2, 30) < 0.7
    value = value * mask[:, None, :, None]
    decay = torch.tensor([0.83, 0.99], dtype=torch.float64).view(H, 1, 1)
    results = [form(query, key, value, seen(30, mask), causal, decay) for form in (quadratic, linear)]
    real = mask[None, :, None, :, None]
    torch.testing.assert_close(results[0] * real, results[1] * real, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("tokens", "causal", "decay", "chosen"),
    [
        (8, False, None, "quadratic"),
        (9, False, None, "linear"),
        (8, True, 0.5, "quadratic"),
        (33, True, None, "linear"),
        (33, True, 0.5, "linear"),
        (65, False, 0.5, "linear"),
    ],
)
def test_the_form_with_fewer_multiplications_is_chosen(tokens, causal, decay, chosen):
    """Multiplications are counted in the products that ran."""
    x = torch.ones(1, 1, 1, tokens, 8)
    decay = None if decay is None else torch.full((1, 1, 1), decay)

    def multiplications(run):
        with torch.profiler.profile(record_shapes=True) as profile:
            run(x, x, x, seen(tokens), causal, decay)
        shapes = [event.input_shapes[:2] for event in profile.events() if event.name == "aten::bmm"]
        return sum(a[0] * a[1] * a[2] * b[2] for a, b in shapes)

    cost = {form.__name__: multiplications(form) for form in (quadratic, linear)}
    assert multiplications(mix) == cost[chosen] == min(cost.values())
    if chosen == "linear":
        assert cost["linear"] < cost["quadratic"]


@every_variant
@both_ways
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("width", [N + 2, 6 * N])  # the wider one takes another form than the text alone
def test_padding_changes_nothing(variant, causal, left, width):
    mask, place = torch.zeros(B, width), slice(width - N, None) if left else slice(N)
    mask[0, place] = 1
    mask[1] = torch.rand(width) < 0.5
    for dtype in (torch.float64, torch.float32):
        if dtype == torch.float32 and variant.startswith("linear"):
            continue  # powers of its decay are not whole numbers
        attention = build(variant, causal).to(dtype)
        alone, padded = qkv(T, 1, N, D, dtype=dtype), qkv(T, B, width, D, rate=0.6, dtype=dtype)  # padding fires
        for wide, narrow in zip(padded, alone, strict=True):
            wide[:, :1, place] = narrow
        expected = attention(*alone)
        assert torch.equal(attention(*padded, mask)[:, :1, place], expected)
        assert torch.equal(attention(*padded, mask.bool())[:, :1, place], expected)
        assert torch.equal(attention(*alone, torch.ones(1, N)), expected)
        assert expected.any()


@every_variant
def test_causal_forms_do_not_see_the_future(variant):
    attention = build(variant, causal=True)
    query, key, value = qkv(T, B, 20, D)
    whole = attention(query, key, value)
    for n in (1, 8, 9, 19):
        assert torch.equal(attention(query[:, :, :n], key[:, :, :n], value[:, :, :n]), whole[:, :, :n])
    changed = key.clone()
    changed[:, :, 12:] = 1 - changed[:, :, 12:]
    assert torch.equal(attention(query, changed, value)[:, :, :12], whole[:, :, :12])
    bidirectional = build(variant)
    assert not torch.equal(bidirectional(query, changed, value)[:, :, :12], bidirectional(query, key, value)[:, :, :12])


@every_variant
def test_steps_equal_the_full_form(variant):
    attention = build(variant, causal=True)
    query, key, value = qkv(T, B, 20, D)
    mask = torch.ones(B, 20)
    mask[0, :5] = 0
    mask[1, [2, 7]] = 0
    full, state, steps = attention(query, key, value, mask), None, []
    for i in range(20):
        before = state
        step, state = attention.step(query[:, :, i], key[:, :, i], value[:, :, i], state, mask[:, i])
        steps.append(step)
        if before is not None:
            held = mask[:, i] == 0
            assert torch.equal(state[0][:, held], before[0][:, held])
            assert torch.equal(state[1][held], before[1][held])
    real = mask[None, :, :, None].bool()
    assert torch.equal(torch.stack(steps, 2).masked_select(real), full.masked_select(real))
    assert full.masked_select(real).any()
    assert state[1].flatten().tolist() == [15, 18]


def test_currents_of_steps_equal_the_full_form():
    """Before the neuron, where spikes cannot hide a difference."""
    for variant in OPTIONS:
        attention = build(variant, causal=True)
        heads = qkv(T, B, H, 20, E)
        mixed, memory = attention.mix(*heads, seen(20)), torch.zeros((), dtype=torch.float64)
        for i in range(20):
            query, key, value = (x[..., i : i + 1, :] for x in heads)
            memory = attention.faded(memory, torch.ones(1, 1, 1, 1)) + attention.remember(key, value)
            recalled = attention.recall(query, memory, seen(20)[..., i : i + 1, :])
            torch.testing.assert_close(recalled, mixed[..., i : i + 1, :], rtol=0, atol=1e-13)


@every_variant
def test_steps_go_on_from_a_prompt(variant):
    """The state of a padded prompt at once, then single tokens."""
    attention = build(variant, causal=True)
    query, key, value = qkv(T, B, 20, D)
    mask = torch.ones(B, 20)
    mask[0, :6] = 0
    full = attention(query, key, value, mask)
    state = attention.state(key[:, :, :15], value[:, :, :15], mask[:, :15])
    for i in range(15, 20):
        step, state = attention.step(query[:, :, i], key[:, :, i], value[:, :, i], state)
        assert torch.equal(step, full[:, :, i])


def test_a_memory_does_not_round_in_half_precision():
    """In bfloat16 256 + 1 is 256."""
    attention, ones = build("ssa", causal=True).bfloat16(), torch.ones(1, 1, D, dtype=torch.bfloat16)
    state = attention.state(*torch.ones(2, 1, 1, 256, D, dtype=torch.bfloat16))
    for _ in range(5):
        spikes, state = attention.step(ones, ones, ones, state)
    assert spikes.dtype == torch.bfloat16
    assert state[0].unique().tolist() == [261]


def test_steps_without_a_mask_and_of_a_bidirectional_attention():
    attention, (query, key, value) = build("ssa", causal=True), qkv(T, B, 3, D)
    state = None
    for i in range(3):
        step, state = attention.step(query[:, :, i], key[:, :, i], value[:, :, i], state)
        assert torch.equal(step, attention(query, key, value)[:, :, i])
    with pytest.raises(ValueError, match=r"SSA\.step needs causal=True"):
        build("ssa").step(query[:, :, 0], key[:, :, 0], value[:, :, 0])


@every_variant
def test_heads_do_not_mix(variant):
    attention, (query, key, value) = build(variant), qkv(T, B, N, D)
    changed = torch.cat([1 - key[..., :E], key[..., E:]], -1)
    one, other = attention(query, key, value), attention(query, changed, value)
    assert torch.equal(one[..., E:], other[..., E:])
    assert not torch.equal(one[..., :E], other[..., :E])


@every_variant
@both_ways
def test_spikes_are_binary_repeatable_and_give_gradients(variant, causal):
    attention, inputs = build(variant, causal).float(), qkv(T, B, 12, D, dtype=torch.float32)
    assert torch.equal(attention(*inputs), attention(*inputs))
    attention.train()
    inputs = [x.requires_grad_() for x in inputs]
    out = attention(*inputs)
    assert set(out.unique().tolist()) <= {0.0, 1.0}
    (out * torch.rand_like(out)).sum().backward()
    for x in (*inputs, *attention.parameters()):
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert x.grad.any()


def test_a_norm_keeps_currents_at_any_length():
    """As published sums grow with N; scale=None divides by what was attended to."""
    sums = {}
    for tokens in (8, 128):
        heads = qkv(1, 1, H, tokens, 16)
        for variant in ("ssa", "ssa-mean"):
            sums[variant, tokens] = build(variant).mix(*heads, seen(tokens)).mean().item()
    assert sums["ssa", 128] > 8 * sums["ssa", 8]
    assert sums["ssa-mean", 128] == pytest.approx(sums["ssa-mean", 8], rel=0.5)
    ones = torch.ones(1, 1, H, 5, 16, dtype=torch.float64)
    causal = build("ssa-mean", causal=True).mix(ones, ones, ones, seen(5))
    torch.testing.assert_close(causal, torch.full_like(ones, 4.0))  # 16 / sqrt(16)


# ---- chance


def error_of_sampling(steps, sample_intermediate, repeats=20):
    """Root mean square distance of the rates of spikes from (Q K^T / E) V / N; N = 6, E = 16, all rates random."""
    attention = make_attention("stochastic", 1, neuron, sample_intermediate=sample_intermediate).train()
    total = 0.0
    for _ in range(repeats):
        query, key, value = (torch.rand(6, 16) for _ in range(3))
        streams = (torch.bernoulli(x.expand(steps, 1, -1, -1)) for x in (query, key, value))
        difference = attention(*streams).mean(0)[0] - query @ key.mT / 16 @ value / 6
        total += difference.square().mean().item() / repeats
    return total**0.5


@pytest.mark.parametrize(
    ("sample_intermediate", "published"),
    [
        (True, {16: 0.085, 64: 0.035, 256: 0.020, 1024: 0.011, 4096: 0.005}),
        (False, {256: 0.0035, 1024: 0.0016}),  # below, rounding the spikes of T steps adds up to 1 / T
    ],
)
def test_error_of_sampling(sample_intermediate, published):
    """Falls with the root of T; without draws it is smaller at every T."""
    for steps, expected in published.items():
        assert error_of_sampling(steps, sample_intermediate) == pytest.approx(expected, rel=0.35)
    assert error_of_sampling(16, False) < error_of_sampling(16, True) / 2


@both_ways
def test_scores_are_drawn(causal):
    """Where they are, values are counted: whole numbers over how many were attended to, with the right mean."""
    heads = [x.expand(4000, -1, -1, -1, -1) for x in qkv(1, 1, H, 6, E)]
    attention = make_attention("stochastic", H, neuron, causal)
    expected = attention.eval().mix(*heads, seen(6))[0]
    mixed = attention.train().mix(*heads, seen(6))
    counted = mixed * (seen(6) if causal else 6)
    assert (counted - counted.round()).abs().max() < 1e-12
    torch.testing.assert_close(mixed.mean(0), expected, rtol=0, atol=4 * 0.5 / 4000**0.5)
    whole = expected * (seen(6)[0] if causal else 6)
    assert (whole != whole.round()).any()  # which expectations are not


def test_draws_are_independent():
    """AND of a stream with itself would have rate p; of independent ones it has p squared."""
    node = BernoulliNode().train()
    p = torch.full((20000, 1), 0.5)
    one, other = node(p, from_rest=True), node(p, from_rest=True)
    assert (one * other).mean().item() == pytest.approx(0.25, abs=0.02)
    assert (one[1:] * one[:-1]).mean().item() == pytest.approx(0.25, abs=0.02)


def test_expectation_gradient():
    """Without draws it is exactly the expectation's; with them it is on average."""
    inputs = [x.requires_grad_() for x in qkv(1, 1, 6, 4, dtype=torch.float32)]
    weight = torch.rand(1, 1, 6, 4)
    query, key, value = inputs
    expected = torch.autograd.grad(((query @ key.mT / 4) @ value / 6 * weight).sum(), inputs)
    one = make_attention("stochastic", 1, neuron, sample_intermediate=False).train()
    for found, wanted in zip(torch.autograd.grad((one(*inputs) * weight).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    both, repeats = make_attention("stochastic", 1, neuron).train(), 3000
    many = [x.expand(repeats, -1, -1, -1) for x in inputs]
    for found, wanted in zip(torch.autograd.grad((both(*many) * weight).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(found / repeats, wanted, rtol=0, atol=0.02)


def test_causal_draws_use_the_tokens_so_far():
    ones = torch.ones(2000, 1, 4, 2)
    attention = make_attention("stochastic", 1, neuron, causal=True).train()
    assert attention(ones, ones, ones).mean().item() == 1  # every mean over i tokens is 1, not i / 4
    mask = torch.tensor([[0, 0, 1, 1]])
    assert attention(ones, ones, ones, mask)[:, :, 2:].mean().item() == 1


def test_always_draws_in_evaluation_too():
    inputs = qkv(64, 1, N, D, dtype=torch.float32)
    attention = make_attention("stochastic", H, neuron, always=True).eval()
    assert not torch.equal(attention(*inputs), attention(*inputs))
    torch.manual_seed(1)
    one = attention(*inputs)
    torch.manual_seed(1)
    assert torch.equal(one, attention(*inputs))


def test_a_bernoulli_node_is_a_spikingjelly_neuron():
    from spikingjelly.activation_based import functional

    node, p = BernoulliNode().eval(), torch.rand(9, 4, 3)
    whole = node(p, from_rest=True)
    assert ((whole.sum(0) - p.sum(0)).abs() < 1).all()
    assert torch.equal(node(p[:4]), whole[:4])
    assert torch.equal(node(p[4:]), whole[4:])  # the membrane stayed
    functional.reset_net(node)
    functional.set_step_mode(node, "s")
    assert torch.equal(torch.stack([node(x) for x in p]), whole)


def test_firing_rates_of_drawn_scores_leave_padding_out():
    attention = make_attention("stochastic", H, neuron, always=True)
    inputs = [torch.ones(T, B, N, D) for _ in range(3)]
    mask = torch.ones(B, N)
    mask[0, 3:] = 0
    with firing_rates_recorded(attention, mask) as rates:
        attention(*inputs, mask)
    assert rates["spike_rates"].keys() == {"neuron", "score_neuron"}
    assert rates["spike_rates"]["score_neuron"].tolist() == [1.0] * T


# ---- blocks


def block(kind, name="ssa", causal=False, **options):
    attention = make_attention(name, H, neuron, causal)
    return kind(D, attention, nn.Linear, neuron, **options).double().eval()


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("kind", [SpikingSelfAttention, SpikingformerSelfAttention])
def test_blocks(kind, name):
    """The same text alone, padded on the left, and token by token."""
    made = block(kind, name, causal=True)
    x = spikes(T, 1, 9, D) if kind is SpikingSelfAttention else torch.randn(T, 1, 9, D, dtype=torch.float64)
    whole, weights = made(x)
    assert weights is None
    assert whole.any()
    padded, mask = torch.cat([torch.ones(T, 1, 4, D), x], 2), torch.tensor([[0] * 4 + [1] * 9])
    assert torch.equal(made(padded, mask)[0][:, :, 4:], whole)
    state, steps = None, []
    for i in range(9):
        step, state = made.step(x[:, :, i], state)
        steps.append(step)
    torch.testing.assert_close(torch.stack(steps, 2), whole, rtol=0, atol=1e-12)


def test_spikingformer_multiplies_spikes_only_and_gives_reals():
    made = block(SpikingformerSelfAttention)
    entered = []
    for layer in (made.query.linear, made.key.linear, made.value.linear, made.output.linear):
        layer.register_forward_hook(lambda _, inputs, __: entered.append(inputs[0]))
    out, _ = made(torch.randn(T, B, N, D, dtype=torch.float64))
    assert len(entered) == 4
    assert all(set(x.unique().tolist()) <= {0.0, 1.0} for x in entered)
    assert not set(out.unique().tolist()) <= {0.0, 1.0}
    spiking = block(SpikingSelfAttention)
    assert set(spiking(spikes(T, B, N, D))[0].unique().tolist()) <= {0.0, 1.0}


# ---- precision, alphabets, errors


@every_variant
@both_ways
def test_bfloat16_autocast(variant, causal):
    """Products above 256 are rounded there; with thresholds amid the currents at least 99 % of the spikes stay."""
    attention = build(variant, causal).float()
    inputs = qkv(4, 2, 160, 128, rate=0.3, dtype=torch.float32)
    if not variant.startswith("stochastic"):
        heads = (x.unflatten(-1, (H, -1)).transpose(-2, -3) for x in inputs)
        attention.neuron.v_threshold = 0.8 * attention.mix(*heads, seen(160)).mean().item()
    exact = attention(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = attention(*(x.bfloat16() for x in inputs))
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() == exact).float().mean().item() >= 0.99
    assert 0.01 < exact.mean().item() < 0.7


@every_variant
def test_a_model_in_bfloat16(variant):
    attention = build(variant).bfloat16()
    assert attention(*qkv(T, B, N, D, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ATTENTIONS)
def test_ternary_spikes(name):
    def ternary(share):
        return ElasticBiSpike(T)

    if name in ("ssa", "linear"):
        attention = make_attention(name, H, ternary)
        signs = [torch.randint(-1, 2, (T, B, N, D)).float() for _ in range(3)]
        out = attention.train()(*signs)
        assert set(out.sign().unique().tolist()) == {-1.0, 0.0, 1.0}
    else:
        with pytest.raises(ValueError, match="made for binary spikes, its neuron gives ternary ones; take a binary"):
            make_attention(name, H, ternary)


def test_errors():
    with pytest.raises(ValueError, match=r"unknown attention 'axnr', known are ssa, .*; did you mean 'axnor'"):
        make_attention("axnr", H, neuron)
    with pytest.raises(TypeError, match="decay"):
        make_attention("ssa", H, neuron, decay=0.5)
    with pytest.raises(ValueError, match="hidden_size 8 does not divide into 3 heads"):
        make_attention("ssa", 3, neuron)(*qkv(T, B, N, D))
    with pytest.raises(ValueError, match="hidden_size 8 does not divide into 3 heads"):
        SpikingSelfAttention(D, make_attention("ssa", 3, neuron), nn.Linear, neuron)
    with pytest.raises(ValueError, match=r"mask \(2, 6\) must be \[B, N\] of the spikes, \(2, 7\)"):
        build("ssa")(*qkv(T, B, N, D), torch.ones(B, N - 1))
    with pytest.raises(ValueError, match=r"decay is one number, or one for each of 2 heads, strictly .*; got 1.0"):
        make_attention("linear", H, neuron, decay=1.0)
    with pytest.raises(ValueError, match=r"a is one number, or one for each of 2 heads, from 0 to 1; got \[0.5\]"):
        make_attention("axnor", H, neuron, a=[0.5], learnable=False)


# ---- weights


@every_variant
@both_ways
def test_weights_times_values_are_what_is_mixed(variant, causal):
    attention = build(variant, causal).eval()
    query, key, value = qkv(2, 2, 7, D)
    mask = torch.tensor([[1] * 7, [0] * 2 + [1] * 5])
    if variant.startswith("sdsa"):
        with pytest.raises(ValueError, match="SDSA has no attention weights"):
            attention.weights(query, key, mask)
        return
    torch.manual_seed(0)
    weights = attention.weights(query, key, mask)
    assert weights.shape == (2, 2, H, 7, 7)
    assert not weights[:, 1, :, :, :2].any()
    assert not causal or not weights.triu(1).any()
    seen_current = []
    attention.neuron.register_forward_pre_hook(lambda _, inputs: seen_current.append(inputs[0]))
    torch.manual_seed(0)  # of the variants that draw
    attention(query, key, value, mask)
    heads = value.unflatten(-1, (H, -1)).transpose(-2, -3)
    mixed = (weights @ heads.to(weights.dtype)).transpose(-2, -3).flatten(-2)
    torch.testing.assert_close(mixed.to(seen_current[0].dtype), seen_current[0])


def test_memories_are_float32_under_autocast():
    """A sum over 600 tokens, of which bfloat16 would keep 256."""
    attention = build("ssa", causal=True).float().eval()
    ones = torch.ones(1, 1, 600, D)
    with torch.autocast("cpu", torch.bfloat16):
        memory, _ = state = attention.state(ones, ones)
        later, _ = attention.step(ones[:, :, 0], ones[:, :, 0], ones[:, :, 0], state)[1]
    assert (memory.dtype, later.dtype) == (torch.float32, torch.float32)
    assert memory.unique().tolist() == [600.0]
    assert later.unique().tolist() == [601.0]


def test_weights_of_what_draws_are_expectations():
    attention = build("stochastic").train()
    query, key, _ = qkv(2, 2, 7, D)
    assert torch.equal(attention.weights(query, key), attention.eval().weights(query, key))
