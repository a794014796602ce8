import pytest

from snlp_zoo.energy import COST_TABLES
from snlp_zoo.energy.claims import CLAIMS, Found, ledger

NEEDED = {claim.system: claim.needed_rate(COST_TABLES["horowitz45"]) for claim in CLAIMS}


def test_rates_the_claims_need():
    assert NEEDED["SpikeLM"] == pytest.approx(0.345345, rel=1e-5)
    assert NEEDED["SpikingBERT"] == pytest.approx(0.159375, rel=1e-9)
    assert NEEDED["SpikeBERT"] == pytest.approx(0.3578, rel=1e-3)


def test_a_claim_is_reproduced_only_if_its_ratio_is_reached():
    rows = {
        "SpikeLM": [Found("mine", 4, 0.3, 4.2, 3.0, 1.5, "texts"), Found("other", 2, 0.4, 3.6, 3.0, 1.5, "texts")],
        "SpikingBERT": [],
    }
    page = ledger(rows).splitlines()
    assert any("| mine |" in line and "3.70x reproduced |" in line for line in page)
    assert any("| other |" in line and "3.70x not reproduced at T = 2 |" in line for line in page)
    assert any("no SpikingBERT in this zoo yet" in line for line in page)
    assert any("no SpikeBERT in this zoo yet" in line for line in page)
