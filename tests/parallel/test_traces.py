"""What ranks record for a timeline, in runs of both optimizers: the start once, and phases that can have been."""

from __future__ import annotations

import json

import numpy as np
import pytest
from parallel import tiny

from dbmpi.monitor import chrome_trace
from dbmpi.monitor.history import RunHistory
from dbmpi.monitor.live_run import LiveRun
from dbmpi.monitor.records import read_records
from dbmpi.monitor.tail import RecordTail
from dbmpi.monitor.timeline import timelines
from dbmpi.mpi import waiting
from dbmpi.runs.training import train


@pytest.mark.parallel([1, 3, 4])
@pytest.mark.parametrize("method", ["downpour", "sandblaster"])
def test_every_rank_records_its_phases(comm, place, method) -> None:
    partitions = 2 if comm.size == 4 else 1
    shards = 1 if comm.size < 4 else 2
    run = tiny.describe(
        place,
        optimizer={"method": method, "epochs": 60, "batch_size": 6},
        topology={"shards": shards, "partitions": partitions},
        monitor={"progress": "none", "report_seconds": 0.001, "timeline_seconds": 0.02},
    )
    train(run, comm)
    waiting.barrier(comm, "the records")
    if comm.rank:
        return
    history = RunHistory(read_records(run.run.directory))
    (start,) = history.session_starts
    assert (start["method"], start["ranks"], start["partitions"]) == (method, comm.size, partitions)
    described = json.loads(run.to_json())
    described["data"]["shuffle"] = "samples"  # what "auto" means for these data
    assert json.loads(start["configuration"]) == described
    names = {"compute", "fetch", "push", "wait", "data"}
    for rank in timelines(history):
        if method == "downpour" or rank.role == "worker":
            assert rank.windows, rank.name
        for phases in rank.windows:
            begins = np.array([phase.begin for phase in phases])
            ends = begins + [phase.seconds for phase in phases]
            assert (np.diff(begins) >= 0).all()
            assert begins[0] >= 0
            assert ends.max() <= history.duration + 0.1
            if rank.role == "worker":
                assert {phase.activity for phase in phases} <= names
                assert (begins[1:] >= ends[:-1] - 3e-6).all(), "phases of a worker overlap"
            else:
                assert {phase.activity for phase in phases} <= {"apply", "serve"}
    assert [event["ts"] for event in chrome_trace.events(history) if event["ph"] == "X"]
    live = LiveRun()
    live.add(RecordTail(run.run.directory).poll())
    if method == "downpour":
        assert live.complete
        assert live.samples == 60 * tiny.SAMPLES
    assert live.total_epochs == 60


@pytest.mark.parallel([2])
def test_phases_are_not_recorded_where_that_is_switched_off(comm, place) -> None:
    monitor = {"progress": "none", "report_seconds": 0.001, "timeline_seconds": 0}
    run = tiny.describe(place, monitor=monitor)
    train(run, comm)
    waiting.barrier(comm, "the records")
    history = RunHistory(read_records(run.run.directory))
    assert history.workers
    assert history.traces == []
