"""What a run finds in its directory: the checkpoint to go on from, and whether it may."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from dbmpi.checkpoint import directory
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.config import Run
from dbmpi.data.stream import Order
from dbmpi.errors import Damaged, UserError


class Previous(NamedTuple):
    """The checkpoint to go on from."""

    path: Path
    notice: str
    """Empty, or which newer ones cannot be read."""
    damaged: tuple[Path, ...]
    """Those of them that are torn, or not what was written."""


def previous(run: Run, without: Collection[Path] = ()) -> Previous | None:
    """Return the checkpoint to go on from, if there is any; refuse to write into another run's directory.

    Those in `without` are not taken.
    """
    place = run.run.directory
    try:
        for below in ("checkpoints", "records"):
            (place / below).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place / below):
                pass
        directory.clean(place / "checkpoints")
        existing = directory.checkpoints(place / "checkpoints")
    except OSError as error:
        raise UserError(
            f"{place}: cannot be used as the run directory ({error.strerror}); set run.directory to a place that "
            "you can write to"
        ) from None
    if not existing:
        return None
    if run.checkpoint.resume == "never":
        raise UserError(
            f"{place}: already holds checkpoints, the newest {existing[0].name}, and nothing is overwritten; set "
            'checkpoint.resume = "auto" to go on from it, or run.directory to another place'
        )
    with Checkpoint.open(place, without) as checkpoint:
        damaged = (path for path, error in checkpoint.unreadable.items() if isinstance(error, Damaged))
        return Previous(checkpoint.path, checkpoint.notice, tuple(damaged))


def check_same_order(run: Run, stored: str, order: Order, total: int, path: Path) -> Order:
    """Refuse to go on where the numbers of the stream would mean other samples; return the order before.

    Its batches may be of another size where either run is by Sandblaster: portions are much larger than the batches of
    stochastic methods.

    Parameters
    ----------
    stored
        The description of the run that wrote the checkpoint.
    order
        Of the run that is to go on.
    total
        Batches of the run that wrote the checkpoint.
    """
    before = Run.from_json(stored)
    same_size = "sandblaster" not in (before.optimizer.method, run.optimizer.method)
    sizes = (min(before.optimizer.batch_size, order.samples), order.batch_size)
    pairs = {
        "optimizer.batch_size": sizes if same_size else (0, 0),
        "run.seed": (before.run.seed, run.run.seed),
        "network.loss": (before.network.loss, run.network.loss),
    }
    for key, (then, now) in pairs.items():
        if then != now:
            raise UserError(
                f"{path}: was written with {key} = {then}, the run to go on has {now}; "
                f"set it back, or start anew in another run.directory"
            )
    earlier = Order(order.samples, min(before.optimizer.batch_size, order.samples), before.optimizer.epochs, order.seed)
    then = earlier.batches
    if then != total:
        raise UserError(
            f"{path}: was written by a run of {total} batches in {before.optimizer.epochs:g} epochs, but the "
            f"{order.samples} samples of {run.data.train} make {then}: it has learned from other data; "
            f"set data.train back, or start anew in another run.directory"
        )
    return earlier
