"""Starting ranks: made-up environments and launchers, and real runs of the installed mpirun."""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.environment import THREADS, mpi_environment, timeout_scale
from harness.programs import Program

from dbmpi.cli import launch
from dbmpi.errors import ToldElsewhere, UserError
from dbmpi.machine import launcher, mpi_library
from dbmpi.machine.launcher import LaunchCommand, check_world, compose
from dbmpi.machine.mpi_library import Mpi, find_mpi, protocol
from dbmpi.machine.rank_variables import launched

OPEN_MPI = Mpi("Open MPI v5.0.11", "/mpi/lib/libmpi.so.40", "/mpi/bin/mpirun")
MPICH = Mpi("MPICH 5.0.2", "/mpi/lib/libmpi.so.12", "/mpi/bin/mpiexec.hydra")
TRAIN = ("-m", "dbmpi", "train", "a b.toml")

# As they were seen under Slurm 22.05, Open MPI 5.0 and MPICH 5.0.
BATCH_BODY = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "3", "SLURM_PROCID": "0", "SLURM_TASKS_PER_NODE": "2,1"}
STEP = BATCH_BODY | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1"}
SRUN_PMI2 = STEP | {"PMI_RANK": "0", "PMI_SIZE": "3", "PMI_JOBID": "1.0"}
SRUN_PMIX = STEP | {"PMIX_RANK": "0", "PMIX_NAMESPACE": "slurm.pmix.1.2"}
MPIRUN = {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"}
HYDRA = {"PMI_SIZE": "3", "PMI_RANK": "0", "MPI_LOCALNRANKS": "3", "MPI_LOCALRANKID": "0"}
ONE_OF_MPIRUN = MPIRUN | {"OMPI_COMM_WORLD_SIZE": "1"}
ONE_OF_HYDRA = HYDRA | {"PMI_SIZE": "1", "MPI_LOCALNRANKS": "1"}


@pytest.mark.parametrize(
    ("environment", "mebibytes", "warned"),
    [
        (HYDRA, 20, True),
        (HYDRA, 24, False),
        (HYDRA | {"MPI_LOCALRANKID": "1"}, 20, False),
        (HYDRA | {"MPI_LOCALNRANKS": "16"}, 64, True),
        (MPIRUN, 1, False),
        ({}, 1, False),
    ],
)
def test_warns_of_a_shared_memory_in_which_mpich_may_crash(environment, mebibytes, warned) -> None:
    warning = mpi_library.mpich_shortage(environment, mebibytes * 2**20)
    assert ("--shm-size" in warning) == warned


@pytest.mark.parametrize(
    ("environment", "ranks", "by"),
    [
        ({}, 1, ""),
        (BATCH_BODY, 1, ""),  # the batch script itself is no task
        (STEP | {"SLURM_STEP_ID": str(0xFFFFFFFB)}, 1, ""),
        (STEP, 3, "srun"),  # srun --mpi=none
        (SRUN_PMI2, 3, "srun"),
        (SRUN_PMIX, 3, "srun"),
        (MPIRUN, 3, "mpirun"),
        (HYDRA, 3, "mpiexec"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "2"} | MPIRUN, 3, "mpirun"),  # one daemon on each of two nodes
        (STEP | {"SLURM_STEP_NUM_TASKS": "2"} | HYDRA, 3, "mpiexec"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "2"} | ONE_OF_MPIRUN, 1, "mpirun"),
        (SRUN_PMI2 | ONE_OF_HYDRA, 1, "mpiexec"),
    ],
)
def test_who_started_how_many(environment: dict[str, str], ranks: int, by: str) -> None:
    found, name, place = launched(environment)
    assert (found, place) == (ranks, 0)
    assert name.startswith(by)


@pytest.mark.parametrize("environment", [STEP, SRUN_PMI2, SRUN_PMIX, MPIRUN, HYDRA])
def test_worlds_of_one_rank_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(UserError, match="started 3 ranks") as caught:
        check_world(1, environment, library="Open MPI v5.0.11")
    assert not isinstance(caught.value, ToldElsewhere)
    assert "\n" not in str(caught.value)
    check_world(3, environment)
    check_world(1, environment | {"DBMPI_ALONE": "1"})


@pytest.mark.parametrize("environment", [{}, BATCH_BODY, ONE_OF_MPIRUN, ONE_OF_HYDRA])
def test_one_rank_that_was_meant_is_accepted(environment: dict[str, str]) -> None:
    check_world(1, environment)


def test_only_the_first_of_them_speaks() -> None:
    for environment in (
        MPIRUN | {"OMPI_COMM_WORLD_RANK": "2"},
        HYDRA | {"PMI_RANK": "1"},
        STEP | {"SLURM_PROCID": "1"},
    ):
        with pytest.raises(ToldElsewhere):
            check_world(1, environment, library="")


@pytest.mark.parametrize(("library", "fix"), [("Open MPI v5.0", "srun --mpi=pmix"), ("MPICH 5.0", "srun --mpi=pmi2")])
def test_the_fix_fits_the_library(library: str, fix: str) -> None:
    with pytest.raises(UserError, match=fix):
        check_world(1, SRUN_PMI2, library=library)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Open MPI v5.0.11, package: ...", "openmpi"),
        ("mpirun (Open MPI) 4.1.4", "openmpi"),
        ("MPICH Version:      5.0.2", "hydra"),
        ("HYDRA build details:", "hydra"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.9", "hydra"),
        ("MVAPICH Version:   3.0", "hydra"),
        ("", ""),
        ("Microsoft MPI", ""),
    ],
)
def test_kinds_of_mpi(said: str, expected: str) -> None:
    assert protocol(said) == expected


def test_open_mpis_command() -> None:
    command = compose(OPEN_MPI, 3, TRAIN, environment={"DBMPI_X": "1", "HOME": "/h"}, cores=2, user=0)
    assert command.argv == (
        *("/mpi/bin/mpirun", "--oversubscribe", "--bind-to", "none", "-x", "DBMPI_PROGRESS", "-x", "DBMPI_X"),
        *("-n", "3", sys.executable, *TRAIN),
    )
    assert command.settings["OMPI_ALLOW_RUN_AS_ROOT"] == command.settings["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] == "1"
    assert command.settings["OMPI_MCA_mpi_yield_when_idle"] == "1"
    assert command.settings["DBMPI_PROGRESS"] == "lines"
    settings = compose(OPEN_MPI, 2, TRAIN, environment={}, cores=2, user=1000).settings
    assert not {"OMPI_ALLOW_RUN_AS_ROOT", "OMPI_MCA_mpi_yield_when_idle"} & set(settings)


@pytest.mark.parametrize(("version", "known"), [("Open MPI v5.0.11", True), ("Open MPI v4.1.4", False)])
def test_an_option_that_open_mpi_4_does_not_know(version: str, known: bool) -> None:
    command = compose(Mpi(version, "", "mpirun"), 2, TRAIN, environment={}, columns=80, user=1000)
    assert ("--stream-buffering" in command.argv) == known


@pytest.mark.parametrize(
    ("version", "ranks", "own", "environment", "set_by_us"),
    [
        ("Open MPI v5.0.11", 2, [], {}, True),
        ("Open MPI v10.1.0", 2, [], {}, True),
        ("Open MPI v4.1.4", 2, [], {}, False),
        ("MPICH 5.0.2", 2, [], {}, False),
        ("Open MPI v5.0.11", 1, [], {}, False),
        ("Open MPI v5.0.11", 2, ["--with-ft", "none"], {}, False),
        ("Open MPI v5.0.11", 2, [], {"OMPI_MCA_mpi_ft_enable": "false"}, False),
    ],
)
def test_ranks_outlive_each_other_where_the_mpi_can_and_the_user_has_not_chosen(
    version: str, ranks: int, own: list[str], environment: dict[str, str], set_by_us: bool
) -> None:
    mpi = Mpi(version, "", "mpirun")
    argv = compose(mpi, ranks, TRAIN, mpi_arguments=own, environment=environment, outlive=True).argv
    assert ("ulfm" in argv) == set_by_us
    assert "ulfm" not in compose(mpi, ranks, TRAIN, environment=environment).argv


def test_hydras_command() -> None:
    command = compose(MPICH, 3, TRAIN, environment={}, columns=90, user=0)
    assert command.argv == ("/mpi/bin/mpiexec.hydra", "-n", "3", sys.executable, *TRAIN)
    assert command.settings == {"DBMPI_PROGRESS": "bar", "COLUMNS": "90"}


def test_what_the_user_set_stays() -> None:
    environment = {"OMPI_MCA_osc": "rdma", "DBMPI_PROGRESS": "none", "COLUMNS": "40"}
    settings = compose(OPEN_MPI, 3, TRAIN, environment=environment, columns=90, user=1000).settings
    assert settings == {"COLUMNS": "90"}, "but the terminal's width is known better here"


@pytest.mark.parametrize("own", [["--bind-to", "core"], ["--bind-to=numa"], ["--map-by", "slot:PE=2"]])
def test_the_users_binding_takes_the_place_of_ours(own: list[str]) -> None:
    argv = compose(OPEN_MPI, 3, TRAIN, mpi_arguments=own, environment={}).argv
    assert "none" not in argv
    place = argv.index(own[0])
    assert list(argv[place : place + len(own)]) == own
    assert place + len(own) == argv.index(sys.executable)


def test_ucx_is_left_out_only_where_there_is_no_adapter(tmp_path: Path) -> None:
    assert mpi_library.openmpi_settings(tmp_path / "missing") == {"OMPI_MCA_osc": "^ucx"}
    assert mpi_library.openmpi_settings(tmp_path) == {"OMPI_MCA_osc": "^ucx"}
    (tmp_path / "mlx5_0").mkdir()
    assert mpi_library.openmpi_settings(tmp_path) == {}


def test_the_command_can_be_pasted_into_a_shell() -> None:
    command = compose(MPICH, 1, ("-m", "dbmpi", "train", "it's; rm *"), environment={"COLUMNS": ""}, columns=80)
    words = shlex.split(str(command))
    assert words[0] == "env"
    assert set(words[1:3]) == {"DBMPI_PROGRESS=bar", "COLUMNS=80"}
    assert tuple(words[3:]) == command.argv


def test_munge_is_left_out_where_the_package_index_has_brought_open_mpi(tmp_path, monkeypatch) -> None:
    """Slurm offers it to each rank; an Open MPI of the site may have it."""
    monkeypatch.setenv("OMPI_MCA_osc", "^ucx")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("PMIX_SECURITY_MODE", "munge,native")
    mpi_library.prepare()
    assert os.environ["PMIX_SECURITY_MODE"] == "munge,native"
    program(tmp_path / "lib" / "libmpi.so.40", "")
    mpi_library.prepare()
    assert os.environ["PMIX_SECURITY_MODE"] == "native"
    monkeypatch.setenv("PMIX_SECURITY_MODE", "munge")
    mpi_library.prepare()
    assert os.environ["PMIX_SECURITY_MODE"] == "munge"


def test_memory_of_killed_ranks_is_removed_after_a_requeue(tmp_path: Path) -> None:
    old, new, other = (tmp_path / name for name in ("mpich_shm_1_0", "mpich_shm_2_0", "sm_segment.1"))
    for path in (old, new, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (time.time() - 100, time.time() - 100))
    assert mpi_library.remove_stale_segments({"SLURM_JOB_ID": "17"}, tmp_path) == []
    assert mpi_library.remove_stale_segments({"SLURM_RESTART_COUNT": "1"}, tmp_path) == [old]
    assert sorted(tmp_path.iterdir()) == [new, other]


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{text}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def open_mpi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python whose MPI is an Open MPI in tmp_path/mpi, with an empty PATH."""
    library = tmp_path / "mpi" / "lib" / "libmpi.so.40"
    monkeypatch.setattr(mpi_library, "loaded_library", lambda: ("Open MPI v5.0", str(library)))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    return tmp_path


def test_mpirun_next_to_the_library_comes_first(open_mpi: Path) -> None:
    program(open_mpi / "path" / "mpirun", "mpirun (Open MPI) 4.1")
    right = program(open_mpi / "mpi" / "bin" / "mpirun", "mpirun (Open MPI) 5.0")
    assert find_mpi() == Mpi("Open MPI v5.0", str(open_mpi / "mpi" / "lib" / "libmpi.so.40"), str(right))


def test_an_mpirun_of_another_kind_is_passed_over(open_mpi: Path) -> None:
    program(open_mpi / "venv" / "bin" / "mpirun", "HYDRA build details:")
    program(open_mpi / "path" / "mpirun", "")
    right = program(open_mpi / "path" / "mpirun.openmpi", "mpirun (Open MPI) 5.0")
    assert find_mpi().mpirun == str(right)


def test_without_a_fitting_mpirun_the_user_hears_what_was_found(open_mpi: Path) -> None:
    wrong = program(open_mpi / "path" / "mpirun", "HYDRA build details:")
    with pytest.raises(UserError, match="no mpirun belongs to this Python's MPI") as caught:
        find_mpi()
    assert str(wrong) in str(caught.value)
    assert "pip install" in str(caught.value)
    with pytest.raises(UserError, match="of another kind"):
        find_mpi(str(wrong))
    with pytest.raises(UserError, match="no such program"):
        find_mpi(str(open_mpi / "missing"))


def test_an_mpi_that_cannot_be_loaded_is_the_users_to_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mpi4py.py").write_text("raise RuntimeError('cannot load MPI library')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match=r"cannot load MPI library.*pip install"):
        find_mpi()


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    launch.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-n", "2"], "nothing to run"),
        (["-n", "2", "--"], "nothing to run"),
        (["-n", "0", "--", "train"], "launch -n 0: expected at least 1"),
        (["-n", "2", "--restarts", "-1", "--", "train"], "launch --restarts -1: expected at least 0"),
        (["-n", "2", "--mpi-args", "'open", "--", "train"], "--mpi-args"),
    ],
)
def test_mistakes_are_explained(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*MPIRUN, *HYDRA, *STEP):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=message):
        launch.run(parsed(*words))


def test_launch_under_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in MPIRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="itself started 3 times by mpirun"):
        launch.run(parsed("-n", "2", "--", "train", "x.toml"))


@pytest.mark.parametrize("dashes", [["--"], []])
def test_arguments_reach_the_command_as_they_are(dashes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train", "a b.toml", "--set", "optimizer.epochs=5", "-n", "7"]
    assert parsed("-n", "2", *dashes, *words).command[len(dashes) :] == words
    assert parsed("-n", "2", *dashes, *words).ranks == 2


@pytest.mark.parametrize("given", [None, "/somewhere"])
def test_a_session_of_open_mpi_has_a_place_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given) -> None:
    """Open MPI's own choice, by process id, may be what a killed mpirun has left behind."""
    fake, found = tmp_path / "mpirun", tmp_path / "found"
    fake.write_text(f'#!/bin/sh\necho "$PRTE_MCA_prte_tmpdir_base" >{found}\n[ -w "$PRTE_MCA_prte_tmpdir_base" ]\n')
    fake.chmod(0o755)
    name = "PRTE_MCA_prte_tmpdir_base"
    monkeypatch.delenv(name, raising=False) if given is None else monkeypatch.setenv(name, given)
    code = launcher.run(Mpi("Open MPI v5.0.11", "", str(fake)), LaunchCommand((str(fake),), {})).code
    place = Path(found.read_text().strip())
    if given is None:
        assert code == 0
        assert not place.exists()  # any more
    else:
        assert place == Path(given)


@pytest.mark.parametrize(("last", "code"), [("", 75), ('rm "$DBMPI_UNFINISHED"', 0), ("exit 3", 3)])
def test_an_mpirun_that_has_cut_its_ranks_off_is_not_believed(tmp_path: Path, capfd, last: str, code: int) -> None:
    """Open MPI's, when it loses a host."""
    fake = tmp_path / "mpirun"
    fake.write_text(f'#!/bin/sh\ntouch "$DBMPI_UNFINISHED"\n{last}\n')
    fake.chmod(0o755)
    assert launcher.run(Mpi("Open MPI v5.0.11", "", str(fake)), LaunchCommand((str(fake),), {})).code == code
    assert ("the first rank has not come to its end" in capfd.readouterr().err) == (code == 75)


# From here on with the mpirun of this environment.


RANK = """
import json, os, signal, sys, time
from mpi4py import MPI
rank, folder = MPI.COMM_WORLD.rank, sys.argv[1]
got = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: got.append(number))
open(os.path.join(folder, f"ready{rank}"), "w").close()
while not got:
    time.sleep(0.01)
time.sleep(float(sys.argv[2]))  # writes a checkpoint, so to say
open(os.path.join(folder, f"done{rank}"), "w").close()
MPI.Finalize()
os._exit(128 + got[0])
"""
START = """
import os, sys
from dbmpi.machine import mpi_library as installation, launcher
mpi = installation.find_mpi()
command = launcher.compose(mpi, 2, ("-c", sys.argv[1], *sys.argv[2:]), environment=os.environ, cores=1)
sys.exit(launcher.run(mpi, command).code)
"""


class Launched:
    """Two ranks under `launcher.run`, ready for signals; `seconds` is what they take to end in peace."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder = folder
        argv = [sys.executable, "-c", START, RANK, str(folder), str(seconds)]
        self.program = Program(argv, directory=folder, env=mpi_environment())

    def wait_until_ready(self) -> None:
        ready = [self.folder / f"ready{rank}" for rank in range(2)]
        self.program.wait_until(lambda: all(file.exists() for file in ready) or self.ended(), 30 * timeout_scale())
        assert all(file.exists() for file in ready), self.said()

    def wait(self, seconds: float) -> int:
        assert self.program.wait(seconds * timeout_scale()), self.said()
        code = self.program.returncode
        assert code is not None
        return code

    def ended(self) -> bool:
        return self.program.returncode is not None

    def done(self) -> list[bool]:
        return [(self.folder / f"done{rank}").exists() for rank in range(2)]

    def said(self) -> str:
        return self.program.stdout + self.program.stderr


@pytest.fixture
def started(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Launched]:
    run = Launched(tmp_path, request.param)
    try:
        run.wait_until_ready()
        yield run
    finally:
        run.program.end()


@pytest.mark.parametrize("started", [1.5], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.slow
def test_a_signal_leaves_the_ranks_time_for_a_checkpoint(started: Launched, number: signal.Signals) -> None:
    started.program.signal(number)
    assert started.wait(30) == 128 + number, started.said()
    assert started.done() == [True, True], started.said()


@pytest.mark.parametrize("started", [60.0], indirect=True)
@pytest.mark.slow
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGUSR2])
def test_a_second_signal_ends_at_once(started: Launched, second: signal.Signals) -> None:
    started.program.signal(signal.SIGINT)
    time.sleep(0.2)
    started.program.signal(signal.SIGTERM)  # together with the first: changes nothing
    time.sleep(1.2)
    assert started.program.returncode is None, started.said()
    started.program.signal(second)
    assert started.wait(20) == 128 + signal.SIGINT
    assert started.done() == [False, False]
    assert started.program.wait_until(lambda: not started.program.processes(), 10 * timeout_scale()), (
        "a process was left over"
    )


@pytest.mark.parametrize("started", [60.0], indirect=True)
@pytest.mark.slow
def test_no_rank_outlives_a_launcher_that_is_killed(started: Launched) -> None:
    started.program.signal(signal.SIGKILL)
    assert started.wait(10) == -signal.SIGKILL
    assert started.program.wait_until(lambda: not started.program.processes(), 15 * timeout_scale()), (
        "a rank was left over"
    )


def run_dbmpi(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dbmpi", *words],
        env={name: value for name, value in mpi_environment().items() if name not in THREADS} | variables,
        capture_output=True,
        text=True,
        timeout=60 * timeout_scale(),
        check=False,
    )


@pytest.mark.slow
def test_the_exit_code_of_the_ranks_is_returned() -> None:
    done = run_dbmpi("launch", "-n", "2", "--", "train", "missing.toml")
    assert done.returncode == 2
    assert done.stderr.count("missing.toml: no such configuration file") == 1


@pytest.mark.slow
def test_training_survives_a_death_unless_that_is_turned_off() -> None:
    tolerant = find_mpi().has_fault_tolerance
    for words, expected in ((["train", "x.toml"], tolerant), (["inspect", "x"], False), (["sleep", "1"], False)):
        done = run_dbmpi("launch", "-n", "2", "--dry-run", "--", *words)
        assert ("--with-ft ulfm" in done.stdout) == expected, done.stdout
    done = run_dbmpi("launch", "-n", "2", "--dry-run", "--no-fault-tolerance", "--", "train", "x.toml")
    assert done.returncode == 0
    assert "--with-ft" not in done.stdout


def test_dry_run_starts_nothing() -> None:
    done = run_dbmpi("launch", "-n", "5", "--dry-run", "--mpi-args=--version", "--", "train", "missing.toml")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"--version {sys.executable} -m dbmpi train missing.toml\n")
    assert " -n 5 " in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_doctor_finds_this_environment_in_order() -> None:
    done = run_dbmpi("doctor", "--json")
    answer = json.loads(done.stdout)
    by_name = {finding["what"]: finding for finding in answer["findings"]}
    assert answer["ok"] == (done.returncode == 0), answer
    assert done.returncode == 0, answer
    assert by_name["two ranks"]["status"] == "ok", answer
    assert by_name["MPI"]["found"].startswith("mpi4py ")
    survived = "a training goes on" in by_name["a death"]["found"]
    assert (survived, by_name["a death"]["status"]) == (find_mpi().has_fault_tolerance, "ok")


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_doctor_finds_what_is_broken(tmp_path: Path) -> None:
    (tmp_path / "h5py.py").write_text("raise ImportError('libhdf5.so: cannot open shared object file')")
    done = run_dbmpi("doctor", PYTHONPATH=str(tmp_path), NUMBA_DISABLE_JIT="1", OMP_NUM_THREADS="4096")
    assert done.returncode == 1, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    found = {line[8:24].strip(): line for line in lines}
    assert found["h5py"].startswith("broken")
    assert "libhdf5.so" in found["h5py"]
    assert found["Numba"].startswith("ok"), "kernels are compiled all the same"
    assert "OMP_NUM_THREADS" in found["cores"]
    assert found["cores"].startswith("note")
    assert last == "broken: h5py"


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_doctor_under_the_launcher_looks_at_the_world() -> None:
    done = run_dbmpi("launch", "-n", "2", "--", "doctor")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("one world of 2 ranks") == 1


@pytest.mark.slow
def test_ranks_that_are_no_world_are_told_so() -> None:
    """A launcher that says it started three ranks, to a Python whose MPI hears nothing of it."""
    program = "from dbmpi.mpi import world; world.start()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=mpi_environment() | STEP,
        capture_output=True,
        text=True,
        timeout=60 * timeout_scale(),
        check=False,
    )
    assert "srun started 3 ranks, but each of them is a world of its own" in done.stderr


def test_the_check_of_two_ranks_notices_wrong_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exchange behind `doctor` must be able to fail: a window that loses what is put into it."""
    from mpi4py import MPI

    from dbmpi.mpi import transport
    from dbmpi.mpi.window import Window

    for shared in (True, False):
        assert transport.measure(MPI.COMM_SELF, "rma", 0, 0, shared=shared).correct
    monkeypatch.setattr(Window, "put", lambda *_: None)
    assert not transport.measure(MPI.COMM_SELF, "rma", 0, 0, shared=True).correct


MPICH_TEXT = "MPICH Version:      5.0.2\nMPICH configure:    --with-device=ch4:ucx,ofi --with-pm=hydra\n"


@pytest.mark.parametrize(
    ("library", "environment", "refused"),
    [
        (MPICH_TEXT, {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, True),
        (MPICH_TEXT, {"PMI_SIZE": "2", "PMI_RANK": "0", "MPI_LOCALNRANKS": "2"}, False),
        (MPICH_TEXT, {"OMPI_COMM_WORLD_SIZE": "1"}, False),
        (MPICH_TEXT + "--with-pmix=/usr", {"OMPI_COMM_WORLD_SIZE": "2"}, False),
        ("Open MPI v5.0.11, package: ...", {"OMPI_COMM_WORLD_SIZE": "2"}, False),
    ],
)
def test_a_launcher_that_cannot_start_this_mpi_is_refused(
    library: str, environment: dict[str, str], refused: bool
) -> None:
    if not refused:
        launcher.check_launcher(library, environment)
        return
    with pytest.raises(UserError, match=r"the MPI of this Python is MPICH 5\.0\.2, .*: dbmpi launch -n 2 --"):
        launcher.check_launcher(library, environment)
    with pytest.raises(ToldElsewhere):
        launcher.check_launcher(library, environment | {"OMPI_COMM_WORLD_RANK": "1"})
