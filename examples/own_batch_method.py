"""A batch method of one's own, in a page: gradient descent with the step of Barzilai and Borwein.

Run it with ``python examples/own_batch_method.py``, or let it train a network: ``[sandblaster] algorithm =
"own_batch_method:barzilai_borwein"``.  A method sees a *space* of named vectors that lie cut over the shards and an
*evaluation* of the whole batch; it holds no vector itself, so it runs unchanged on any number of shards.
"""

import numpy as np

from dbmpi.methods.descent import Callback, Evaluate, Limits, Progress, Report, prepare
from dbmpi.methods.local_space import LocalSpace
from dbmpi.methods.space import Space

FIRST, SHORTEST = 1e-3, 1e-9
"""The first step, and one that is taken where the gradient has not grown along the last; the shortest one."""


def barzilai_borwein(space: Space, evaluate: Evaluate, *, limits: Limits, callback: Callback | None = None) -> Report:
    """Minimise from the vector "parameters".

    The step is ``s.s / s.y`` for the last displacement s and the change y of the gradient (IMA J. Num. Anal. 8, 1988);
    a quarter of it where the loss would exceed the last ten (Raydan, SIAM J. Optim. 7, 1997).
    """
    prepare(space, "previous parameters", "gradient", "previous gradient", "y")
    loss, step, iteration, reason = evaluate("parameters", "gradient"), FIRST, 0, "gradient"
    losses = [loss]
    while (largest := float(space.norms(["gradient"])[0])) > limits.gtol:
        if iteration >= limits.iterations:
            reason = "iterations"
            break
        space.copy("gradient", "previous gradient")
        space.advance("parameters", "previous parameters", -step, "gradient")
        loss, iteration = evaluate("parameters", "gradient"), iteration + 1
        if not loss <= max(losses[-10:]) and step > SHORTEST:  # too far: back to where it was
            space.copy("previous parameters", "parameters")
            space.copy("previous gradient", "gradient")
            loss, step = losses[-1], step / 4
            continue
        losses.append(loss)
        if callback is not None and callback(Progress(iteration, iteration + 1, loss, largest, step)):
            reason = "callback"
            break
        space.combine("y", [(1.0, "gradient"), (-1.0, "previous gradient")])
        # s = -step g, so that s.s = step^2 g.g and s.y = -step g.y
        square, product = space.dots([("previous gradient", "previous gradient"), ("previous gradient", "y")])
        step = -step * square / product if product < 0 else FIRST
    return Report(reason, loss, largest, iteration, iteration + 1)


def main() -> None:
    """Minimise a quadratic whose solution is known."""
    scales = np.geomspace(1, 100, 1000)
    parameters = np.zeros(1000)
    space = LocalSpace(1000, np.float64, vectors={"parameters": parameters})

    def evaluate(point: str, gradient: str) -> float:
        x = space.array(point)
        space.writable(gradient)[:] = scales * x - 1
        return float(0.5 * x @ (scales * x) - x.sum())

    report = barzilai_borwein(space, evaluate, limits=Limits(gtol=1e-8))
    error = np.abs(parameters - 1 / scales).max()
    print(f"loss {report.loss:.6f} after {report.evaluations} evaluations; largest error of the parameters {error:.1e}")


if __name__ == "__main__":
    main()
