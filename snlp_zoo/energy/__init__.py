"""Energy that can be audited: counts, costs, reports, and proof of where the spikes are."""

from snlp_zoo.energy.costs import COST_TABLES, MEMORY_MODELS, CostTable, Memory, break_even_rate
from snlp_zoo.energy.report import EnergyReport, estimate

__all__ = ["COST_TABLES", "MEMORY_MODELS", "CostTable", "EnergyReport", "Memory", "break_even_rate", "estimate"]
