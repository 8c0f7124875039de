"""The plain twin of what L-BFGS does in one pass: the two-loop recursion."""

from __future__ import annotations

from dbmpi.methods.lbfgs import History
from dbmpi.methods.space import Space


def two_loop(space: Space, history: History, gradient: str, target: str) -> None:
    """Set `target` to the direction ``-H g`` by the recursion on vectors, as it is written in algorithm 7.4.

    The plain twin of `History.choose`: it needs 2m passes and reductions, one after the other.

    Parameters
    ----------
    space, history
        Where the vectors and the pairs are.
    gradient, target
        Names of vectors.
    """
    alphas = []
    space.copy(gradient, target)
    for s, y in reversed(history.pairs):
        dot, curvature = space.dots([(s, target), (s, y)])
        alphas.append(dot / curvature)
        space.axpy(-alphas[-1], y, target)
    for s, y in history.pairs[-1:]:
        curvature, square = space.dots([(s, y), (y, y)])
        space.scale(target, curvature / square)
    for (s, y), alpha in zip(history.pairs, reversed(alphas), strict=True):
        dot, curvature = space.dots([(y, target), (s, y)])
        space.axpy(alpha - dot / curvature, s, target)
    space.scale(target, -1.0)
