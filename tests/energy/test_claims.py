from pathlib import Path

import pytest

from snlp_zoo.energy import COST_TABLES
from snlp_zoo.energy.claims import CLAIMS, Found, ledger

NEEDED = {claim.system: claim.needed_rate(COST_TABLES["horowitz45"]) for claim in CLAIMS}


def test_rates_the_claims_need():
    assert NEEDED["SpikeLM"] == pytest.approx(0.345345, rel=1e-5)
    assert NEEDED["SpikingBERT"] == pytest.approx(0.159375, rel=1e-9)
    assert NEEDED["SpikeBERT"] == pytest.approx(0.3578, rel=1e-3)


def test_a_claim_needs_a_rate_that_is_low_enough():
    rows = {
        "SpikeLM": [
            Found("mine", "texts", 4, 0.30, 0.99, 4.2, 3.0, 1.5),
            Found("other", "texts", 2, 0.40, 0.99, 3.6, 3.0, 1.5),
        ],
        "SpikingBERT": [],
        "SpikeGPT": [Found("published", "texts", 1, 0.0, 0.0, 1.0, 0.9, 0.9)],
    }
    page = ledger(rows).splitlines()
    assert any("| mine |" in line and "low enough for 3.70x at T = 4 (4.26x)" in line for line in page)
    assert any("| other |" in line and "too high for 3.70x at T = 4 (3.19x)" in line for line in page)
    assert any(line.startswith("| published |") and line.endswith("| - |") for line in page)
    assert any("no SpikingBERT in this zoo yet" in line for line in page)
    assert any("no SpikeBERT in this zoo yet" in line for line in page)


def test_the_page_is_of_these_claims():
    page = (Path(__file__).parents[2] / "snlp_zoo" / "energy" / "claims.md").read_text(encoding="utf-8")
    assert "\n".join(ledger({}).splitlines()[: 2 + len(CLAIMS)]) in page
