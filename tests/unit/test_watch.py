"""Following a run: records are read once as they come, the state is bounded, and the view can be left at any time."""

import fcntl
import io
import json
import os
import pty
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from harness.environment import timeout_scale
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.run_records import make_run

from dbmpi.checkpoint.run_lock import locked
from dbmpi.checkpoint.run_presence import RunPresence
from dbmpi.cli.main import main
from dbmpi.errors import UserError
from dbmpi.monitor import lines, live_view, tail
from dbmpi.monitor.history import RunHistory
from dbmpi.monitor.live_run import LiveRun, TimeSeries
from dbmpi.monitor.records import read_records
from dbmpi.monitor.tail import RecordTail

START = {
    "kind": "start", "role": "shard", "number": 0, "session": 1, "time": 1e9, "elapsed": 0.0, "version": "0.1",
    "method": "downpour", "ranks": 3, "shards": 1, "replicas": 2, "partitions": 1, "parameters": 1234,
    "samples": 6000, "samples_before": 0, "epochs": 2.0, "configuration": "",
}  # fmt: skip


def started_run(directory: Path, **kwargs) -> Path:
    """Return a run of one session that says what it began with."""
    make_run(directory, sessions=1, **kwargs)
    path = directory / "records" / "shard-0.jsonl"
    path.write_text(json.dumps(START) + "\n" + path.read_text())
    return directory


def everything(directory):
    records = read_records(directory)
    return sorted(json.dumps(record) for record in records), records.skipped


@settings(max_examples=12)
@given(st.integers(0, 2**32 - 1), st.integers(50, 4000))
def test_records_that_grow_by_any_bytes_are_read_once(tmp_path_factory, seed, largest):
    """In pieces of any size, cut anywhere, with foreign lines between them: the same as reading the files at once."""
    directory = make_run(tmp_path_factory.mktemp("runs") / "whole", workers=2)
    junk = [b"\xff\xfe\n", b"{}\n", b"\n", b'{"kind": "worker"\n', b"[1, 2]\n"]
    draw = random.Random(seed)
    for path in (directory / "records").iterdir():
        with path.open("ab") as file:
            file.writelines(draw.choices(junk, k=3))
    grown = directory.with_name("grown")
    (grown / "records").mkdir(parents=True)
    follower, found = RecordTail(grown), []
    left = {path.name: path.read_bytes() for path in (directory / "records").iterdir()}
    while left:
        name = draw.choice(sorted(left))
        size = draw.randint(1, largest)
        with (grown / "records" / name).open("ab") as file:
            file.write(left[name][:size])
        left[name] = left[name][size:]
        if not left[name]:
            del left[name]
        if draw.random() < 0.2:
            found += follower.poll()
    found += follower.poll()
    assert list(follower.poll()) == []
    assert (sorted(json.dumps(record) for record in found), follower.skipped) == everything(directory)


def test_only_new_bytes_are_read(tmp_path, monkeypatch):
    directory = make_run(tmp_path / "run", workers=1)
    follower = RecordTail(directory)
    before = len(list(follower.poll()))
    opened = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *a, **k: (opened.append(path.name), real(path, *a, **k))[1])
    assert list(follower.poll()) == []
    assert opened == []
    path = directory / "records" / "worker-0.jsonl"
    last = path.read_bytes().splitlines(keepends=True)[-1]
    with real(path, "ab") as file:
        file.write(last)
    opened.clear()
    (record,) = follower.poll()
    assert opened == ["worker-0.jsonl"]
    assert json.dumps(record) in {json.dumps(one) for one in read_records(directory)}
    assert before > 10


def test_a_file_that_was_replaced_or_cut_is_read_anew(tmp_path):
    directory = make_run(tmp_path / "run", workers=1, shards=0, sessions=1)
    path = directory / "records" / "worker-0.jsonl"
    follower = RecordTail(directory)
    count = len(list(follower.poll()))
    rows = path.read_bytes().splitlines(keepends=True)
    os.truncate(path, 0)
    with path.open("ab") as file:
        file.write(rows[0])
    assert len(list(follower.poll())) == 1
    path.unlink()
    assert list(follower.poll()) == []
    path.with_suffix(".new").write_bytes(b"".join(rows))
    path.with_suffix(".new").rename(path)
    assert len(list(follower.poll())) == count
    shutil.rmtree(directory)
    assert list(follower.poll()) == []


def test_of_long_files_the_end_is_read_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tail, "_FIRST", 4000)
    monkeypatch.setattr(tail, "_LEAST", 1000)
    directory = make_run(tmp_path / "run", workers=1, sessions=3)
    follower = RecordTail(directory)
    found = list(follower.poll())
    assert follower.skipped == 0
    whole = read_records(directory)
    assert 5 < len(found) < len(whole)
    assert all(record in whole for record in found)
    assert max(record["session"] for record in found) == 3
    # A line without an end is not kept.
    path = directory / "records" / "worker-0.jsonl"
    with path.open("ab") as file:
        for _ in range(3):
            file.write(b"x" * lines.LONGEST_LINE)
            file.flush()
            assert list(follower.poll()) == []
            position = follower._positions["worker-0.jsonl"]
            assert len(position.begun) < lines.LONGEST_LINE
        file.write(b"\n" + json.dumps(found[0]).encode() + b"\n")
    assert list(follower.poll()) == [found[0]]
    assert follower.skipped == 1


def test_a_newer_version_is_named(tmp_path):
    directory = make_run(tmp_path / "run", workers=1)
    with (directory / "records" / "worker-0.jsonl").open("a") as file:
        file.write('{"format": 9, "kind": "worker", "what": "is this"}\n')
    with pytest.raises(UserError, match=r"worker-0.jsonl: was written by a newer dbmpi, as records of format 9"):
        list(RecordTail(directory).poll())


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(-10, 10), st.floats(0.1, 10)), max_size=50), st.randoms())
def test_a_series_is_bounded_and_does_not_depend_on_the_order(points, draw):
    series, shuffled = TimeSeries(8), TimeSeries(8)
    for point in points:
        series.add(*point)
    draw.shuffle(points)
    for point in points:
        shuffled.add(*point)
    assert series.means() == pytest.approx(shuffled.means())
    assert len(series.means()) <= 16
    assert all(-10.001 <= mean <= 10.001 for mean in series.means())
    if points:
        total = sum(weight for _, _, weight in points)
        assert sum(weight for _, weight in series._sums.values()) == pytest.approx(total)


@pytest.mark.parametrize("sessions", [1, 2])
def test_the_state_is_that_of_the_history(tmp_path, sessions):
    """Held against what is computed from all records; in whichever order the files come."""
    directory = make_run(tmp_path / "run", workers=2, sessions=sessions)
    history, live = RunHistory(read_records(directory)), LiveRun()
    live.add(RecordTail(directory).poll())
    assert live.session == sessions
    assert live.steps == history.steps(sessions, 1e9)
    assert live.epochs == pytest.approx(history.summary().epochs)
    assert live.samples_per_second == pytest.approx(3000)
    assert live.mean_rate == pytest.approx(3000)
    assert live.staleness == pytest.approx(1.2)
    assert list(live.evaluations) == history.evaluations
    assert live.best == history.evaluations[0]  # all have the same accuracy
    assert not live.complete
    reverse = LiveRun()
    reverse.add(reversed(list(RecordTail(directory).poll())))
    assert reverse.session == live.session


def test_a_run_that_says_its_end_is_complete(tmp_path):
    live = LiveRun()
    changes = live.add(RecordTail(started_run(tmp_path / "run")).poll())
    assert live.complete
    assert live.samples == 12_000
    assert [record["kind"] for record in changes] == ["start", "evaluation", "evaluation"]
    state = live.display()
    assert (state.total, state.samples, state.epochs) == (12_000, 12_000, 2.0)


def test_the_state_of_a_long_run_stays_small(tmp_path):
    record = read_records(make_run(tmp_path / "run", workers=1, shards=0, sessions=1))[0]
    live = LiveRun()
    for number in range(20_000):
        live.add([record | {"elapsed": float(number), "step": number}])
    assert len(live.workers) == 1
    assert len(live.loss.means()) <= 120


def render(live, width=100, height=40, plain=False, name="run") -> str:
    from rich.console import Console

    out = io.StringIO()
    console = Console(
        file=out, width=width, height=height, force_terminal=not plain, color_system=None, highlight=False
    )
    console.print(
        live_view.view(live, name, "running", working=True, width=width, height=height, plain=plain), soft_wrap=False
    )
    return out.getvalue()


def test_the_view_shows_what_matters(tmp_path):
    live = LiveRun()
    live.add(RecordTail(started_run(tmp_path / "run", workers=2)).poll())
    text = render(live, 140)
    for part in ("3 ranks", "epoch 2.0/2", "3,000 samples/s", "loss", "accuracy 90.00 %", "best", "1.20", "█ compute"):
        assert part in text, part
    plain = render(live, plain=True)
    assert plain.isascii() or set(plain) - {"·", "━", "╸", "╺"} <= set(map(chr, range(128)))
    assert "c=compute" in plain
    assert "cccccccccccccc" in plain


@pytest.mark.parametrize(("width", "height"), [(20, 5), (80, 24), (200, 60)])
def test_a_view_of_many_ranks_fits(tmp_path, width, height):
    live = LiveRun()
    live.add(RecordTail(started_run(tmp_path / "run", workers=100, shards=30)).poll())
    shown = render(live, width, height).splitlines()
    assert len(shown) <= max(height, 24)
    assert all(len(line) <= width for line in shown)
    if height == 24:
        assert any("slowest 6 of 100" in line for line in shown)


def test_names_and_kinds_of_strangers_control_no_terminal(tmp_path):
    directory = started_run(tmp_path / "run")
    path = directory / "records" / "shard-0.jsonl"
    evil = "\x1b]0;gotcha\x07[red]"
    path.write_text(path.read_text().replace('"downpour"', json.dumps(evil)).replace('"apply"', json.dumps(evil)))
    live = LiveRun()
    live.add(RecordTail(directory).poll())
    text = render(live, name=evil)
    assert "\x07" not in text
    assert "\x1b" not in text
    assert "[red]" in text  # and it is no markup


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), max_size=100), st.integers(1, 30))
def test_a_sparkline_of_anything_fits(values, columns):
    shown = live_view.sparkline(values, columns)
    assert len(shown) == min(len(values), columns)
    assert set(shown) <= set("▁▂▃▄▅▆▇█")


def test_a_sparkline_rises_as_its_values_do():
    assert live_view.sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert live_view.sparkline([1e-4, 1e-2, 1], 3) == "▁▅█"  # decades
    assert live_view.sparkline([5, 5, 5], 3) == "▁▁▁"


@given(st.dictionaries(st.sampled_from(["compute", "push", "wait", "other"]), st.floats(0, 1e6)), st.integers(1, 40))
def test_the_bar_of_a_rank_is_full(seconds, columns):
    bars = live_view.shares_bar(seconds, columns)
    total = sum(seconds.values())
    assert sum(width for _, width in bars) == (columns if total else 0)
    for name, width in bars:
        assert abs(width - columns * seconds[name] / total) <= 1


def test_a_run_is_seen_by_its_lock(tmp_path):
    directory = tmp_path / "run"
    presence = RunPresence(directory)
    assert not presence.look()
    with locked(directory, print):
        assert presence.look()
        (lock,) = directory.glob("in-use.*.json")
        kept = lock.read_text()
    assert not presence.look()
    mine = json.loads(kept)
    lock.write_text(json.dumps(mine | {"process": 2**22 + 1}))  # of this host, but there is no such process
    assert not presence.look()


def test_a_run_of_another_host_is_seen_by_its_renewals(tmp_path):
    lock = tmp_path / "in-use.1.json"
    content = {"host": "far", "system": "far", "process": 1, "started": "1", "token": "t", "since": "s"}
    lock.write_text(json.dumps(content | {"renewals": "1"}))
    presence = RunPresence(tmp_path, lease=0.2)
    assert presence.look()
    time.sleep(0.3)
    assert not presence.look()
    lock.write_text(json.dumps(content | {"renewals": "2"}))
    assert presence.look()


def test_a_finished_run_is_shown_in_lines(tmp_path, capsys):
    assert main(["watch", str(started_run(tmp_path / "run"))]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("session 1: 3 ranks, 1 shards, 2 replicas of 1; 1,234 parameters; downpour")
    assert shown[1].startswith("epoch 1   test loss")
    assert "epoch 2.0/2" in shown[3]
    assert shown[-1] == "dbmpi: complete"


def test_a_run_that_was_stopped_is_not_complete(tmp_path, capsys):
    assert main(["watch", str(make_run(tmp_path / "run"))]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "dbmpi: ended before it was complete"


def test_a_stream_of_few_letters_gets_question_marks(tmp_path):
    words = [sys.executable, "-m", "dbmpi", "watch", "--once", str(started_run(tmp_path / "run"))]
    shown = subprocess.run(words, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=True)
    assert b"3 ranks  -  1 shard" in shown.stdout


def test_one_look(tmp_path, capsys):
    assert main(["watch", "--once", str(started_run(tmp_path / "a run"))]) == 0
    assert "a run  complete" in capsys.readouterr().out
    assert main(["watch", "--once", str(tmp_path / "none")]) == 2
    assert "is missing; expected the directory of a run" in capsys.readouterr().err


def test_what_is_no_run_is_refused_at_once(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "holiday.jpg").touch()
    for path, words in (
        (tmp_path / "file", "is not a directory"),
        (tmp_path / "folder", "holds no records"),
        (tmp_path / "no" / "such", "is missing, and so is the folder"),
    ):
        assert main(["watch", str(path)]) == 2
        (message,) = capsys.readouterr().err.splitlines()
        assert words in message
    with pytest.raises(SystemExit):
        main(["watch", "--every", "0", str(tmp_path)])
    assert "expected seconds from 0.05 to 3600" in capsys.readouterr().err


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *words):
        self.process, self._master = None, None
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        environment = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dbmpi", "watch", *map(str, words)],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env=environment | {"TERM": "xterm-256color", "PYTHONUTF8": "1"},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509  # a test process has no others
        )  # fmt: skip
        self._master, self.seen = master, b""

    def read_until(self, text, seconds=20):
        end = time.monotonic() + seconds * timeout_scale()
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} has not appeared in {self.seen[-2000:]!r}"
            if select.select([self._master], [], [], 0.05)[0]:
                self.seen += os.read(self._master, 65536)

    def write(self, text):
        os.write(self._master, text)

    def finish(self, seconds=20):
        end = time.monotonic() + seconds * timeout_scale()
        while self.process.poll() is None:
            assert time.monotonic() < end, "the command has not ended"
            if select.select([self._master], [], [], 0.05)[0]:
                self.seen += os.read(self._master, 65536)
        while select.select([self._master], [], [], 0.05)[0]:
            self.seen += os.read(self._master, 65536)
        return self.process.returncode

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)
        os.close(self.slave)


SCREEN, BACK = b"\x1b[?1049h", b"\x1b[?1049l"


@pytest.mark.parametrize("how", ["q", "Ctrl-C", "SIGTERM"])
def test_the_view_is_left_and_the_terminal_is_as_it_was(tmp_path, how):
    """It waits for a run that has not begun, shows it when it does, and ends as asked."""
    directory = tmp_path / "run"
    with Terminal("--every", "0.1", directory) as terminal:
        terminal.read_until(b"waiting for it to begin")
        with locked(directory, print):
            shutil.copytree(started_run(tmp_path / "other") / "records", directory / "records")
            terminal.read_until(b"running")
            terminal.read_until(b"90.00 %")
            assert SCREEN in terminal.seen
            if how == "SIGTERM":
                terminal.process.send_signal(signal.SIGTERM)
            else:
                terminal.write(b"q" if how == "q" else b"\x03")
            assert terminal.finish() == (128 + signal.SIGTERM if how == "SIGTERM" else 0)
        assert terminal.seen.rindex(BACK) > terminal.seen.rindex(SCREEN)
        assert termios.tcgetattr(terminal.slave) == terminal.before
        assert b"Traceback" not in terminal.seen


def test_the_view_ends_with_the_run_and_stays(tmp_path):
    directory = started_run(tmp_path / "run")
    with Terminal("--every", "0.1", directory) as terminal:
        assert terminal.finish() == 0
        after = terminal.seen[terminal.seen.rindex(BACK) :]
        assert b"complete" in after
        assert b"90.00 %" in after
