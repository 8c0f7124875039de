"""What a configuration asks of the machines, apart from how many of them there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dbmpi.errors import UserError
from dbmpi.paramserver.rules import rule

if TYPE_CHECKING:
    from dbmpi.config import Run

_STATES_OF_OWN = 1
"""Arrays that a rule of the user's own is taken to have: it is not loaded."""
_MIB = 2.0**20


@dataclass(frozen=True)
class Demands:
    """The settings of a run that its speed and memory depend on."""

    samples: int
    """Of a batch."""
    size: int
    """Parameters of the network."""
    states: int
    """Arrays in the state of the update rule."""
    overlap: bool = False
    """Whether a replica fetches and pushes while it computes."""
    fetch_copies: bool = True
    """Whether a worker copies the parameters that it fetches, also on one host."""
    push_copies: bool = False
    """Whether a push is copied, also on one host."""
    whole_gradients: bool = True
    """Whether a worker has memory for a whole gradient."""
    checks: bool = True
    """Whether gradients are looked through for numbers that are not finite."""
    wire_bytes: int = 4
    """Bytes of a number between hosts."""
    inbox: float = 64 * _MIB
    """Bytes of a shard for gradients that arrive."""
    chunk: float = 4 * _MIB
    """Bytes of a piece of a gradient, at most."""
    data: float = 64 * _MIB
    """Bytes of samples that each worker keeps."""

    @classmethod
    def from_config(cls, run: Run, size: int) -> Demands:
        """Return the demands of a configuration.

        Parameters
        ----------
        run
            The configuration.
        size
            Parameters of its network.

        Raises
        ------
        UserError
            If the run is not by Downpour with pushes that are applied at once, which is what the model knows.
        """
        optimizer, server = run.optimizer, run.server
        if optimizer.method != "downpour":
            raise UserError(
                f'optimizer.method = "{optimizer.method}": the cost model is one of Downpour; set optimizer.method = '
                '"downpour"'
            )
        if optimizer.exchange != "asynchronous":
            raise UserError(
                f'optimizer.exchange = "{optimizer.exchange}": the cost model is one of replicas that do not wait for '
                'each other; set optimizer.exchange = "asynchronous"'
            )
        states = _STATES_OF_OWN if optimizer.own else len(rule(optimizer).state_names)
        return cls(
            samples=optimizer.batch_size,
            size=size,
            states=min(states, 2),
            overlap=server.overlap == "threads",
            fetch_copies=server.fetch == "copied",
            push_copies=server.push == "copied",
            whole_gradients=server.gradients == "whole",
            checks=optimizer.most_withheld > 0,
            wire_bytes=2 if server.wire == "bfloat16" else 4,
            inbox=server.inbox_mib * _MIB,
            chunk=server.chunk_kib * 2.0**10,
        )
