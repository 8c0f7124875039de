"""Runs that an evaluation ends: by patience or by a target, with both optimizers, and when they resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from parallel import tiny

from dbmpi.checkpoint import directory, summary
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.cli import inspect_text
from dbmpi.errors import UserError
from dbmpi.formats.report import page
from dbmpi.monitor.history import RunHistory
from dbmpi.monitor.records import read_records
from dbmpi.runs.training import train

EPOCHS = 300
SLOW = {"algorithm": "gradient_descent", "line_search": "fixed", "step_length": 0.3, "gtol": 0.0, "ftol": 0.0}


def described(place: Path, comm, method: str, checkpoint: dict[str, object] | None = None, **monitor: object):
    return tiny.describe(
        place,
        topology={"colocate": comm.size == 1, "shards": 2 if comm.size == 4 else 1},
        optimizer={"method": method, "learning_rate": 0.02, "epochs": EPOCHS},
        sandblaster={} if "target" in monitor else SLOW,
        monitor={"evaluate_epochs": 1, **monitor},
        checkpoint={"keep": 1, **(checkpoint or {})},
    )


def evaluations(place: Path) -> list[dict[str, object]]:
    return [record for record in read_records(place / "run") if record["kind"] == "evaluation"]


@pytest.mark.parallel([1, 3, 4])
@pytest.mark.parametrize("method", ["downpour", "sandblaster"])
def test_patience_ends_a_run_which_goes_on_only_with_more_of_it(comm, place, method) -> None:
    impatient = {"patience": 3, "min_delta": 10.0}
    result = train(described(place, comm, method, **impatient), comm)
    assert "3 evaluations have not been better (monitor.patience = 3)" in result.ended
    assert result.stopped_by == 0
    assert result.test is not None
    assert 0 < result.steps < EPOCHS * 7
    again = train(described(place, comm, method, **impatient), comm)
    assert (again.steps, again.ended[:20], again.checkpoint) == (0, result.ended[:20], result.checkpoint)
    if comm.rank == 0:
        with Checkpoint.open(result.checkpoint) as checkpoint:
            info = checkpoint.info
        heard = [one["loss"] for one in evaluations(place)]
        assert info.best_value == pytest.approx(min(heard), rel=1e-5)
        assert info.best_counted == pytest.approx(heard[0], rel=1e-5)
        assert info.best_waited >= 3
        found = summary.describe(place / "run")
        assert [end["session"] for end in found["ends"]] == [1]
        assert any("ended early: session 1, step" in line for line in inspect_text.lines(found))
        assert "session 1 ends early" in page(RunHistory(read_records(place / "run")), "run", working=False)
    comm.Barrier()
    more = train(described(place, comm, method, patience=info_waited(comm, place) + 2, min_delta=10.0), comm)
    assert more.steps > 0
    assert "monitor.patience" in more.ended


def info_waited(comm, place: Path) -> int:
    """Return how many evaluations the newest checkpoint has waited for, which is the same on all ranks."""
    with Checkpoint.open(place / "run") as checkpoint:
        waited = checkpoint.info.best_waited
    comm.Barrier()
    return waited


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("method", ["downpour", "sandblaster"])
def test_a_target_ends_a_run(comm, place, method) -> None:
    result = train(described(place, comm, method, metric="accuracy", target=0.5), comm)
    reached = [one["accuracy"] >= 0.5 for one in evaluations(place)]
    assert "has reached monitor.target = 0.5" in result.ended
    after = len(reached) - 1 - reached.index(True)
    # Downpour learns on while it evaluates, and so may have come to the next evaluations before it hears of the end.
    assert after <= (EPOCHS // 10 if method == "downpour" else 1), "the last one but that at the end"
    assert result.steps < EPOCHS * 7
    comm.Barrier()
    assert train(described(place, comm, method), comm).ended == "", "all epochs are learned without a target"


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("method", ["downpour", "sandblaster"])
def test_the_best_evaluation_has_a_checkpoint_at_once(comm, place, method) -> None:
    described_run = described(place, comm, method, {"best": "at_once", "every_seconds": 0}, evaluate_epochs=3)
    train(described_run, comm)
    if comm.rank == 0:
        best = directory.read_pointer(place / "run" / "checkpoints", "best")
        with Checkpoint.open(best) as checkpoint:
            info = checkpoint.info
        losses = [one["loss"] for one in evaluations(place)]
        assert info.test_loss == pytest.approx(min(losses), rel=1e-5)
        assert len([one for one in read_records(place / "run") if one["kind"] == "checkpoint"]) > 2
        if method == "sandblaster":
            assert info.test_step == info.step, "between two iterations nothing is learned"


@pytest.mark.parallel([1, 2])
def test_a_metric_that_is_not_measured_is_refused_on_all_ranks(comm, place) -> None:
    if comm.rank == 0:
        rng = np.random.default_rng(1)
        for name in ("train", "test"):
            tiny.write_file(
                place / f"{name}.h5", rng.normal(size=(8, 6)), (rng.random((8, 3)) > 0.5).astype(float), None
            )
    comm.Barrier()
    values = described(place, comm, "downpour", metric="accuracy", target=0.5)
    values = values.model_copy(update={"network": values.network.model_copy(update={"loss": "logistic"})})
    with pytest.raises(
        UserError, match=r"monitor\.metric = 'accuracy': this run does not measure that|reports a mistake"
    ):
        train(values, comm)
    untested = described(place, comm, "downpour", patience=2)
    untested = untested.model_copy(
        update={"network": values.network, "data": values.data.model_copy(update={"test": None})}
    )
    with pytest.raises(UserError, match=r"monitor\.patience = 2: there are no test data to evaluate|reports a mistake"):
        train(untested, comm)
