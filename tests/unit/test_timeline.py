"""Timelines: phases are recorded in bounded windows, come back at the right time, and make a valid trace."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.run_records import make_run

from dbmpi.cli.main import main
from dbmpi.errors import UserError
from dbmpi.monitor import chrome_trace, timeline_panels, tracer
from dbmpi.monitor.history import RunHistory
from dbmpi.monitor.measures import Stopwatch
from dbmpi.monitor.records import Recorder, read_records
from dbmpi.monitor.reports import TraceReport
from dbmpi.monitor.timeline import Interval, RankTimeline, timelines
from dbmpi.monitor.tracer import Tracer
from dbmpi.monitor.worker_log import WorkerLog
from dbmpi.objective import Outcome


class Clock:
    """A clock for all that asks for the time: it stands still but for `pass_`."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        for name in ("perf_counter", "monotonic", "time"):
            monkeypatch.setattr(time, name, lambda: self.now)

    def pass_(self, seconds):
        self.now += seconds


def traces(directory):
    return RunHistory(read_records(directory)).traces


def test_phases_of_a_worker_come_back_when_they_were(tmp_path, monkeypatch):
    """What the log records, as timelines show it, is what the stopwatch was used for, also where phases nest."""
    clock = Clock(monkeypatch)
    with Recorder(tmp_path, "worker", 3, session=1, started=time.time()) as recorder:
        log = WorkerLog(recorder, 10.0, replica=3, partition=0, partitions=1, traced=2.5)
        clock.pass_(10.0)
        log.count(Outcome(1, 1.0, 0))  # opens the window
        expected = []
        for step in range(3):
            begin = clock.now - 100
            with log.stopwatch("push"):
                clock.pass_(0.25)
                with log.stopwatch("wait"):
                    clock.pass_(0.125)
                clock.pass_(0.5)
            expected += [("push", begin, 0.25), ("wait", begin + 0.25, 0.125), ("push", begin + 0.375, 0.5)]
            clock.pass_(0.125)
            log.count(Outcome(1, 1.0, 0))
            assert log.stopwatch.on_phase is None or step < 2
        with log.stopwatch("data"):
            clock.pass_(1.0)
        log.report(1.0, (0, 0, 0, 0), {})
        log.end_trace()
    (rank,) = timelines(RunHistory(read_records(tmp_path)))
    assert rank.name == "worker 3"
    (window,) = rank.windows
    assert [phase.activity for phase in window] == [name for name, _, _ in expected]
    np.testing.assert_allclose([phase[1:] for phase in window], [times for _, *times in expected], atol=2e-6)
    (interval,) = rank.intervals
    assert sum(interval.seconds.values()) == pytest.approx(3 * 0.875 + 1)


def test_windows_open_ever_more_rarely_and_hold_a_step(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    with Recorder(tmp_path, "shard", 0, session=1, started=time.time()) as recorder:
        one = Tracer(recorder, 1.0, 0.5)
        for _ in range(10_000):
            begin = clock.now
            clock.pass_(0.1)
            if one.open:
                one.add("apply", begin, clock.now - 0.05)
            one.step()
        one.close()
        one.close()
    found = traces(tmp_path)
    begins = [trace["begin"] for trace in found]
    assert len(found) == 10
    np.testing.assert_allclose(begins, 2.0 ** np.arange(10), atol=0.11)
    assert all(3 * 4 <= len(trace["phases"]) <= 3 * 6 for trace in found)


def test_a_step_longer_than_the_window_is_recorded_whole(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    with Recorder(tmp_path, "worker", 0, session=1, started=time.time()) as recorder:
        log = WorkerLog(recorder, 1.0, replica=0, partition=0, partitions=1, traced=0.25)
        for _ in range(4):
            with log.stopwatch("compute"):
                clock.pass_(30.0)
            log.count(Outcome(1, 1.0, 0))
    assert [trace["phases"] for trace in traces(tmp_path)] == 2 * [[0, 0, 30_000_000]]


def test_a_window_is_bounded_and_can_be_switched_off(tmp_path):
    with Recorder(tmp_path, "worker", 0) as recorder:
        none, one = Tracer(recorder, 0.01, 0.0), Tracer(recorder, 0.01, 1e9)
        time.sleep(0.02)
        assert not none.step()
        assert one.step()
        for number in range(3 * tracer.MOST_PHASES):
            one.add("push" if number % 2 else "wait", number, number + 0.5)
        assert not one.step()
    (trace,) = traces(tmp_path)
    assert len(trace["phases"]) == 3 * tracer.MOST_PHASES


def test_the_stopwatch_without_a_listener_costs_next_to_nothing():
    """Two changes of activity take some microseconds at most; a step has about six."""
    watch = Stopwatch()
    best = min(_timed(watch) for _ in range(20))
    assert best < 50e-6


def _timed(watch):
    begin = time.perf_counter()
    for _ in range(100):
        with watch("compute"):
            pass
    return (time.perf_counter() - begin) / 100


spans = st.lists(
    st.tuples(st.floats(0, 3), st.floats(0.01, 2), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6
)


@given(spans, st.integers(1, 50))
def test_shares_are_those_of_every_instant(spans, columns):
    """Held against a sum over small steps of time."""
    intervals, now = [], 0.0
    for gap, length, one, other in spans:
        now += gap
        scale = length / max(one + other, 1.0)
        intervals.append(Interval(now, now + length, {"compute": one * scale, "push": other * scale}))
        now += length
    duration = 1.1 * now
    found = timeline_panels.shares(intervals, duration, columns)
    fine = 400
    moments = (np.arange(columns * fine) + 0.5) * duration / (columns * fine)
    for activity in ("compute", "push"):
        twin = np.zeros(moments.size)
        for begin, end, seconds in intervals:
            twin[(moments >= begin) & (moments < end)] = seconds[activity] / (end - begin)
        np.testing.assert_allclose(found[activity], twin.reshape(columns, fine).mean(axis=1), atol=0.02)


@given(st.lists(st.tuples(st.booleans(), st.floats(0.01, 2)), max_size=20), st.integers(1, 5))
def test_merged_intervals_have_all_the_time_and_no_gap(given_spans, together):
    intervals, now = [], 0.0
    for gap, length in given_spans:
        now += gap
        intervals.append(Interval(now, now + length, {"compute": length / 2}))
        now += length
    found = list(chrome_trace.merged(intervals, together))
    assert len(found) <= len(intervals)
    total = sum(one.seconds["compute"] for one in found)
    assert total == pytest.approx(sum(one.seconds["compute"] for one in intervals))
    assert sum(one.end - one.begin for one in found) == pytest.approx(2 * total)


def write_trace(directory: Path, role: str, number: int, begin: float, phases: list[int]) -> None:
    with Recorder(directory, role, number, session=2) as recorder:
        recorder.write(TraceReport(begin, {"fetch": 0, "compute": 1, "serve": 2, "apply": 3}, phases))


def traced_run(directory: Path) -> Path:
    make_run(directory, workers=3, shards=2)
    for number in range(3):
        phases = [value for step in range(30) for value in (0, 300 * step, 100, 1, 300 * step + 100, 150)]
        write_trace(directory, "worker", number, 2.0 + number / 1000, phases)
    write_trace(directory, "shard", 1, 2.001, [2, 0, 200, 3, 50, 100, 2, 300, 50])
    return directory


def read_trace(path: Path) -> list[dict]:
    """Read a trace as Perfetto does, and check what its documentation asks for."""
    content = json.loads(path.read_bytes())
    assert content["displayTimeUnit"] == "ms"
    timed = [event for event in content["traceEvents"] if event["ph"] != "M"]
    assert [event["ts"] for event in timed] == sorted(event["ts"] for event in timed)
    named = {event["pid"] for event in content["traceEvents"] if event["name"] == "process_name"}
    rows: dict[tuple[int, int], list[dict]] = {}
    for event in timed:
        assert set(event) >= {"ph", "name", "pid", "tid", "ts"}
        assert event["ph"] in "XCi"
        assert event["pid"] in named
        assert isinstance(event["ts"], int)
        assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
            rows.setdefault((event["pid"], event["tid"]), []).append(event)
    for slices in rows.values():  # of two slices of a row, one is within the other, or they do not overlap
        open_until: list[int] = []
        for event in slices:
            while open_until and open_until[-1] <= event["ts"]:
                open_until.pop()
            assert not open_until or event["ts"] + event["dur"] <= open_until[-1]
            open_until.append(event["ts"] + event["dur"])
    return content["traceEvents"]


def test_a_trace_is_valid_and_has_a_process_for_each_rank(tmp_path):
    directory = traced_run(tmp_path / "run")
    chrome_trace.write(RunHistory(read_records(directory)), 'a "run"\n', tmp_path / "trace.json")
    events = read_trace(tmp_path / "trace.json")
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert sorted(names.values()) == ["run", "shard 0", "shard 1", "worker 0", "worker 1", "worker 2"]
    assert json.loads((tmp_path / "trace.json").read_bytes())["otherData"] == {"run": 'a "run"\n'}
    history = RunHistory(read_records(directory))
    worker = next(pid for pid, name in names.items() if name == "worker 2")
    phases = [event for event in events if event["pid"] == worker and event["tid"] == 2 and event["ph"] == "X"]
    assert len(phases) == 60
    assert phases[0]["ts"] == round(1e6 * (history.starts[2] + 2.002))
    sums = [event for event in events if event["pid"] == worker and event["tid"] == 1 and event["ph"] == "X"]
    assert sum(event["dur"] for event in sums if event["name"] == "compute") == pytest.approx(8 * 0.6e6)
    assert sum(event["name"] == "evaluation" for event in events) == 4
    assert {event["name"] for event in events if event["ph"] == "C"} == {
        "loss", "accuracy", "samples_per_second", "queue",
    }  # fmt: skip


def test_a_trace_of_many_reports_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(chrome_trace, "MOST_SLICES", 12)
    directory = make_run(tmp_path / "run", sessions=1)
    chrome_trace.write(RunHistory(read_records(directory)), "run", tmp_path / "trace.json")
    slices = [event for event in read_trace(tmp_path / "trace.json") if event["ph"] == "X"]
    assert len(slices) <= 12
    assert sum(event["dur"] for event in slices) == pytest.approx(3 * 4e6, rel=0.01)


@settings(max_examples=30)
@given(
    st.dictionaries(st.sampled_from(["a", "b", "", "<b>"]), st.integers(-3, 9)),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20),
    st.one_of(st.none(), st.floats(-1e6, 1e6)),
)
def test_any_trace_record_can_be_drawn_around(tmp_path_factory, activities, phases, begin):
    """Foreign numbers are left out, and nothing fails."""
    directory = tmp_path_factory.mktemp("run")
    with Recorder(directory, "worker", 0) as recorder:
        recorder.write(TraceReport(begin, activities, phases))
    history = RunHistory(read_records(directory))
    for event in chrome_trace.events(history):
        assert event["ph"] == "M" or event.get("dur", 0) >= 0
    pytest.importorskip("matplotlib", reason="drawing needs the extra [plot]")
    from matplotlib.figure import Figure

    timeline_panels.timeline(Figure(), history)


def test_the_picture_names_its_ranks_and_leaves_out_some_of_many(tmp_path):
    pytest.importorskip("matplotlib", reason="drawing needs the extra [plot]")
    from matplotlib.figure import Figure

    figure = Figure()
    timeline_panels.timeline(figure, RunHistory(read_records(traced_run(tmp_path / "run"))))
    above, below = figure.axes
    names = [label.get_text() for label in above.get_yticklabels()]
    assert names == ["shard 0", "shard 1", "worker 0", "worker 1", "worker 2"]
    assert names == [label.get_text() for label in below.get_yticklabels()]
    assert below.get_xlim() == pytest.approx((0, 7), abs=2.1)  # milliseconds
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert legend == {"compute", "fetch", "push", "wait", "apply", "idle", "serve"}
    many = [RankTimeline("worker", number) for number in range(1000)]
    shown = timeline_panels.evenly(many, 24)
    assert len(shown) == 24
    assert (shown[0].number, shown[-1].number) == (0, 999)


def test_the_command_writes_a_trace_whole_or_not_at_all(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="drawing needs the extra [plot]")
    directory = traced_run(tmp_path / "run")
    (tmp_path / "folder.json").mkdir()
    assert main(["plot", str(directory), "--trace", str(tmp_path / "folder.json")]) == 2
    assert "folder.json: cannot write the trace" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(UserError, match="cannot write the trace"):
        chrome_trace.write(RunHistory(read_records(directory)), "run", tmp_path / "no" / "trace.json")
    assert main(["plot", str(directory), str(make_run(tmp_path / "b")), "--trace", str(tmp_path / "t.json")]) == 2
    assert "given 2 runs" in capsys.readouterr().err
    assert not (tmp_path / "t.json").exists()
