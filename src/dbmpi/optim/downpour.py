"""Downpour SGD: the client's loop (paper, section 4.1 and algorithm 1.1)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dbmpi.kernels import updates
from dbmpi.objective import Batch, Objective, Outcome

if TYPE_CHECKING:
    from dbmpi.monitor.records import Stopwatch
    from dbmpi.paramserver.client import Client


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
    client: Client,
    batches: Iterable[int],
    watcher: Watcher,
    *,
    dtype: np.dtype[np.floating],
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
    client
        The connection with the shards; all of its pushes are applied on return.
    batches
        Numbers of the batches to learn from, in order.
    watcher
        Accompanies the loop.
    dtype
        Of the parameters.
    n_fetch, n_push, local_rate
        As above; the paper's experiments use 1, 1 and no local steps.
    first_step
        Where the count of steps begins: not at 0 in a run that goes on from a checkpoint.
    """
    size = objective.size
    parameters = np.zeros(size, dtype) if client.parameters is None else client.parameters
    # What is pushed lies where shards on this host can read it.
    accrued = client.gradients[0] if client.gradients else np.zeros(size, dtype)
    gradient = accrued if n_push == 1 else np.zeros(size, dtype)
    unpushed, steps = Outcome(0, 0.0, 0), 0
    clock = watcher.stopwatch

    def push() -> None:
        nonlocal unpushed, steps
        with clock("push"):
            client.push(accrued, unpushed, steps)
        watcher.pushed(steps)
        unpushed, steps = Outcome(0, 0.0, 0), 0

    for step, number in enumerate(batches, first_step):
        if not watcher.proceed():
            break
        if step % n_fetch == 0 or step == first_step:
            with clock("fetch"):
                client.fetch(parameters)
        with clock("data"):
            batch = watcher.load(number)
        if steps == 0:
            with clock("push"):
                client.settle()  # the last push has left `accrued`
        with clock("compute"):
            outcome = objective.loss_and_gradient(parameters, batch, gradient, step=number)
            watcher.stepped(outcome)
            if accrued is not gradient:
                if steps == 0:
                    accrued[:] = gradient
                else:
                    updates.add(accrued, gradient)
            if local_rate:
                updates.sgd(parameters, gradient, local_rate)
        unpushed, steps = unpushed.plus(outcome), steps + 1
        if step % n_push == 0:
            push()
    if steps:
        push()
    with clock("wait"):
        client.settle()
