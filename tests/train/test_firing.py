"""A network that never or always fires is noticed while it trains; where its surrogates reach is logged."""

import logging
from types import SimpleNamespace

import pytest
import torch

from snlp_zoo.train import run as runs
from snlp_zoo.train.firing import EVERY, PATIENCE, FiringWatch
from snlp_zoo.train.loop import Trainer

LONG = {"epochs": 5, "batch_size": 4, "eval_steps": 200, "save_steps": 110, "logging_steps": 50}  # 120 steps
SMALL = {"model_type": "spikingbert", "config": {"time_steps": 2, "num_hidden_layers": 1}}


def with_threshold(v_threshold):
    return SMALL | {"config": SMALL["config"] | {"v_threshold": v_threshold}}


@pytest.fixture
def warnings(caplog):
    """Function: what was said about firing."""
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if "firing rate" in record.getMessage()]


def test_a_silent_student_is_noticed_once(run, trained, warnings, tmp_path, stop_at, monkeypatch):
    """And not again by the same run, resumed."""
    real, changes = Trainer._step, {"model": with_threshold(1e6), "train": LONG, "objectives": {"hidden_mse": 1.0}}
    stop_at(115)
    with pytest.raises(stop_at.error):
        run(into=tmp_path / "run", **changes)
    (said,) = warnings()
    assert said.startswith(
        "the mean firing rate in the student's layers has been under 0.1 % for 100 steps, at step 101 it is 0.00"
    )
    assert "silent are layers.0.attention.key_neuron, layers.0.attention.value_neuron, layers.0" in said
    assert " and 3 more. The usual cause is a v_threshold (or firing_k) that is large" in said
    monkeypatch.setattr(Trainer, "_step", real)
    _, summary = run(into=tmp_path / "run", resume=True, **changes)
    assert summary["firing_rate"] < 1e-3
    assert len(warnings()) == 1


def test_tau_large_against_t_is_the_cause_that_is_told(run, warnings):
    """SpikeBERT with the tau of its pre-training script and the T of its fine-tuning script."""
    model = {
        "model_type": "spikebert",
        "init_from": "scratch",
        "config": {"time_steps": 4, "tau": 10.0, "num_hidden_layers": 1},
    }
    _, summary = run(model=model, train=LONG | {"learning_rate": 1e-6})
    assert summary["firing_rate"] > 1e-3  # that of embeddings as spikes is one half
    (said,) = warnings()
    assert "under 0.1 % for 100 steps" in said
    assert "layers.0." in said
    assert "(tau 10 and T 4 ask for x >= 2.9 v_threshold)" in said


def test_a_saturated_student_is_noticed(run, warnings, monkeypatch):
    real = runs.make_student

    def flooded(*arguments):
        student = real(*arguments)
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if name.endswith("bias"):
                    parameter += 10
        return student

    monkeypatch.setattr(runs, "make_student", flooded)
    run(model=with_threshold(0.5), train=LONG | {"learning_rate": 1e-8})
    (said,) = warnings()
    assert "over 90 % for 100 steps" in said
    assert "saturated are" in said
    assert "raise it" in said


def test_a_healthy_student_is_left_in_peace(run, warnings):
    _, summary = run(model=with_threshold(0.5), train=LONG)
    assert 0.001 < summary["firing_rate"] < 0.9
    assert warnings() == []


def test_looking_changes_nothing(run, monkeypatch):
    """Bytes of a run whose neurons are looked at after every step; dropout and amplitudes that move included."""
    changes = {"train": {"max_steps": 6}, "model": {"config": {"hidden_dropout_prob": 0.1}}}
    folders = []
    for due in (True, False):
        monkeypatch.setattr(FiringWatch, "due", lambda self, step, due=due: due)
        folders.append(run(**changes)[0])
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def looks(rates, tau=None, time_steps=4):
    """Whether it had warned after each look."""
    watch, told = FiringWatch(), []
    for number, rate in enumerate(rates):
        sites = {"input": 0.5, "layers.0.a": rate, "layers.0.b": 0.0 if rate < 0.5 else 1.0, "layers.1.a": rate}
        config = SimpleNamespace(time_steps=time_steps, **({"tau": tau} if tau else {}))
        watch.look(1 + number * EVERY, sites, config)
        told.append(watch.warned)
    return told


def test_it_has_to_stay_there():
    patience = PATIENCE // EVERY
    assert looks([0.0] * (patience + 1)) == [False] * patience + [True]
    assert not any(looks([0.0] * patience + [0.01] + [0.0] * patience))  # it recovered
    assert not any(looks([0.0, 0.95] * patience))  # neither the one nor the other
    assert not any(looks([0.0016] * 3 * patience))  # a mean of 0.0011: the bound is 0.001
    assert not any(looks([0.84] * 3 * patience))  # of 0.893
    assert looks([0.91] * (patience + 1))[-1]


def test_the_usual_cause_in_numbers(warnings):
    """tau 10 with T 4 asks a constant current for 1 / (1 - 0.9^4) = 2.9 thresholds."""
    looks([0.0] * (PATIENCE // EVERY + 1), tau=10.0)
    (said,) = warnings()
    assert "silent are layers.0.a, layers.0.b, layers.1.a. The usual" in said
    assert "(tau 10 and T 4 ask for x >= 2.9 v_threshold)" in said


def test_a_look_is_due_every_few_steps():
    assert [step for step in range(1, 152) if FiringWatch().due(step)] == [1, 51, 101, 151]


def test_it_warns_once(warnings):
    looks([0.0] * 30)
    assert len(warnings()) == 1


# ---- the effective domain ----


def test_validation_rows_and_the_summary_tell_where_surrogates_reach(trained, metrics):
    rows = [row["effective_domain"] for row in metrics(trained.folder) if "split" in row]
    assert len(rows) == 2
    for row in rows:
        assert {"layers.0.attention.query.neuron", "layers.1.mlp.down.neuron"} <= row.keys()
        assert all(0 <= share <= 1 for share in row.values())
    assert len({tuple(row.values()) for row in rows}) == 2
    best = [row for row in metrics(trained.folder) if "split" in row]
    best = max(best, key=lambda row: (row["accuracy"], -row["step"]))
    assert trained.summary["effective_domain"] == best["effective_domain"]
