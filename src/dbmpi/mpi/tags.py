"""Tags of all messages, so that no two kinds of message on one communicator share one."""

from __future__ import annotations

from enum import IntEnum


class Tag(IntEnum):
    """The purpose of a message."""

    SHARD = 1
    """Orders for the role of a shard (:class:`dbmpi.mpi.mailbox.Role`)."""
    WORKER = 2
    """Orders for the role of a worker."""
    COMMANDS = 4
    """Commands for the shards of a run by Sandblaster."""
    CONCLUSION = 5
    """The result of a run, from the lead to every rank."""
    EXCHANGE = 7
    """Activations and their gradients between partitions."""
    LOSS = 8
    """Outputs that change from a cut by units to one by samples."""
    SUMS = 9
    """Gradients of parameters that several partitions share."""
    PREDICTIONS = 11
    """Outputs for the rank that writes them."""
    INITIAL = 12
    """Initial parameters, from a worker of a user's own loop to the shards."""
    SNAPSHOT = 13
    """Vectors for a checkpoint, from a shard to the worker of a user's own loop that has asked for them."""
    OBJECTIVE_STATE = 14
    """What an objective has beside its parameters, from a worker to the lead."""
    CHECKPOINT = 15
    """What a shard has done of a checkpoint, for the lead."""
    DEAL = 16
    """The batches that a replica learns from now on, from the lead."""
    MIRROR = 17
    """What a shard holds, for the shard that holds its mirror."""
    MIRRORED = 18
    """The version of a mirror that has arrived whole."""
    SWEPT_RUN = 19
    """What has become of a run of a sweep, for rank 0."""
    FINISHED = 20
    """A notice that a rank has no further run of a sweep, and rank 0's that all have finished."""
    LAST_TRANSFER = 30000
    """The largest tag of transfers, which number theirs from 1 on a communicator of their own."""
    END = 30001
    """The exit code with which all ranks end, from the one that has reported why."""
    REPLACEMENT = 30003
    """A notice that the run goes on with new processes in the places of ranks that have died."""
    DEPARTURE = 30002
    """A notice that the first rank ends, in a world in which others have died."""
    REACH = 30004
    """A first message between two ranks, which shows that their hosts reach each other."""
    REACH_REPORT = 30005
    """Which ranks a rank has not heard, for rank 0, and whether the job ends for that."""
