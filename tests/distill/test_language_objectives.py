import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import snlp_zoo
from snlp_zoo.distill.distiller import Distiller
from snlp_zoo.distill.objectives import l2wrap

B, N, V = 3, 5, 7


class Outputs:
    def __init__(self, logits):
        self.logits = logits


class L2Wrap(torch.autograd.Function):
    """As published: the loss stays, and 1e-4 / (B N) of each largest logit is added to that logit's gradient."""

    @staticmethod
    def forward(ctx, loss, logits):
        ctx.save_for_backward(logits)
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        (logits,) = ctx.saved_tensors
        largest, where = logits.max(-1, keepdim=True)
        added = torch.zeros_like(logits).scatter_(-1, where, largest * 1e-4 / (logits.shape[0] * logits.shape[1]))
        return grad, grad * added


def test_l2wrap_has_the_published_gradient():
    logits = torch.randn(B, N, V, dtype=torch.float64).float() * 3
    logits[0, 0] = 2.0  # all are largest: one of them takes it
    labels = torch.randint(V, (B, N))
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss = F.cross_entropy(ours.flatten(0, 1), labels.flatten())
    (loss + 1e-4 * l2wrap(Outputs(ours), None, {"labels": labels})).backward()
    loss = F.cross_entropy(theirs.flatten(0, 1), labels.flatten())
    L2Wrap.apply(loss, theirs).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-9, rtol=1e-5)
    assert (l2wrap(Outputs(ours), None, {"labels": labels}) - logits.amax(-1).square().mean() / 2).abs() < 1e-5


def test_l2wrap_leaves_out_what_is_not_predicted():
    logits = torch.tensor([[[1.0, 3.0], [50.0, 0.0]]])
    assert l2wrap(Outputs(logits), None, {"labels": torch.tensor([[0, -100]])}) == pytest.approx(4.5)
    assert l2wrap(Outputs(logits[0]), None, {"labels": torch.tensor([0, 1])}) == pytest.approx((4.5 + 1250) / 2)


@pytest.fixture
def batch():
    labels = torch.randint(V, (B, N))
    labels[-1, 2:] = -100
    return {"input_ids": torch.randint(V, (B, N)), "attention_mask": (labels != -100).long(), "labels": labels}


def student(**changes):
    return snlp_zoo.build("spikegpt_tiny", vocab_size=V, **changes)


def teacher(vocab_size=V):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes))


def test_means_run_over_predicted_tokens(batch):
    objectives = {"cross_entropy": {}, "l2wrap": {}, "forward_kl": {}, "hidden_mse": {}, "spike_rate": {}}
    distiller = Distiller(student(), teacher(), objectives)
    assert distiller.counts(batch).tolist() == [12.0] * 5
    model = distiller.student
    losses = distiller(batch).detach()
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    by_hand = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    assert losses[0] == pytest.approx(float(by_hand), rel=1e-5)
    p = distiller._teacher[0](batch["input_ids"]).logits.log_softmax(-1)
    kl = (p.exp() * (p - logits.log_softmax(-1))).sum(-1)
    assert losses[2] == pytest.approx(float(kl[batch["labels"] != -100].mean()), rel=1e-4)


def test_a_step_towards_a_teacher_lowers_its_divergence(batch):
    distiller = Distiller(student(), teacher(), {"forward_kl": {}, "hidden_mse": {}})
    optimizer = torch.optim.Adam(distiller.parameters(), lr=1e-2)
    first = distiller(batch)
    for _ in range(20):
        distiller(batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (distiller(batch) < first).all()


def test_another_vocabulary_is_an_error(batch):
    with pytest.raises(ValueError, match="logit distillation needs the same classes or vocabulary"):
        Distiller(student(), teacher(V + 1), {"forward_kl": {}})(batch)
