"""A user's own objective over two ranks: `dbmpi.minimize` beside SciPy's L-BFGS-B around an Allreduce.

Each of two ranks holds half of the samples, and both contestants call the same objectives, in float64 with 10 pairs of
history.  What one writes by hand is SciPy's optimiser on every rank, whose objective adds up losses and gradients by
MPI_Allreduce.  They run in turn, for the same number of iterations: of a logistic regression with few parameters, where
what counts is how fast ranks hear of one another, and of a sparse least-squares problem with many, where it is the
vector work and memory.  Beside the seconds stands the largest memory of a rank, that of the objective included.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import common

if TYPE_CHECKING:
    import numpy as np

RANKS, PAIRS = 2, 10
CASES = {
    # samples of a rank, parameters, iterations
    "logistic regression, dense": (16_000, 123, 60),
    "least squares, sparse": (2_000_000, 4_000_000, 25),
}
SPEED = 1.0

Objective = Callable[["np.ndarray"], tuple[float, "np.ndarray"]]


def main() -> None:
    if sys.argv[1:2] == ["--contestant"]:
        contestant(sys.argv[2], sys.argv[3])
        return
    options = common.options(__doc__)
    report = common.Report("minimize", options.json)
    rows = []
    for case, (_, parameters, _) in CASES.items():
        with ExitStack() as stack:
            ours, peer = (
                stack.enter_context(common.Contestant(common.on_ranks(RANKS, __file__, "--contestant", one, case)))
                for one in ("ours", "scipy")
            )
            for one in (ours, peer):
                one.do()
            found = common.in_turn(2 if options.quick else 7, ours=ours.do, scipy=peer.do)
        times = {}
        for name, runs in found.items():
            its, evaluations, loss = (runs[-1][what] for what in ("iterations", "evaluations", "loss"))
            times[name] = 1e3 * common.median([run["seconds"] for run in runs]) / its
            memory = max(run["memory"] for run in runs) / 2**20
            rows.append((case, parameters, name, times[name], evaluations / its, f"{loss:.9g}", memory))
        report.at_least(f"speed of SciPy and Allreduce's, {case}", times["scipy"] / times["ours"], SPEED)
    header = ("problem", "parameters", "", "ms an iteration", "evaluations an iteration", "loss", "MiB of a rank")
    report.table(f"{RANKS} ranks of one thread, in turn (medians)", header, rows)
    report.finish()


def contestant(method: str, case: str) -> None:
    """Serve minimisations from the same start."""
    common.prepare_runtime()
    import numpy as np

    from dbmpi.mpi import waiting, world

    comm = world.start()
    samples, parameters, iterations = CASES[case]
    make = logistic if "logistic" in case else least_squares
    objective = make(np.random.default_rng(comm.rank), samples, parameters)
    solve = ours if method == "ours" else scipys

    def step() -> Mapping[str, Any]:
        waiting.barrier(comm, "the other ranks")
        start = time.perf_counter()
        loss, done, evaluations = solve(comm, objective, np.zeros(parameters), iterations)
        seconds = time.perf_counter() - start
        memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"seconds": seconds, "loss": loss, "iterations": done, "evaluations": evaluations, "memory": memory}

    common.serve_together(comm, step=step)


def ours(comm: Any, objective: Objective, x: np.ndarray, iterations: int) -> tuple[float, int, int]:
    """Minimise by the library; return the loss, the iterations and the evaluations."""
    from dbmpi import minimize

    found = minimize(objective, x, comm, memory=PAIRS, gtol=0, ftol=0, iterations=iterations)
    return found.loss, found.iterations, found.evaluations


def scipys(comm: Any, objective: Objective, x: np.ndarray, iterations: int) -> tuple[float, int, int]:
    """Minimise by SciPy on every rank alike, with sums of all ranks' losses and gradients."""
    import numpy as np
    from mpi4py import MPI
    from scipy import optimize

    sums = np.empty(x.size + 1)

    def summed(x: np.ndarray) -> tuple[float, np.ndarray]:
        loss, gradient = objective(x)
        mine = np.append(gradient, loss)
        comm.Allreduce(mine, sums, MPI.SUM)
        return float(sums[-1]), sums[:-1]

    options = {"maxcor": PAIRS, "gtol": 0, "ftol": 0, "maxiter": iterations, "maxfun": 10 * iterations}
    found = optimize.minimize(summed, x, jac=True, method="L-BFGS-B", options=options)
    return float(found.fun), int(found.nit), int(found.nfev)


def logistic(random: Any, samples: int, parameters: int) -> Objective:
    """Return the loss of a rank's samples, most of whose features are 0 or 1, with an L2 term of their number."""
    import numpy as np

    inputs = np.asarray(random.random((samples, parameters)) < 0.11, np.float64)
    labels = np.where(inputs[:, :10].sum(axis=1) + random.normal(size=samples) > 1, 1.0, -1.0)

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        margins = labels * (inputs @ x)
        gradient = -inputs.T @ (labels / (1 + np.exp(margins))) + 1e-4 * samples * x
        return float(np.logaddexp(0, -margins).sum() + 0.5e-4 * samples * (x @ x)), gradient

    return objective


def least_squares(random: Any, samples: int, parameters: int) -> Objective:
    """Return the squared error of a rank's equations, each of five of the unknowns."""
    import numpy as np
    from scipy import sparse

    columns = random.integers(0, parameters - 5, samples)[:, None] + np.arange(5)
    values = random.normal(size=columns.shape) * np.geomspace(0.1, 1, 5)
    starts = np.arange(0, values.size + 1, 5)
    matrix = sparse.csr_array((values.reshape(-1), columns.reshape(-1).astype(np.int32), starts), (samples, parameters))
    right = matrix @ random.normal(size=parameters) + random.normal(size=samples)
    transposed = matrix.T

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        error = matrix @ x - right
        return 0.5 * float(error @ error), transposed @ error

    return objective


if __name__ == "__main__":
    main()
