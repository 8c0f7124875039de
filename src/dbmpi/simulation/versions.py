"""The parameters of a shard, and those earlier versions of them that replicas still need."""

from __future__ import annotations

import numpy as np

from dbmpi.kernels.memory import aligned_empty


class HeldVersion:
    """The parameters of one version.

    Attributes
    ----------
    values
        Flat; they do not change while there are users.
    users
        How many hold it.
    """

    __slots__ = ("users", "values")

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.users = values, 0


class VersionedParameters:
    """Parameters that are copied before they change, if they are held: one array for each version that is held.

    Parameters
    ----------
    values
        Flat; the present ones are here until the first copy is made.

    Attributes
    ----------
    arrays
        How many have been made so far: one more than the versions that were held at the same time, at most.

    Examples
    --------
    >>> parameters = VersionedParameters(np.zeros(2))
    >>> first, second = parameters.hold(), parameters.hold()
    >>> parameters.changeable()[:] = 1
    >>> first is second, first.values.tolist(), parameters.values.tolist(), parameters.arrays
    (True, [0.0, 0.0], [1.0, 1.0], 2)
    """

    def __init__(self, values: np.ndarray) -> None:
        self._present = HeldVersion(values)
        self._unused: list[np.ndarray] = []
        self.arrays = 1

    @property
    def values(self) -> np.ndarray:
        """The present parameters."""
        return self._present.values

    def hold(self) -> HeldVersion:
        """Return the present version, which stays as it is until it is released as often as it was held."""
        self._present.users += 1
        return self._present

    def release(self, held: HeldVersion) -> None:
        """Give up a version that is `held`."""
        held.users -= 1
        if held.users == 0 and held is not self._present:
            self._unused.append(held.values)

    def changeable(self) -> np.ndarray:
        """Return the present parameters, to be changed in place."""
        if self._present.users:
            before = self._present.values
            if not self._unused:
                self._unused.append(aligned_empty(before.size, before.dtype))
                self.arrays += 1
            self._present = HeldVersion(self._unused.pop())
            np.copyto(self._present.values, before)
        return self._present.values
