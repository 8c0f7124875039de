"""One run at a time in a run directory: a lock with host and process, which other hosts see as a lease.

The lock is a file ``in-use.<n>.json``.  It is created under another name and linked to its own, which fails where there
is one already, also on network file systems; locks of the system (flock) are not needed, which many of them lack.

On the same host the process is looked up, with the time of its start, as the system gives numbers of processes again.
Of another host's, nothing can be seen but the file, which the run that holds it renews.  A lease has run out when the
file has not changed for `LEASE` seconds while it was watched, or is much older than a file that was just written
beside it: the clocks of hosts are never compared.

A dead lock is taken over by making the one with the next number, and then removing the old one.  Of two runs that try,
one finds that there is a file already.  A holder that was only halted sees a higher number, also of a lock that was
released meanwhile, and writes nothing any more.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dbmpi.errors import RunFailed, UserError
from dbmpi.machine import processes
from dbmpi.mpi import waiting

LEASE = 60.0
"""Seconds after which a lock of another host counts as left behind, if it is not renewed."""
RENEWAL = 5.0
"""Seconds between two renewals."""
_LONG_AGO = 10 * LEASE
"""Age of a lock that needs not be watched."""
_ENDING = 3.0
"""Seconds in which a process of this host may still end, e.g. one that was just killed with its job."""
_LOOK = 0.1
_LARGEST = 4096
_NAME = re.compile(r"in-use\.(\d{1,9})\.json")
_held: dict[Path, RunLock] = {}
"""The locks of this process, by directory."""


class RunLock:
    """A lock on a run directory; acquired by :meth:`acquire`.

    Parameters
    ----------
    path
        Of its file.
    content
        What the file says.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = path
        self._content = content
        self._lost = ""
        self._ended = threading.Event()
        self._renewing = threading.Thread(target=self._renew_until_the_end, name="lock of the run", daemon=True)

    @classmethod
    def acquire(cls, directory: Path, say: Callable[[str], object], *, lease: float = LEASE) -> RunLock:
        """Lock a directory, which is created if it is missing.

        Parameters
        ----------
        directory
            Of the run.
        say
            Called with a line where the lock of another run is waited for.
        lease
            Seconds for which a lock of another host is watched at most.

        Raises
        ------
        UserError
            If another run is at work there, or the directory cannot be written to.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
            while True:
                number, holder = max(lock_numbers(directory), default=0), None
                if number:
                    holder = read_lock(lock_file(directory, number))
                    if holder is None:
                        continue
                    if not holder["released"]:
                        _refuse_living(lock_file(directory, number), holder, say, lease)
                lock = cls(lock_file(directory, number + 1), this_process())
                if lock._create() and lock._alone(number, "" if holder is None else holder["token"]):
                    return lock
        except OSError as error:
            raise UserError(
                f"{directory}: cannot be used as the run directory ({error.strerror}); set run.directory to one "
                "that you can write to"
            ) from None

    def check(self) -> bool:
        """Raise RunFailed if another run was found in the directory; returns False, as it is no sign of life."""
        if self._lost:
            raise RunFailed(self._lost)
        return False

    def confirm(self) -> None:
        """Read the lock, and raise RunFailed if another run has taken the directory over."""
        directory, number = self.path.parent, _number(self.path)
        try:
            last = max(lock_numbers(directory), default=number)
            other = read_lock(lock_file(directory, last))
        except OSError:  # nothing can be seen, and so nothing be written
            return
        if last >= number and other is not None and other["token"] != self._content["token"]:
            self._lost = (
                f"{directory}: has been taken over by {_name(other)}, because this run seemed to be dead for a "
                "while, as where it was halted; this one writes nothing any more, and ends"
            )
        self.check()

    def renew(self) -> None:
        """Show that this run lives; a file that was removed, perhaps with its directory, is created anew."""
        with suppress(OSError, RunFailed):  # a disk that fails for a while; what is lost, the next wait says
            self.confirm()
            self._content["renewals"] += 1
            try:
                # No new file: one that another host has removed in the meantime is not there again.
                with self.path.open("r+b") as file:
                    file.write(self._bytes)
            except FileNotFoundError:
                self._create()

    def _renew_until_the_end(self) -> None:
        # A thread that sleeps, because the run may be in one call of the system or of a compiler for long.
        while not self._ended.wait(RENEWAL):
            self.renew()

    def release(self) -> None:
        """Let others use the directory; without effect the second time."""
        self._ended.set()
        if self._renewing.is_alive():
            self._renewing.join()
        with suppress(OSError):
            found = read_lock(self.path)
            if found is None or found["token"] != self._content["token"]:
                return
            if _number(self.path) == 1:
                self.path.unlink()
                return
            # The number stays, for a holder before this one that may only have been halted.
            self._content["released"] = True
            with self.path.open("r+b") as file:
                file.write(self._bytes)
                file.truncate()

    def _create(self) -> bool:
        """Create the file, if there is none of its name yet; return whether it was created."""
        temporary = self.path.with_name(f".{self.path.name}.{self._content['token']}.tmp")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(self._bytes)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, self.path)
            except FileExistsError:
                return False
            except OSError:
                # Some network file systems report a failure of what they have done; others have no links.
                if temporary.stat().st_nlink != 2:
                    return self._create_without_links()
            return True
        finally:
            temporary.unlink(missing_ok=True)

    def _create_without_links(self) -> bool:
        try:
            with self.path.open("xb") as file:
                file.write(self._bytes)
        except FileExistsError:
            return False
        return True

    def _alone(self, before: int, token: str) -> bool:
        """Remove the lock that was taken over; return False, without a lock, where another run was faster.

        That has a higher number, or the same as the lock `before` with another `token`, where that was given back.
        """
        number, last = before + 1, read_lock(lock_file(self.path.parent, before))
        if any(other > number for other in lock_numbers(self.path.parent)) or (
            last is not None and last["token"] != token
        ):
            self.path.unlink(missing_ok=True)
            return False
        for other in lock_numbers(self.path.parent):
            if other < number:
                lock_file(self.path.parent, other).unlink(missing_ok=True)
        return True

    @property
    def _bytes(self) -> bytes:
        return json.dumps(self._content | {"renewals": f"{self._content['renewals']:012d}"}, indent=1).encode() + b"\n"


@contextmanager
def locked(directory: Path, say: Callable[[str], object]) -> Iterator[RunLock]:
    """Hold and renew the lock of a run directory in the block; every wait of this process ends where it is lost.

    `say` is called with a line where the lock of another run is waited for.
    """
    directory = directory.absolute()
    lock = RunLock.acquire(directory, say)
    _held[directory] = lock
    try:
        lock._renewing.start()
        with waiting.serving(lock.check):
            yield lock
    finally:
        del _held[directory]
        lock.release()


def confirm(directory: Path) -> None:
    """Raise RunFailed if this process had the lock of a run directory and has lost it."""
    lock = _held.get(directory.absolute())
    if lock is not None:
        lock.confirm()


def _refuse_living(path: Path, holder: dict[str, Any], say: Callable[[str], object], lease: float) -> None:
    """Return when the holder of a lock is gone; UserError if it lives."""
    here = holder["system"] == processes.system()
    if not here and _age(path) > _LONG_AGO:
        return
    patience = _ENDING if here else lease
    until, reported = time.monotonic() + patience, False
    while True:
        last = time.monotonic() >= until  # asked before the file is read: where this process rested, it looks again
        found = read_lock(path)
        if (
            found is None
            or found["released"]
            or found["token"] != holder["token"]
            or (here and not processes.lives(holder["process"], holder["started"]))
        ):
            return  # it has ended, or another run was faster: the caller tries again
        if not here and found["renewals"] != holder["renewals"]:
            break
        if last:
            if here:
                break
            return
        if not here and not reported:
            say(f"{path.parent}: was in use by {_name(holder)}; waiting up to {lease:g} s to see whether it still is")
            reported = True
        time.sleep(_LOOK)
    how = f"stop it (kill {holder['process']})" if here else f"stop it on {holder['host']}"
    raise UserError(
        f"{path.parent}: is in use by {_name(holder)}, and two runs would overwrite one another's files; wait for its "
        f"end, {how}, or set run.directory to another one.  (If no such run exists, delete {path})"
    )


def _age(path: Path) -> float:
    """Return how much older a file is than one that is written now, by the clock of the file system."""
    probe = path.with_name(f".in-use.{secrets.token_hex(8)}.tmp")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def lock_numbers(directory: Path) -> list[int]:
    """Return the numbers of the locks of a `directory`."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return [int(match[1]) for name in names if (match := _NAME.fullmatch(name))]


def _number(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def lock_file(directory: Path, number: int) -> Path:
    """Return the path of the lock of that `number` of a `directory`."""
    return directory / f"in-use.{number}.json"


def read_lock(path: Path) -> dict[str, Any] | None:
    """Return what the lock at `path` says, or None where there is none.

    One that cannot be understood, e.g. because it is just being written, is that of an unknown process.
    """
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(_LARGEST))
    except FileNotFoundError:
        return None
    except ValueError:
        found = {}
    found = found if isinstance(found, dict) else {}
    texts = ("host", "system", "since", "started", "token", "renewals")
    unknown = dict.fromkeys(texts, "unknown") | {"process": 0}
    number = found.get("process")
    return (
        unknown
        | {name: found[name] for name in texts if isinstance(found.get(name), str)}
        | ({"process": number} if isinstance(number, int) and 0 < number < 2**31 else {})
        | {"released": found.get("released") is True}
    )


def this_process() -> dict[str, Any]:
    """Return what tells this process from all others, for the file of its lock."""
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "started": processes.started(os.getpid()),
        "system": processes.system(),
        "token": secrets.token_hex(16),
        "renewals": 0,
        "released": False,
    }


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder['process']} on {holder['host']} since {holder['since']}"
