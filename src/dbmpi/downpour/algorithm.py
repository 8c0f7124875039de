"""Downpour SGD: the client's loop (paper, section 4.1 and algorithm 1.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

from dbmpi.objective import Objective, Outcome

if TYPE_CHECKING:
    from dbmpi.downpour.datapath import DataPath
    from dbmpi.monitor.records import Stopwatch


class Watcher(Protocol):
    """Accompanies the loop: provides its batches, is notified of its steps, and may end it."""

    stopwatch: Stopwatch

    def proceed(self) -> bool:
        """Return whether to take another step; may wait, e.g. while a checkpoint is written."""
        ...

    def load(self, number: int) -> Any:
        """Return the batch of that `number` in the stream."""
        ...

    def stepped(self, outcome: Outcome) -> None:
        """Note the `outcome` of a gradient that has been computed; raise if the loss is not finite."""
        ...

    def pushed(self, steps: int) -> None:
        """Note that the gradients of so many `steps` are on their way to the shards."""
        ...


def downpour(
    objective: Objective[Any],
    path: DataPath,
    batches: Iterable[int],
    watcher: Watcher,
    *,
    n_fetch: int = 1,
    n_push: int = 1,
    local_rate: float | Callable[[int], float] = 0.0,
    first_step: int = 0,
) -> None:
    """Learn from `batches` against the shards, until they are used up or the watcher ends it.

    Algorithm 1.1 of the paper: fetch every `n_fetch` steps, push the accrued gradient every `n_push` steps, and in
    between walk by plain SGD of rate `local_rate`, a walk that the next fetch overwrites.  As written there, both
    fire at step 0: the first push carries one gradient, later ones the sum of `n_push`.  What remains at the end is
    pushed too.

    Parameters
    ----------
    objective
        Loss and gradient.
    path
        Brings parameters and takes gradients; all pushes are applied on return.
    batches
        Numbers of the batches to learn from, in order.
    watcher
        Accompanies the loop.
    n_fetch, n_push, local_rate
        As above; the paper's experiments use 1, 1 and no local steps.  A rate may be a function of the batch's number.
    first_step
        Where the count of steps begins: not at 0 in a run that is resumed from a checkpoint.
    """
    clock = watcher.stopwatch

    def push() -> None:
        with clock("push"):
            steps = path.push()
        watcher.pushed(steps)

    for step, number in enumerate(batches, first_step):
        if not watcher.proceed():
            break
        with clock("fetch"):
            if step % n_fetch == 0 or step == first_step:
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
            outcome = objective.loss_and_gradient(path.parameters, batch, gradient, leave, step=number, add=path.add)
            watcher.stepped(outcome)
            path.accrue(outcome, local_rate(number) if callable(local_rate) else local_rate)
        if pushing:
            push()
    if path.steps:
        push()
    with clock("wait"):
        path.close()
