"""``dbmpi watch``: follow a run live, from its records."""

from __future__ import annotations

import argparse
import math
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from dbmpi.cli import options
from dbmpi.cli.submit import SCRIPT
from dbmpi.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console, Group

    from dbmpi.monitor.lines import Record
    from dbmpi.monitor.live_run import LiveRun

SUMMARY = "follow a run live on the terminal, from its records: also one of another process or host"

_GRACE = 3.0
"""Seconds after which a run that was there and is gone counts as ended: it may be just about to be started again."""
_PARTS = ("records", "checkpoints", SCRIPT)
"""What a run directory may have in it before the records begin."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its `parser`."""
    parser.add_argument(
        "directory", metavar="RUN_DIR", type=Path, help="directory of the run (run.directory), which may yet begin"
    )
    parser.add_argument(
        "--every",
        metavar="SECONDS",
        type=_seconds,
        default=1.0,
        help="time between two looks at the records (default: %(default)g)",
    )
    parser.add_argument("--once", action="store_true", help="show the present state, and end")


def run(arguments: argparse.Namespace) -> int:
    """Follow the run that these `arguments` name until it ends, and return the exit code."""
    options.refuse_configuration(arguments.directory, "watch", "the directory of a run")
    _refuse_foreign(arguments.directory)

    with suppress(KeyboardInterrupt):  # as the key q: the run has nothing to do with it
        _follow(arguments.directory, arguments.every, once=arguments.once)
    return 0


def _follow(directory: Path, every: float, *, once: bool) -> None:
    from rich.console import Console

    with suppress(AttributeError):  # a terminal that knows no such character shows a question mark
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    watch, console = _Watch(directory), Console(highlight=False)
    if once:
        watch.look()
        if not watch.live.session:
            from dbmpi.monitor.records import without_records

            raise UserError(without_records(directory))
        console.print(watch.view(console))
    elif console.is_terminal and not console.is_dumb_terminal:
        _draw(watch, console, every)
    else:
        _print_lines(watch, every)


class _Watch:
    """What is known of the run, and whether it is still at work."""

    def __init__(self, directory: Path) -> None:
        from dbmpi.checkpoint.run_presence import RunPresence
        from dbmpi.monitor.live_run import LiveRun
        from dbmpi.monitor.tail import RecordTail

        self.live: LiveRun = LiveRun()
        self._directory = directory
        self._name = directory.resolve().name
        self._tail, self._presence = RecordTail(directory), RunPresence(directory)
        self._seen = -_GRACE  # when it was last at work, by the clock of this process
        self._news = time.monotonic()
        self.working = False

    def look(self) -> list[Record]:
        """Read what is new; return what else happened than progress."""
        # First the lock, then the records: those of a run that has ended in between are read.
        self.working = self._presence.look()
        now = time.monotonic()
        if self.working:
            self._seen = now
        before = self.live.elapsed, self.live.session
        changes = self.live.add(self._tail.poll())
        if before != (self.live.elapsed, self.live.session):
            self._news = now
        return changes

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to come."""
        return bool(self.live.session) and not self.working and time.monotonic() - self._seen >= _GRACE

    @property
    def status(self) -> str:
        """What the run does, in a few words."""
        from dbmpi.monitor.display import duration

        if not self.live.session:
            return "starting" if self.working else f"waiting for it to begin in {self._directory}"
        if self.working:
            quiet = time.monotonic() - self._news
            return "running" if quiet < 10 else f"running; no news for {duration(quiet)}"
        return "complete" if self.live.complete else "ended before it was complete"

    def view(self, console: Console) -> Group:
        """Return the view of the present state for a `console`."""
        from dbmpi.monitor.live_view import view

        size = console.size
        plain = console.encoding.lower().replace("-", "") != "utf8" or not console.is_terminal
        return view(
            self.live,
            self._name,
            self.status,
            working=self.working,
            width=size.width,
            height=size.height,
            plain=plain,
        )


def _draw(watch: _Watch, console: Console, every: float) -> None:
    """Draw the view on a screen of its own until the run ends or a key says so; then leave it on the terminal."""
    from rich.live import Live

    with _ending_by_signal(), _keys() as keys:
        watch.look()
        with Live(watch.view(console), console=console, screen=True, auto_refresh=False) as screen:
            while not watch.ended:
                screen.update(watch.view(console), refresh=True)
                if _asked_to_end(keys, every):
                    break
                watch.look()
    console.print(watch.view(console))


def _print_lines(watch: _Watch, every: float) -> None:
    """Print a line where something has changed, until the run ends."""
    from dbmpi.monitor.display import line

    shown, status = "", ""
    while True:
        changes = watch.look()
        if watch.status.partition(";")[0] != status:
            status = watch.status.partition(";")[0]
            if not watch.live.session:
                print(f"dbmpi: {status}", flush=True)
        for record in changes:
            print(_told(record), flush=True)
        now = line(watch.live.display(working=watch.working)) if watch.live.workers else ""
        if now != shown:
            print(now, flush=True)
            shown = now
        if watch.ended:
            print(f"dbmpi: {watch.status}", flush=True)
            return
        time.sleep(every)


def _told(record: Record) -> str:
    """Return a line on an event."""
    from dbmpi.cli.tables import printable
    from dbmpi.monitor.display import digits

    if record["kind"] == "evaluation":
        accuracy = "" if record["accuracy"] is None else f"   test accuracy {100 * record['accuracy']:.2f} %"
        loss = math.nan if record["loss"] is None else record["loss"]
        return f"epoch {record['epoch'] or 0:.4g}   test loss {digits(loss)}{accuracy}   {record['samples']:,} samples"
    if record["kind"] == "checkpoint":
        return f"checkpoint {printable(record['name'])}   {record['bytes']:,} bytes in {record['seconds'] or 0:.2f} s"
    if record["kind"] == "rescue":
        name = printable(record["name"])
        return f"shard {record['shard']} is lost, after {record['step']:,} steps of all; its mirror is in {name}"
    if record["kind"] == "end":
        return f"session {record['session']} ends early: {printable(record['reason'], 500)}"
    if record["kind"] == "loss":
        return f"{printable(record['role'])} {record['lost']} is lost, after {record['step']:,} steps of all"
    return (
        f"session {record['session']}: {record['ranks']} ranks, {record['shards']} shards, {record['replicas']} "
        f"replicas of {record['partitions']}; {record['parameters']:,} parameters; {printable(record['method'])}"
        f"{', in virtual time' if record['virtual'] else ''}"
    )


def _refuse_foreign(directory: Path) -> None:
    """Refuse what can be no run directory: a file, or a folder with nothing but other things in it."""
    from dbmpi.monitor.records import without_records

    if not directory.exists():
        if not directory.parent.is_dir():
            raise UserError(
                f"{directory}: is missing, and so is the folder that it would be in; expected the directory of a run "
                "(run.directory of its configuration), which may yet begin"
            )
        return
    try:
        names = os.listdir(directory)
    except NotADirectoryError:
        raise UserError(without_records(directory)) from None
    except OSError as error:
        raise UserError(f"{directory}: cannot be read: {error.strerror}") from None
    if names and not any(name in _PARTS or name.startswith(("in-use.", ".in-use.")) for name in names):
        raise UserError(without_records(directory))


@contextmanager
def _ending_by_signal() -> Iterator[None]:
    """Leave the block by an exception after a signal, too, so that the terminal is as it was."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _keys() -> Iterator[int | None]:
    """Give the descriptor from which single keys can be read in the block, without an echo; None without a keyboard."""
    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, ValueError, AttributeError, termios.error):
        yield None
        return
    try:
        tty.setcbreak(descriptor)
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _asked_to_end(keys: int | None, seconds: float) -> bool:
    """Wait, and return whether the key q was pressed meanwhile; any other key looks again at once."""
    if keys is None:
        time.sleep(seconds)
        return False
    ready, _, _ = select.select([keys], [], [], seconds)
    if not ready:
        return False
    pressed = os.read(keys, 64)
    return not pressed or pressed[:1] in b"qQ\x04"


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.05 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"expected seconds from 0.05 to 3600, got {text!r}")
    return value
