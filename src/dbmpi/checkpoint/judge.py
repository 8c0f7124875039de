"""Which evaluation of a run is the best, and whether one ends the run: the same for all optimizers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Self

if TYPE_CHECKING:
    from dbmpi.checkpoint.schema import CheckpointInfo
    from dbmpi.config import MonitorSection
    from dbmpi.objective import Outcome


class Criterion(NamedTuple):
    """By which number evaluations are compared."""

    metric: str = "loss"
    """``loss``, ``accuracy``, or a metric of the objective."""
    higher: bool = False
    """Whether higher values are better."""

    @classmethod
    def stored(cls, configuration: str) -> Self:
        """Return that of a run, given the `configuration` in its checkpoint; by the loss where that says nothing."""
        try:
            section = json.loads(configuration)["monitor"]
            metric, better = section["metric"], section["better"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return cls()
        return cls(str(metric), metric == "accuracy" or better == "higher")

    def value(self, loss: float | None, accuracy: float | None, metrics: Mapping[str, float]) -> float | None:
        """Return the number of an evaluation; None where it has none, or none that is finite.

        Parameters
        ----------
        loss, accuracy, metrics
            Of the evaluation.
        """
        found = {**metrics, "loss": loss, "accuracy": accuracy}.get(self.metric)
        return found if found is not None and math.isfinite(found) else None

    def gain(self, value: float, before: float) -> float:
        """Return by how much a `value` is better than one `before`; negative where it is worse."""
        return value - before if self.higher else before - value


class Judge:
    """Compares the evaluations of a run, over all its sessions.

    Parameters
    ----------
    section
        What is compared, and when that ends the run.
    earlier
        Description of the checkpoint that the run resumes from.  What it says of the best evaluation holds, unless it
        was by another metric.

    Attributes
    ----------
    criterion
        By which number.
    """

    def __init__(self, section: MonitorSection, earlier: CheckpointInfo | None = None) -> None:
        self._section = section
        self.criterion = Criterion(section.metric, section.higher)
        self._step = self._best_step = self._waited = 0
        self._last: float | None = None
        self._best: float | None = None
        self._counted: float | None = None
        if earlier is None or earlier.best_value is None:
            return
        if Criterion.stored(earlier.configuration) == self.criterion:
            self._step, self._best_step, self._waited = earlier.test_step, earlier.best_step, earlier.best_waited
            self._best, self._counted = earlier.best_value, earlier.best_counted
            self._last = self.criterion.value(earlier.test_loss, earlier.test_accuracy, earlier.test_metrics)

    def hear(self, step: int, outcome: Outcome) -> bool:
        """Note an evaluation; return whether it is the best so far.

        Parameters
        ----------
        step
            Of the parameters, counted over all sessions.  Another evaluation of the same ones does not count again.
        outcome
            Of all held-out samples.
        """
        criterion, again = self.criterion, step == self._step and self._last is not None
        self._step, self._last = step, criterion.value(outcome.mean_loss, outcome.accuracy, outcome.metrics)
        value, best, counted = self._last, self._best, self._counted
        if value is not None and (counted is None or criterion.gain(value, counted) > self._section.min_delta):
            self._counted, self._waited = value, 0
        elif not again:
            self._waited += 1
        if value is None or (best is not None and criterion.gain(value, best) <= 0):
            return False
        self._best, self._best_step = value, step
        return True

    @property
    def fields(self) -> dict[str, Any]:
        """What a checkpoint says of the best evaluation, by name: fields of :class:`CheckpointInfo`."""
        return {
            "best_step": self._best_step,
            "best_value": self._best,
            "best_counted": self._counted,
            "best_waited": self._waited,
        }

    @property
    def verdict(self) -> str:
        """Why the last evaluation ends the run, a clause for the user; empty where it does not."""
        section, last, best = self._section, self._last, self._best
        if section.target is not None and last is not None and self.criterion.gain(last, section.target) >= 0:
            return f"the test {section.metric}, {last:.6g}, has reached monitor.target = {section.target:g}"
        if section.patience and self._waited >= section.patience:
            which = "has no finite value" if best is None else f"was best, {best:.6g}, at step {self._best_step:,}"
            return (
                f"the test {section.metric} {which}, and {self._waited} evaluations have not been better "
                f"(monitor.patience = {section.patience})"
            )
        return ""
