"""What one worker of a run is to learn, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dbmpi.data.numbered_batches import NumberedBatches
from dbmpi.data.source import Source
from dbmpi.data.stream import Stream
from dbmpi.monitor.callbacks import Callbacks
from dbmpi.replica.own_state import OwnState


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """The task of one worker of a run."""

    replica: int
    """Number of this worker's replica."""
    train: NumberedBatches
    """What to learn from."""
    stream: Stream
    """The batches that are left when the session begins."""
    share: Sequence[range]
    """Positions among these that this replica learns."""
    test: Source | None = None
    """Held-out samples."""
    warm_steps: int = 0
    """Steps after which this worker reports to the lead that the warmstart is over; 0 for never."""
    takes_turns: bool = False
    """Whether the replica asks the lead before each fetch, so that no push becomes too stale."""
    evaluate_epochs: float = 0.0
    """How often the first replica evaluates the held-out samples; 0 for never."""
    directory: Path
    """That of the run."""
    callbacks: Callbacks = field(default_factory=Callbacks)
    """The user's own, for each step."""
    state: OwnState | None = None
    """What an objective of the user's own has beside its parameters: the lead gets that of the first replica."""
    most_withheld: int = 0
    """Pushes in a row that the replica may withhold."""
    rolls_back: bool = False
    """Whether the run then goes back to its last checkpoint, and does not end."""
    layers: Sequence[str] = ()
    """Names of the layers, for messages."""
    remedy: str = ""
    """Advice against numbers that are not finite, for the message of the error."""
