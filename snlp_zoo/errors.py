"""Errors a user can cause and mend. The command line prints the message alone and exits with their code."""


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
    """An energy estimate cannot be made: nothing spikes, an operation has no price, spikes are none, a cost is bad."""


class FoldError(SnlpError, ValueError):
    """An amplitude cannot be absorbed into weights exactly."""
