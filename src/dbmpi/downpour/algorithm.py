"""Downpour SGD: the client's loop (paper, section 4.1 and algorithm 1.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from dbmpi.objective import Objective, Outcome

if TYPE_CHECKING:
    from dbmpi.downpour.datapath import DataPath, Push
    from dbmpi.monitor.measures import Stopwatch


class Watcher(Protocol):
    """Accompanies the loop: provides its batches, is notified of its steps, and may end it."""

    stopwatch: Stopwatch

    @property
    def expired(self) -> bool:
        """Whether what is accrued when the loop ends must not be pushed any more, and its batches stay unlearned."""
        ...

    @property
    def turn_ends(self) -> bool:
        """Whether the batch that was given last must be pushed before another one is given."""
        ...

    def proceed(self, fetches: bool) -> int | None:
        """Return the number of the next batch to learn from, or None to end; may wait, e.g. for a checkpoint.

        Parameters
        ----------
        fetches
            Whether parameters are fetched for it.
        """
        ...

    def load(self, number: int) -> Any:
        """Return the batch of that `number` in the stream."""
        ...

    def stepped(self, outcome: Outcome) -> None:
        """Note the `outcome` of a gradient that has been computed."""
        ...

    def pushed(self, push: Push, *, last: bool) -> None:
        """Note that a push is on its way to the shards, or is withheld; raise if it must not be.

        Parameters
        ----------
        push
            What has become of it.
        last
            Whether the next push is computed from another fetch.
        """
        ...


def downpour(
    objective: Objective[Any],
    path: DataPath,
    watcher: Watcher,
    *,
    n_fetch: int = 1,
    n_push: int = 1,
    local_rate: float | Callable[[int], float] = 0.0,
    first_step: int = 0,
) -> int:
    """Learn against the shards from the batches that the watcher gives, until it ends that; return the steps taken.

    Algorithm 1.1 of the paper: fetch every `n_fetch` steps, push the accrued gradient every `n_push` steps, and in
    between walk by plain SGD of rate `local_rate`, a walk that the next fetch overwrites.  As written there, both
    fire at step 0: the first push carries one gradient, later ones the sum of `n_push`.  What remains at the end is
    pushed too.  After a push that is withheld the next step fetches, as local steps may have followed its gradient.

    Parameters
    ----------
    objective
        Loss and gradient.
    path
        Brings parameters and takes gradients; all pushes are applied on return.
    watcher
        Accompanies the loop, and says what to learn from.
    n_fetch, n_push, local_rate
        As above; the paper's experiments use 1, 1 and no local steps.  A rate may be a function of the batch's number.
    first_step
        Where the count of steps begins: not at 0 where the replica goes on.
    """
    clock = watcher.stopwatch

    def push(*, last: bool) -> bool:
        with clock("push"):
            done = path.push()
        watcher.pushed(done, last=last or done.withheld)
        return done.withheld

    step, fetches = first_step, True
    while (number := watcher.proceed(fetches)) is not None:
        with clock("fetch"):
            if fetches:
                path.fetch()
            else:
                path.refresh()
        with clock("data"):
            batch = watcher.load(number)
        with clock("push"):
            gradient = path.begin()
        pushing = step % n_push == 0
        with clock("compute"):
            leave = path.on_gradient if pushing else None
            outcome = objective.loss_and_gradient(
                path.parameters, batch, gradient, leave, step=number, add=path.add, changed=path.changed
            )
            watcher.stepped(outcome)
            path.accrue(outcome, local_rate(number) if callable(local_rate) else local_rate)
        withheld = pushing and push(last=(step + 1) % n_fetch == 0)
        step += 1
        fetches = step % n_fetch == 0 or withheld
    if path.steps and not watcher.expired:
        push(last=True)
    with clock("wait"):
        path.settle()
    return step - first_step
