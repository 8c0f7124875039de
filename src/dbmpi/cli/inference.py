"""What ``dbmpi evaluate`` and ``dbmpi predict`` have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from dbmpi.checkpoint.trained import TrainedNetwork
    from dbmpi.data.source import Source

MEMORY_MIB = 1024
"""A data file up to this size (MiB, as float32) is read at once, a larger one batch by batch."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that both commands have."""
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, or a run directory (its latest checkpoint)"
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="HDF5 file with the samples")
    parser.add_argument(
        "--batch-size", type=_count, default=1024, metavar="N", help="samples computed together (default: %(default)s)"
    )
    add_allow_code(parser)


def add_allow_code(parser: argparse.ArgumentParser) -> None:
    """Add the argument by which a user allows code that a file names to be run."""
    parser.add_argument(
        "--allow-code",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.py",
        help="file with layers of your own that the checkpoint needs; it is run (may be repeated)",
    )


def prepare() -> None:
    """Choose threads, BLAS kernel and kernel cache; must come before NumPy and Numba are loaded."""
    from dbmpi.runtime.environment import prepare as prepare_environment

    prepare_environment()


def load(path: Path, code: Sequence[Path]) -> TrainedNetwork:
    """Read the network of a checkpoint and say on standard error which one, where that is not as asked.

    Layers of a user's own are loaded from the files `code` only.
    """
    from dbmpi.checkpoint import trained

    found = trained.load(path, code)
    if found.notice:
        sys.stderr.write(f"dbmpi: {found.notice}\n")
    return found


def batches(source: Source, batch_size: int, doing: str) -> Iterator[np.ndarray]:
    """Yield the indices of batch after batch, int64, with a progress bar on standard error if it is a terminal."""
    import numpy as np
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(doing, total=source.samples)
        for start in range(0, source.samples, batch_size):
            indices = np.arange(start, min(start + batch_size, source.samples))
            yield indices
            progress.advance(task, len(indices))


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number
