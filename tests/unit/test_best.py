"""What a checkpoint says of itself, and which one is the best: kept beside the newest, and named by a link."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from unit.checkpoint_files import LAYOUT, as_version_1, make_info, read_all, write

from dbmpi.checkpoint import account, amendment, run_lock, summary
from dbmpi.checkpoint.account import Account
from dbmpi.checkpoint.amendment import amend
from dbmpi.checkpoint.directory import checkpoint_path
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.checkpoint.writer import CheckpointWriter
from dbmpi.errors import Damaged, RunFailed
from dbmpi.objective import Outcome

MEASURED = {
    "seconds": 12.5,
    "loss": -0.25,
    "accuracy": 0.5,
    "test_step": 120,
    "test_loss": 0.125,
    "test_accuracy": 1.0,
    "test_metrics": {"F1 of class 3": 0.75, "müh": -2.0},
    "best_step": 80,
    "best_value": 0.0625,
    "best_counted": 0.125,
    "best_waited": 3,
    "data_name": "digits-train.h5",
    "data_samples": 1438,
    "host": "node17",
    "user": "ada",
}


def test_measures_survive(tmp_path):
    with Checkpoint.open(write(tmp_path, **MEASURED)) as checkpoint:
        assert {name: getattr(checkpoint.info, name) for name in MEASURED} == MEASURED
    path = write(tmp_path, 124)
    with Checkpoint.open(path) as checkpoint:
        assert (checkpoint.info.loss, checkpoint.info.test_metrics, checkpoint.info.host) == (None, {}, "")
    with h5py.File(path, "r+") as file:
        as_version_1(file)
    read_all(path)


ABSURD = {
    "run/seconds": -1.0,
    "run/loss": math.nan,
    "run/accuracy": 1.5,
    "run/test/step": 124,
    "run/test/loss": math.inf,
    "run/test/accuracy": -0.5,
    "run/test/metrics/F1": math.nan,
    "run/test/best/step": -1,
    "run/warm_samples": -1,
    "run/test/best/value": math.nan,
    "run/test/best/waited": -1,
    "data/samples": -3,
}


@pytest.mark.parametrize("path", ABSURD)
def test_absurd_measures_are_refused_by_name(tmp_path, path):
    checkpoint = write(tmp_path, **MEASURED)
    with h5py.File(checkpoint, "r+") as file:
        as_version_1(file)
        file.pop(path, None)
        file[path] = np.array(ABSURD[path])
    with pytest.raises(Damaged, match=rf"step-000000123\.h5: not a whole checkpoint: /{path} is {ABSURD[path]}, expec"):
        Checkpoint.open(checkpoint)
    with pytest.raises(ValueError, match="/run/loss is nan"):
        write(tmp_path / "written", **{**MEASURED, "loss": math.nan})


def test_an_account_goes_on_where_the_checkpoint_ended(monkeypatch):
    now = [100.0]
    new = Account(None, "train.h5", 40, clock=lambda: now[0])
    now[0] = 103.0
    fields = new.fields()
    assert (fields["seconds"], fields["data_name"], fields["data_samples"]) == (3, "train.h5", 40)
    assert "loss" not in fields
    assert "test_loss" not in fields
    new.learned(0.5, None)
    new.tested(7, Outcome(4, 2.0, 3, (("half", 2.0), ("a/b", 1.0), ("nothing", math.nan))))
    info = make_info(**new.fields())
    assert (info.loss, info.accuracy, info.test_step, info.test_loss, info.test_accuracy) == (0.5, None, 7, 0.5, 0.75)
    assert info.test_metrics == {"half": 0.5}
    then = Account(info, "train.h5", 40, clock=lambda: now[0])
    now[0] = 110.0
    again = then.fields()
    assert again == {**new.fields(), "seconds": 10}
    then.learned(math.inf, None)
    assert (then.fields()["loss"], then.fields()["test_loss"]) == (None, 0.5)
    assert Account(replace(info, seconds=None), "x", 1).fields()["seconds"] is None

    def nobody() -> str:
        raise KeyError("uid not found: 1234")

    monkeypatch.setattr(account.getpass, "getuser", nobody)
    assert account.whereabouts()["user"] == str(os.getuid())


def write_tested(run: Path, step: int, test_loss: float | None, test_step: int | None = None, keep: int = 1) -> Path:
    with CheckpointWriter(checkpoint_path(run, step), LAYOUT) as writer:
        writer.write("parameters", 0, np.full(LAYOUT.size, step, np.float32))
        tested = (
            {} if test_loss is None else {"test_loss": test_loss, "test_step": step - 1 if test_step is None else 0}
        )
        return writer.commit(make_info(step=step, **tested), keep=keep)


def listed(run: Path) -> dict[str, str]:
    """Return the names in a directory of checkpoints, with those that they name."""
    folder = run / "checkpoints"
    return {path.name: os.readlink(path) if path.is_symlink() else "" for path in folder.iterdir()}


def name(step: int) -> str:
    return f"step-{step:09d}.h5"


def test_the_best_is_kept_beside_the_newest(tmp_path):
    steps = [(10, None), (20, 0.5), (30, 0.25), (40, 0.75), (50, 0.375), (60, 0.125), (70, 0.875)]
    best, seen = None, {}
    for step, loss in steps:
        write_tested(tmp_path, step, loss)
        seen |= {} if loss is None else {step: loss}
        best = min(seen, key=seen.get, default=None)
        expected = {"latest": name(step), name(step): ""} | (
            {} if best is None else {"best": name(best), name(best): ""}
        )
        assert listed(tmp_path) == expected
    with Checkpoint.open(tmp_path / "checkpoints" / "best") as checkpoint, Checkpoint.open(tmp_path) as newest:
        assert (checkpoint.info.step, newest.info.step) == (60, 70)
    assert summary.describe(tmp_path / "checkpoints" / "best")["step"] == 60
    write_tested(tmp_path, 80, None, keep=3)
    assert set(listed(tmp_path)) == {"best", "latest", name(60), name(70), name(80)}


def test_an_evaluation_counts_for_the_first_checkpoint_after_it(tmp_path):
    for step in (10, 20, 30):
        write_tested(tmp_path, step, 0.5, test_step=0, keep=2)
    assert listed(tmp_path) == {"latest": name(30), "best": name(10), **{name(step): "" for step in (10, 20, 30)}}


def test_the_best_by_a_text_where_links_are_impossible(tmp_path, monkeypatch):
    def refuse(self, target, target_is_directory=False):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    write_tested(tmp_path, 10, 0.25)
    write_tested(tmp_path, 20, 0.5)
    best = tmp_path / "checkpoints" / "best"
    assert best.read_text() == name(10) + "\n"
    with Checkpoint.open(best) as checkpoint:
        assert checkpoint.info.step == 10
    assert summary.describe(best)["step"] == 10


def evaluated() -> Account:
    found = Account(None, "train.h5", 40)
    found.tested(20, Outcome(8, 2.0, 6, (("F1", 4.0),)))
    return found


def test_the_last_checkpoint_gets_the_evaluation_that_comes_after_it(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "confirm", lambda directory: None)
    write_tested(tmp_path, 10, 0.5)
    path = write_tested(tmp_path, 20, 0.75, keep=2)
    with Checkpoint.open(path) as before:
        amend(path, evaluated(), keep=1, warn=pytest.fail)
        with Checkpoint.open(path) as after:
            after.verify()
            told = {"test_loss": 0.25, "test_accuracy": 0.75, "test_step": 20, "test_metrics": {"F1": 0.5}}
            assert after.info == replace(before.info, **told)
            np.testing.assert_array_equal(
                after.parameters(), before.parameters()
            )  # a reader keeps the file that it has
    assert listed(tmp_path) == {"latest": name(20), "best": name(20), name(20): ""}
    with h5py.File(path) as file:
        assert file.attrs["test_loss"] == 0.25
        assert file["checksums/run/test/loss"].shape == (1,)


@pytest.mark.parametrize("failure", ["full disk", "unreadable", "taken over"])
def test_an_evaluation_that_cannot_be_added_costs_nothing_else(tmp_path, monkeypatch, failure):
    path, lines = write_tested(tmp_path, 20, 0.75), []
    monkeypatch.setattr(run_lock, "confirm", lambda directory: None)
    if failure == "full disk":
        monkeypatch.setattr(
            amendment.NewFile, "check_space", lambda self: (_ for _ in ()).throw(OSError(28, "No space"))
        )
    elif failure == "unreadable":
        path.write_bytes(path.read_bytes()[:-100])
    else:

        def lost(directory: Path) -> None:
            raise RunFailed("another run")

        monkeypatch.setattr(run_lock, "confirm", lost)
    whole = path.read_bytes()
    if failure == "taken over":
        with pytest.raises(RunFailed, match="another run"):
            amend(path, evaluated(), keep=1, warn=lines.append)
    else:
        amend(path, evaluated(), keep=1, warn=lines.append)
        assert len(lines) == 1
        assert lines[0].startswith("the checkpoint does not have the evaluation at the end: ")
    assert path.read_bytes() == whole
    assert set(listed(tmp_path)) == {"best", "latest", name(20)}


def write_accurate(run: Path, step: int, accuracy: float, metric: str = "accuracy") -> None:
    with CheckpointWriter(checkpoint_path(run, step), LAYOUT) as writer:
        writer.write("parameters", 0, np.full(LAYOUT.size, step, np.float32))
        configuration = json.dumps({"monitor": {"metric": metric, "better": "auto"}})
        tested = {"test_step": step - 1, "test_loss": accuracy, "test_accuracy": accuracy}
        writer.commit(make_info(step=step, configuration=configuration, **tested), keep=1)


def test_the_best_is_by_the_metric_of_the_run_that_writes(tmp_path):
    for step, accuracy in ((10, 0.5), (20, 0.75), (30, 0.25)):
        write_accurate(tmp_path, step, accuracy)
    assert listed(tmp_path) == {"latest": name(30), "best": name(20), name(20): "", name(30): ""}
    write_accurate(tmp_path, 40, 0.375, "loss")  # from now on the lowest loss of all that are there
    assert listed(tmp_path)["best"] == name(30)
