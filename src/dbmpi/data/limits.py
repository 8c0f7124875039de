"""Settings that size memory, limited by the data and the machine."""

from __future__ import annotations

from collections.abc import Sequence

from dbmpi.config import Run
from dbmpi.errors import UserError
from dbmpi.machine import capacity

_BYTES = 4


def fitted(run: Run, samples: int) -> tuple[Run, tuple[str, ...]]:
    """Return the run with no batch larger than its `samples`, and Sandblaster's numbers no larger than that leaves.

    No result changes, but less memory is set aside.

    Returns
    -------
    Run, tuple of str
        The run, and for each number that has been lowered a line for the user.
    """
    notices = []

    def lower(name: str, given: int, most: int, what: str) -> int:
        if given > most:
            notices.append(f"{name} = {given:,} is more than the {what}: taken as {most:,}")
        return min(given, most)

    optimizer, sandblaster = run.optimizer, run.sandblaster
    size = lower("optimizer.batch_size", optimizer.batch_size, samples, "samples to learn from")
    optimizer = optimizer.model_copy(update={"batch_size": size})
    if optimizer.method == "sandblaster":
        most, what = -(-samples // size), "portions of all samples"
        portions = lower("sandblaster.batch_portions", sandblaster.batch_portions, most, what)
        most, what = (portions or most), "portions of a batch"
        if sandblaster.batch_growth > 1:
            most, what = -(-samples // size), "portions of all samples"
        push = lower("sandblaster.portions_per_push", sandblaster.portions_per_push, most, what)
        sandblaster = sandblaster.model_copy(update={"batch_portions": portions, "portions_per_push": push})
    if not notices:
        return run, ()
    return run.model_copy(update={"optimizer": optimizer, "sandblaster": sandblaster}), tuple(notices)


def check_activations(
    sizes: Sequence[int],
    samples: int,
    *,
    setting: str,
    partitions: int = 1,
    workers: int = 1,
    learning: bool = True,
) -> None:
    """Refuse batches whose activations alone do not fit the memory.

    Parameters
    ----------
    sizes
        Numbers in a sample of the inputs, and of each layer's outputs.
    samples
        Of a batch.
    setting
        What it is called that says so.
    partitions, workers
        How many ranks compute one batch together, and how many ranks compute on this host.
    learning
        Whether there are gradients of activations, too.

    Raises
    ------
    UserError
        Says how much is needed and how much there is.
    """
    memory = capacity.available()
    # Of the gradients there are two at a time, of a layer's outputs and of its inputs.
    each = _BYTES * (sum(sizes) + (2 * max(sizes) if learning else 0)) * workers / partitions
    if each * samples > memory:
        fits = int(memory / each)
        advice = f"set it to {fits:,} or less" if fits else "make the layers smaller, or use more partitions or hosts"
        raise UserError(
            f"{setting} = {samples:,}: the activations of a batch take {capacity.shown(each * samples)} on this host, "
            f"but {capacity.shown(memory)} of memory are available; {advice}"
        )


def check_history(pairs: int, iterations: int, elements: int, shards: int) -> None:
    """Refuse a history of L-BFGS that would not fit the memory when it is full.

    Parameters
    ----------
    pairs
        That are kept: ``sandblaster.memory``.
    iterations
        That the epochs leave time for, at most.
    elements, shards
        Of a shard's part of the parameters, and shards on this host.
    """
    memory = capacity.available()
    each = 2 * elements * shards * _BYTES
    if min(pairs, iterations) * each > memory:
        raise UserError(
            f"sandblaster.memory = {pairs:,}: so many steps and gradient differences take "
            f"{capacity.shown(min(pairs, iterations) * each)} on this host, but {capacity.shown(memory)} of memory are "
            f"available; set it to {int(memory / each):,} or less, or start shards on more hosts"
        )


def check_resident(nbytes: int, workers: int) -> None:
    """Refuse to read data into memory that does not hold them.

    Parameters
    ----------
    nbytes
        That each worker keeps.
    workers
        On this host.
    """
    memory = capacity.available()
    if nbytes * workers > memory:
        copies = f" in each of {workers} workers" if workers > 1 else ""
        raise UserError(
            f"data.train and data.test take {capacity.shown(nbytes)}{copies}, but {capacity.shown(memory)} of memory "
            f"are available on this host; set data.memory_mib below the size of the larger file as float32, and it is "
            f"read batch by batch"
        )
