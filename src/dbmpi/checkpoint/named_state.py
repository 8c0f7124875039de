"""First state of an objective by name, from the same files as the first values of parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dbmpi.checkpoint.named_arrays import StoredValues, damaged_file, names_outside
from dbmpi.errors import UserError
from dbmpi.index.layout import Layout


def take_state(
    layout: Layout, state: Mapping[str, np.ndarray], stored: dict[str, StoredValues], source: str
) -> dict[str, np.ndarray]:
    """Remove what is first state from named arrays, and return it by the names of the state.

    Parameters
    ----------
    layout
        Of the parameters.
    state
        The arrays that it is for; any may be missing in the file.
    stored
        The arrays of the file by their own names.
    source
        Where they are from, for messages.

    Raises
    ------
    UserError
        If shapes or types do not fit, or the values cannot be read.
    """
    inside = {_dotted(outside): name for name, outside in names_outside(layout, state).items()}
    found: dict[str, np.ndarray] = {}
    for name in [name for name in stored if _dotted(name) in inside]:
        values, own = stored.pop(name), inside[_dotted(name)]
        array, mistake = state[own], ""
        if values.shape != array.shape:
            mistake = f"has shape {values.shape}, the state of the objective {array.shape}"
        elif not values.numbers:
            mistake = f"is {values.kind}, expected numbers"
        else:
            with damaged_file(Path(source)):
                parts = list(values.read(0, math.prod(values.shape)))
            read = np.concatenate(parts) if parts else np.empty(0, array.dtype)
            as_stored = array.dtype == bool and read.dtype == np.uint8  # as checkpoints have booleans
            if not as_stored and not np.can_cast(read.dtype, array.dtype, "same_kind"):
                mistake = f"is {read.dtype}, the state of the objective {array.dtype}"
            found[own] = read.reshape(array.shape)
        if mistake:
            raise UserError(f"{source}: does not fit the model: {name!r} {mistake}")
    return found


def _dotted(name: str) -> str:
    return name.replace("/", ".")
