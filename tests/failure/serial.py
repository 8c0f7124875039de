"""What a run of Sandblaster by gradient descent comes to with one replica that nothing happens to, in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from failure.jobs import BATCHES_PER_EPOCH as PORTIONS
from failure.jobs import Jobs
from failure.plain_descent import descend
from parallel import tiny

from dbmpi.config import Run
from dbmpi.kernels import updates, vectors
from dbmpi.methods.descent import Limits
from dbmpi.methods.local_space import LocalSpace

SETTINGS = (
    "optimizer.method=sandblaster",
    "sandblaster.algorithm=plain_descent:descend",
    f"network.code={Path(__file__).parent}",
)


def found_and_expected(jobs: Jobs, resumed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the parameters in the last checkpoint, and those of the serial twin of that run.

    Each time that it was resumed, it has evaluated a point again: a user's method begins with that.
    """
    with jobs.checkpoint() as checkpoint:
        found = np.empty(checkpoint.layout.size, np.float32)
        checkpoint.read("parameters", 0, found)
        run, evaluations = Run.from_json(checkpoint.info.configuration), checkpoint.info.step // PORTIONS - resumed
    data = {"train": jobs.directory / "train.h5", "test": jobs.directory / "test.h5"}
    return found, serial(run.model_copy(update={"data": run.data.model_copy(update=data)}), evaluations)


def serial(run: Run, evaluations: int) -> np.ndarray:
    """Return the parameters after so many evaluations in one loop over the portions, in their order."""
    twin = tiny.Twin(run)
    space = LocalSpace(twin.server.size, np.float32, vectors={"parameters": twin.server})
    batches = [twin.batch(portion) for portion in range(PORTIONS)]
    part, weighted = np.empty_like(twin.server), np.empty_like(twin.server)

    def evaluate(point: str, gradient: str) -> float:
        x, target, loss = space.array(point), space.writable(gradient), 0.0
        target[:] = 0
        for batch in batches:
            outcome = twin.network.loss_and_gradient(x, batch, part)
            vectors.combine(weighted, [outcome.samples / tiny.SAMPLES], [part])
            updates.add(target, weighted)
            loss += outcome.loss
        return loss / tiny.SAMPLES

    descend(space, evaluate, limits=Limits(), callback=lambda progress: progress.evaluations >= evaluations)
    return twin.server
