"""Head-tail KL and Wasserstein distances; forward and reverse KL are in test_objectives.py."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from snlp_zoo.distill.divergences import forward_kl, head_tail_kl, reverse_kl, wasserstein
from snlp_zoo.errors import RecipeError

DISTANCES = {
    "head_tail_kl": head_tail_kl,
    "zero_one": wasserstein,
    "ordinal": lambda *outputs, **options: wasserstein(*outputs, cost="ordinal", **options),
}
every_distance = pytest.mark.parametrize("name", DISTANCES)


def outputs(*probabilities):
    """Outputs whose softmax these are."""
    return [SimpleNamespace(logits=torch.tensor(p, dtype=torch.float64).log()) for p in probabilities]


def random_outputs(classes, scale=2.0, rows=16):
    """Student and teacher."""
    logits = [scale * torch.randn(rows, classes) for _ in range(2)]
    return [SimpleNamespace(logits=x) for x in (logits[0].requires_grad_(), logits[1])]


def part(p, q):
    return p * math.log(p / q) - p + q


def test_head_and_tail_by_hand():
    # the head are the classes of 0.4 and 0.3: the first alone has less than half of the mass
    q, p = [0.1, 0.2, 0.3, 0.4], [0.3, 0.1, 0.4, 0.2]
    student, teacher = outputs([q], [p])
    head = part(0.3, 0.1) + part(0.4, 0.3)
    tail = part(0.2, 0.1) + part(0.4, 0.2)  # reverse: of the student to the teacher
    w_head = (0.2 + 0.1) / (0.2 + 0.1 + 0.1 + 0.2)
    expected = w_head * head + (1 - w_head) * tail
    assert head_tail_kl(student, teacher, {}).item() == pytest.approx(expected, abs=1e-6)
    got = head_tail_kl(student, teacher, {}, head_weight=2.0, tail_weight=0.5)
    assert got.item() == pytest.approx(2 * head + 0.5 * tail, abs=1e-6)
    got = head_tail_kl(student, teacher, {}, delta=0.25, tail="forward", head_weight=1.0, tail_weight=0.0)
    assert got.item() == pytest.approx(part(0.4, 0.3), abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("delta", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("direction", "whole"), [("forward", forward_kl), ("reverse", reverse_kl)])
def test_head_and_tail_make_up_the_kl_when_weights_are_one(direction, whole, delta, temperature):
    student, teacher = random_outputs(7)
    options = {"head": direction, "tail": direction, "head_weight": 1.0, "tail_weight": 1.0}
    got = head_tail_kl(student, teacher, {}, delta=delta, temperature=temperature, **options)
    expected = whole(student, teacher, {}, temperature=temperature)
    torch.testing.assert_close(got, expected)
    parts = [
        head_tail_kl(student, teacher, {}, delta=delta, temperature=temperature, **(options | {name: 0.0}))
        for name in ("tail_weight", "head_weight")
    ]
    torch.testing.assert_close(sum(parts), expected)
    assert all(part >= -1e-6 for part in parts)  # each of them a divergence


def test_weights_follow_the_mismatch_without_a_gradient():
    student, teacher = random_outputs(5)
    head_tail_kl(student, teacher, {}).backward()
    got, student.logits.grad = student.logits.grad, None
    q, p = student.logits.softmax(-1), teacher.logits.softmax(-1)
    mass, order = p.sort(-1, descending=True)
    head = torch.zeros_like(p, dtype=torch.bool)
    for row in range(len(p)):
        size = next(n for n in range(1, 6) if mass[row, :n].sum() >= 0.5)
        head[row, order[row, :size]] = True
    mismatch = (p - q).abs().detach()
    share = (mismatch * head).sum(-1) / mismatch.sum(-1)
    forward, reverse = p * (p / q).log() - p + q, q * (q / p).log() - q + p
    loss = share * (forward * head).sum(-1) + (1 - share) * (reverse * ~head).sum(-1)
    loss.mean().backward()
    torch.testing.assert_close(got, student.logits.grad)


def test_the_ordinal_distance_by_hand():
    student, teacher = outputs([[1e-30, 1e-30, 1.0], [0.5, 0.5, 1e-30]], [[1.0, 1e-30, 1e-30], [0.25, 0.5, 0.25]])
    got = wasserstein(student, teacher, {}, cost="ordinal")
    assert got.item() == pytest.approx((2 + (0.25 + 0.25)) / 2, abs=1e-6)


def test_the_ordinal_distance_against_a_sum_over_moves():
    from scipy.stats import wasserstein_distance

    student, teacher = random_outputs(6)
    q, p = (x.logits.detach().double().softmax(-1).numpy() for x in (student, teacher))
    expected = [wasserstein_distance(range(6), range(6), a, b) for a, b in zip(q, p, strict=True)]
    got = wasserstein(student, teacher, {}, cost="ordinal").item()
    assert got == pytest.approx(sum(expected) / len(expected), abs=1e-5)


def transport(p, q, epsilon, iterations=2000):
    """Entropic transport with the whole matrix of costs, plan and all: <plan, cost> + epsilon KL(plan || p q)."""
    cost = 1 - torch.eye(len(p), dtype=p.dtype)
    kernel, u, v = (-cost / epsilon).exp() * p[:, None] * q, torch.ones_like(p), torch.ones_like(q)
    for _ in range(iterations):
        u, v = p / (kernel @ v), q / (kernel.T @ u)
        u = p / (kernel @ v)
    plan = u[:, None] * kernel * v
    return (plan * cost).sum() + epsilon * (plan * (plan / (p[:, None] * q)).log()).sum()


@pytest.mark.parametrize("epsilon", [0.2, 1.0])
def test_zero_one_is_the_sinkhorn_divergence_of_the_whole_cost_matrix(epsilon):
    student, teacher = random_outputs(5, scale=1.0, rows=3)
    q, p = (x.logits.detach().double().softmax(-1) for x in (student, teacher))
    expected = [
        transport(a, b, epsilon) - (transport(a, a, epsilon) + transport(b, b, epsilon)) / 2
        for a, b in zip(p, q, strict=True)
    ]
    got = wasserstein(student, teacher, {}, epsilon=epsilon, iterations=200)
    assert got.item() == pytest.approx(torch.stack(expected).mean().item(), abs=2e-6)


def test_zero_one_tends_to_the_total_variation():
    student, teacher = random_outputs(5)
    total_variation = (student.logits.softmax(-1) - teacher.logits.softmax(-1)).abs().sum(-1).mean() / 2
    errors = [
        abs(wasserstein(student, teacher, {}, epsilon=epsilon, iterations=1000) - total_variation).item()
        for epsilon in (0.2, 0.1, 0.05, 0.01)
    ]
    assert all(later < 0.6 * earlier for earlier, later in pairwise(errors))
    assert errors[-1] < 0.01


@pytest.mark.parametrize("classes", [2, 5, 100])
def test_the_gradient_of_the_potentials_is_that_of_the_value(classes):
    """At the default settings, against differences of the value with many more iterations."""
    student, teacher = random_outputs(classes, scale=1.0, rows=1)
    student, teacher = (SimpleNamespace(logits=x.logits.detach().requires_grad_()) for x in (student, teacher))
    wasserstein(student, teacher, {}).backward()
    step, direction = 0.05, torch.randn(1, classes)
    moved = [SimpleNamespace(logits=student.logits.detach() + sign * step * direction) for sign in (1, -1)]
    plus, minus = (wasserstein(x, teacher, {}, iterations=400).item() for x in moved)
    slope = (student.logits.grad * direction).sum().item()
    assert slope == pytest.approx((plus - minus) / (2 * step), rel=0.03, abs=2e-5)


def test_a_vocabulary_of_classes_fits():
    student, teacher = random_outputs(30_000, rows=2)
    loss = wasserstein(student, teacher, {}, iterations=5)
    loss.backward()
    assert 0 < loss < 1
    assert student.logits.grad.isfinite().all()


@every_distance
def test_learning_from_a_distance_reaches_the_teacher(name):
    student, teacher = random_outputs(4, scale=1.0, rows=4)
    optimizer = torch.optim.Adam([student.logits], lr=0.1)
    for _ in range(100):
        loss = DISTANCES[name](student, teacher, {})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(student.logits.softmax(-1), teacher.logits.softmax(-1), rtol=0, atol=0.05)


@every_distance
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_extreme_logits_are_finite(name, size):
    rows = [[1, -1, 0], [0, 0, 0], [1, 1, -1]], [[-1, 1, 0], [1, -1, -1], [1, 1, -1]]
    student, teacher = (SimpleNamespace(logits=size * torch.tensor(x, dtype=torch.float32)) for x in rows)
    student.logits.requires_grad_()
    loss = DISTANCES[name](student, teacher, {})
    loss.backward()
    assert loss.isfinite()
    assert loss > 0
    assert student.logits.grad.isfinite().all()


@pytest.mark.parametrize("epsilon", [1e-4, 1e4])
def test_extreme_epsilon_is_finite(epsilon):
    student, teacher = random_outputs(4)
    loss = wasserstein(student, teacher, {}, epsilon=epsilon)
    loss.backward()
    assert loss.isfinite()
    assert student.logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        (head_tail_kl, {"delta": 0.0}, r"delta is a share of the teacher's mass, in \(0, 1\], got 0\.0"),
        (head_tail_kl, {"delta": 1.5}, r"got 1\.5"),
        (head_tail_kl, {"tail": "backward"}, "tail must be 'forward' or 'reverse', got 'backward'"),
        (wasserstein, {"cost": "sorted"}, "cost must be 'zero_one' or 'ordinal', got 'sorted'"),
        (wasserstein, {"epsilon": 0.0}, r"epsilon must be positive and iterations at least 1, got 0\.0 and 50"),
        (wasserstein, {"iterations": 0}, r"got 0\.2 and 0"),
    ],
)
def test_options_out_of_range_are_errors(objective, options, message):
    with pytest.raises(RecipeError, match=message):
        objective(*random_outputs(3), {}, **options)
