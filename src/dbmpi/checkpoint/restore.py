"""How a shard resumes: its range of the parameters and of the rule's state, from a checkpoint."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.checkpoint.schema import PARAMETERS
from dbmpi.paramserver.rules import Rule, State

if TYPE_CHECKING:
    import numpy as np


class Restorable(Protocol):
    """A shard that begins with the parameters and the state that it is given."""

    @property
    def parameters(self) -> np.ndarray:
        """Its range of the parameters, flat, to be filled."""
        ...

    def begin(self, state: State | None, version: int = 0, *, begun: int = 0, samples: int = 0) -> None:
        """Start after the parameters have been filled.

        Parameters
        ----------
        state, version, begun, samples
            As for :meth:`dbmpi.paramserver.server.Server.begin`.
        """
        ...


def restore(server: Restorable, rule: Rule, path: Path, pieces: Collection[tuple[int, int, int]]) -> None:
    """Give a shard the parameters and the state of a checkpoint; it is ready to serve afterwards.

    Parameters
    ----------
    server
        To be filled.
    rule
        Its update rule, which begins state that the checkpoint does not have afresh.
    path
        The checkpoint.
    pieces
        Of the shard's range: where each begins in the checkpoint and in the range, and its length.

    Raises
    ------
    UserError
        If the checkpoint cannot be read, or nothing can be resumed from its numbers.
    """
    with Checkpoint.open(path) as opened:
        state: State = rule.init(server.parameters)
        for name, values in {PARAMETERS: server.parameters, **state}.items():
            for start, local, length in pieces if name in opened.vectors else ():
                opened.load(name, start, values[local : local + length])
        info, fresh = opened.info, any(name not in opened.vectors for name in state)
    # The shards of the checkpoint may have been others, so none has a version of its own.
    version = max(info.shard_versions)
    server.begin(state, version, begun=version if fresh else info.begun, samples=info.samples)
