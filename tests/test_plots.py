import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from snlp_zoo.energy import estimate
from snlp_zoo.energy.record import Recorded, record
from snlp_zoo.errors import EnergyError
from snlp_zoo.layers import ElasticBiSpike, IFNode, LIFNode
from snlp_zoo.layers.firing import effective_domain_recorded
from snlp_zoo.registry import build

pytest.importorskip("matplotlib")
from snlp_zoo import plots
from snlp_zoo.pareto import front


@pytest.fixture(params=["spikelm_tiny", "spikingbert_tiny", "spikebert_tiny", "spikegpt_tiny"])
def model(request):
    return build(request.param)


BATCH = {"input_ids": torch.tensor([[0, 5, 6, 7, 8]]), "attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}


def texts(figure):
    return [text.get_text() for text in figure.findobj(lambda x: hasattr(x, "get_text"))]


def test_recorded_membranes_fire_where_they_reach_their_threshold(model):
    for name, found in record(model, BATCH).items():
        assert found.spikes.shape == found.membranes.shape
        time_steps = 1 if model.config.model_type == "spikegpt" else 4
        assert found.spikes.shape[:2] == (time_steps, 4)  # T steps of four real tokens
        reached = found.membranes.abs() > found.threshold.view(-1, 1, 1) if found.ternary else (
            found.membranes >= found.threshold.view(-1, 1, 1))  # fmt: skip
        assert torch.equal(found.spikes != 0, reached), name


def test_recording_leaves_the_model_as_it_was(model):
    *_, frozen = model.train().modules()
    frozen.eval()
    record(model, BATCH)
    assert [m for m in model.modules() if not m.training] == [frozen]
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "node",
    [
        LIFNode(),
        LIFNode(v_reset=None),
        LIFNode(decay_input=False),
        IFNode(),
        ElasticBiSpike(6),
        ElasticBiSpike(6, beta=0),
    ],
)
def test_membranes_of_every_neuron(node):
    class One(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.node = node

        def forward(self, inputs_embeds, attention_mask):
            return self.node(3 * inputs_embeds.unsqueeze(0).repeat(6, 1, 1, 1), from_rest=True)

    (found,) = record(One(), {"inputs_embeds": torch.randn(1, 3, 20)}).values()
    threshold = found.threshold.view(-1, 1, 1)
    reached = found.membranes.abs() > threshold if found.ternary else found.membranes >= threshold
    assert found.spikes.any()
    assert torch.equal(found.spikes != 0, reached)


def test_raster_has_a_mark_for_every_spike_and_a_label_for_every_token(model):
    site, found = next(iter(record(model, BATCH).items()))
    figure = plots.spike_raster(found, ["a", "b", "c", "d"], site)
    marks = sum(len(collection.get_offsets()) for collection in figure.axes[0].collections)
    assert marks == int((found.spikes != 0).sum()) > 0
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["a", "b", "c", "d"]
    assert site in figure.axes[0].get_title(loc="left")


def test_labels_read_as_the_text_does():
    tokens = ["the", "\u0120crew", "\u0120", "\u00e6", "$x$"]
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="the"))  # noqa: S106
    inner.decoder = decoders.ByteLevel()
    labels = plots.token_labels(PreTrainedTokenizerFast(tokenizer_object=inner), range(5))
    assert labels == ["the", "crew", "\u0120", "\u00e6", "$x$"]  # neither white space nor part of a letter reads
    spikes = torch.eye(5).unsqueeze(0)
    found = Recorded(spikes, spikes, torch.ones(1), spikes > 0, False)
    drawn = plots.spike_raster(found, labels, "layers.0").axes[0].get_xticklabels()
    assert not any(label.get_parse_math() for label in drawn)  # a dollar is a dollar


def test_raster_over_tokens_has_no_steps():
    spikes = torch.eye(3).unsqueeze(0)  # one neuron fires at each token
    found = Recorded(spikes, spikes, torch.ones(1), spikes > 0, False)
    axes = plots.spike_raster(found, ["a", "b", "c"], "layers.0").axes[0]
    assert axes.collections[0].get_offsets().tolist() == [[0.5, 0], [1.5, 1], [2.5, 2]]
    assert axes.get_xlabel() == "token"


def test_raster_of_one_neuron_for_all_tokens():
    found = Recorded(torch.ones(3, 1, 8), torch.ones(3, 1, 8), torch.ones(3), torch.ones(3, 1, 8) > 0, False)
    figure = plots.spike_raster(found, ["a", "b"], "gate")
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["all tokens"]


def test_rates_have_a_bar_for_every_site(model):
    output = model(**BATCH, output_spike_rates=True)
    figure = plots.firing_rates(output.spike_rates)
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == pytest.approx([100 * rate.mean().item() for rate in output.spike_rates.values()])


def test_energy_bars_add_up(model):
    report = estimate(model, BATCH)
    figure = plots.energy_breakdown(report)
    spiking = [bar for bar in figure.axes[0].patches if bar.get_y() < 0]
    assert sum(bar.get_width() for bar in spiking) == pytest.approx(report.totals["pj"] * 1e-6)
    assert any("not measured" in text for text in texts(figure))


def test_large_energies_are_written_out(model):
    report = estimate(model, BATCH)
    large = {"with_memory": dict.fromkeys(report.energy_pj["with_memory"], 2.1374e9)}
    figure = plots.energy_breakdown(replace(report, energy_pj=large))
    assert " 2,140" in texts(figure)


def test_membrane_histogram_counts_every_membrane(model):
    site, found = next(iter(record(model, BATCH).items()))
    figure = plots.membrane_histogram(found, site)
    bars = [patch for patch in figure.axes[0].patches if patch.get_facecolor()[:3] != (0, 0, 0)]
    assert sum(bar.get_height() for bar in bars[:100]) == found.membranes.numel()
    assert {"threshold", "surrogate's window"} <= set(texts(figure))


def test_membranes_in_the_window_are_those_of_the_effective_domain(model):
    batch = {key: value[:, 1:] for key, value in BATCH.items()}  # without padding
    body = model.eval().base_model
    with effective_domain_recorded(body, batch["attention_mask"]) as shares:
        body(**batch)
    for site, found in record(body, BATCH).items():
        assert found.reached.float().mean() == pytest.approx(shares[site])
        figure = plots.membrane_histogram(found, site)
        assert f"{100 * shares[site]:.0f} % inside" in figure.axes[0].get_title(loc="left")
        outside = sum(bar.get_height() for bar in figure.axes[0].patches[100:200])
        assert outside == (~found.reached).sum()


ROWS = [
    {"time_steps": t, "threshold": x, "accuracy": a, "pj_per_token": pj, "ms_per_text": ms}
    for t, x, a, pj, ms in [(1, 1.0, 0.5, 1e6, 1), (2, 1.0, 0.7, 2e6, 2), (4, 1.0, 0.6, 4e6, 4), (4, 0.5, 0.7, 3e6, 4)]
]


def test_pareto_front_is_what_nothing_beats():
    assert front(ROWS) == ROWS[:2]
    figure = plots.pareto_front(ROWS, front(ROWS))
    assert {"T=1", "T=2", "T=4", "threshold x 0.5", "threshold x 1"} <= set(texts(figure))


def test_figures_are_written_in_800_pixels(tmp_path):
    figure = plots.firing_rates({"a": 0.1, "b": torch.tensor([0.2, 0.4])})
    path = plots.save(figure, tmp_path / "new" / "rates.png")
    assert int.from_bytes(path.read_bytes()[16:20], "big") == 800  # width in the header of a PNG
    svg = ElementTree.parse(plots.save(figure, tmp_path / "rates.svg")).getroot()  # noqa: S314  (our own file)
    assert svg.tag.endswith("svg")
    with pytest.raises(EnergyError, match=r"png or svg, got 'rates\.gif'"):
        plots.save(figure, tmp_path / "rates.gif")


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(EnergyError, match=r"snlp-zoo\[plots\]"):
        plots.firing_rates({"a": 0.1})
