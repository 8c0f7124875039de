"""The private directory: what it refuses, and that Numba uses it."""

import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dbmpi.machine import kernel_cache, threads


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary directory like /tmp, for one test."""
    place = tmp_path / "tmp"
    place.mkdir()
    place.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    monkeypatch.setenv(threads.MARK, "{}")
    kernel_cache._private_root.cache_clear()
    yield place
    kernel_cache._private_root.cache_clear()


def own(place: Path) -> Path:
    return place / f"dbmpi-{os.getuid()}"


def is_private(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def test_is_made_for_us_alone(temporary: Path) -> None:
    umask = os.umask(0)
    try:
        made = kernel_cache.private_directory("numba")
    finally:
        os.umask(umask)
    assert made == own(temporary) / "numba"
    assert stat.S_IMODE(made.stat().st_mode) == stat.S_IMODE(made.parent.stat().st_mode) == 0o700
    assert kernel_cache.private_directory("numba") == made


def test_a_directory_that_others_can_write_is_not_used(temporary: Path) -> None:
    own(temporary).mkdir()
    own(temporary).chmod(0o770)
    made = kernel_cache.private_directory("numba")
    assert own(temporary) not in made.parents
    assert is_private(made)
    assert is_private(made.parent)


def test_a_link_is_not_followed(temporary: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    trap.mkdir(mode=0o700)
    own(temporary).symlink_to(trap)
    made = kernel_cache.private_directory("numba")
    assert trap not in made.resolve().parents
    assert not any(trap.iterdir())


def test_a_link_inside_is_not_followed(temporary: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    trap.mkdir(mode=0o700)
    own(temporary).mkdir(mode=0o700)
    (own(temporary) / "numba").symlink_to(trap)
    made = kernel_cache.private_directory("numba")
    assert made.parent == own(temporary)
    assert not made.is_symlink()
    assert made.resolve() != trap


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_else_is_not_used(temporary: Path) -> None:
    own(temporary).mkdir(mode=0o700)
    os.chown(own(temporary), 12345, 12345)
    made = kernel_cache.private_directory("numba")
    assert own(temporary) not in made.parents


def test_a_file_in_the_way_is_not_used(temporary: Path) -> None:
    own(temporary).write_text("")
    assert is_private(kernel_cache.private_directory("numba"))


def test_a_place_where_others_may_rename_is_not_used(temporary: Path, tmp_path: Path) -> None:
    temporary.chmod(0o777)  # not sticky
    (tmp_path / "home" / ".cache").mkdir(parents=True)
    assert kernel_cache.private_directory("numba") == own(tmp_path / "home" / ".cache") / "numba"


def test_the_users_cache_directory_stays(temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tmp_path / "somewhere" / "else"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(theirs))
    assert kernel_cache.prepare() == theirs
    assert os.environ["NUMBA_CACHE_DIR"] == str(theirs)
    assert not any(temporary.iterdir())
    assert kernel_cache.notes() == ()


def test_a_cache_directory_that_cannot_be_written_is_replaced(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "cache"))  # not even root can
    made = kernel_cache.prepare()
    assert made is not None
    assert made.parent == own(temporary)
    assert os.environ["NUMBA_CACHE_DIR"] == str(made)
    assert str(tmp_path / "file" / "cache") in kernel_cache.notes()[0]


def test_a_cache_directory_that_everybody_can_change_is_replaced(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(shared))
    shared.chmod(0o777)
    assert kernel_cache.private_part(shared, "kernels") is None
    assert own(temporary) in kernel_cache.prepare().parents
    assert "can be changed by other users" in kernel_cache.notes()[0]
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(shared))
    shared.chmod(0o1777)  # sticky: a part that is ours stays ours
    assert kernel_cache.prepare() == shared
    assert is_private(kernel_cache.private_part(shared, "kernels"))


def test_where_nothing_can_be_written_it_says_so(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "gettempdir", fails)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert kernel_cache.private_directory("numba") is None
    assert kernel_cache.prepare() is None
    assert not os.environ["NUMBA_CACHE_DIR"]
    assert "set NUMBA_CACHE_DIR" in kernel_cache.notes()[0]


def fails() -> str:
    raise FileNotFoundError("no usable temporary directory")


def test_serial_and_threaded_kernels_are_kept_apart(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for number in ("1", "2", "8"):
        monkeypatch.setenv("NUMBA_CACHE_DIR", "")
        monkeypatch.setenv("NUMBA_NUM_THREADS", number)
        found.add(kernel_cache.prepare())
        assert Path(os.environ["NUMBA_CACHE_DIR"]) in found
    assert len(found) == 2
    assert all(is_private(path) for path in found)


@pytest.mark.slow
def test_numba_keeps_its_code_there(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text(
        "import numba\n@numba.njit(cache=True)\ndef twice(x):\n    return x + x\n", encoding="utf-8"
    )
    program = """
from dbmpi.machine import kernel_cache as kernelcache
place = kernelcache.prepare()
import kernel
assert kernel.twice(2) == 4
hits = sum(kernel.twice.stats.cache_hits.values())
print(place, hits, sum(1 for file in place.rglob("*.nbi")))
"""
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    environment |= {"TMPDIR": str(tmp_path), "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    answers = [
        subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert [answer[1:] for answer in answers] == [["0", "1"], ["1", "1"]]
    assert answers[0][0].startswith(str(own(tmp_path)))


HOLDER = """
import sys, time
from pathlib import Path
from dbmpi.machine import kernel_cache as kernelcache
with kernelcache.locked(Path(sys.argv[1]), 5) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


def test_lock_waits_no_longer_than_told_and_dies_with_its_holder(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "True"
        begin = time.monotonic()
        with kernel_cache.locked(lock, 0.2) as mine:
            assert not mine
        assert time.monotonic() - begin >= 0.2
        assert holder.poll() is None
        holder.kill()
        with kernel_cache.locked(lock, 30) as mine:
            assert mine
    finally:
        holder.kill()
        holder.communicate()


def test_where_nothing_can_be_locked_nobody_waits(tmp_path: Path) -> None:
    with kernel_cache.locked(tmp_path / "missing" / "lock", 30) as mine:
        assert mine


def test_processors_are_told_apart() -> None:
    text = kernel_cache.cpu_description()
    assert text == kernel_cache.cpu_description()
    assert "machine: " in text
    if Path("/proc/cpuinfo").exists() and "flags" in Path("/proc/cpuinfo").read_text():
        assert "flags: " in text
