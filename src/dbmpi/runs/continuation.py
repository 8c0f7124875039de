"""How a run goes on in the same job, after ranks were replaced or numbers went wrong."""

from __future__ import annotations

from dbmpi.config import Run


def resuming(run: Run) -> Run:
    """Return the description of a `run` that goes on from its own last checkpoint."""
    return run.model_copy(update={"checkpoint": run.checkpoint.model_copy(update={"resume": "auto"})})


def slower(run: Run) -> Run:
    """Return the description of a `run` that goes on from its own last checkpoint, with lower rates."""
    optimizer = run.optimizer
    rates = {"learning_rate": optimizer.learning_rate, "local_rate": optimizer.local_rate}
    lower = {name: rate * optimizer.roll_back for name, rate in rates.items()}
    return resuming(run).model_copy(update={"optimizer": optimizer.model_copy(update=lower)})
