"""Threads of a rank: made-up environments and machines, and what a fresh process really does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmpi.errors import UserError
from dbmpi.machine import threads
from dbmpi.machine.rank_variables import expand, ranks_on_node
from dbmpi.machine.threads import Node, decide

# As Slurm 22.05 and the launchers of Open MPI 5 and MPICH 5 set them.
BATCH_BODY = {
    "SLURM_JOB_ID": "1",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "0",
    "SLURM_NODEID": "0",
    "SLURM_TASKS_PER_NODE": "2,1",
}
STEP = BATCH_BODY | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 1),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 4),
        ({"MPI_LOCALNRANKS": "3"}, 3),
        (BATCH_BODY, 1),
        (STEP, 2),
        (STEP | {"SLURM_NODEID": "1"}, 1),
        (STEP | {"SLURM_NODEID": "7"}, 1),
        (STEP | {"SLURM_STEP_ID": str(0xFFFFFFFA)}, 1),  # the interactive shell of salloc
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "MPI_LOCALNRANKS": "5"}, 5),  # hydra's daemons are the step
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "many"}, 1),
    ],
)
def test_ranks_on_node(environment: dict[str, str], expected: int) -> None:
    assert ranks_on_node(environment) == expected


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 5)), min_size=1, max_size=8))
def test_expands_counts_per_node(groups: list[tuple[int, int]]) -> None:
    text = ",".join(f"{count}(x{times})" if times > 1 else str(count) for count, times in groups)
    assert expand(text) == [count for count, times in groups for _ in range(times)]


@pytest.mark.parametrize("text", ["", "x", "4(x)", "4(x2", "-1", "4;3"])
def test_refuses_lists_of_counts_that_are_none(text: str) -> None:
    assert expand(text) == []


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300))
def test_never_more_threads_than_cores_nor_fewer_than_one(ranks: int, cores: int, mine: int) -> None:
    decision = decide({}, Node(ranks, cores, min(mine, cores)))
    assert decision.threads >= 1
    assert decision.threads == 1 or ranks * decision.threads <= cores
    assert decision.threads <= max(1, mine)
    assert not decision.oversubscribed
    assert decision.settings == dict.fromkeys(threads.VARIABLES, str(decision.threads)) | threads.PATIENCE


def test_cores_are_shared_out() -> None:
    assert decide({}, Node(3, 8, 8)).threads == 2
    assert decide({}, Node(1, 8, 8)).threads == 8
    assert decide({}, Node(9, 8, 8)).threads == 1


def test_a_binding_limits_and_is_named() -> None:
    decision = decide({}, Node(2, 16, 1))
    assert decision.threads == 1
    assert "--bind-to none" in decision.line


def test_slurm_says_how_many() -> None:
    assert decide({"SLURM_CPUS_PER_TASK": "4"}, Node(2, 16, 16)).threads == 4
    # More ranks than tasks, or a group of a heterogeneous job: there are not as many as it says.
    assert decide({"SLURM_CPUS_PER_TASK": "4"}, Node(8, 16, 16)).threads == 2


def test_what_the_user_set_stays() -> None:
    decision = decide({"OPENBLAS_NUM_THREADS": "3", "NUMBA_NUM_THREADS": ""}, Node(2, 8, 8))
    assert "OPENBLAS_NUM_THREADS" not in decision.settings
    assert decision.settings["NUMBA_NUM_THREADS"] == "4"  # empty is not set
    assert "OPENBLAS_NUM_THREADS=3" in decision.line
    assert not decision.oversubscribed


def test_idle_threads_sleep_unless_the_user_wants_them_awake() -> None:
    assert decide({}, Node(1, 8, 8)).settings["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "OMP_WAIT_POLICY" not in decide({"OMP_WAIT_POLICY": "ACTIVE"}, Node(1, 8, 8)).settings


@pytest.mark.parametrize("text", ["2", "2,4", " 2 "])
def test_omp_num_threads_counts_for_the_others(text: str) -> None:
    decision = decide({"OMP_NUM_THREADS": text}, Node(2, 8, 8))
    assert decision.threads == 2
    assert "OMP_NUM_THREADS" not in decision.settings
    assert decision.settings["OPENBLAS_NUM_THREADS"] == decision.settings["NUMBA_NUM_THREADS"] == "2"


def test_says_that_threads_are_too_many() -> None:
    decision = decide({"OPENBLAS_NUM_THREADS": "8", "MKL_NUM_THREADS": "1"}, Node(4, 8, 8))
    assert decision.oversubscribed
    assert "4 ranks x 8 threads on 8 cores" in decision.line
    assert "unset OPENBLAS_NUM_THREADS" in decision.line
    assert "\n" not in decision.line


def test_nonsense_is_shown_and_left_alone() -> None:
    decision = decide({"OMP_NUM_THREADS": "all"}, Node(2, 8, 8))
    assert decision.threads == 4
    assert "OMP_NUM_THREADS" not in decision.settings
    assert "OMP_NUM_THREADS=all" in decision.line


def test_hardware_threads_of_a_core_count_once(tmp_path: Path) -> None:
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(siblings + "\n")
    assert threads.physical_cores(range(4), tmp_path) == 2
    assert threads.physical_cores([0, 2], tmp_path) == 1
    assert threads.physical_cores([0, 17], tmp_path) == 2  # nothing is known of 17


def test_quota_is_the_lowest_on_the_way_up(tmp_path: Path) -> None:
    (tmp_path / "job" / "step").mkdir(parents=True)
    membership = tmp_path / "membership"
    membership.write_text("1:cpuset:/elsewhere\n0::/job/step\n")
    assert threads.cpu_quota(tmp_path, membership) is None
    (tmp_path / "job" / "step" / "cpu.max").write_text("max 100000\n")
    assert threads.cpu_quota(tmp_path, membership) is None
    (tmp_path / "job" / "cpu.max").write_text("250000 100000\n")
    assert threads.cpu_quota(tmp_path, membership) == 2.5
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert threads.cpu_quota(tmp_path, membership) == 1.5
    membership.write_text("4:memory:/job\n")
    assert threads.cpu_quota(tmp_path, membership) is None
    assert threads.cpu_quota(tmp_path, tmp_path / "missing") is None


def fresh(program: str, **variables: str) -> str:
    """Run a program in a process without any of the variables, and return what it prints."""
    ours = {*threads.VARIABLES, *threads.PATIENCE}
    kept = {name: value for name, value in os.environ.items() if name not in ours and "SLURM" not in name}
    done = subprocess.run(
        [sys.executable, "-c", program], env=kept | variables, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_numpy_and_numba_obey() -> None:
    program = """
import sys
from dbmpi.errors import UserError
from dbmpi.machine import threads
assert "numpy" not in sys.modules
first = threads.prepare()
assert threads.prepare() is first, "a second call sees its own settings as the user's"
import numba, os
print(os.environ["OPENBLAS_NUM_THREADS"], numba.config.NUMBA_NUM_THREADS, first.threads)
assert not {*threads.VARIABLES, *threads.PATIENCE} & set(threads.without_prepared(os.environ))
"""
    assert fresh(program, OMPI_COMM_WORLD_LOCAL_SIZE="100000").split() == ["1", "1", "1"]


@pytest.mark.parametrize("name", ["train", "minimize", "ParameterServer"])
@pytest.mark.slow
def test_public_functions_prepare_when_they_are_imported(name: str) -> None:
    program = f"""
import os, sys
import dbmpi
assert "numpy" not in sys.modules
from dbmpi import {name}
import numba
print(os.environ["OPENBLAS_NUM_THREADS"], numba.config.NUMBA_NUM_THREADS)
"""
    assert fresh(program, OMPI_COMM_WORLD_LOCAL_SIZE="100000").split() == ["1", "1"]


def test_what_a_process_inherits_from_dbmpi_is_no_wish_of_the_user() -> None:
    program = """
import os, subprocess, sys
from dbmpi.errors import UserError
from dbmpi.machine import threads
threads.prepare()
if len(sys.argv) == 1:
    several = os.environ | {"OMPI_COMM_WORLD_LOCAL_SIZE": "100000"}
    program = "import os; from dbmpi.machine import threads; chosen = threads.prepare(); " \
        "print(chosen.threads, os.environ['OMP_NUM_THREADS'], chosen.given, 'set' in chosen.line)"
    subprocess.run([sys.executable, "-c", program], env=several, check=True)
"""
    assert fresh(program).split() == ["1", "1", "{}", "False"]


def test_a_mark_that_is_none_is_no_trouble() -> None:
    for mark in ("", "[", "[1]", "1"):
        assert threads.without_prepared({threads.MARK: mark, "OMP_NUM_THREADS": "3"}) == {"OMP_NUM_THREADS": "3"}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_tells_a_binding_by_the_launcher_from_a_share_of_the_job(tmp_path: Path) -> None:
    """A rank on one core under a daemon on two may not use the other; if both are on one, there is only one."""
    program = "import os; from dbmpi.machine import threads; n = threads.this_node(os.environ); print(n.cores, n.mine)"
    cpus = sorted(os.sched_getaffinity(0))[:2]
    if threads.physical_cores(cpus) < 2:
        pytest.skip("needs two cores")
    launcher = tmp_path / "daemon.py"
    launcher.write_text(f"""
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(15, b"prterun")  # PR_SET_NAME
daemon, rank = (list(map(int, text.split(","))) for text in sys.argv[1:])
os.sched_setaffinity(0, daemon)
subprocess.run([sys.executable, "-c", {program!r}], preexec_fn=lambda: os.sched_setaffinity(0, rank), check=True)
""")

    def node(daemon: list[int], rank: list[int]) -> list[int]:
        done = subprocess.run(
            [sys.executable, str(launcher), ",".join(map(str, daemon)), ",".join(map(str, rank))],
            env=dict(os.environ) | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            capture_output=True,
            text=True,
            check=True,
        )
        return [int(number) for number in done.stdout.split()]

    assert node(cpus, cpus[:1]) == [2, 1]
    assert node(cpus[:1], cpus[:1]) == [1, 1]
    assert node(cpus, cpus) == [2, 2]


@pytest.mark.parametrize("name", threads.VARIABLES)
def test_more_threads_than_processors_are_refused_with_the_fix(name: str) -> None:
    threads.check_processors({name: "2"}, 2)
    threads.check_processors({}, 1)
    threads.check_processors({name: "many"}, 1)
    with pytest.raises(UserError) as caught:
        threads.check_processors({name: "3"}, 2)
    assert f"{name}=3: this rank may use 2 processors" in str(caught.value)
    assert f"unset {name}" in str(caught.value)
    threads.check_processors({name: "3", "DBMPI_OVERSUBSCRIBE": "1"}, 2)
    # What dbmpi has set itself is not the user's.
    threads.check_processors({name: "3", threads.MARK: f'{{"{name}": "3"}}'}, 2)
