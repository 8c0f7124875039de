"""The ``[monitor]`` section of a run's description."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dbmpi.config.values import CountOrNone, NotNegative, Positive, Section

NATURAL = {"loss": "lower", "accuracy": "higher"}
"""Metrics that dbmpi measures itself, and which values of them are better."""


class MonitorSection(Section):
    """What is reported during the run, and which evaluations end it."""

    report_seconds: Positive = 1.0
    """Time between two lines of each rank's records."""
    evaluate_epochs: NotNegative = 1.0
    """Epochs between two evaluations on the test data; 0 evaluates only at the end."""
    metric: Annotated[str, Field(min_length=1, max_length=200)] = "loss"
    """What the best checkpoint is chosen by, and `patience` and `target` are about: ``loss`` or ``accuracy`` on the
    test data, or a metric of your own objective."""
    better: Literal["auto", "lower", "higher"] = "auto"
    """Which values of a metric of your own are better; ``auto``: a lower loss, a higher accuracy."""
    patience: CountOrNone = 0
    """Evaluations in a row without a better value after which the run ends; 0 for never."""
    min_delta: NotNegative = 0.0
    """By how much a value must be better than those before, to count for `patience`."""
    target: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Value of the metric at which the run ends; an accuracy is a fraction from 0 to 1."""
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """How progress is shown: a live bar on a terminal, lines elsewhere."""
    timeline_seconds: NotNegative = 0.25
    """Length of the windows in which each rank records single phases, for the timeline of ``dbmpi plot``; 0 for none.
    They begin 1, 2, 4, 8, ... times `report_seconds` after the start, and have at most 2,000 phases each."""
    stall_timeout: NotNegative = 240.0
    """Downpour: seconds without progress after which a rank is named, and writes its stack trace; 0 for never.  It must
    be longer than the longest step, and compiling in it, and below half of ``DBMPI_STALL_SECONDS`` (600)."""
    on_stall: Literal["warn", "drop", "end"] = "warn"
    """What happens then: ``warn``: nothing more; ``drop``: the run goes on without its replica, as if that had died;
    ``end``: the run ends.  One that holds a shard cannot be dropped: the run then ends."""

    @property
    def higher(self) -> bool:
        """Whether higher values of the metric are better."""
        return NATURAL.get(self.metric, self.better) == "higher"

    @model_validator(mode="after")
    def _metric_is_judged(self) -> MonitorSection:
        natural = NATURAL.get(self.metric)
        if natural is None and self.better == "auto":
            raise ValueError(
                f"metric = {self.metric!r}: say which values are better: set better to 'lower' or 'higher'"
            )
        if natural is not None and self.better not in ("auto", natural):
            raise ValueError(
                f"better = {self.better!r}: of the {self.metric}, {natural} values are better: leave it out"
            )
        if self.metric == "accuracy" and self.target is not None and not 0 < self.target <= 1:
            raise ValueError(f"target = {self.target:g}: an accuracy is a fraction, above 0 and at most 1, e.g. 0.95")
        if self.min_delta and not self.patience:
            raise ValueError(f"min_delta = {self.min_delta:g} is for patience: set patience, too, or leave it out")
        if self.patience and not self.evaluate_epochs:
            raise ValueError(
                f"patience = {self.patience} counts evaluations, and with evaluate_epochs = 0 there is one at the end: "
                "set evaluate_epochs to more, or patience = 0"
            )
        if self.target is not None and not self.evaluate_epochs:
            raise ValueError(
                f"target = {self.target:g} is looked for in evaluations, and with evaluate_epochs = 0 there is one at "
                "the end: set evaluate_epochs to more, or leave target out"
            )
        return self


def mistake_in_metric(section: MonitorSection, loss: str) -> str:
    """Return what is wrong with the metric of a network with this `loss`; empty if nothing.

    Parameters
    ----------
    section, loss
        The section, and the name of the loss.
    """
    given = f"monitor.metric = {section.metric!r}"
    if section.metric not in NATURAL:
        return f"{given}: a network has none but 'loss' and 'accuracy': set it to one of them"
    if section.metric == "accuracy" and loss in ("squared", "reconstruction"):
        return f"{given}: the loss {loss!r} knows no classes: set it to 'loss'"
    return ""
