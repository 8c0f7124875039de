"""Parameters of PyTorch that are one and the same in the user's mind, but not in PyTorch's."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dbmpi.errors import UserError


def check_apart(parameters: Mapping[str, torch.Tensor], called: str) -> None:
    """Refuse different parameters at the same place in memory: each would be learned and stored on its own.

    Parameters
    ----------
    parameters
        By name.
    called
        What refuses them, for the message.

    Raises
    ------
    UserError
        If there are any.
    """
    known: dict[int, str] = {}
    for name, one in parameters.items():
        other = known.setdefault(one.data_ptr(), name) if one.numel() else name
        if other != name:
            raise UserError(
                f"{called}: {other} and {name} are different parameters in the same memory; to share one, assign the "
                "parameter itself, e.g. last.weight = first.weight, and transpose it where it is used"
            )
