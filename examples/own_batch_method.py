"""A batch method of one's own, in a page: gradient descent with the step of Barzilai and Borwein.

Run it with ``python examples/own_batch_method.py``.  A method sees a *space* of named vectors that lie cut over the
shards and an *evaluation* of the whole batch; it holds no vector itself, so it runs unchanged on any number of shards.
"""

import numpy as np

from dbmpi.optim.descent import Evaluate, prepare
from dbmpi.optim.localspace import LocalSpace
from dbmpi.optim.space import Space


def barzilai_borwein(space: Space, evaluate: Evaluate, *, first: float = 1e-3, gtol: float = 1e-8) -> tuple[float, int]:
    """Minimise from the vector "parameters"; return the loss and the number of evaluations.

    The step is ``s.s / s.y`` for the last displacement s and the change y of the gradient (IMA J. Num. Anal. 8, 1988).
    """
    prepare(space, "previous parameters", "gradient", "previous gradient", "y")
    loss, step, evaluations = evaluate("parameters", "gradient"), first, 1
    while space.norms(["gradient"])[0] > gtol and evaluations < 1000:
        space.copy("gradient", "previous gradient")
        space.advance("parameters", "previous parameters", -step, "gradient")
        loss, evaluations = evaluate("parameters", "gradient"), evaluations + 1
        space.combine("y", [(1.0, "gradient"), (-1.0, "previous gradient")])
        # s = -step g, so that s.s = step^2 g.g and s.y = -step g.y
        square, product = space.dots([("previous gradient", "previous gradient"), ("previous gradient", "y")])
        step = -step * square / product if product < 0 else first
    return loss, evaluations


def main() -> None:
    """Minimise a quadratic whose solution is known."""
    scales = np.geomspace(1, 100, 1000)
    parameters = np.zeros(1000)
    space = LocalSpace(1000, np.float64, vectors={"parameters": parameters})

    def evaluate(point: str, gradient: str) -> float:
        x = space.array(point)
        space.writable(gradient)[:] = scales * x - 1
        return float(0.5 * x @ (scales * x) - x.sum())

    loss, evaluations = barzilai_borwein(space, evaluate)
    error = np.abs(parameters - 1 / scales).max()
    print(f"loss {loss:.6f} after {evaluations} evaluations; largest error of the parameters {error:.1e}")


if __name__ == "__main__":
    main()
