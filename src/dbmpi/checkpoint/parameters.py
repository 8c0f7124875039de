"""What a run has learned, as arrays by name: ``dbmpi.parameters``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.result import FilePath, Result, path_of

if TYPE_CHECKING:
    import numpy as np


def parameters(checkpoint: FilePath | Result) -> dict[str, np.ndarray]:
    """Read the parameters of a checkpoint, e.g. for ``numpy.savez`` or a module's ``load_state_dict``.

    No code of the checkpoint is needed, and none is run.

    Parameters
    ----------
    checkpoint : path or Result
        A checkpoint, the directory of a run (its newest checkpoint), or what ``dbmpi.train`` returned.

    Returns
    -------
    dict of str to array
        Every array as float32, by its name in the checkpoint: ``dense1/weights`` (units, inputs) of a network, nested
        names of an objective joined by "/", those of a module of PyTorch as in its ``state_dict``.  A single number has
        shape (1,).

    Raises
    ------
    UserError
        If there is no whole checkpoint, or it is damaged.

    Examples
    --------
    >>> import dbmpi
    >>> overrides = ["optimizer.epochs=2", "monitor.progress=none", "run.directory=runs/parameters"]
    >>> result = dbmpi.train(dbmpi.load("examples/digits.toml", overrides))
    >>> dbmpi.parameters(result)["dense1/weights"].dtype
    dtype('float32')
    """
    with Checkpoint.open(path_of(checkpoint)) as opened:
        if opened.notice:
            sys.stderr.write(f"dbmpi: {opened.notice}\n")
        return opened.layout.views(opened.parameters())
