"""One run at a time in a run directory, whatever dies, halts or is removed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dbmpi.checkpoint import run_lock
from dbmpi.checkpoint.run_lock import RunLock, locked
from dbmpi.errors import RunFailed, UserError
from dbmpi.machine import processes
from dbmpi.mpi import waiting

HOLD = """
import sys, time
from pathlib import Path
from dbmpi.checkpoint.run_lock import locked
with locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(1000)
"""


def silent(text: str) -> None:
    raise AssertionError(f"nothing was to be said, and not {text!r}")


def hold(directory: Path) -> subprocess.Popen:
    """Start a process that holds the lock; return when it does."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, directory], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    return holder


def leave(directory: Path, number: int = 1, **fields: object) -> Path:
    """Leave a lock as of a process on another host."""
    content = {"host": "elsewhere", "process": 77, "since": "2026-01-02", "started": "5", "system": "elsewhere x y"}
    directory.mkdir(exist_ok=True)
    path = directory / f"in-use.{number}.json"
    path.write_text(json.dumps(content | {"token": f"theirs {number}", "renewals": "000000000007"} | fields))
    return path


def locks(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_a_directory_is_made_locked_and_released(tmp_path):
    run = tmp_path / "a" / "run"
    with locked(run, silent) as lock:
        assert locks(run) == ["in-use.1.json"]
        content = json.loads(lock.path.read_text())
        assert (content["process"], content["host"]) == (os.getpid(), os.uname().nodename)
        run_lock.confirm(run)
    assert locks(run) == []
    with pytest.raises(ZeroDivisionError), locked(run, silent):
        raise ZeroDivisionError
    assert locks(run) == []


def test_a_living_process_is_named_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_ENDING", 0.2)
    holder = hold(tmp_path)
    try:
        with pytest.raises(UserError) as raised:
            RunLock.acquire(tmp_path, silent)
        for words in (f"process {holder.pid} on {os.uname().nodename} since 20", f"kill {holder.pid}", "run.directory"):
            assert words in str(raised.value)
    finally:
        holder.kill()
        holder.wait()


def test_a_killed_process_is_followed_at_once(tmp_path):
    holder = hold(tmp_path)
    holder.kill()  # and not waited for: a zombie does not live
    with locked(tmp_path, silent):
        assert locks(tmp_path) == ["in-use.2.json"]
    holder.wait()
    with locked(tmp_path, silent):
        assert locks(tmp_path) == ["in-use.3.json"]


def test_another_process_of_the_same_number_is_not_the_holder(tmp_path):
    leave(tmp_path, process=os.getpid(), started="1", system=processes.system())
    with locked(tmp_path, silent):
        assert locks(tmp_path) == ["in-use.2.json"]


def test_a_lease_of_another_host_runs_out_when_it_is_not_renewed(tmp_path):
    leave(tmp_path)
    said = []
    lock = RunLock.acquire(tmp_path, said.append, lease=0.5)
    assert lock.path.name == "in-use.2.json"
    assert said == [
        f"{tmp_path}: was in use by process 77 on elsewhere since 2026-01-02; waiting up to 0.5 s to see whether it "
        "still is"
    ]


@pytest.mark.parametrize("rest", [0.1, 0.6])
def test_a_lease_that_is_renewed_is_respected(tmp_path, monkeypatch, rest):
    """Also where it was renewed while this process rested for longer than the lease had left."""
    monkeypatch.setattr(run_lock, "_LOOK", rest)
    path = leave(tmp_path)
    renewing = threading.Timer(0.3, lambda: leave(tmp_path, renewals="000000000008"))
    renewing.start()
    with pytest.raises(UserError, match=r"in use by process 77 on elsewhere.*stop it on elsewhere.*delete .*in-use\.1"):
        RunLock.acquire(tmp_path, lambda text: None, lease=60 if rest < 0.3 else 0.5)
    renewing.join()
    assert path.exists()
    assert locks(tmp_path) == ["in-use.1.json"]


def test_a_lock_that_is_released_while_it_is_watched_is_followed(tmp_path, monkeypatch):
    """By a process that goes on with something else."""
    monkeypatch.setattr(run_lock, "_ENDING", 60)
    content = run_lock.this_process()
    path = leave(tmp_path, 2, **content | {"renewals": "000000000007"})
    releasing = threading.Timer(0.3, lambda: leave(tmp_path, 2, **content | {"released": True}))
    releasing.start()
    lock = RunLock.acquire(tmp_path, silent)
    releasing.join()
    assert lock.path.name == "in-use.3.json"
    assert not path.exists()


@pytest.mark.parametrize("fields", [{}, {"host": os.uname().nodename, "system": f"{os.uname().nodename} other boot"}])
def test_a_lock_from_long_ago_needs_not_be_watched(tmp_path, fields):
    """By the clock of the file system; another start of this machine is another host."""
    path = leave(tmp_path, **fields)
    then = time.time() - 2 * run_lock._LONG_AGO
    os.utime(path, (then, then))
    with locked(tmp_path, silent):
        assert locks(tmp_path) == ["in-use.2.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"process": "x", "token": 5}', b"\xff" * 9000])
def test_a_lock_that_cannot_be_understood_is_watched(tmp_path, content):
    (tmp_path / "in-use.4.json").write_bytes(content)
    said = []
    lock = RunLock.acquire(tmp_path, said.append, lease=0.2)
    assert lock.path.name == "in-use.5.json"
    assert "in use by process 0 on unknown" in said[0]


@pytest.mark.parametrize("links", [True, False])
def test_of_many_that_take_over_one_succeeds(tmp_path, links):
    leave(tmp_path, process=2**30, system=processes.system())
    code = f"""
import os, sys, time
from pathlib import Path
from dbmpi.errors import UserError
from dbmpi.checkpoint import run_lock as runlock
runlock._ENDING = 0.05
if not {links}:
    def refuse(*names):
        raise PermissionError(1, "Operation not permitted")
    os.link = refuse
print("ready", flush=True)
sys.stdin.readline()
try:
    runlock.RunLock.acquire(Path({str(tmp_path)!r}), lambda text: None)
    print("mine", flush=True)
except UserError as error:
    print("refused", flush=True)
sys.stdin.readline()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    several = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(5)]
    for one in several:
        assert one.stdout.readline() == "ready\n"
    for one in several:
        one.stdin.write("\n")
        one.stdin.flush()
    found = [one.stdout.readline().strip() for one in several]
    for one in several:
        one.communicate("\n")
    assert sorted(found) == ["mine", *["refused"] * 4]
    assert locks(tmp_path) == ["in-use.2.json"]


@pytest.mark.parametrize("released", [False, True])
def test_a_run_that_was_halted_notices_that_it_was_taken_over(tmp_path, released):
    with locked(tmp_path, silent) as lock:
        leave(tmp_path, 2, released=released)
        lock.path.unlink()
        with pytest.raises(RunFailed, match="taken over by process 77 on elsewhere"):
            run_lock.confirm(tmp_path)
        lock.renew()
        assert locks(tmp_path) == ["in-use.2.json"]
        with pytest.raises(RunFailed, match="taken over"):
            waiting.until(lambda: False, "nothing")
    assert locks(tmp_path) == ["in-use.2.json"]


def test_a_lock_that_is_removed_with_its_directory_is_made_anew(tmp_path):
    run = tmp_path / "run"
    with locked(run, silent) as lock:
        run.rename(tmp_path / "moved")
        lock.renew()
        assert not lock.check()
        assert locks(run) == ["in-use.1.json"]
    assert locks(run) == []


def test_the_lease_is_renewed_while_the_holder_does_something_else(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "RENEWAL", 0.01)
    with locked(tmp_path, silent) as lock:
        seen = set()
        while len(seen) < 3:
            seen.add(json.loads(lock.path.read_text())["renewals"])


def test_a_holder_that_is_halted_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_ENDING", 0.1)
    holder = hold(tmp_path)
    os.kill(holder.pid, signal.SIGSTOP)
    try:
        with pytest.raises(UserError, match="in use"):
            RunLock.acquire(tmp_path, silent)
    finally:
        holder.kill()
        holder.wait()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be used as the run directory .*set run\.directory"):
        RunLock.acquire(tmp_path / "file" / "run", silent)
