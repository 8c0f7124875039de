"""Local steps: a replica walks by a rule of its own, and pushes how far it has come.

Douillard et al., "DiLoCo: Distributed low-communication training of language models", 2023, algorithm 1.  The state of
the replica's own rule goes on from push to push; it is not part of checkpoints.

Zhang, Choromanska, LeCun, "Deep learning with elastic averaging SGD", NIPS 2015, algorithm 1: the replica does not
begin again from the parameters of the shards; the two are drawn towards each other.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dbmpi.data.stream import Order
from dbmpi.downpour.algorithm import Watcher
from dbmpi.downpour.datapath import DataPath, Flow, Push
from dbmpi.kernels import updates
from dbmpi.objective import Gradient, Objective, Outcome
from dbmpi.paramserver.client import Client
from dbmpi.paramserver.clip import Clip
from dbmpi.paramserver.rules import Rule, rule
from dbmpi.paramserver.schedule import Moment

if TYPE_CHECKING:
    from dbmpi.session import Session


class LocalPath(DataPath):
    """Parameters of one client that walk by a rule of its own; what it pushes is where they were less where they are.

    Parameters
    ----------
    client, flow, waiting, largest
        As for :class:`DataPath`, without overlap.
    rule
        Takes the steps.
    order
        The samples of each batch, for the schedule of the rule.
    clip
        Scales the gradient of each step, if it is clipped.
    """

    def __init__(
        self,
        client: Client,
        flow: Flow,
        waiting: AbstractContextManager[None],
        largest: Callable[[int], int],
        rule: Rule,
        order: Order,
        clip: Clip | None = None,
    ) -> None:
        super().__init__(client, replace(flow, apart=False, at_once=True), waiting, None, largest)
        self._rule, self._order, self._clip_step = rule, order, clip
        self._gradient, self._fetched = np.zeros_like(self.parameters), np.empty_like(self.parameters)
        self._state, self._updates = rule.init(self.parameters), 0

    def fetch(self) -> None:
        """Get parameters from the shards, to walk from there."""
        super().fetch()
        np.copyto(self._fetched, self.parameters)

    def begin(self) -> Gradient:
        """Return where to write the gradient of the next step."""
        return self._gradient

    def walk(self, outcome: Outcome, number: int) -> None:
        """Take a step along the gradient of the batch of that `number`, with this `outcome`."""
        if self._clip_step is not None:
            self._clip_step(self._gradient)
        self._updates += 1
        moment = Moment(self._updates, self._order.before(number), self._order.size(number))
        self._rule.apply(self.parameters, self._gradient, self._state, moment)
        self._accrued, self.steps = self._accrued.plus(outcome), self.steps + 1

    def push(self) -> Push:
        """Push the way since the last fetch, or withhold it where it is not finite: the rule then begins afresh."""
        self._difference(self._buffers[0].whole())
        done = super().push()
        if done.withheld:
            self._state, self._updates = self._rule.init(self._fetched), 0
        return done

    def _difference(self, out: np.ndarray) -> None:
        """Write what is pushed."""
        np.subtract(self._fetched, self.parameters, out=out)


class ElasticPath(LocalPath):
    """Parameters of one client that walk on from push to push, and are drawn towards those of the shards.

    With x for those of the replica, y for those of the shards and the elasticity a, a push is::

        d = a * (y - x);  x <- x + d;  y <- y - d

    Parameters
    ----------
    elasticity
        As above.
    **others
        As for :class:`LocalPath`.
    """

    def __init__(self, elasticity: float, **others: Any) -> None:
        super().__init__(**others)
        self._elasticity, self._begins = elasticity, True

    def fetch(self) -> None:
        """Begin at the parameters of the shards, and at one's own ever after."""
        if self._begins:
            super().fetch()
            self._begins = False

    def push(self) -> Push:
        """Meet the shards; or begin again at their parameters, where those of the replica are not finite."""
        self._client.fetch(self._fetched)
        done = super().push()
        self._begins = done.withheld
        return done

    def _difference(self, out: np.ndarray) -> None:
        """Write what is pushed, and move by it."""
        super()._difference(out)
        updates.scale(out, self._elasticity)
        updates.add(self.parameters, out)


def walk(objective: Objective[Any], path: LocalPath, watcher: Watcher, *, steps: int) -> int:
    """Learn against the shards from the batches that the watcher gives, until it ends that; return the steps taken.

    Parameters
    ----------
    objective
        Loss and gradient.
    path
        Brings parameters, walks, and takes away how far; all pushes are applied on return.
    watcher
        Accompanies the loop, and says what to learn from.
    steps
        Steps between a fetch and the push after it; fewer where the watcher ends a turn.
    """
    clock, taken = watcher.stopwatch, 0
    while (number := watcher.proceed(path.steps == 0)) is not None:
        if path.steps == 0:
            with clock("fetch"):
                path.fetch()
        with clock("data"):
            batch = watcher.load(number)
        with clock("compute"):
            outcome = objective.loss_and_gradient(path.parameters, batch, path.begin(), step=number)
            watcher.stepped(outcome)
            path.walk(outcome, number)
        taken += 1
        if path.steps == steps or watcher.turn_ends:
            _push(path, watcher)
    if path.steps and not watcher.expired:
        _push(path, watcher)
    with clock("wait"):
        path.settle()
    return taken


def _push(path: LocalPath, watcher: Watcher) -> None:
    with watcher.stopwatch("push"):
        done = path.push()
    watcher.pushed(done, last=True)


def walking(
    session: Session,
    client: Client,
    flow: Flow,
    waiting: AbstractContextManager[None],
    largest: Callable[[int], int],
    clip: Clip | None,
) -> LocalPath:
    """Return the path of a replica that walks, as the run describes it.

    Parameters
    ----------
    session
        Everything that is known of the run.
    client, flow, waiting, largest, clip
        As for :class:`LocalPath`.
    """
    run, order = session.run, session.order
    own = rule(run.local.inner(run.optimizer), order.samples)
    if run.optimizer.exchange == "local":
        return LocalPath(client, flow, waiting, largest, own, order, clip)
    elasticity = run.local.elasticity or 0.9 / session.plan.learning
    return ElasticPath(
        elasticity, client=client, flow=flow, waiting=waiting, largest=largest, rule=own, order=order, clip=clip
    )
