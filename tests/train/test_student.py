"""Where a student starts."""

import logging

import pytest
import torch

import snlp_zoo
from snlp_zoo.errors import CheckpointError, RecipeError
from snlp_zoo.train.student import copy_student

LAZY = {"max_steps": 1, "learning_rate": 1e-12}


def build(**changes):
    return snlp_zoo.build("spikelm_tiny", **{"num_labels": 2, "vocab_size": 83} | changes)


@pytest.fixture
def saved(tmp_path):
    """A student whose amplitudes were measured."""
    torch.manual_seed(5)
    student = build().train()
    student(torch.randint(1, 83, (4, 9)))
    student.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_an_equal_student_is_copied_whole(saved):
    student = build()
    assert copy_student(student, str(saved)) == []
    theirs = snlp_zoo.load(saved)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in student.state_dict().items())
    ids = torch.randint(1, 83, (2, 7))
    assert torch.equal(student(ids).logits, theirs(ids).logits)


def test_other_classes_get_a_new_classifier_and_that_is_logged(saved, caplog):
    student = build(num_labels=3)
    fresh = student.classifier.weight.clone()
    with caplog.at_level(logging.WARNING, logger="snlp_zoo"):
        left = copy_student(student, str(saved))
    assert left == ["classifier.weight", "classifier.bias"]
    assert f"not copied from {saved}: classifier.weight, classifier.bias" in caplog.text
    assert torch.equal(student.classifier.weight, fresh)


def test_other_time_steps_keep_weights_and_measure_amplitudes_anew(saved):
    student = build(time_steps=2)
    left = copy_student(student, str(saved))
    theirs = snlp_zoo.load(saved)
    assert {name.rpartition(".")[2] for name in left} == {"alpha", "initialized", "magnitude"}
    state = student.state_dict()
    assert not any(state[name] for name in state if name.endswith("initialized"))
    assert torch.equal(student.spikelm.layers[1].mlp.up.weight, theirs.spikelm.layers[1].mlp.up.weight)
    assert torch.equal(student.classifier.weight, theirs.classifier.weight)


@pytest.mark.parametrize(("source", "target"), [("encoder", None), (None, "encoder")])
def test_encoders_and_classifiers_start_from_each_other(tmp_path, source, target):
    build(task=source).save_pretrained(tmp_path / "saved")
    student = build(task=target)
    left = copy_student(student, str(tmp_path / "saved"))
    assert left == (["classifier.weight", "classifier.bias"] if source else [])
    ours, theirs = student.base_model.state_dict(), snlp_zoo.load(tmp_path / "saved").base_model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("bits", [1.58, 1])
def test_low_bit_weights_start_from_float_ones(saved, bits):
    student = build(weight_bits=bits)
    assert copy_student(student, str(saved)) == []
    name = "spikelm.layers.0.mlp.up.weight"
    assert torch.equal(student.state_dict()[name], snlp_zoo.load(saved).state_dict()[name])


@pytest.mark.parametrize("bits", [1.58, 1])
def test_float_weights_start_from_what_low_bit_ones_act_as(tmp_path, bits):
    torch.manual_seed(5)
    ids = torch.randint(1, 83, (4, 9))
    low, student = build(weight_bits=bits).train(), build()
    low(ids)
    low.save_pretrained(tmp_path / "saved")
    assert copy_student(student, str(tmp_path / "saved")) == []
    assert torch.equal(student.eval()(ids).logits, low.eval()(ids).logits)
    weight = next(p for name, p in student.named_parameters() if "query" in name and p.ndim == 2)
    assert len(weight.unique()) == (3 if bits == 1.58 else 2)


def test_packed_weights_are_no_start(tmp_path):
    build(weight_bits=1.58, packed=True).save_pretrained(tmp_path / "saved")
    with pytest.raises(RecipeError, match="saved is packed for inference; name the student it was made from"):
        copy_student(build(weight_bits=1.58), str(tmp_path / "saved"))


def test_a_student_none_of_whose_layers_fits(saved):
    with pytest.raises(RecipeError, match=r"init_from: no layer of .*saved fits the student"):
        copy_student(build(hidden_size=16, intermediate_size=20), str(saved))


def test_a_task_starts_from_the_student_of_another(run, trained, make_data):
    """A finished run's folder; another number of classes; a stage less than in the teacher's weights."""
    rows = [("lumi", "x"), ("grum", "y"), ("kalan", "z")] * 8
    data = str(make_data(train=rows, dev=rows, test=rows))
    folder, _ = run(train=LAZY, data={"source": data, "overlap": "report"}, model={"init_from": str(trained.folder)})
    ours, theirs = snlp_zoo.load(folder), snlp_zoo.load(trained.folder)
    assert ours.config.label_names == ["x", "y", "z"]
    name = "spikelm.layers.1.mlp.down.weight"
    assert torch.allclose(ours.state_dict()[name], theirs.state_dict()[name], atol=1e-9)


def test_a_start_that_is_not_there_is_told_at_once(run, tmp_path):
    with pytest.raises(CheckpointError, match="no folder and no zoo entry called 'runs/nobody'"):
        run(model={"init_from": "runs/nobody"})
    assert not list(tmp_path.glob("run*"))
