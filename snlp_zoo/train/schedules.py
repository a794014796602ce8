"""Numbers that may change over a run: weights of objectives, the temperature of surrogates.

1.0                                              always
[1.0, 0.1]                                       linearly, from the first step to the last
{start: 1.0, end: 0.1, shape: cosine, until: 0.5}    along half a cosine, done half-way
"""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from snlp_zoo.checked import Checked


class Schedule(Checked):
    """A number that goes from `start` to `end` over the first share `until` of a run and stays there."""

    start: float = Field(ge=0, allow_inf_nan=False)
    end: float = Field(ge=0, allow_inf_nan=False)
    shape: Literal["linear", "cosine"] = "linear"
    until: float = Field(1.0, gt=0, le=1)

    def at(self, progress: float) -> float:
        """The value at a share of the run in [0, 1]: it depends on that alone, so a resumed run repeats it."""
        done = min(progress / self.until, 1.0)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start * (1 - done) + self.end * done


def _from_pair(value: Any) -> Any:
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    return {"start": value[0], "end": value[1]} if is_pair else value


def _kind(value: Any) -> str:
    return "schedule" if isinstance(value, list | tuple | dict | Schedule) else "number"


# A number of at least 0, or a `Schedule`; constant numbers stay numbers, in recipes and in the files they are kept in.
Scheduled = Annotated[
    Annotated[float, Field(ge=0, allow_inf_nan=False), Tag("number")]
    | Annotated[Schedule, BeforeValidator(_from_pair), Tag("schedule")],
    Discriminator(_kind),
]


def value_at(scheduled: float | Schedule, progress: float) -> float:
    """The value at a share of the run in [0, 1]."""
    return scheduled.at(progress) if isinstance(scheduled, Schedule) else scheduled
