"""What a run says of itself in its checkpoints: how long it has learned and how well, from which data, and where."""

from __future__ import annotations

import getpass
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from dbmpi.checkpoint.consistency import is_metric
from dbmpi.checkpoint.finite import finite_or_none
from dbmpi.checkpoint.schema import CheckpointInfo
from dbmpi.objective import Outcome

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_LEARNED = ("loss", "accuracy")
_TEST = ("test_step", "test_loss", "test_accuracy", "test_metrics")
_BEST = ("best_step", "best_value", "best_counted", "best_waited")


class Account:
    """Keeps what the next checkpoint of a run says beside its position: fields of :class:`CheckpointInfo`.

    Parameters
    ----------
    earlier
        Description of the checkpoint that the run resumes from: what it says holds until there is something newer.
    data_name
        Name of the training data, without directories.
    data_samples
        Number of samples in them.
    clock
        Seconds, for tests.
    """

    def __init__(
        self,
        earlier: CheckpointInfo | None,
        data_name: str,
        data_samples: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        # A file of an early version does not say how long its run had learned, and neither do those that follow it.
        before = 0.0 if earlier is None else earlier.seconds
        self._began = None if before is None else clock() - before
        self._fixed: dict[str, Any] = {"data_name": _text(data_name), "data_samples": data_samples, **whereabouts()}
        self._measured: dict[str, Any] = {}
        if earlier is not None:
            best = _BEST if earlier.best_value is not None else ()
            warm = ("warm_samples",) if earlier.warm_samples else ()
            self._measured = {name: getattr(earlier, name) for name in (*_LEARNED, *_TEST, *best, *warm)}

    def learned(self, loss: float, accuracy: float | None) -> None:
        """Note the mean `loss` of the samples learned from last, and the `accuracy`, if they have classes."""
        self._measured |= {"loss": finite_or_none(loss), "accuracy": accuracy}

    def warmed(self, samples: int) -> None:
        """Note that the warmstart was over after so many `samples`, counted over all sessions."""
        self._measured["warm_samples"] = samples

    def tested(self, step: int, outcome: Outcome, best: Mapping[str, Any] = _NOTHING) -> None:
        """Note an evaluation of the held-out samples.

        Parameters
        ----------
        step
            When it was, counted over all sessions.
        outcome
            What it came to.
        best
            Fields of :class:`CheckpointInfo` about the best one so far.
        """
        metrics = {name: value for name, value in outcome.metrics.items() if is_metric(name) and math.isfinite(value)}
        numbers = (step, finite_or_none(outcome.mean_loss), outcome.accuracy, metrics)
        self._measured |= dict(zip(_TEST, numbers, strict=True)) | dict(best)

    def test(self) -> dict[str, Any]:
        """Return the fields of the last evaluation on held-out samples, and of the best one, by name."""
        return {name: self._measured[name] for name in (*_TEST, *_BEST) if name in self._measured}

    def fields(self) -> dict[str, Any]:
        """Return the fields as they are now, by name."""
        seconds = None if self._began is None else self._clock() - self._began
        return {**self._fixed, **self._measured, "seconds": seconds}


def whereabouts() -> dict[str, Any]:
    """Return the fields ``host`` and ``user``: where this process runs, and for whom."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a number without an entry, as containers have; which of them depends on the Python
        user = str(os.getuid())
    return {"host": _text(socket.gethostname()), "user": _text(user)}


def _text(name: str) -> str:
    """Return a name without bytes that are no UTF-8, and without NULs."""
    return name.encode("utf-8", "replace").decode().replace("\0", "?")
