"""Does the gradient of a user's own objective fit its loss?  Compared with differences of the loss, array by array."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dbmpi.config import Run
from dbmpi.data.reading import Reading
from dbmpi.data.source import Source
from dbmpi.errors import UserError
from dbmpi.machine.doctor import Finding
from dbmpi.network import own
from dbmpi.network.own import calling
from dbmpi.objective import Samples
from dbmpi.replica.own_objective import OwnModel, OwnReplica

ELEMENTS = 16
"""Elements of each array that are compared: the largest of the gradient, and random ones."""
STEPS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Lengths of the differences: a loss in float32 needs long ones, and one with large curvature short ones."""
TOLERANCE = 2e-2
"""Relative difference up to which a gradient fits, for one of the steps."""
_SMALL = 0.03
"""Elements smaller than this fraction of their array's largest are compared with that: float32 losses say no more."""
_NOTHING = 1e-6
"""Arrays whose gradient is smaller than this fraction of the largest one are compared with that: it may be 0, as of a
bias below a batch normalisation, and computed as what rounding leaves."""
_AWAY = 0.05
"""Standard deviation of what is added to the first values: zeros are a special point of many losses."""


def check_gradient(run: Run) -> Iterator[Finding]:
    """Yield a finding for each array of the parameters of an objective.

    Parameters
    ----------
    run
        Names the objective and the data; its first batch is used.

    Raises
    ------
    UserError
        If the run has no objective, or that fails.
    """
    section = run.objective
    if section is None:
        raise UserError(
            "doctor --objective: the configuration has no [objective]; the gradients of dbmpi's own layers are tested"
        )
    called = f"the objective {section.use!r}"
    model = OwnModel(own.make_objective(section, own.from_directory(run.network.code)), run.run.seed, called)
    data, reading = run.data, Reading.of(run.data, run.network)
    with Source.open(data.training_file, data.memory_mib, "optional", reading) as source:
        batch = source.batch(np.arange(min(run.optimizer.batch_size, source.samples)))
    random = np.random.default_rng(run.run.seed)
    point = np.empty(model.layout.size)
    model.initial(0, point)
    point += random.normal(0, _AWAY, point.size)
    replica, gradient = OwnReplica(model), np.empty_like(point)
    try:
        replica.loss_and_gradient(point, batch, gradient)
    except Exception:  # code that takes float32 alone, perhaps; what else is wrong shows again
        point, gradient = point.astype(np.float32), gradient.astype(np.float32)
    with calling("the objective", "its gradient is computed"):
        replica.loss_and_gradient(point, batch, gradient)
        for tensor, part in zip(model.layout.tensors, replica.parameters.parts, strict=True):
            mine = gradient[part.start : part.stop]
            others = random.integers(0, mine.size, ELEMENTS - 1)
            chosen = np.unique([np.abs(mine).argmax(), *others])
            scale = max(np.abs(mine).max(), _NOTHING * np.abs(gradient).max())
            worst, slope, where = max(
                (*_difference(replica, batch, point, part.start + one, float(mine[one]), scale), one)
                for one in chosen.tolist()
            )
            index = ", ".join(map(str, np.unravel_index(where, tensor.shape)))
            compared = f"{len(chosen)} of {mine.size:,} elements compared, relative difference at most {worst:.1g}"
            if worst <= TOLERANCE:
                yield Finding(tensor.name, "ok", compared)
            else:
                yield Finding(
                    tensor.name,
                    "broken",
                    f"the gradient of element [{index}] is {mine[where]:.6g}, differences of the loss say {slope:.6g}",
                    f"see the derivative of the loss by {tensor.name!r}; both are of the mean over the batch",
                )


def _difference(
    replica: OwnReplica, batch: Samples, point: np.ndarray, position: int, expected: float, scale: float
) -> tuple[float, float]:
    """Return how much an element of the gradient differs from the slope of the loss, relatively, and that slope.

    Parameters
    ----------
    replica, batch
        What is computed.
    point
        The parameters; as they were at the end.
    position
        Of the element.
    expected
        The element of the gradient.
    scale
        Largest magnitude of the array's gradient: elements much smaller than it are compared with it.
    """
    found = []
    kept = point[position]
    for step in STEPS:
        losses: list[float] = []
        there: list[float] = []
        for sign in (1, -1):
            point[position] = kept + sign * step
            losses.append(replica.learned(point, batch).mean_loss)
            there.append(float(point[position]))
        point[position] = kept
        slope = (losses[0] - losses[1]) / (there[0] - there[1]) if there[0] > there[1] else np.inf
        if not np.isfinite(slope):
            continue
        size = max(abs(slope), abs(expected), _SMALL * scale)
        found.append((abs(slope - expected) / size if size else 0.0, slope))
    return min(found, default=(np.inf, np.nan))
