"""What was measured of a zoo entry, as `results:` in its file holds it and `tools/ledger.py` writes it.

Shares and scores are fractions of 1, but for perplexity and bits. A field that nobody measured is not there.
"""

from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from snlp_zoo.checked import Checked

Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Paper(Checked):
    """What the paper reports on this data set: its value, of a model of so many parameters at T = time_steps."""

    value: Finite
    parameters: float | None = Field(None, gt=0)
    time_steps: int | None = Field(None, ge=1)
    bits: float | None = Field(None, gt=0)
    source: str | None = None  # which table or page, and of what, if it is not what the entry's source says


class EnergyRatios(Checked):
    """Energy of the dense float network / the spiking one's, `energy.estimate` with its own costs and memory."""

    products: Finite | None = None  # as papers count
    all_operations: Finite | None = None
    with_memory: Finite | None = None
    texts: int | None = Field(None, ge=1)  # first texts of the reported split that ran
    seed: int | None = None  # of the model that ran


class Result(Checked):
    """One score of a trained model on one data set: a mean over seeds, or of one seed."""

    dataset: str
    metric: str
    split: str | None = None
    value: Finite | None = None  # mean over seeds; without it the line says what a paper reports
    deviation: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None  # of the sample, over seeds
    least: Finite | None = None
    most: Finite | None = None
    seed: int | None = None
    seeds: list[int] | None = None
    paper: Paper | None = None
    teacher_value: Finite | None = None
    baseline_value: Finite | None = None
    firing_rate: Share | None = None
    spike_driven_fraction: Share | None = None
    energy: EnergyRatios | None = None
    parameters: int | None = Field(None, ge=1)
    time_steps: int | None = Field(None, ge=1)
    bits: float | None = Field(None, gt=0)  # of the weights inside the encoder or decoder
    minutes: Annotated[float, Field(ge=0)] | None = None  # mean over seeds of all stages, without the teacher's tuning
    teacher_minutes: Annotated[float, Field(ge=0)] | None = None  # the tuning, of the run that did it or waited longest
    overlap: int | None = Field(None, ge=0)  # training texts left out because they hold a held-out one
    selection: str | None = None  # how the epoch was chosen
    command: str | None = None
    hardware: str | None = None
    torch: str | None = None
    commit: str | None = None

    @property
    def runs(self) -> list[int]:
        """Seeds of the runs that the value is the mean of."""
        return self.seeds or ([] if self.seed is None else [self.seed])

    @property
    def number_of_seeds(self) -> str:
        """In words: 3 seeds, or 4 runs of 3 seeds."""
        seeds = len(set(self.runs))
        words = f"{seeds} seed{'s' * (seeds != 1)}"
        return words if seeds == len(self.runs) else f"{len(self.runs)} runs of {words}"

    def spread(self, shown: Callable[[float], str]) -> str:
        """Mean +- standard deviation as `shown` writes numbers, or what there is of them."""
        numbers = [shown(number) for number in (self.value, self.deviation) if number is not None]
        return " +- ".join(numbers)
