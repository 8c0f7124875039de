"""Shared memory that is left in /dev/shm by a process without a launcher, or by ranks that are killed: none."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest
from failure.jobs import FOR_EVER, Jobs

from dbmpi.machine.mpi_library import remove_segments

COMMAND = """
import re, sys
from dbmpi.cli.main import main
code = main(["train", "config.toml", *sys.argv[1:]])
print("mapped", *re.findall("/dev/shm/(sm_segment[^ \\\\n]*)", open("/proc/self/maps").read()), flush=True)
raise SystemExit(code)
"""
KILLED = """
import os, re, signal
from dbmpi.mpi import world
with world.ranks() as comm:
    print("mapped", *re.findall("/dev/shm/(sm_segment[^ \\\\n]*)", open("/proc/self/maps").read()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("program", "settings", "code"),
    [
        (COMMAND, ("--set", "optimizer.epochs=1"), 0),
        (COMMAND, ("--set", "data.train=missing.h5"), 2),
        (KILLED, (), -signal.SIGKILL),
    ],
    ids=["end", "mistake", "kill"],
)
def test_nothing_is_left(jobs: Jobs, program: str, settings: tuple[str, ...], code: int) -> None:
    done = jobs.launch(None, [sys.executable, "-c", program, *settings], cwd=jobs.directory)
    assert done.returncode == code, done.transcript
    mapped = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("mapped")]
    assert len(mapped) == 1, done.transcript
    assert not [name for name in mapped[0] if Path("/dev/shm", name).exists()]


def test_nothing_is_left_of_ranks_that_are_killed(jobs: Jobs) -> None:
    """Neither MPI's own memory nor windows: MPICH's launcher removes nothing."""
    program = jobs.start(3, f"optimizer.epochs={FOR_EVER}")
    jobs.wait_until_all_learn(program, 2)
    ranks = list(program.ranks().values())
    mapped = {name for rank in ranks for name in re.findall(r"/dev/shm/\S+", Path(f"/proc/{rank}/maps").read_text())}
    assert mapped
    program.send(ranks, signal.SIGKILL)
    assert jobs.finish(program).returncode != 0
    assert not [name for name in mapped if Path(name).exists()]


def test_only_what_this_process_has_mapped_is_removed(tmp_path: Path) -> None:
    names = ("sm_segment.vm.0.1.0", "sm_segment.vm.0.2.0", "sm_segment.vm.0.3.0", "other")
    ours, renewed, others, no_segment = (tmp_path / name for name in names)
    for path in (ours, renewed, others, no_segment):
        path.touch()
    numbers = {ours: ours.stat().st_ino, renewed: 1, no_segment: no_segment.stat().st_ino}
    lines = [f"7f-8f rw-s 00000000 00:1b {number}      {path}\n" for path, number in numbers.items()]
    maps = tmp_path / "maps"
    maps.write_text("".join([*lines, "8f-9f rw-p 00000000 00:00 0\n"]))
    for variable in ("PMIX_RANK", "OMPI_COMM_WORLD_SIZE"):
        assert remove_segments({variable: "1"}, tmp_path, maps) == []
    assert remove_segments({}, tmp_path, maps) == [ours]
    assert [path.exists() for path in (ours, renewed, others, no_segment)] == [False, True, True, True]
    assert remove_segments({}, tmp_path, tmp_path / "missing") == []


def test_the_name_of_mpichs_segment_is_removed_under_any_launcher(tmp_path: Path) -> None:
    segment, maps = tmp_path / "mpich_shm_93b00cda_0", tmp_path / "maps"
    segment.touch()
    maps.write_text(f"7f-8f rw-s 00000000 00:1b {segment.stat().st_ino} {segment}\n")
    assert remove_segments({"PMI_RANK": "0", "PMIX_RANK": "0"}, tmp_path, maps) == [segment]


def test_the_name_of_anothers_segment_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segment, maps = tmp_path / "sm_segment.vm.0.1.0", tmp_path / "maps"
    segment.touch()
    maps.write_text(f"7f-8f rw-s 00000000 00:1b {segment.stat().st_ino} {segment}\n")
    monkeypatch.setattr(os, "geteuid", lambda: segment.stat().st_uid + 1)
    assert remove_segments({}, tmp_path, maps) == []
    assert segment.exists()
