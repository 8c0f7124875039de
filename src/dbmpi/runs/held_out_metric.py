"""Whether the metric that judges a run is one that the run measures."""

from __future__ import annotations

from dbmpi.config import Run
from dbmpi.data.run_data import RunData
from dbmpi.errors import UserError
from dbmpi.network.description import Network
from dbmpi.replica.own_objective import OwnModel


def check_metric(run: Run, model: Network | OwnModel, data: RunData) -> None:
    """Refuse a `run` whose metric is none of those that it measures, and what needs evaluations where there are none.

    Parameters
    ----------
    run
        The description.
    model
        What is learned; of an objective it is known what it measures.
    data
        The samples.

    Raises
    ------
    UserError
        Says what would do.
    """
    section, measured = run.monitor, ["loss"]
    if model.classifies if isinstance(model, OwnModel) else data.classes:
        measured.append("accuracy")
    if isinstance(model, OwnModel):
        measured += model.metrics or ()
    if section.metric not in measured:
        raise UserError(
            f"monitor.metric = {section.metric!r}: this run does not measure that on its test data; set it to "
            + " or ".join(map(repr, measured))
        )
    given = {
        f"topology.evaluators = {run.topology.evaluators}": run.topology.evaluators > 0,
        f"monitor.patience = {section.patience}": section.patience > 0,
        f"monitor.target = {section.target}": section.target is not None,
        f'checkpoint.best = "{run.checkpoint.best}"': run.checkpoint.best == "at_once",
    }
    for setting, needs in given.items():
        if needs and not data.tested:
            raise UserError(f"{setting}: there are no test data to evaluate: set data.test, or leave it out")
