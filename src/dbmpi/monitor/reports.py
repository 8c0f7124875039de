"""Reports of a run: the kinds of lines in its records.

Counters (``step``, ``samples``, ``version``, ``pushes``) count from the beginning of the session; everything else in a
report is about the time since the report before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, get_args

if TYPE_CHECKING:
    from dbmpi.objective import Outcome


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """The work of one worker since its last report."""

    kind: ClassVar[str] = "worker"
    step: int
    """Mini-batches of this client in this session."""
    epoch: float
    """Position in the stream: passes through the training samples by all replicas together, over all sessions."""
    samples: int
    """Training samples this client has learned from in this session."""
    loss: float
    """Mean over the samples since the last report."""
    accuracy: float | None
    """Fraction of those samples that were classified correctly, 0 to 1; None where the loss knows no classes."""
    samples_per_second: float
    """Since the last report."""
    pushed_bytes: int
    """Sent to the shards since the last report."""
    fetched_bytes: int
    """Taken from the shards since the last report."""
    seconds: Mapping[str, float]
    """Time since the last report by activity: ``compute, fetch, push, wait, data``, and where a replica is cut over
    several ranks, ``exchange``, in which it also waits for the slowest of them."""
    replica: int | None = None
    """The replica it belongs to, where that is not the worker's own number."""
    partition: int = 0
    """Which partition of the replica it computes; only partition 0 counts for the replica's samples."""
    pushed_chunks: int = 0
    """Pieces in which the gradients went."""
    fetched_pieces: int = 0
    """Pieces in which the parameters came."""
    layers: Mapping[str, float] | None = None
    """Time since the last report by phase and layer, e.g. ``forward 1`` or ``exchange 4``, to find what is slow."""
    withheld: int = 0
    """Pushes that it has withheld in this session, because their gradient was not finite."""


@dataclass(frozen=True, slots=True)
class ShardReport:
    """The work of one shard since its last report."""

    kind: ClassVar[str] = "shard"
    version: int
    """Pushes that are in the parameters, over all sessions."""
    pushes: int
    """Pushes applied in this session."""
    staleness: Mapping[str, float]
    """``p50, p90, max, mean`` of the pushes since the last report, see :meth:`StalenessHistogram.summary`."""
    staleness_histogram: Mapping[int, int]
    """How many of the pushes since the last report had each staleness."""
    queue: float
    """Chunks that waited at most since the last report."""
    seconds: Mapping[str, float]
    """Time since the last report by activity: ``apply, serve, idle``."""
    applied_bytes: int
    """Gradients applied since the last report."""
    discarded: int = 0
    """Pushes that it has dropped in this session, because they were too stale, or too late for their round."""
    bandwidth: float | None = None
    """Bytes that the rule's kernel read and wrote a second, as a share of a copy's, measured when the run began."""


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """The loss on held-out samples."""

    kind: ClassVar[str] = "evaluation"
    step: int
    """Mini-batches of all replicas together in this session."""
    epoch: float
    """Position in the stream when the parameters were taken."""
    loss: float
    """Mean over the held-out samples."""
    accuracy: float | None
    """Fraction classified correctly, 0 to 1; None where the loss knows no classes."""
    samples: int
    """How many held-out samples were evaluated."""
    metrics: Mapping[str, float] | None = None
    """Means of the objective's own metrics over them; None where it has none."""

    @classmethod
    def of(cls, outcome: Outcome, step: int, epoch: float) -> EvaluationReport:
        """Return the report of an `outcome` at that `step` and `epoch`."""
        loss, accuracy, samples = outcome.mean_loss, outcome.accuracy, outcome.samples
        return cls(step, epoch, loss, accuracy, samples, outcome.metrics or None)


@dataclass(frozen=True, slots=True)
class BatchReport:
    """One pass of Sandblaster over a batch, and the iteration that it belongs to."""

    kind: ClassVar[str] = "batch"
    iteration: int
    """Iterations finished before it, in this session."""
    epoch: float
    """Passes over the training samples, this one included, over all sessions."""
    loss: float
    """Mean over the batch's samples, at the point that was tried; without regularisation."""
    accuracy: float | None
    """Fraction classified correctly, 0 to 1; None where the loss knows no classes."""
    samples: int
    """Of the batch."""
    portions: Mapping[int, int]
    """How many portions of each replica count; they add up to those of the batch."""
    revoked: int
    """Bundles of portions that were taken from a replica and handed out again."""
    seconds: float
    """From the offer of the batch to the last gradient."""
    ledger: Sequence[int] | None = None
    """For each portion of the batch, the replica whose result counts; None for more portions than a line can hold."""
    lost: Sequence[int] = ()
    """Replicas that have died in this session by the end of the batch."""


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """A checkpoint that is written."""

    kind: ClassVar[str] = "checkpoint"
    name: str
    """Of its file."""
    bytes: int
    """Of all its files."""
    seconds: float
    """From when the shards took their vectors to when it was whole and on disk."""
    rested: float
    """Seconds for which a replica paused for it, in the mean; 0 for the last one of a run, and in Sandblaster."""
    waited: float
    """Seconds for which changes of the vectors waited while these were copied, on the shard where it was longest."""


@dataclass(frozen=True, slots=True)
class LossReport:
    """A replica or an evaluator of Downpour that is given up, because a rank of it has died or is stalled."""

    kind: ClassVar[str] = "loss"
    step: int
    """Mini-batches of all replicas together in this session that count."""
    lost: int
    """Number of the replica; evaluators are numbered behind the replicas."""
    pushes: int
    """Its pushes that count; each of them once, on all shards."""
    dropped: int
    """Further pushes, which it had posted at least in part."""
    repeated: int
    """Of these, pushes that some shard has applied, at least in part, though their batches are learned again."""
    left: int
    """Batches of its share that were left."""
    takers: Sequence[int]
    """Replicas that learn these; none where the run was about to end."""
    role: str = "replica"
    """``replica`` or ``evaluator``."""


@dataclass(frozen=True, slots=True)
class RescueReport:
    """A checkpoint with the mirror of a shard that has died in its place."""

    kind: ClassVar[str] = "rescue"
    step: int
    """Mini-batches of all replicas together in this session that are in it."""
    shard: int
    """Number of the shard that has died."""
    updates: int
    """Updates of it that are lost, because they had not come into the mirror."""
    repeated: int
    """Pushes that some shard has applied, at least in part, though their batches are learned again."""
    name: str
    """Of the checkpoint's file."""
    seconds: float
    """From when the lead had heard of the death to when the checkpoint was on disk."""


@dataclass(frozen=True, slots=True)
class StartReport:
    """The start of a session, written once by shard 0."""

    kind: ClassVar[str] = "start"
    version: str
    """Of dbmpi."""
    method: str
    """Of the optimizer: ``downpour`` or ``sandblaster``."""
    ranks: int
    """Of the whole run, those in reserve included."""
    shards: int
    """Ranks that hold parameters."""
    replicas: int
    """Of the network."""
    partitions: int
    """Ranks that compute a replica together."""
    parameters: int
    """Numbers that are learned."""
    samples: int
    """Training samples of an epoch."""
    samples_before: int
    """Training samples behind the parameters that the session began with."""
    epochs: float
    """Passes through the training samples after which the run is complete, all sessions together."""
    configuration: str
    """The complete description of the run, as JSON; empty where it is too long for a line."""
    virtual: int = 0
    """1 where the run is simulated: all times of the session are virtual, and so are the ranks."""
    evaluators: int = 0
    """Instances of the network that only evaluate."""
    job: str = ""
    """Number of the job of Slurm that the session belongs to, ``17_2`` in an array; empty without one."""


@dataclass(frozen=True, slots=True)
class EndReport:
    """The end of a session before its epochs are learned: an evaluation is the reason.

    With Downpour it may also be a signal, a callback, or gradients that were not finite.
    """

    kind: ClassVar[str] = "end"
    step: int
    """Mini-batches of all replicas together in this session until then."""
    epoch: float
    """Passes through the training samples by then, all sessions together."""
    reason: str
    """Why, a clause."""


@dataclass(frozen=True, slots=True)
class TraceReport:
    """Single phases of a rank during a short time, see ``monitor.timeline_seconds``."""

    kind: ClassVar[str] = "trace"
    begin: float
    """When the first phase began, in seconds since the session did."""
    activities: Mapping[str, int]
    """Number of each activity: of a worker ``compute, fetch, push, wait, data``, of a shard ``apply, serve``."""
    phases: Sequence[int]
    """For each phase, in the order of their beginnings, three numbers: its activity's, when it began, in microseconds
    after `begin`, and how long it took, in microseconds.  Those of a worker do not overlap; ``apply`` of a shard is
    within ``serve``."""


Report = (
    WorkerReport
    | ShardReport
    | EvaluationReport
    | BatchReport
    | CheckpointReport
    | LossReport
    | RescueReport
    | StartReport
    | EndReport
    | TraceReport
)
KINDS: dict[str, type[Report]] = {report.kind: report for report in get_args(Report)}
