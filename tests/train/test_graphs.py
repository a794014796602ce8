"""Steps replayed from CUDA graphs: when they are, on which batches, and that a run stays what it is without them."""

import random
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, GPT2Config, RwkvConfig

import snlp_zoo
from snlp_zoo.data.streams import Crops, Stream
from snlp_zoo.distill.distiller import Distiller
from snlp_zoo.models import decoder
from snlp_zoo.train.graphs import ReplayedSteps, can_replay, padded
from snlp_zoo.train.parts import TrainPart

FAMILIES = ["spikelm", "spikingbert", "spikebert"]


@pytest.mark.parametrize(
    ("settings", "device", "processes", "replayed"),
    [
        ({}, "cuda:0", DistributedType.NO, True),
        ({"mixed_precision": "bf16"}, "cuda", DistributedType.NO, True),
        ({"surrogate_temperature": 2}, "cuda", DistributedType.NO, True),
        ({"cuda_graphs": False}, "cuda", DistributedType.NO, False),
        ({"gradient_accumulation_steps": 2}, "cuda", DistributedType.NO, False),
        ({"mixed_precision": "fp16"}, "cuda", DistributedType.NO, False),
        ({"surrogate_temperature": [3.0, 1.0]}, "cuda", DistributedType.NO, False),
        ({}, "cpu", DistributedType.NO, False),
        ({}, "cuda", DistributedType.MULTI_GPU, False),
        ({}, "cuda", DistributedType.FSDP, False),
    ],
)
def test_when_steps_are_replayed(settings, device, processes, replayed):
    settings = TrainPart(**{"cuda_graphs": True} | settings)
    kind = {"distributed_type": processes, "mixed_precision": settings.mixed_precision}
    assert can_replay(SimpleNamespace(device=torch.device(device), **kind), settings) is replayed


def test_the_runs_precision_decides_also_for_the_teacher():
    place = SimpleNamespace(device=torch.device("cuda"), distributed_type=DistributedType.NO, mixed_precision="fp16")
    assert not can_replay(place, TrainPart(cuda_graphs=True))


def batch_of(length):
    ids = torch.arange(10, 10 + 2 * length).view(2, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids + 1, "index": torch.arange(2)}


def test_padding_to_a_multiple_of_8():
    longer = padded(batch_of(13), BertConfig(pad_token_id=3))
    assert longer["input_ids"].shape == longer["attention_mask"].shape == longer["labels"].shape == (2, 16)
    for name, fill in (("input_ids", 3), ("attention_mask", 0), ("labels", -100)):
        assert torch.equal(longer[name][:, :13], batch_of(13)[name])
        assert (longer[name][:, 13:] == fill).all()
    assert torch.equal(longer["index"], torch.arange(2))


def test_labels_of_texts_stay_as_they_are():
    batch = batch_of(5) | {"labels": torch.tensor([0.5, 1.0])}
    assert torch.equal(padded(batch, BertConfig())["labels"], torch.tensor([0.5, 1.0]))


@pytest.mark.parametrize(("length", "wanted"), [(16, 16), (17, 24), (25, 30), (30, 30), (31, 31)])
def test_padding_ends_where_a_model_has_no_positions(length, wanted):
    # the teacher's too; what is too long already is not cut, for the model to refuse
    longer = padded(batch_of(length), BertConfig(max_position_embeddings=64), GPT2Config(n_positions=30))
    assert {tuple(longer[name].shape) for name in ("input_ids", "attention_mask", "labels")} == {(2, wanted)}


def test_padding_for_a_model_without_padding_token():
    longer = padded(batch_of(3), RwkvConfig())["input_ids"]  # it names none, not even None
    assert longer.shape == (2, 8)
    assert (longer[:, 3:] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_loss(family):
    objectives = {"forward_kl": {}, "cross_entropy": {}, "hidden_mse": {}, "embedding_mse": {}, "attention_mse": {}}
    student, teacher = (snlp_zoo.build(f"{family}_tiny").double() for _ in range(2))
    distiller = Distiller(student, teacher, objectives).double().train()
    ids = torch.randint(1, 120, (3, 13))
    batch = {"input_ids": ids, "attention_mask": (torch.arange(13) < torch.tensor([[13], [9], [4]])).long()}
    batch["labels"] = torch.tensor([0, 1, 0])
    distiller(batch)  # an amplitude is measured once, and may move with what comes next
    kept = {name: value.clone() for name, value in distiller.state_dict().items()}
    losses = distiller(batch)
    after = {name: value.clone() for name, value in student.named_buffers()}
    distiller.load_state_dict(kept)
    torch.testing.assert_close(distiller(padded(batch, *distiller.configs)), losses)
    for name, value in student.named_buffers():
        torch.testing.assert_close(value, after[name], msg=name)


# ---- causal models, which cut a batch by its mask unless a graph is captured ----


INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


class Unread(TorchDispatchMode):
    """Refuses what waits for a device: values that are read, and shapes that depend on them."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        reads = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.intersection(function.tags)
        if function.overloadpacket in INDEXING:
            reads = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
        assert not reads, function
        return function(*args, **(kwargs or {}))


def causal(task, **options):
    """A distiller of a model whose blocks fire, and a maker of batches as the loop gets them."""
    torch.manual_seed(0)
    student = snlp_zoo.build("spikegpt_tiny", task=task, v_threshold=0.3, hidden_dropout_prob=0.0, **options)
    for parameter in student.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5)
    distiller = Distiller(student, None, {"cross_entropy": {}, "l2wrap": {}, "spike_rate": {}}).train()

    def draw():
        ids = torch.randint(1, 120, (61,))
        if task == "causal-lm":  # the last crop is shorter: it has padding
            return Crops(Stream(ids.int(), 1, 1, 0), 20).collate([0, 20, 45])
        mask = (torch.arange(20) < torch.tensor([[20], [9], [4]])).long()
        batch = {"input_ids": ids[:60].view(3, 20) * mask, "attention_mask": mask, "labels": torch.tensor([0, 1, 0])}
        return batch | {"index": torch.arange(3)}

    return distiller, lambda: padded(draw(), *distiller.configs)


def differentiated(distiller, batch):
    distiller.zero_grad()
    losses = distiller(batch)
    losses.sum().backward()
    return losses.detach(), {name: p.grad.clone() for name, p in distiller.named_parameters() if p.grad is not None}


CAUSAL = pytest.mark.parametrize(
    ("task", "options"),
    [
        ("causal-lm", {}),
        ("causal-lm", {"wiring": "spike_driven", "learnable_surrogate": True}),
        ("causal-lm", {"weight_bits": 1.58}),
        ("sequence-classification", {}),
        ("sequence-classification", {"classifier_pooling": "last"}),
    ],
)


@CAUSAL
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_of_a_causal_model_reads_nothing(task, options, autocast, monkeypatch):
    distiller, draw = causal(task, **options)
    batch = draw()
    assert not batch["attention_mask"].all()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = differentiated(distiller, batch)
        with pytest.raises(AssertionError, match="_local_scalar_dense"), Unread():
            distiller(batch)
        monkeypatch.setattr(decoder, "captured", lambda x: True)
        with Unread():
            found = differentiated(distiller, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(gradient.any() for gradient in found[1].values())


def test_a_captured_step_takes_no_other_padding(monkeypatch):
    monkeypatch.setattr(decoder, "captured", lambda x: True)
    distiller, draw = causal("causal-lm")
    batch = draw()
    with pytest.raises(RuntimeError, match="padding must be on the right"):
        distiller(batch | {"attention_mask": batch["attention_mask"].flip(1)})
    with pytest.raises(RuntimeError, match="nowhere before a cache"):
        distiller.student(batch["input_ids"], batch["attention_mask"], use_cache=True)


@pytest.mark.gpu
@CAUSAL
def test_replayed_gradients_of_a_causal_model(task, options):
    distiller, draw = causal(task, **options)
    distiller.cuda()
    replayed = ReplayedSteps(distiller, lambda batch: differentiated(distiller, batch)[0])
    for _ in range(4):
        batch = {name: values.cuda() for name, values in draw().items()}
        expected = differentiated(distiller, batch)
        losses = replayed(batch).clone()
        gradients = {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}
        torch.testing.assert_close((losses, gradients), expected, rtol=1e-3, atol=1e-5)
    assert len(replayed.graphs) == 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("spikelm", {}),
        ("spikelm", {"time_steps": 1}),
        ("spikelm", {"weight_bits": 1.58}),
        ("spikelm", {"neuron": "lif", "v_threshold": 0.25, "initializer_range": 0.2}),
        ("spikingbert", {}),
        ("spikingbert", {"weight_bits": 1}),
        ("spikebert", {}),
    ],
)
def test_replayed_gradients_of_an_encoder(family, options):
    torch.manual_seed(0)
    student, teacher = snlp_zoo.build(f"{family}_tiny", **options), snlp_zoo.build("spikelm_tiny").cuda()
    objectives = {"forward_kl": {}, "cross_entropy": {}, "hidden_mse": {}}
    distiller = Distiller(student, teacher, objectives).train().cuda()
    replayed = ReplayedSteps(distiller, lambda batch: differentiated(distiller, batch)[0])
    mask = (torch.arange(13) < torch.tensor([[13], [9], [4]])).long()

    def draw():
        batch = {"input_ids": torch.randint(1, 120, (3, 13)) * mask, "attention_mask": mask}
        batch = padded(batch | {"labels": torch.tensor([0, 1, 0])}, *distiller.configs)
        return {name: values.cuda() for name, values in batch.items()}

    distiller(draw())  # amplitudes are measured once
    for _ in range(4):
        batch, kept = draw(), {name: value.clone() for name, value in distiller.state_dict().items()}
        expected = differentiated(distiller, batch)
        distiller.load_state_dict(kept)  # and may move with what comes next
        losses = replayed(batch).clone()
        gradients = {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}
        torch.testing.assert_close((losses, gradients), expected, rtol=1e-3, atol=1e-5)
        assert all(gradient.any() for gradient in gradients.values())
    assert len(replayed.graphs) == 1


def test_on_a_cpu_nothing_changes(run, trained):
    folder, _ = run(train={"cuda_graphs": True}, teacher={"train": {"cuda_graphs": False}})
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (folder / name).read_bytes() == (trained.folder / name).read_bytes(), name


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_equal_others(run, losses, make_data, monkeypatch, family):
    rng, words = random.Random(0), ["lumi", "sola", "grum", "vosh", "kalan", "modor", "ripim", "tesut"]
    rows = [(" ".join(rng.choices(words, k=6)), ("negative", "positive")[i % 2]) for i in range(96)]
    entry = snlp_zoo.build(f"{family}_tiny").config.to_diff_dict()
    names = ("time_steps", "v_threshold")
    changes = {
        "data": {"source": str(make_data(train=rows))},  # 8 tokens each: 12 steps of one shape
        "model": {"model_type": family, "config": {name: entry[name] for name in names if name in entry}},
        "objectives": {"cross_entropy": 1.0, "hidden_mse": [0.0, 1.0]},
    }
    replays, real = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), real(graph)))
    eager, replayed = (run(train={"cuda_graphs": wanted}, **changes)[0] for wanted in (False, True))
    assert len(replays) == 11
    torch.testing.assert_close(losses(replayed), losses(eager), rtol=1e-3, atol=1e-4)
    last = [max((folder / "checkpoints").iterdir()) for folder in (eager, replayed)]
    weights = [load_file(folder / "model.safetensors") for folder in last]
    torch.testing.assert_close(*weights, rtol=0, atol=2e-3)
