"""The module that is trained, with a stand-in student: the families that give attention scores are others' work."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel

from snlp_zoo.distill.distiller import Distiller, gives_attention_scores
from snlp_zoo.distill.matching import Projection, SharedProjection, attention_scores_recorded
from snlp_zoo.errors import RecipeError
from snlp_zoo.models.modeling_spikelm import SpikeLMModel
from snlp_zoo.registry import build

SIZES = {"vocab_size": 30, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}


class Scores(nn.Module):
    """A student that is nothing but tables: states in [0, 1] as rates are, and scores of its own."""

    def __init__(self, layers=2, heads=2):
        super().__init__()
        self.config = BertConfig(**SIZES, num_hidden_layers=layers)
        self.layers, self.heads = layers, heads
        self.query, self.key = nn.Embedding(30, 8), nn.Embedding(30, 8)

    def forward(
        self, input_ids, attention_mask=None, output_hidden_states=None, output_attention_scores=None
    ) -> SimpleNamespace:
        query, key = (x(input_ids).unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.query, self.key))
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        states = (self.query(input_ids).sigmoid(),) * (self.layers + 1) if output_hidden_states else None
        return SimpleNamespace(
            hidden_states=states, attention_scores=(scores,) * self.layers if output_attention_scores else None
        )


@pytest.fixture
def teacher():
    return BertModel(BertConfig(**SIZES, num_hidden_layers=4))


@pytest.fixture
def batch():
    ids = torch.randint(1, 30, (4, 6))
    return {"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [0] * 4])}


@pytest.mark.parametrize(("layer_map", "layers"), [("spread", [2, 4]), ("skip", [1, 3]), ([4, 1], [4, 1])])
def test_layers_learn_from_the_layers_of_the_map(teacher, batch, layer_map, layers):
    student, objectives = Scores(), {"hidden_mse": {}, "attention_score_mse": {}}
    losses = Distiller(student, teacher, objectives, layer_map=layer_map)(batch)
    inputs = batch["input_ids"], batch["attention_mask"]
    ours = student(*inputs, output_hidden_states=True, output_attention_scores=True)
    with torch.no_grad(), attention_scores_recorded(teacher) as scores:
        states = teacher(*inputs, output_hidden_states=True).hidden_states
    mask = batch["attention_mask"].bool()
    hidden = [(ours.hidden_states[0] - states[layer])[mask].square().mean() for layer in layers]
    torch.testing.assert_close(losses[0], sum(hidden) / 2)
    pairs = (mask[:, :, None] & mask[:, None, :])[:, None].expand(-1, 2, -1, -1)
    wrong = [(ours.attention_scores[0] - scores[layer - 1])[pairs].square().mean() for layer in layers]
    torch.testing.assert_close(losses[1], sum(wrong) / 2)


@pytest.mark.parametrize("heads", [2, 4])
def test_scores_are_learned_from_a_teacher_that_only_has_projections(teacher, batch, heads):
    student = Scores(heads=heads)
    distiller = Distiller(student, teacher, {"attention_score_mse": {}})
    optimizer, losses = torch.optim.Adam(student.parameters(), lr=0.05), []
    for _ in range(60):
        (loss,) = distiller(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert distiller.counts(batch).tolist() == [36 + 36 + 16 + 4]
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_scores_are_asked_for_only_if_an_objective_needs_them(teacher, batch):
    seen = []
    student = Scores()
    student.register_forward_pre_hook(lambda module, inputs, named: seen.append(set(named)), with_kwargs=True)
    Distiller(student, teacher, {"hidden_mse": {}})(batch)
    Distiller(student, teacher, {"hidden_mse": {}, "attention_score_mse": {}})(batch)
    assert [("output_attention_scores" in names) for names in seen] == [False, True]


def test_which_students_give_scores():
    assert gives_attention_scores(Scores)
    assert gives_attention_scores(Scores())
    assert not gives_attention_scores(SpikeLMModel)


def test_projection_kinds(teacher, batch):
    assert isinstance(Distiller(Scores(), teacher, {"hidden_mse": {}}).projection, Projection)
    shared = Distiller(Scores(), teacher, {"hidden_mse": {}, "embedding_mse": {}}, "shared")
    assert isinstance(shared.projection, SharedProjection)
    shared(batch).sum().backward()
    assert shared.projection.layer.bias.grad.any()
    normed = Distiller(Scores(), teacher, {"hidden_mse": {}}, "normed")
    normed(batch).sum().backward()
    assert all(parameter.grad.any() for parameter in normed.projection.parameters())
    without = Distiller(Scores(), teacher, {"attention_score_mse": {}}, "shared")
    assert not list(without.projection.parameters())  # nothing that no loss would train


def test_padding_and_unequal_parts_do_not_change_the_loss(teacher, batch):
    """Parts weighted by what their means run over make up the whole: what two processes rely on."""
    distiller = Distiller(Scores(), teacher, {"attention_score_mse": {}, "hidden_mse": {}}, "shared")
    whole, total = distiller(batch), distiller.counts(batch)
    parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 1), slice(1, 4))]
    summed = sum(distiller(part) * distiller.counts(part) for part in parts) / total
    torch.testing.assert_close(summed, whole)


@pytest.fixture
def labelled():
    ids = torch.randint(5, 120, (4, 8))
    mask = torch.tensor([[1] * 8, [1] * 8, [1] * 5 + [0] * 3, [1] * 2 + [0] * 6])
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.arange(4) % 2}


def spiking_student(**config):
    student = build("spikelm_tiny", attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0, **config)
    return student.train()


def test_a_student_learns_to_fire_at_the_target_without_a_teacher(labelled):
    distiller = Distiller(spiking_student(), None, {"spike_rate": {"target": 0.25}}).train()
    optimizer, losses = torch.optim.Adam(distiller.parameters(), lr=3e-3), []
    for _ in range(40):
        (loss,) = distiller(labelled)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert distiller.counts(labelled).tolist() == [8 + 8 + 5 + 2]


def test_rates_are_of_real_tokens_and_asked_for_once(labelled):
    distiller = Distiller(spiking_student(), None, {"spike_rate": {}})
    distiller(labelled)  # measures amplitudes
    distiller.eval()
    with torch.no_grad():
        losses, rate = distiller.losses_and_rate(labelled, output_spike_rates=True)
        padded = {k: torch.cat([v, v.new_zeros(4, 3)], 1) for k, v in labelled.items() if k != "labels"}
        more, same = distiller.losses_and_rate(padded, output_spike_rates=True)
    assert 0 < rate < 1
    torch.testing.assert_close((more, same), (losses, rate))
    nothing = labelled | {"attention_mask": torch.zeros_like(labelled["attention_mask"])}
    assert distiller(nothing).isfinite().all()  # a process without rows: counted as nothing, but not as NaN


def test_a_student_whose_spikes_have_no_gradient_is_told_so(labelled):
    distiller = Distiller(build("spikingbert_tiny"), None, {"spike_rate": {}})
    with pytest.raises(RecipeError, match="this student's spikes have no gradient"):
        distiller(labelled)
    with torch.no_grad():
        assert distiller(labelled).isfinite().all()


def test_tables_are_learned_whatever_the_batch(labelled):
    student = spiking_student()
    config = student.config
    teacher = BertModel(BertConfig(**SIZES | {"vocab_size": config.vocab_size, "hidden_size": config.hidden_size}))
    distiller = Distiller(student, teacher, {"embedding_table_mse": {}, "cross_entropy": {}})
    loss, _ = distiller(labelled)
    tables = [model.get_input_embeddings().weight for model in (student, teacher)]
    torch.testing.assert_close(loss, (tables[0] - tables[1]).square().mean())
    loss.backward()
    torch.testing.assert_close(tables[0].grad, 2 * (tables[0] - tables[1]).detach() / tables[0].numel())
    assert tables[1].grad is None
    parts = [{key: value[rows] for key, value in labelled.items()} for rows in (slice(0, 1), slice(1, 4))]
    summed = sum(distiller(part)[0] * distiller.counts(part)[0] for part in parts) / distiller.counts(labelled)[0]
    torch.testing.assert_close(summed, loss)


def test_other_tables_are_an_error(labelled):
    teacher = BertModel(BertConfig(**SIZES))
    with pytest.raises(RecipeError, match=r"embedding_table_mse: the student's table .* and the teacher's \(30, 8\)"):
        Distiller(spiking_student(), teacher, {"embedding_table_mse": {}})(
            labelled | {"input_ids": torch.ones(4, 8).long()}
        )


def test_angles_are_learned_through_the_projection(batch):
    teacher = BertModel(BertConfig(**SIZES | {"hidden_size": 16}, num_hidden_layers=4))
    distiller = Distiller(Scores(), teacher, {"cosine": {}})
    assert len(distiller.projection.layers) == 3
    optimizer, losses = torch.optim.Adam(distiller.parameters(), lr=0.05), []
    for _ in range(60):
        (loss,) = distiller(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_only_states_are_projected(labelled):
    teacher = BertModel(BertConfig(**SIZES | {"vocab_size": 120}))
    for objective in ("attention_mse", "spike_rate"):
        assert not list(Distiller(spiking_student(), teacher, {objective: {}}).projection.parameters())


def test_a_teacher_under_autocast_gives_what_it_gives_by_itself(batch):
    """Linear layers are cast once; a table that the head shares is not."""
    teacher = BertForMaskedLM(BertConfig(**SIZES, num_hidden_layers=2)).eval()
    distiller = Distiller(Scores(), teacher, {"hidden_mse": {}})
    before = {name: parameter.clone() for name, parameter in teacher.named_parameters()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = teacher(**batch, output_hidden_states=True)
        for _ in range(2):
            found = distiller._teach(batch)
            for ours, theirs in zip(
                [found.logits, *found.hidden_states], [expected.logits, *expected.hidden_states], strict=True
            ):
                assert torch.equal(ours, theirs)
    (cast,) = distiller._cast.values()
    half = {name for name, parameter in cast.named_parameters() if parameter.dtype == torch.bfloat16}
    linear = {name for name, module in teacher.named_modules() if isinstance(module, nn.Linear)}
    assert {name.rpartition(".")[0] for name in half} == linear - {"cls.predictions.decoder"}
    assert cast.get_input_embeddings().weight is teacher.get_input_embeddings().weight
    assert not any("_cast" in name for name in distiller.state_dict())
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter, before[name])
    expected = teacher(**batch, output_hidden_states=True).logits  # outside autocast
    assert torch.equal(distiller._teach(batch).logits, expected)
