"""Energy that can be audited: counts, costs, reports, and proof of where the spikes are."""

from snlp_zoo.energy.costs import COST_TABLES, MEMORY_MODELS, CostTable, Memory, break_even_rate
from snlp_zoo.energy.report import EnergyReport, estimate
from snlp_zoo.energy.verify import Verification, verify_spikes

__all__ = [
    "COST_TABLES",
    "MEMORY_MODELS",
    "CostTable",
    "EnergyReport",
    "Memory",
    "Verification",
    "break_even_rate",
    "estimate",
    "verify_spikes",
]
