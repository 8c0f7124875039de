"""All kernels of batch methods, called once."""

from __future__ import annotations

from functools import cache

import numpy as np

from dbmpi.kernels import sums, vectors
from dbmpi.methods.descent import ORIGIN, POINT, Limits
from dbmpi.methods.lbfgs import lbfgs
from dbmpi.methods.local_space import LocalSpace
from dbmpi.methods.owlqn import owlqn
from dbmpi.methods.whole_space import WholeSpace


@cache
def use_kernels(dtype: str = "float32") -> None:
    """Call all kernels of vectors of this `dtype` once, so that they are compiled or loaded before the clock runs."""
    few = np.linspace(1, 2, 8, dtype=dtype)
    whole = WholeSpace(8, dtype)
    whole.create(POINT)
    whole.writable(POINT)[:] = few
    _use(whole)
    _use(LocalSpace(8, dtype, vectors={POINT: few}))
    sums.sum_products([few, few], [(0, 1)], [3, 3], sums.FINE)
    vectors.largest_magnitude(few)
    vectors.accrue(few, 0.5, few.copy())


def _use(space: LocalSpace) -> None:
    def evaluate(point: str, gradient: str) -> float:
        space.writable(gradient)[:] = space.array(point)
        return 0.5 * float(space.dots([(point, point)])[0])

    owlqn(space, evaluate, strength=0.1, memory=3, limits=Limits(0, 0, iterations=2))
    lbfgs(space, evaluate, memory=3, limits=Limits(0, 0, iterations=2))
    space.multiply(POINT, POINT, ORIGIN)
