"""What a checkpoint holds, as PyTorch keeps it."""

from __future__ import annotations

from pathlib import Path

import torch

from dbmpi.checkpoint.reader import Checkpoint


def state_dict(checkpoint: str | Path, module: torch.nn.Module | None = None) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers in a checkpoint, for ``module.load_state_dict``.

    Parameters
    ----------
    checkpoint : path
        A checkpoint, or the directory of a run, whose newest one is taken.
    module : torch.nn.Module, optional
        Whose parameters are used in several places: a checkpoint has each of them once, under its first name, and a
        strict ``load_state_dict`` wants all names.

    Returns
    -------
    dict
        Tensors by name; frozen parameters and buffers are among them.

    Raises
    ------
    UserError
        If there is no checkpoint, or it is damaged.

    Examples
    --------
    After ``result = dbmpi.train(run, objective=dbmpi.torch.objective(module, loss))``, on any rank::

        module.load_state_dict(dbmpi.torch.state_dict(result.checkpoint))
    """
    with Checkpoint.open(Path(checkpoint)) as opened:
        arrays = opened.layout.views(opened.parameters()) | opened.objective_state()
    found = {name: torch.from_numpy(array) for name, array in arrays.items()}
    first: dict[int, str] = {}
    for name, one in () if module is None else module.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(one), name)
        if known in found:
            found.setdefault(name, found[known])
    return found
