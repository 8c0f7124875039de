"""Named vectors that lie cut over the shards, and what a batch method may do with them (paper, section 4.2).

A batch method runs on a coordinator that holds no vector: it says what is to be done, the shards do it, each with
its own part, what results stays there, and only scalars come back.  `Space` is all that a method sees.
:class:`~dbmpi.methods.local_space.LocalSpace` executes on the arrays of one shard;
:class:`~dbmpi.sandblaster.commands.RemoteSpace` sends commands to shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

Order = Literal["max", "one"]


class Space(Protocol):
    """Named real vectors of one length.  A name that is not there is a ValueError."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the vectors."""
        ...

    def create(self, name: str, dtype: str | None = None) -> None:
        """Make a vector `name` of zeros, of the space's dtype, "float32" or "float64"; one that exists becomes zero."""
        ...

    def copy(self, source: str, target: str) -> None:
        """Set ``target = source``."""
        ...

    def scale(self, name: str, factor: float) -> None:
        """Multiply the vector `name` by `factor`."""
        ...

    def axpy(self, factor: float, source: str, target: str) -> None:
        """Set ``target = target + factor * source``."""
        ...

    def combine(self, target: str, terms: Sequence[tuple[float, str]]) -> None:
        """Set `target` to the sum of ``coefficient * vector`` over the terms, in one pass; it may be among them."""
        ...

    def multiply(self, left: str, right: str, target: str) -> None:
        """Set ``target = left * right``, element by element."""
        ...

    def advance(self, point: str, origin: str, step: float, direction: str) -> None:
        """Set ``origin = point`` and then ``point = point + step * direction``, in one pass.

        Parameters
        ----------
        point, origin, direction
            Names of vectors.
        step
            A number.
        """
        ...

    def dots(self, pairs: Sequence[tuple[str, str]], maxima: Sequence[str] = ()) -> np.ndarray:
        """Return the dot products of all pairs, then the largest magnitudes of the vectors in `maxima`, as float64.

        One pass over memory.  A product is not a number where an element is not finite.
        """
        ...

    def norms(self, names: Sequence[str], order: Order = "max") -> np.ndarray:
        """Return the largest magnitude of each of `names`, or with ``order="one"`` the sum of its magnitudes.

        Not a number where an element is none.
        """
        ...

    def pseudo_gradient(self, point: str, gradient: str, strength: float, target: str) -> None:
        """Set `target` to the pseudo-gradient of the loss plus ``strength * |point|_1`` (OWL-QN).

        Parameters
        ----------
        point, gradient
            Names of the vectors with the parameters and the gradient of the loss.
        strength
            A number.
        target
            Name of the vector to write.
        """
        ...

    def align(self, direction: str, gradient: str) -> None:
        """Set elements of `direction` to zero where they do not descend along ``-gradient`` (OWL-QN)."""
        ...

    def project(self, point: str, origin: str, gradient: str) -> None:
        """Set elements of `point` to zero that left the orthant of `origin` and ``-gradient`` (OWL-QN)."""
        ...
