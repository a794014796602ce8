"""Errors a user can cause and mend. The command line prints the message alone and exits with their code."""

from collections.abc import Mapping
from difflib import get_close_matches
from textwrap import shorten
from typing import TypeVar

Named = TypeVar("Named")


class SnlpError(Exception):
    """Says what is wrong, the value that is wrong, and what to do about it, in one or two sentences."""

    exit_code = 2


class BackendError(SnlpError, RuntimeError):
    """A backend was asked for by name and cannot run here."""


class RecipeError(SnlpError, ValueError):
    """A zoo entry or recipe cannot be read: unknown name, unknown key, value of the wrong kind."""


class DataError(SnlpError, ValueError):
    """A data set cannot be used as asked: missing column, empty text, label outside its range."""


class CheckpointError(SnlpError, OSError):
    """A checkpoint cannot be read or written."""


class HubError(CheckpointError):
    """The Hub refuses, cannot be reached, or does not hold what was sent."""


class ProcessError(SnlpError, RuntimeError):
    """Another process of the same run is gone."""


class Interrupted(SnlpError):
    """A run was told to stop, has saved a checkpoint and can go on: try again later, as sysexits.h says."""

    exit_code = 75  # EX_TEMPFAIL


class ConvergenceError(SnlpError, ArithmeticError):
    """A fixed point was not reached: too few iterations, feedback too strong, or a step that is not finite."""


class EnergyError(SnlpError, ValueError):
    """An estimate or a figure cannot be made: nothing spikes, no price, spikes are none, a bad cost, no matplotlib."""


class ConversionError(SnlpError, ValueError):
    """A model cannot be made to spike as asked: no such layer, converted already, an option out of range."""


class FoldError(SnlpError, ValueError):
    """An amplitude cannot be absorbed into weights exactly."""


def lookup(what: str, name: str, known: Mapping[str, Named], error: type[Exception] = ValueError) -> Named:
    """known[name].

    Raises:
        error: unknown name, with the nearest one.
    """
    if name in known:
        return known[name]
    nearest = get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise error(f"unknown {what} {name!r}, known are {', '.join(known)}{hint}")


def unknown(kind: str, name: str, known: list[str]) -> RecipeError:
    """The error for a name that none of many things has, with the nearest ones."""
    nearest = get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"known are {shorten(', '.join(known), 500)}"
    return RecipeError(f"unknown {kind} {name!r}; {hint}")
