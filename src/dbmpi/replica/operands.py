"""The bfloat16 copies of the weights that one worker multiplies by, made once for each change of the parameters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dbmpi.kernels import bfloat16
from dbmpi.kernels.memory import aligned_empty
from dbmpi.network.layer import BIAS, Arrays


class Operands:
    """What the layers of a worker multiply by: rounded copies where products are of bfloat16, and else the parameters.

    A layer's copies are made when its forward pass asks for them, just before they are read, and serve all passes until
    the parameters change.  So the two passes of a step multiply by the same weights.  Where shards keep rounded
    parameters beside those that a worker computes on, these are used, and both change meanwhile.

    Parameters
    ----------
    rounded
        For each layer, whether it multiplies bfloat16.
    """

    def __init__(self, rounded: Sequence[bool]) -> None:
        self._rounded = tuple(rounded)
        self._copies: dict[int, dict[str, np.ndarray]] = {}
        self._current: set[int] = set()
        self._source = 0
        self._kept_source, self._kept = 0, tuple[Arrays, ...]()

    def keep(self, parameters: np.ndarray, rounded: Sequence[Arrays]) -> None:
        """Use what others keep up to date, instead of copies, whenever these parameters are computed from.

        Parameters
        ----------
        parameters
            The vector whose rounded values are kept.
        rounded
            For each layer, its tensors in the vector that holds them as bfloat16.
        """
        self._kept_source, self._kept = parameters.ctypes.data, tuple(rounded)

    def begin(self, parameters: np.ndarray, *, changed: bool) -> None:
        """Note that the next passes compute from the vector `parameters`, and whether it may have `changed`.

        It is known by its place in memory: a new one there is to be called changed.
        """
        source = parameters.ctypes.data
        if changed or source != self._source:
            self._current.clear()
        self._source = source

    def of(self, layer: int, parameters: Arrays) -> Arrays:
        """Return the tensors of `layer`, by their short names, as it takes them.

        Parameters
        ----------
        layer
            Its number.
        parameters
            Its tensors in the worker's vector.
        """
        if not self._rounded[layer]:
            return parameters
        factors = {short: values for short, values in parameters.items() if short != BIAS}
        if self._kept and self._source == self._kept_source:
            return {**parameters, **{short: self._kept[layer][short] for short in factors}}
        copies = self._copies.setdefault(
            layer, {short: aligned_empty(values.shape, bfloat16.BFLOAT16) for short, values in factors.items()}
        )
        if layer not in self._current:
            for short, values in factors.items():
                bfloat16.rounded(values, copies[short])
            self._current.add(layer)
        return {**parameters, **copies}
