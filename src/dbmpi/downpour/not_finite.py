"""The error of gradients that are not finite."""

from __future__ import annotations

from dbmpi.checkpoint.retention import kept
from dbmpi.downpour.assignment import Assignment
from dbmpi.downpour.datapath import Push
from dbmpi.errors import RunFailed


def not_finite(push: Push, step: int, batch: int, times: int, assignment: Assignment) -> RunFailed:
    """Return the error of a push that must not be withheld.

    Parameters
    ----------
    push
        What is wrong with it.
    step, batch
        The worker's count of steps, and the number of the batch in the stream.
    times
        Pushes withheld in a row, this one included.
    assignment
        Of the worker.
    """
    gradient = again = ""
    if push.layer is not None:
        join = "but" if push.outcome.are_numbers else "and"
        gradient = f", {join} the gradient of {assignment.layers[push.layer]!r} is not finite"
    if times > 1:
        again = f", for {times} pushes in a row"
    return RunFailed(
        f"the loss is {push.outcome.mean_loss} at step {step} of replica {assignment.replica}, batch {batch} of the "
        f"stream{gradient}{again}; {kept(assignment.directory / 'checkpoints')}; {assignment.remedy}"
    )
