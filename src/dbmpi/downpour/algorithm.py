"""Downpour SGD: the client's loop (paper, section 4.1 and algorithm 1.1)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dbmpi.kernels import updates
from dbmpi.objective import Batch, Objective, Outcome

if TYPE_CHECKING:
    from dbmpi.downpour.datapath import DataPath
    from dbmpi.monitor.records import Stopwatch


class Watcher(Protocol):
    """Who accompanies the loop: gives it its batches, hears of its steps, and may end it."""

    stopwatch: Stopwatch

    def proceed(self) -> bool:
        """Return whether to take another step; may wait, e.g. while a checkpoint is written."""
        ...

    def load(self, number: int) -> Batch:
        """Return a batch of the stream."""
        ...

    def stepped(self, outcome: Outcome) -> None:
        """Hear that a gradient has been computed; raise if its loss makes no sense."""
        ...

    def pushed(self, steps: int) -> None:
        """Hear that the gradients of so many steps are on their way to the shards."""
        ...


def downpour(
    objective: Objective,
    path: DataPath,
    batches: Iterable[int],
    watcher: Watcher,
    *,
    n_fetch: int = 1,
    n_push: int = 1,
    local_rate: float = 0.0,
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
        As above; the paper's experiments use 1, 1 and no local steps.
    first_step
        Where the count of steps begins: not at 0 in a run that goes on from a checkpoint.
    """
    unpushed, steps = Outcome(0, 0.0, 0), 0
    clock = watcher.stopwatch

    def push() -> None:
        nonlocal unpushed, steps
        with clock("push"):
            path.push(unpushed, steps)
        watcher.pushed(steps)
        unpushed, steps = Outcome(0, 0.0, 0), 0

    for step, number in enumerate(batches, first_step):
        if not watcher.proceed():
            break
        with clock("fetch"):
            if step % n_fetch == 0 or step == first_step:
                path.fetch()
            else:
                path.look()
        with clock("data"):
            batch = watcher.load(number)
        with clock("push"):
            path.begin()
        pushing = step % n_push == 0
        with clock("compute"):
            on_gradient = path.on_gradient if pushing else None
            outcome = objective.loss_and_gradient(
                path.parameters, batch, path.gradient, on_gradient, step=number, add=path.add
            )
            watcher.stepped(outcome)
            if local_rate:
                assert isinstance(path.gradient, np.ndarray)  # the configuration refuses the other
                updates.sgd(path.parameters, path.gradient, local_rate)
            path.accrue(pushing)
        unpushed, steps = unpushed.plus(outcome), steps + 1
        if pushing:
            push()
    if steps:
        push()
    with clock("wait"):
        path.close()
