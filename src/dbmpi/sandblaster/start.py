"""How a shard of a run by Sandblaster begins: with fresh parameters, or with those of a checkpoint and its method."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.config import Run
from dbmpi.index.layout import pieces
from dbmpi.methods.descent import POINT
from dbmpi.mpi.window import Window
from dbmpi.sandblaster.setup import Setup
from dbmpi.sandblaster.shard import BundleSource, ShardSpace
from dbmpi.sandblaster.state import MethodState, read_state
from dbmpi.session import DTYPE, Session

_MAY_CHANGE: dict[str, object] = {
    "gtol": 0.0,
    "ftol": 0.0,
    "line_search": "strong_wolfe",
    "step_length": 1.0,
    "portions_per_push": 1,
    "deterministic": False,
}
"""Settings that a resumed search may have changed, each set to some value, to compare the others."""
_OF_A_METHOD = re.compile(r"[sy]\d+|(other )?gradient")
"""Names of the vectors that belong to a batch method."""


class ShardStart(NamedTuple):
    """A shard with its first vectors."""

    space: ShardSpace
    carried: tuple[str, ...] = ()
    """Names of vectors that are kept unchanged, for another optimizer."""
    state: MethodState | None = None
    """Where the batch method stood, if its vectors are in the space."""


def start_shard(session: Session, setup: Setup, window: Window, number: int) -> ShardStart:
    """Return a shard that is filled.

    Parameters
    ----------
    session, setup
        The run.
    window
        This rank's; the parameters lie there.
    number
        Of the shard.
    """
    held, comms, sources = setup.ranges[number], session.comms, _sources(setup, number)
    parameters = window.local[setup.memories[number].parameters :][: len(held) * DTYPE.itemsize].view(DTYPE)
    vectors = {POINT: parameters}
    if session.checkpoint is None:
        session.initial(held.start, parameters)
        return ShardStart(ShardSpace(comms.world, comms.shards, window, sources, 0, vectors))
    with Checkpoint.open(session.checkpoint) as checkpoint:
        state, version = _state(session, checkpoint), max(checkpoint.info.shard_versions)
        carried = tuple(name for name in checkpoint.vectors[1:] if not _OF_A_METHOD.fullmatch(name))
        vectors.update((name, np.empty(len(held), DTYPE)) for name in carried)
        for name, vector in vectors.items():
            checkpoint.load(name, held.start, vector)
        space = ShardSpace(comms.world, comms.shards, window, sources, version, vectors)
        for name in () if state is None else state.vectors:
            space.create(name)
            checkpoint.load(name, held.start, space.writable(name))
    if state is not None:
        space.restore_bounds(state.bounds)
    return ShardStart(space, carried, state)


def _state(session: Session, checkpoint: Checkpoint) -> MethodState | None:
    """Return where the method of a checkpoint stood, as far as the settings of this run can use it."""
    state = read_state(checkpoint.info.method, checkpoint.vectors, checkpoint.path)
    settings = session.run.sandblaster
    # The history of another memory, or of parameters that Downpour has changed since, is of no use.
    if settings.algorithm != "lbfgs" or state is None or state.memory != settings.memory:
        return None
    then = Run.from_json(checkpoint.info.configuration)
    before = then.sandblaster
    if (
        settings.model_copy(update=_MAY_CHANGE) != before.model_copy(update=_MAY_CHANGE)
        or then.objective != session.run.objective
        or then.data.transform != session.run.data.transform
    ):
        # Another loss or another batch: the history is of use, but not the gradient.
        state = state.model_copy(update={"gradient": "", "position": [], "bounds": {}})
    return state


def _sources(setup: Setup, number: int) -> list[list[BundleSource]]:
    """Return for each replica what a shard takes of the bundles of its workers."""
    here = [
        [piece for piece in pieces(stretches, setup.ranges)[number] if piece.pushed] for stretches in setup.stretches
    ]
    return [
        [BundleSource(bundles, taken) for bundles, taken in zip(setup.bundles_of(replica), here, strict=True)]
        for replica in range(setup.plan.replicas)
    ]
