"""Records: what is written is read back, whatever else is in the files."""

import json
import math
import os
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmpi.errors import UserError
from dbmpi.monitor import lines
from dbmpi.monitor.history import RunHistory, summary
from dbmpi.monitor.measures import StalenessHistogram, Stopwatch
from dbmpi.monitor.records import Recorder, next_session, read_records
from dbmpi.monitor.reports import CheckpointReport, EvaluationReport, ShardReport, WorkerReport


def worker_report(step=1, **changes):
    values = {
        "step": step,
        "epoch": step / 10,
        "samples": 32 * step,
        "loss": 1.0 / step,
        "accuracy": 0.5,
        "samples_per_second": 320.0,
        "pushed_bytes": 4000,
        "fetched_bytes": 8000,
        "seconds": {"compute": 0.05, "fetch": 0.01, "push": 0.02, "wait": 0.01, "data": 0.01},
    }
    return WorkerReport(**(values | changes))


def shard_report(histogram, **changes):
    values = {
        "version": 7,
        "pushes": 7,
        "staleness": histogram.summary(),
        "staleness_histogram": histogram.counts,
        "queue": 1,
        "seconds": {"apply": 0.1, "serve": 0.0, "idle": 0.9},
        "applied_bytes": 4000,
    }
    return ShardReport(**(values | changes))


def test_reports_come_back_in_the_order_of_time(tmp_path):
    with Recorder(tmp_path, "worker", 0) as worker, Recorder(tmp_path, "shard", 1, session=1) as shard:
        worker.write(worker_report(1, loss=np.float32(0.1), samples=np.int64(32)))
        time.sleep(0.002)
        shard.write(shard_report(StalenessHistogram({0: 2, 3: 1})))
        time.sleep(0.002)
        worker.write(EvaluationReport(step=1, epoch=0.1, loss=0.3, accuracy=0.9, samples=100))
        time.sleep(0.002)
        shard.write(CheckpointReport(name="step-000000001.h5", bytes=9, seconds=0.5, rested=0.1, waited=0.0))
    found = read_records(tmp_path)
    assert [(r["kind"], r["role"], r["number"], r["session"]) for r in found] == [
        ("worker", "worker", 0, 1),
        ("shard", "shard", 1, 1),
        ("evaluation", "worker", 0, 1),
        ("checkpoint", "shard", 1, 1),
    ]
    assert found[3]["name"] == "step-000000001.h5"
    assert RunHistory(found).batches == []
    assert found.skipped == 0
    assert np.float32(found[0]["loss"]) == np.float32(0.1)
    assert found[0]["samples"] == 32
    assert found[0]["seconds"] == worker_report().seconds
    assert found[1]["staleness_histogram"] == {"0": 2, "3": 1}
    assert found[1]["staleness"] == {"p50": 0, "p90": 3, "max": 3, "mean": 1}
    assert abs(found[0]["time"] - time.time()) < 60
    assert 0 <= found[0]["elapsed"] < 60


@given(loss=st.floats(), accuracy=st.none() | st.floats(), step=st.integers(0, 2**57), push=st.floats())
def test_every_line_is_valid_json_and_keeps_nine_digits(tmp_path_factory, loss, accuracy, step, push):
    directory = tmp_path_factory.mktemp("run")
    with Recorder(directory, "worker", 3) as recorder:
        recorder.write(worker_report(step + 1, loss=loss, accuracy=accuracy, seconds={"push": push}))
    (line,) = (directory / "records" / "worker-3.jsonl").read_text().splitlines()
    strict = json.loads(line, parse_constant=pytest.fail)
    (found,) = read_records(directory)
    assert found == strict
    assert found["step"] == step + 1
    for value, back in ((loss, found["loss"]), (accuracy, found["accuracy"]), (push, found["seconds"]["push"])):
        if value is None or not math.isfinite(value):
            assert back is None
        else:
            assert math.isclose(value, back, rel_tol=1e-8, abs_tol=0)


def test_a_line_is_one_write_and_can_be_read_at_once(tmp_path, monkeypatch):
    writes = []
    write = os.write
    with Recorder(tmp_path, "worker", 0) as recorder:
        monkeypatch.setattr(os, "write", lambda descriptor, data: (writes.append(data), write(descriptor, data))[1])
        for step in range(1, 4):
            recorder.write(worker_report(step))
            assert len(read_records(tmp_path)) == step
    assert len(writes) == 3
    assert all(line.count(b"\n") == 1 and line.endswith(b"\n") for line in writes)


def test_a_resumed_run_appends_and_repairs_a_torn_line(tmp_path):
    with Recorder(tmp_path, "worker", 0) as recorder:
        recorder.write(worker_report(1))
        recorder.write(worker_report(2))
    path = tmp_path / "records" / "worker-0.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    before = read_records(tmp_path)
    assert (len(before), before.skipped) == (1, 1)
    with Recorder(tmp_path, "worker", 0) as recorder:
        assert recorder.session == 2
        recorder.write(worker_report(3))
        recorder.write(worker_report(4))
    after = read_records(tmp_path)
    assert [(r["session"], r["step"]) for r in after] == [(1, 1), (2, 3), (2, 4)]
    assert after.skipped == 1
    assert path.read_bytes().count(b"\n") == 4


@given(cut=st.integers(0, 2000))
def test_a_file_torn_anywhere_loses_only_its_last_line(tmp_path_factory, cut):
    directory = tmp_path_factory.mktemp("run")
    with Recorder(directory, "worker", 0) as recorder:
        for step in range(1, 5):
            recorder.write(worker_report(step))
    path = directory / "records" / "worker-0.jsonl"
    whole = path.read_bytes()
    left = whole[: max(0, len(whole) - cut)]
    path.write_bytes(left)
    # A line that lost nothing but its newline is whole.
    kept = left.count(b"\n") + left.endswith(b'"withheld": 0}')
    with Recorder(directory, "worker", 0, session=9) as recorder:
        recorder.write(worker_report(5))
    assert [r["step"] for r in read_records(directory)] == [*range(1, kept + 1), 5]


FOREIGN = [
    b"not json at all",
    b"{}",
    b"[1, 2]",
    b"null",
    b"12",
    b'{"kind": "worker"}',
    b'{"kind": "other", "role": "worker", "number": 0, "session": 1, "time": 1.0, "elapsed": 1.0}',
    b"[" * 200_000,
    b"1" * 100_000,
    b"\xff\xfe\x00\x00",
    b"x" * (3 * lines.LONGEST_LINE),
]


def test_foreign_lines_are_skipped_and_counted(tmp_path):
    with Recorder(tmp_path, "worker", 0) as recorder:
        recorder.write(worker_report(1))
    path = tmp_path / "records" / "worker-0.jsonl"
    good = path.read_bytes()
    path.write_bytes(b"\n".join(FOREIGN) + b"\n\n  \n" + good + b"\n".join(FOREIGN))
    found = read_records(tmp_path)
    assert len(found) == 1
    assert found.skipped == 2 * len(FOREIGN)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("time", "null"),
        ("time", "NaN"),
        ("time", "1e999"),
        ("elapsed", '"1"'),
        ("session", "1.5"),
        ("session", "1" * 40),
        ("number", "true"),
        ("role", "3"),
        ("kind", "[]"),
        ("step", "null"),
        ("step", '"7"'),
        ("loss", '"low"'),
        ("loss", "[1]"),
        ("seconds", "3"),
        ("seconds", '{"push": "much"}'),
        ("partition", "null"),
    ],
)
def test_a_field_of_another_type_makes_a_line_foreign(tmp_path, field, value):
    with Recorder(tmp_path, "worker", 0) as recorder:
        recorder.write(worker_report(1))
    path = tmp_path / "records" / "worker-0.jsonl"
    record = json.loads(path.read_text())
    assert field in record
    del record[field]
    path.write_text(json.dumps(record)[:-1] + f', "{field}": {value}}}\n')
    found = read_records(tmp_path)
    assert (len(found), found.skipped) == (0, 1)


@given(st.binary(max_size=300))
def test_any_bytes_can_be_read_and_appended_to(tmp_path_factory, junk):
    directory = tmp_path_factory.mktemp("run")
    (directory / "records").mkdir()
    (directory / "records" / "worker-0.jsonl").write_bytes(junk)
    with Recorder(directory, "worker", 0) as recorder:
        recorder.write(worker_report(1))
    assert [r["step"] for r in read_records(directory)] == [1]


def test_sessions_are_numbered_alike_on_all_ranks(tmp_path):
    assert next_session(tmp_path) == 1
    with Recorder(tmp_path, "worker", 0, session=1) as recorder:
        recorder.write(worker_report(1))
    with Recorder(tmp_path, "shard", 0, session=4) as recorder:
        recorder.write(shard_report(StalenessHistogram()))
    assert next_session(tmp_path) == 5
    with Recorder(tmp_path, "worker", 7, session=5) as recorder:  # a rank that the first sessions did not have
        recorder.write(worker_report(1))
    assert [r["session"] for r in read_records(tmp_path)] == [1, 4, 5]


def test_elapsed_counts_from_the_start_given(tmp_path):
    started = time.time() - 100
    with Recorder(tmp_path, "worker", 0, started=started) as recorder:
        recorder.write(worker_report(1))
    (record,) = read_records(tmp_path)
    assert 100 <= record["elapsed"] < time.time() - started + 1


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")])
def test_what_is_not_a_run_directory_is_named(tmp_path, make):
    directory = tmp_path / "run"
    make(directory)
    with pytest.raises(UserError, match=r"run: .*expected the directory of a run"):
        read_records(directory)


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(UserError, match=r"worker-0\.jsonl: cannot write .* choose another"):
        Recorder(tmp_path / "file", "worker", 0)


def test_a_full_disk_costs_records_and_not_the_run(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "records" / "worker-0.jsonl"
    with Recorder(tmp_path, "worker", 0) as recorder:
        recorder.write(worker_report(1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 50, hard))
        try:
            with pytest.warns(RuntimeWarning, match="records are being lost: File too large"):
                recorder.write(worker_report(2))
            recorder.write(worker_report(3))  # says it once
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        with pytest.warns(RuntimeWarning, match="2 records were lost; they are written again"):
            recorder.write(worker_report(4))
    found = read_records(tmp_path)
    assert [r["step"] for r in found] == [1, 4]
    assert found.skipped == 1


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_records_that_are_removed_under_way_are_begun_anew(tmp_path, how):
    run = tmp_path / "run"
    with Recorder(run, "worker", 0) as recorder:
        recorder.write(worker_report(1))
        run.rename(tmp_path / "other")
        if how == "removed":
            shutil.rmtree(tmp_path / "other")
        if how == "replaced":
            Recorder(run, "worker", 0).close()
        with pytest.warns(RuntimeWarning, match="removed or moved"):
            recorder.write(worker_report(2))
        recorder.write(worker_report(3))  # says it once
    assert [record["step"] for record in read_records(run)] == [2, 3]
    if how != "removed":
        assert [record["step"] for record in read_records(tmp_path / "other")] == [1]


def test_records_that_cannot_be_begun_anew_do_not_end_the_run(tmp_path):
    run = tmp_path / "run"
    with Recorder(run, "worker", 0) as recorder:
        shutil.rmtree(run)
        run.touch()  # no directory can be made here
        with pytest.warns(RuntimeWarning, match="records are being lost: (Not a directory|File exists)"):
            recorder.write(worker_report(1))
        run.unlink()
        with pytest.warns(RuntimeWarning, match=r"removed or moved|1 records were lost") as told:
            recorder.write(worker_report(2))
        assert len(told) == 2
    assert [record["step"] for record in read_records(run)] == [2]


def test_a_closed_recorder_says_so(tmp_path):
    recorder = Recorder(tmp_path, "worker", 0)
    recorder.close()
    recorder.close()
    with pytest.raises(ValueError, match="closed"):
        recorder.write(worker_report(1))


counts = st.dictionaries(st.integers(0, 50), st.integers(0, 40), max_size=12)


@given(counts, counts, st.floats(0, 1))
def test_the_histogram_agrees_with_numpy_on_the_values_themselves(one, other, q):
    histogram, second = StalenessHistogram(one), StalenessHistogram()
    for value, count in other.items():
        for _ in range(count):
            second.add(value)
    histogram.merge(second)
    values = np.array([v for c in (one, other) for v, n in c.items() for _ in range(n)], dtype=np.int64)
    assert histogram.total == values.size
    if values.size == 0:
        assert math.isnan(histogram.mean)
        assert all(math.isnan(value) for value in histogram.summary().values())
        assert histogram.quantile(q) == histogram.max == 0
        return
    assert histogram.max == values.max()
    assert math.isclose(histogram.mean, values.mean())
    assert histogram.quantile(q) == np.quantile(values, q, method="inverted_cdf")
    assert StalenessHistogram.from_json(json.loads(json.dumps(histogram.counts))).counts == histogram.counts


def test_the_histogram_counts_exactly_beyond_floats():
    histogram = StalenessHistogram({1: 2**60, 0: 1})
    histogram.add(1)
    assert histogram.counts == {1: 2**60 + 1, 0: 1}
    assert histogram.total == 2**60 + 2
    with pytest.raises(ValueError, match="from 0 to 1"):
        histogram.quantile(90)
    histogram.clear()
    assert histogram.total == 0


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


def test_the_stopwatch_counts_time_once(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("dbmpi.monitor.measures.time", clock)
    watch = Stopwatch()
    with watch("push"):
        clock.now += 1
        with watch("wait"):
            clock.now += 10
            with watch("push"):
                clock.now += 100
        clock.now += 1000
        assert watch.take(["push"]) == {"push": 1101}
        clock.now += 3
    clock.now += 50  # between two activities: nobody's
    with watch("compute"):
        clock.now += 7
    assert watch.take() == {"push": 3, "wait": 10, "compute": 7}
    assert watch.take(["wait", "data"]) == {"wait": 0, "data": 0}


def test_the_stopwatch_survives_an_exception(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("dbmpi.monitor.measures.time", clock)
    watch = Stopwatch()

    def fail():
        with watch("push"):
            clock.now += 1
            raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        fail()
    with watch("wait"):
        clock.now += 2
    assert watch.take() == {"push": 1, "wait": 2}


def run_of_two_sessions(directory: Path) -> None:
    """Two replicas that take 20 steps each in an epoch; session 2 goes on at step 12, before the end of session 1."""
    lines = []

    def add(role, number, session, elapsed, report):
        stamp = 1000 * session + elapsed
        fields = {name: getattr(report, name) for name in report.__slots__}
        record = {"kind": report.kind, "role": role, "number": number, "session": session}
        record |= {"steps_before": 12 * (session - 1), "steps_per_epoch": 40}
        lines.append((number, role, record | {"time": stamp, "elapsed": elapsed} | fields))

    for number in (0, 1):
        for step, epoch in ((4, 0.2), (8, 0.4), (12, 0.6)):
            report = worker_report(step, epoch=epoch + number / 100, samples=step * 10, samples_per_second=10.0)
            add("worker", number, 1, 2.0 + step, report)  # two seconds of preparation, then a step a second
    for step, epoch in ((4, 0.5), (8, 0.7)):  # replica 0 alone fills gaps, and is at another place than all steps are
        report = worker_report(step, epoch=epoch, samples=step * 20, samples_per_second=20.0)
        add("worker", 0, 2, 1.0 + step, report)
    add("shard", 0, 1, 14.5, shard_report(StalenessHistogram({1: 20}), version=20, pushes=20))
    add("shard", 1, 1, 14.5, shard_report(StalenessHistogram({0: 10, 4: 10}), version=20, pushes=20))
    add("shard", 0, 2, 9.5, shard_report(StalenessHistogram({0: 8}), version=20, pushes=8))
    add("worker", 0, 1, 10.0, EvaluationReport(step=16, epoch=0.4, loss=0.5, accuracy=0.7, samples=100))
    add("worker", 0, 2, 9.75, EvaluationReport(step=8, epoch=0.7, loss=0.25, accuracy=0.875, samples=100))
    (directory / "records").mkdir(parents=True)
    for number, role, record in lines:
        with (directory / "records" / f"{role}-{number}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


def test_the_summary_counts_all_sessions(tmp_path):
    run_of_two_sessions(tmp_path)
    result = summary(tmp_path)
    assert result.test_accuracy == 0.875
    assert result.test_loss == 0.25
    assert result.sessions == 2
    assert result.epochs == (12 + 8) / 40
    assert result.steps == 12 + 12 + 8
    assert result.samples == 120 + 120 + 160
    assert result.seconds == 12 + 8
    assert result.samples_per_second == 400 / 20
    assert result.mean_staleness == (20 + 40) / 48
    assert result.train_loss == worker_report(8).loss


def test_the_clock_of_the_run_stands_still_between_sessions(tmp_path):
    run_of_two_sessions(tmp_path)
    history = RunHistory(read_records(tmp_path))
    assert history.starts == {1: 0.0, 2: 14.5}
    assert [history.seconds(r) for r in history.workers[0]] == [6.0, 10.0, 14.0, 19.5, 23.5]


def test_the_steps_of_a_session_go_on_from_its_checkpoint(tmp_path):
    run_of_two_sessions(tmp_path)
    history = RunHistory(read_records(tmp_path))
    assert history.steps_per_epoch == 40
    assert history.begins == {1: 0, 2: 12}
    assert [history.steps(1, elapsed) for elapsed in (0, 2, 3, 10, 14, 99)] == [0, 0, 2, 16, 24, 24]
    assert [history.steps(2, elapsed) for elapsed in (0, 1, 5, 9)] == [12, 12, 16, 20]
    # Of what session 1 did after the checkpoint, nothing is in the result.
    assert [history.kept(r) for r in history.workers[0]] == [True, False, False, True, True]


def test_records_say_where_a_session_began_and_without_it_follows_the_one_before(tmp_path):
    for session, before in ((1, 0), (2, 50), (3, None)):  # as those of early versions
        with Recorder(tmp_path, "worker", 0, session=session, steps_before=before, steps_per_epoch=7) as worker:
            worker.write(worker_report(100))
    history = RunHistory(read_records(tmp_path))
    assert history.begins == {1: 0, 2: 50, 3: 150}
    assert history.steps_per_epoch == 7


def test_partitions_speak_for_their_replica_once(tmp_path):
    for number in range(4):
        with Recorder(tmp_path, "worker", number, session=1) as recorder:
            recorder.write(worker_report(5, replica=number // 2, partition=number % 2))
    history = RunHistory(read_records(tmp_path))
    assert list(history.replicas) == [0, 1]
    assert list(history.workers) == [0, 1, 2, 3]
    assert history.summary().steps == 10


def test_a_summary_of_little_is_not_a_number(tmp_path):
    with Recorder(tmp_path, "shard", 0) as recorder:
        recorder.write(shard_report(StalenessHistogram()))
    result = summary(tmp_path)
    assert result.test_accuracy is None
    assert math.isnan(result.samples_per_second)
    assert math.isnan(result.mean_staleness)
    assert (result.steps, result.epochs) == (0, 0.0)
