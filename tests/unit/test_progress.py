"""Progress: what is shown where, at every width, and that nobody listening never stops a run."""

import io
import math
import os
import pty
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmpi.monitor import display, progress
from dbmpi.monitor.progress import RunProgress


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    launchers = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
    for name in (*launchers, "DBMPI_PROGRESS", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


class Text(io.StringIO):
    encoding = "utf-8"


def frames(output: str) -> list[str]:
    """What stood on the bar's line after each drawing, without colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", output)
    return [frame.split("\n")[0] for frame in text.split("\r\x1b[2K")]


def test_lines_come_at_once_and_then_every_five_seconds(clock):
    stream = Text()
    shown = RunProgress(1000, "lines", stream, epochs=10)
    for second in range(13):
        clock.now += 1
        shown.update(second * 80, 0.231, 0.931, 12345.4, 1.94)
    assert stream.getvalue().splitlines() == [
        "   0:01  epoch  0.0/10  loss 0.2310  accuracy 93.1 %  12,345 samples/s  staleness 1.9",
        "   0:06  epoch  4.0/10  loss 0.2310  accuracy 93.1 %  12,345 samples/s  staleness 1.9",
        "   0:11  epoch  8.0/10  loss 0.2310  accuracy 93.1 %  12,345 samples/s  staleness 1.9",
    ]
    shown.finish()
    assert stream.getvalue().splitlines()[3].startswith("   0:13  epoch  9.6/10")
    shown.finish()
    assert len(stream.getvalue().splitlines()) == 4


def test_what_is_unknown_is_left_out(clock):
    stream = Text()
    with RunProgress(200, "lines", stream) as shown:
        clock.now += 3
        shown.update(50, math.nan, math.nan, 0.0, math.nan)
    assert stream.getvalue() == "   0:03   25 %  loss    nan  0 samples/s\n"


def test_a_finish_without_news_adds_nothing(clock):
    stream = Text()
    with RunProgress(200, "lines", stream) as shown:
        shown.update(200, 0.5, None, 10.0, None)
    assert stream.getvalue().count("\n") == 1
    with RunProgress(200, "lines", stream):
        pass
    assert stream.getvalue().count("\n") == 1


def test_messages_and_evaluations_are_lines_in_every_mode_but_none(clock):
    for mode, count in (("lines", 2), ("bar", 2), ("none", 0)):
        stream = Text()
        shown = RunProgress(100, mode, stream)
        shown.message("[bold]begins[/bold] :smile:")  # no markup: it is a user's text
        shown.evaluation(3.0, 0.1234, 0.961, 10000)
        assert (
            stream.getvalue().splitlines()
            == [
                "[bold]begins[/bold] :smile:",
                "epoch 3   test loss 0.1234   test accuracy 96.10 %   10,000 samples",
            ][:count]
        )


def test_messages_stand_above_the_bar_whole(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = Text()
    text = "a checkpoint was written to [a]/very/long/path/" + "x" * 60
    with RunProgress(1000, "bar", stream) as shown:
        shown.update(100, 1.0, None, 10.0, None)
        shown.message(text)
        clock.now += 1
        shown.update(900, 0.1, None, 10.0, None)
    drawn = frames(stream.getvalue())
    assert text in drawn
    after = drawn.index(text) + 1
    assert after < len(drawn)
    assert drawn[-1].startswith(" 90 % ")
    assert stream.getvalue().endswith("\n")
    assert "\x1b[?25l" not in stream.getvalue(), "the cursor was hidden: a killed run would leave it so"
    assert "\x1b[1A" not in stream.getvalue(), "the bar moves up: it would overwrite what another rank has printed"


def test_the_bar_is_drawn_no_more_than_ten_times_a_second(clock, monkeypatch):
    stream = Text()
    shown = RunProgress(1000, "bar", stream)
    for _ in range(1000):
        clock.now += 0.001
        shown.update(1, 1.0, None, 1.0, None)
    assert 5 <= len(frames(stream.getvalue())) <= 12


@given(
    columns=st.integers(1, 250),
    samples=st.integers(0, 10**12),
    loss=st.floats(),
    accuracy=st.none() | st.just(math.nan) | st.floats(0, 1),
    rate=st.floats(0) | st.just(math.nan),
    staleness=st.none() | st.floats(0, 1e6),
    epochs=st.none() | st.floats(0.1, 1e4),
)
def test_the_bar_fits_into_every_terminal(*, columns, samples, loss, accuracy, rate, staleness, epochs):
    stream = Text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        patch.setenv("LINES", "2")
        with RunProgress(10**9, "bar", stream, epochs=epochs) as shown:
            shown.update(samples, loss, accuracy, rate, staleness)
    drawn = frames(stream.getvalue())
    assert drawn[-1].strip()
    assert all(len(frame) <= max(1, columns - 1) for frame in drawn)
    assert stream.getvalue().count("\n") == 1


def test_a_terminal_of_eighty_columns_shows_everything(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    stream = Text()
    with RunProgress(600_000, "bar", stream, epochs=10) as shown:
        shown.update(195_000, 0.231, 0.9312, 12_345.0, 1.94)
    last = frames(stream.getvalue())[-1]
    assert re.fullmatch(r"epoch  3\.2/10 ━{3}╺━+  loss 0\.2310  acc 93\.1%  12\.3k/s  stale 1\.9  0:32 left", last), (
        last
    )
    assert last.count("━") + last.count("╸") + last.count("╺") >= 8


def test_more_room_never_shows_less():
    state = display.DisplayState(1000, 10, 300, 0.5, 0.9, 1234.0, 1.5, 10.0)
    previous = 0
    for columns in range(1, 200):
        facts = len(display.fit(state, columns)[2])
        assert facts >= previous
        previous = facts
    assert previous == 5


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "    0"),
        (999.4, "  999"),
        (999.6, "1.00k"),
        (12345, "12.3k"),
        (99_960, " 100k"),
        (1.5e6, "1.50M"),
        (3e9, "3.00G"),
    ],
)
def test_rates_are_short(value, text):
    assert display.short(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.0000"),
        (0.23456, "0.2346"),
        (12.3456, "12.345"),
        (1234.5, "1234.5"),
        (9999.9, "9999.9"),
        (12345.0, " 1.2e4"),
        (0.0009, "9.0e-4"),
        (1e-10, "1.0e-10"),
        (-0.5, "-0.500"),
        (math.inf, "   inf"),
    ],
)
def test_losses_keep_to_their_columns(value, text):
    assert display.digits(value) == text


@pytest.mark.parametrize(("epochs", "text"), [(10, "epoch  2.5/10"), (0.5, "epoch   0.1/0.5"), (400, "epoch 100/400")])
def test_the_place_in_the_run(epochs, text):
    assert display.DisplayState(1000, epochs, 250).position == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.9, "0:59"),
        (61, "1:01"),
        (3723, "1:02:03"),
        (8 * 86400 + 3723, "8 d 01:02:03"),
        (1e300, "11574 d 01:46:40"),
    ],
)
def test_durations(seconds, text):
    assert display.duration(seconds) == text


class Deaf(Text):
    """A stream whose reader goes away after some writes."""

    def __init__(self, error, writes):
        super().__init__()
        self.error, self.left = error, writes

    def write(self, text):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("mode", ["bar", "lines"])
@pytest.mark.parametrize("writes", range(6))
@pytest.mark.parametrize("error", [BrokenPipeError(32, "gone"), OSError(5, "terminal gone"), OSError(28, "disk full")])
def test_a_reader_that_goes_away_does_not_stop_the_run(clock, mode, writes, error):
    stream = Deaf(error, writes)
    with RunProgress(100, mode, stream) as shown:
        for step in range(10):
            clock.now += 6
            shown.update(step, 1.0, None, 1.0, None)
            shown.message("still here")
        assert shown.mode == "none"
    assert stream.left == -1, "it wrote on after the failure"


@pytest.mark.parametrize("mode", ["bar", "lines"])
def test_a_stream_closed_meanwhile_does_not_stop_the_run(clock, mode):
    stream = Text()
    shown = RunProgress(100, mode, stream)
    shown.update(1, 1.0, None, 1.0, None)
    stream.close()
    clock.now += 6
    shown.update(2, 1.0, None, 1.0, None)
    shown.message("nobody")
    shown.finish()
    assert RunProgress(100, mode, stream).mode == "none"


def test_the_mode_follows_the_terminal_and_the_environment(monkeypatch):
    leader, follower = pty.openpty()
    with os.fdopen(leader, "rb"), os.fdopen(follower, "w") as terminal:
        assert RunProgress(1, "auto", terminal).mode == "bar"
        assert RunProgress(1, "auto", Text()).mode == "lines"
        monkeypatch.setenv("PMIX_RANK", "0")  # Open MPI's own terminal, behind which there may be a file
        assert RunProgress(1, "auto", terminal).mode == "lines"
        monkeypatch.setenv("DBMPI_PROGRESS", "bar")
        assert RunProgress(1, "auto", Text()).mode == "bar"
        assert RunProgress(1, "lines", Text()).mode == "lines"
        monkeypatch.setenv("DBMPI_PROGRESS", "nonsense")
        assert RunProgress(1, "auto", Text()).mode == "lines"
        monkeypatch.delenv("DBMPI_PROGRESS")
        monkeypatch.delenv("PMIX_RANK")
        monkeypatch.setenv("TERM", "dumb")
        assert RunProgress(1, "auto", terminal).mode == "lines"


PROGRAM = """
import sys
from dbmpi.monitor.progress import RunProgress
with RunProgress(100, sys.argv[1]) as shown:
    shown.message("h\\u00e9llo \\u2713")
    for step in range(101):
        shown.update(step, 1.0, 0.5, 1.0, 1.0)
        shown._shown_at = -1e9
print("rich" in sys.modules, file=sys.stderr)
"""


def run(mode, **options):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], stderr=subprocess.PIPE, text=True, check=False, **options
    )


@pytest.mark.parametrize(("mode", "rich"), [("lines", "False"), ("none", "False"), ("bar", "True")])
def test_rich_is_imported_only_for_a_bar(mode, rich):
    done = run(mode, stdout=subprocess.DEVNULL)
    assert (done.returncode, done.stderr.strip()) == (0, rich)


@pytest.mark.parametrize("mode", ["lines", "bar"])
def test_a_program_whose_pipe_breaks_ends_well(mode):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run(mode, stdout=writer)
    finally:
        os.close(writer)
    assert done.returncode == 0
    assert "Error" not in done.stderr


@pytest.mark.parametrize("mode", ["lines", "bar"])
def test_a_terminal_without_unicode_is_enough(mode):
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = run(mode, stdout=subprocess.PIPE, env=environment)
    assert done.returncode == 0
    assert "h?llo ?" in done.stdout
    assert done.stdout.isascii()
