"""Which samples make up the batches of Sandblaster, pure numbers: all of them, or a sample that moves on and grows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dbmpi.sandblaster.state import Position

if TYPE_CHECKING:
    from dbmpi.config.sections import SandblasterSection
    from dbmpi.data.stream import Order
    from dbmpi.methods.descent import Reason

REASONS: dict[Reason, str] = {
    "gradient": "the gradient is as small as sandblaster.gtol asks",
    "loss": "the loss decreases less than sandblaster.ftol asks",
    "precision": "the loss cannot be decreased any further at its precision",
    "unbounded": "the loss falls without a bound",
    "iterations": "all iterations are done",
    "evaluations": "all epochs are done",
    "callback": "it was asked to end",
}
"""Why a run has ended, for people."""


def samples_of(order: Order, portions: range) -> int:
    """Return the number of samples of some `portions` of a stream, in this `order`."""
    epochs, rest = divmod(len(portions), order.batches_per_epoch)
    return epochs * order.samples + sum(map(order.size, portions[len(portions) - rest :]))


class Sampling:
    """The batch of the moment (the `Batches` of :func:`dbmpi.methods.descent.descend`).

    Parameters
    ----------
    order
        Of the samples.
    portions
        Of the first batch; 0 for all samples.
    iterations
        How many iterations a batch stays.
    growth
        Factor by which the batch grows when progress stalls; 1 for never.
    overlap
        Portions that two batches share.
    drawn
        Whether a loss also depends on what is drawn at random for each portion of the stream, as dropout does: batches
        of all samples then change, too, to the same samples in the next epoch of the stream.
    """

    def __init__(
        self,
        order: Order,
        portions: int,
        iterations: int = 1,
        growth: float = 1.0,
        overlap: int = 0,
        drawn: bool = False,
    ) -> None:
        self._order, self._most = order, order.batches_per_epoch
        self._iterations, self._growth, self._overlap = iterations, growth, overlap
        self._portions = min(portions or self._most, self._most)
        self._drawn = drawn
        self._first = self._here = 0
        self._before: float | None = None
        self._began: float | None = None
        """Mean losses where the batch before and this one began."""

    @property
    def portions(self) -> range:
        """The portions of the batch, in the stream."""
        return range(self._first, self._first + self._portions)

    @property
    def whole(self) -> bool:
        """Whether the batch is all samples, and stays as it is."""
        return self._portions == self._most and not self._drawn

    @property
    def position(self) -> Position:
        """Where it stands, to be kept in a checkpoint."""
        return Position(self._first, self._portions, self._here, self._before if self._began is None else self._began)

    def restore(self, position: Position) -> None:
        """Resume at the `position` of another session, if that is possible with these settings."""
        first, portions, here, loss = position
        if 0 <= first <= self._order.batches - portions and self._portions <= portions <= self._most:
            self._first, self._portions, self._here, self._began = first, portions, here, loss

    def evaluated(self, loss: float) -> None:
        """Note the mean loss of an evaluation on this batch."""
        if self._began is None:
            self._began = loss

    def proceed(self) -> bool:
        """Go on to the next samples after some iterations on these, and to more of them where progress stalls."""
        if self.whole:
            return False
        self._here += 1
        if self._here < self._iterations:
            return False
        # Losses where batches begin are of samples that no step has seen: they tell whether there is progress.
        stalls = self._before is not None and self._began is not None and self._began >= self._before
        self._before, self._began = self._began, None
        self._go_on(self._growth if stalls else 1.0)
        return True

    def exhausted(self) -> bool:
        """Grow, if the loss of this part of the samples is minimal; return whether there is more."""
        if self._portions == self._most or self._growth == 1:
            return False
        self._before = self._began = None
        self._go_on(self._growth)
        return True

    def _go_on(self, growth: float) -> None:
        self._here = 0
        self._first += self._portions - self._overlap
        if growth > 1:
            self._portions = round(min(max(self._portions + 1, growth * self._portions), self._most))
        # The stream ends with the epochs; and all samples are the portions of one epoch.
        if self.whole or self._first + self._portions > self._order.batches:
            self._first = 0


def sampling(settings: SandblasterSection, order: Order, drawn: bool) -> Sampling:
    """Return the first batch of a run.

    Parameters
    ----------
    settings, order
        Of the batches, and of the samples.
    drawn
        Whether losses depend on what is drawn at random.
    """
    return Sampling(
        order,
        settings.batch_portions,
        settings.batch_iterations,
        settings.batch_growth,
        settings.batch_overlap,
        drawn,
    )
