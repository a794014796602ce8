"""What the processes of a run owe each other: to stop at the same step, and to say so when one of them is gone."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist

from snlp_zoo.errors import ProcessError

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class StopSignals:
    """Notes SIGTERM and SIGUSR1, by which schedulers announce the end, instead of dying; used as a context.

    Outside the main thread nothing is noted: only there Python receives signals.
    """

    def __init__(self, processes: int) -> None:
        self.received = False
        # on CPUs: asking must not wait for a GPU
        self.group: Any = dist.new_group(backend="gloo") if processes > 1 else None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def received_by_any(self) -> bool:
        """Whether any process was told to stop; all get the same answer, and all must ask."""
        if self.group is None:
            return self.received
        told = torch.tensor([int(self.received)])
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self.group)
        return bool(told.item())


def wait_for_all(processes: int) -> None:
    """Wait until all processes are here, for a day if need be: one of them may wait for another run. On CPUs, where the
    end of a process is noticed at once.
    """
    if processes > 1:
        everyone: Any = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        dist.barrier(everyone)


def others_lost(error: BaseException) -> bool:
    """Whether this is what a process hears of another one's end."""
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


@contextmanager
def loss_of_others_explained() -> Iterator[None]:
    """Around a run: what its processes hear of another one's end becomes one sentence.

    Raises:
        ProcessError: another process is gone or does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        if not others_lost(error):
            raise
        raise ProcessError(
            "another process of this run has ended or does not answer; the launcher names it and its signal below; "
            "start all of them again with --resume"
        ) from error
