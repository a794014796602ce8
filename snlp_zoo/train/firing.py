"""A student whose neurons are silent, or fire all the time, learns nothing: noticed while it trains, said once."""

import logging
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)
SILENT, SATURATED = 0.001, 0.9  # mean firing rates beyond these carry next to no information
PATIENCE = 100  # steps that a rate has to stay there
EVERY = 50  # steps between two looks


@dataclass
class FiringWatch:
    """What was seen so far; part of a run's progress, so that a resumed run does not warn again."""

    state: str = ""  # or "silent" or "saturated"
    since: int = 0
    warned: bool = False

    def due(self, step: int) -> bool:
        """Whether to look after this step (counted from 1): the same on every rank, whatever each has seen."""
        return step % EVERY == 1

    def look(self, step: int, sites: dict[str, float], config: Any) -> None:
        """Warn if it is time to.

        Args:
            sites: neuron site -> firing rate. Those inside layers count: neurons that code the input always fire.
            config: the student's.
        """
        inside = {site: rate for site, rate in sites.items() if site.startswith("layers.")} or sites
        rate = sum(inside.values()) / len(inside)
        state = _state(rate)
        if state != self.state:
            self.state, self.since = state, step
        if self.warned or not state or step - self.since < PATIENCE:
            return
        self.warned = True
        names = [site for site, own in inside.items() if _state(own) == state]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        beyond = "under 0.1 %" if state == "silent" else "over 90 %"
        logger.warning(
            f"the mean firing rate in the student's layers has been {beyond} for {step - self.since} "
            f"steps, at step {step} it is {rate:.3%}; {state} are {', '.join(names[:3])}{more}. "
            + (_why_silent(config) if state == "silent" else _WHY_SATURATED)
        )


def _state(rate: float) -> str:
    return "silent" if rate < SILENT else "saturated" if rate > SATURATED else ""


_WHY_SATURATED = "The usual cause is a v_threshold (or firing_k) that is small against the currents: raise it"


def _why_silent(config: Any) -> str:
    here, tau, steps = "", getattr(config, "tau", None), config.time_steps
    kind = getattr(config, "neuron", "lif")
    if not tau or kind == "if":  # there is no leak to choose
        return "The usual cause is a v_threshold (or firing_k) that is large against the currents: lower it"
    if kind != "plif":  # which has learned another tau since
        here = f" (tau {tau:g} and T {steps} ask for x >= {1 / (1 - (1 - 1 / tau) ** steps):.2g} v_threshold)"
    return (
        "The usual cause is a tau large against T: where the input decays too, a constant current x reaches "
        f"v_threshold only if x (1 - (1 - 1/tau)^T) does{here}: lower tau or v_threshold, or raise T"
    )
