"""The page of published scores: what the zoo's results make of them, and that it is current."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from snlp_zoo.models.configuration import SpikingConfig
from snlp_zoo.registry import model_classes
from snlp_zoo.results import Result

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture
def published(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    yield import_module("published")
    sys.modules.pop("published")


def result(value, **more):
    return Result(dataset="sst2", metric="accuracy", value=value, seeds=[0, 1, 2], **more)


def test_a_score_is_reproduced_by_a_model_that_takes_no_more(published):
    claim = published.Published("SpikeLM", "SST-2", "accuracy", 0.87, 109e6, 4, "a paper")
    good, poor = result(0.871, deviation=0.002), result(0.869)
    assert published.status(claim, []) == ("not measured yet", "")
    assert published.status(claim, [("SpikingBERT", "other", 4, 32, good)])[0] == "not measured yet"
    assert published.status(claim, [("SpikeLM", "slow", 8, 32, good)])[0] == "not measured yet"
    assert published.status(claim, [("SpikeLM", "mine", 4, 32, poor)]) == (
        "not reproduced", "86.90, 3 seeds, mine, T = 4, 32 bits",
    )  # fmt: skip
    both = [("SpikeLM", "mine", 4, 32, poor), ("SpikeLM", "small", 1, 1.58, good)]
    assert published.status(claim, both) == ("reproduced", "87.10 +- 0.20, 3 seeds, small, T = 1, 1.58 bits")
    few_bits = published.Published("SpikeLM", "SST-2", "accuracy", 0.86, None, None, "a paper", 1.58)
    assert published.status(few_bits, both[:1])[0] == "not measured yet"
    assert published.status(few_bits, both)[0] == "reproduced"


def test_a_run_of_a_seed_that_was_there_counts_as_a_run():
    assert result(0.87).number_of_seeds == "3 seeds"
    twice = Result(dataset="sst2", metric="accuracy", value=0.87, seeds=[0, 0, 1, 2])
    assert twice.number_of_seeds == "4 runs of 3 seeds"
    assert Result(dataset="sst2", metric="accuracy", value=0.87, seeds=[1, 1]).number_of_seeds == "2 runs of 1 seed"


def test_less_perplexity_is_better(published):
    claim = published.Published("SpikeGPT", "Books", "perplexity", 20.0, None, 1, "a paper")
    ours = Result(dataset="books", metric="perplexity", value=19.0, seed=0)
    assert published.status(claim, [("SpikeGPT", "mine", 1, 32, ours)])[0] == "reproduced"
    worse = ours.model_copy(update={"value": 21.0})
    assert published.status(claim, [("SpikeGPT", "mine", 1, 32, worse)])[0] == "not reproduced"


def test_reasons_come_before_results(published):
    claim = published.Published("SpikeLM", "QNLI", "accuracy", 0.85, None, 4, "a paper", reason="no data")
    ours = Result(dataset="QNLI", metric="accuracy", value=0.9, seed=0)
    assert published.status(claim, [("SpikeLM", "mine", 4, 32, ours)]) == ("not testable here", "no data")


@pytest.mark.parametrize(
    ("asked", "value", "steps"),
    [
        (("SpikeLM", "sst2", "accuracy", 4, 32), 0.870, 4),
        (("SpikeLM", "SST-2", "accuracy", 1, 32), 0.865, 1),
        (("SpikeLM", "SST-2", "accuracy", 2, 32), 0.870, 4),
        (("SpikingBERT", "SST-2", "accuracy", 16, 32), 0.8819, 80),
        (("SpikingBERT", "SST-2", "accuracy", 16, 1.58), 0.871, None),
        (("SpikingBERT", "SST-2", "accuracy", 16, 1), 0.867, None),
        (("SpikeGPT", "SST-2", "accuracy", 1, 32), 0.8039, 1),
    ],
)
def test_the_papers_value_for_a_model(published, asked, value, steps):
    paper = published.paper_of(*asked)
    assert (paper.value, paper.time_steps) == (value, steps)


def test_no_paper_reports_spikelm_with_ternary_weights(published):
    assert published.paper_of("SpikeLM", "SST-2", "accuracy", 4, 1.58) is None


def test_every_family_has_a_name_and_no_score_is_listed_twice(published):
    spiking = {name for name, classes in model_classes().items() if issubclass(classes["config"], SpikingConfig)}
    assert published.SYSTEMS.keys() == spiking
    keys = [(c.system, c.dataset, c.metric, c.time_steps, c.bits, c.size) for c in published.PUBLISHED]
    assert len(set(keys)) == len(keys)
    assert all(0 < claim.value < 1 or claim.lower_is_better for claim in published.PUBLISHED)


def test_the_page_is_current():
    command = [sys.executable, TOOLS / "published.py", "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
