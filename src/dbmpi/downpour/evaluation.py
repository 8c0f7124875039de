"""The outcome of held-out samples, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from dbmpi.data.source import Source
from dbmpi.mpi.tags import Tag
from dbmpi.objective import Objective, Outcome

if TYPE_CHECKING:
    from dbmpi.downpour.orders import Orders
    from dbmpi.replica.own_state import OwnState
    from dbmpi.replica.team import Team


def evaluate(
    objective: Objective[Any],
    parameters: np.ndarray,
    source: Source,
    batch_size: int,
    part: int = 0,
    parts: int = 1,
    serve: Callable[[], bool] | None = None,
) -> Outcome:
    """Return the outcome of every `parts`-th batch of a source, beginning with number `part`.

    Parameters
    ----------
    objective
        Computes it.
    parameters
        Flat vector.
    source
        The samples.
    batch_size
        How many to compute at a time.
    part, parts
        This share, and the number of shares.
    serve
        Called after each batch.
    """
    total = Outcome(0, 0.0, 0)
    for outcome in outcomes(objective, parameters, source, batch_size, part, parts):
        total = total.plus(outcome)
        if serve is not None:
            serve()
    return total


def receive_state(state: OwnState | None, orders: Orders, team: Team) -> None:
    """Let the state of an objective, if there is any, be what the lead sends.

    Parameters
    ----------
    state
        That of the objective on this rank.
    orders
        The connection with the lead.
    team
        The ranks that evaluate together.
    """
    if state is not None and state.nbytes:
        packed = np.empty(state.nbytes, np.uint8)
        if team.speaks:
            orders.receive_array(packed, Tag.OBJECTIVE_STATE, "the state of the objective")
        team.broadcast(packed)
        state.restore(state.unpack(packed))


def outcomes(
    objective: Objective[Any],
    parameters: np.ndarray,
    source: Source,
    batch_size: int,
    part: int = 0,
    parts: int = 1,
) -> Iterator[Outcome]:
    """Yield the outcome of each batch of :func:`evaluate`, in their order.

    Parameters
    ----------
    objective, parameters, source, batch_size, part, parts
        As there.
    """
    first = part * batch_size
    for start in range(first, source.samples, parts * batch_size):
        indices = np.arange(start, min(start + batch_size, source.samples))
        yield objective.evaluate(parameters, source.batch(indices), changed=start == first)
