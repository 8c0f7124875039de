"""The harness itself: tests that fail, hang and crash in a session of their own are seen, and spoil no others."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

from harness import launching
from harness.environment import timeout_scale
from harness.launching import Completed, Launch
from harness.programs import shared_memory_of

pytestmark = pytest.mark.timeout(200)

INI = f"[pytest]\npythonpath = {Path(__file__).parent.parent}\n"
CONFTEST = "pytest_plugins = ['harness.plugin']\n"
SCALE = {"DBMPI_TEST_TIMEOUT_SCALE": "1"}  # also where this session's own is larger: some limits are waited for
UP = 60 * timeout_scale()
"""Seconds in which a program must have started."""

HEAD = """
import atexit, ctypes, os, signal, threading, time
import pytest
pytestmark = pytest.mark.parallel([2])
hangs = pytest.mark.parallel([2], timeout=2)
"""
HELD = """
def hold_the_interpreter():
    import ctypes
    mutex = ctypes.create_string_buffer(64)  # of zeros: one that waits for itself
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)
"""
"""Hangs in compiled code that lets no other thread of Python run, nor a signal's handler."""
AFTER_FAILURE = "from harness import rank\nrank.AFTER_FAILURE_SECONDS = 2.0\n"
AT_THE_END = "from harness import rank\nrank.END_SECONDS = 6.0\n"
GRACE = "from harness import watchdog\nwatchdog._GRACE_SECONDS = 2.0\n"
"""Limits for sessions in which they are waited for; all others are those of every session, for slow machines."""


@dataclass(frozen=True)
class Case:
    outcome: str
    text: str


@dataclass(frozen=True)
class Session:
    done: Completed
    cases: dict[str, Case]

    def outcomes(self) -> dict[str, str]:
        return {name: case.outcome for name, case in self.cases.items()}


@pytest.fixture
def nested(launch: Launch, tmp_path: Path):
    """Runs a session of the given tests with short time limits, and reads its outcomes."""

    def run(source: str, *arguments: str, ranks: int | None = None, limits: str = "") -> Session:
        (tmp_path / "pytest.ini").write_text(INI)
        (tmp_path / "conftest.py").write_text(CONFTEST + limits)
        (tmp_path / "test_nested.py").write_text(source)
        argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "--junitxml=cases.xml"]
        done = launch(ranks, [*argv, *arguments], 180.0, SCALE, tmp_path)
        return Session(done, _cases(tmp_path / "cases.xml"))

    return run


def _cases(path: Path) -> dict[str, Case]:
    cases = {}
    for element in ElementTree.parse(path).iter("testcase") if path.exists() else ():
        child = next((c for c in element if c.tag in ("failure", "error", "skipped")), None)
        text = "" if child is None else f"{child.get('message')}\n{child.text}"
        outcome = "passed" if child is None else child.tag
        cases[str(element.get("name"))] = Case(outcome, text)
    return cases


def test_failures_are_told_by_rank_and_spoil_no_other_test(nested):
    session = nested(
        HEAD
        + """
@pytest.mark.parallel([1, 2, 3])
def test_passes(comm, ranks):
    assert comm.size == ranks

def test_fails_on_rank_1(comm):
    print("printed by", comm.rank)
    assert comm.rank == 0, "not on rank one"

def test_fails_everywhere(comm):
    assert comm.size == 7

@pytest.fixture
def broken_setup(comm):
    if comm.rank == 1:
        raise RuntimeError("setup of rank one")

def test_setup(broken_setup):
    pass

def test_skips(comm):
    pytest.skip("no reason")

def test_skips_on_one_rank(comm):
    if comm.rank == 0:
        pytest.skip("only here")

@pytest.mark.xfail(strict=True)
def test_expected(comm):
    assert False

def test_directories(comm, shared_path, tmp_path):
    (shared_path / str(comm.rank)).touch()
    (tmp_path / "mine").touch()
    comm.Barrier()
    assert len(list(shared_path.iterdir())) == 2
    assert len(list(tmp_path.iterdir())) == 1
    assert len(set(comm.allgather(str(tmp_path)))) == 2

def test_not_parallel_after_all(request):
    pass

def as_the_library(comm):
    return eval("comm.allreduce(1)", {"__name__": "dbmpi.somewhere", "comm": comm})

def test_the_library_may_not_pickle(comm):
    as_the_library(comm)

def test_itself_may(comm):
    assert comm.allreduce(1) == 2
"""
    )
    assert session.outcomes() == {
        "test_passes[n1]": "passed",
        "test_passes[n2]": "passed",
        "test_passes[n3]": "passed",
        "test_fails_on_rank_1[n2]": "failure",
        "test_fails_everywhere[n2]": "failure",
        "test_setup[n2]": "error",
        "test_skips[n2]": "skipped",
        "test_skips_on_one_rank[n2]": "failure",
        "test_expected[n2]": "skipped",
        "test_directories[n2]": "passed",
        "test_not_parallel_after_all[n2]": "passed",
        "test_the_library_may_not_pickle[n2]": "failure",
        "test_itself_may[n2]": "passed",
    }, session.done.transcript
    assert session.done.returncode == 1
    assert "assert 1 == 0" in session.cases["test_fails_on_rank_1[n2]"].text
    assert "dbmpi.somewhere uses a method" in session.cases["test_the_library_may_not_pickle[n2]"].text
    assert "failed on rank 1 of 2" in session.done.stdout
    assert "failed on rank 0, 1 of 2" in session.done.stdout
    assert "printed by 1" in session.done.stdout
    assert "setup of rank one" in session.cases["test_setup[n2]"].text
    assert "rank 0 of 2: skipped\nrank 1 of 2: passed" in session.cases["test_skips_on_one_rank[n2]"].text
    assert not session.done.left


def test_hangs_end_with_the_stacks_of_all_ranks(nested):
    session = nested(
        HEAD
        + HELD
        + """
def test_before(comm):
    comm.Barrier()

@hangs
def test_one_rank_sleeps(comm):
    if comm.rank == 1:
        sleeps_for_ever()
    comm.Barrier()

def sleeps_for_ever():
    time.sleep(1000)

def test_between(comm):
    comm.Barrier()

@hangs
def test_waits_for_a_message_that_nobody_sends(comm):
    if comm.rank == 0:
        comm.Recv(bytearray(1), source=1)

@hangs
def test_in_compiled_code_with_the_interpreter_locked(comm):
    if comm.rank == 0:
        hold_the_interpreter()

def test_waits_for_a_rank_that_failed(comm):
    if comm.rank == 1:
        raise ValueError("the first cause")
    comm.Barrier()

@hangs
def test_halted(comm):
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    comm.Barrier()

def test_after(comm):
    comm.Barrier()
""",
        limits=AFTER_FAILURE,
    )
    assert session.outcomes() == {
        "test_before[n2]": "passed",
        "test_one_rank_sleeps[n2]": "failure",
        "test_between[n2]": "passed",
        "test_waits_for_a_message_that_nobody_sends[n2]": "failure",
        "test_in_compiled_code_with_the_interpreter_locked[n2]": "failure",
        "test_waits_for_a_rank_that_failed[n2]": "failure",
        "test_halted[n2]": "failure",
        "test_after[n2]": "passed",
    }, session.done.transcript
    sleeps = session.cases["test_one_rank_sleeps[n2]"]
    assert "is still running after 2 s: rank 0, 1 of 2" in sleeps.text
    assert "in sleeps_for_ever" in sleeps.text
    assert "stacks of rank 0 of 2" in sleeps.text
    recv = session.cases["test_waits_for_a_message_that_nobody_sends[n2]"].text
    assert "finished the test: rank 1 of 2" in recv
    assert "in test_waits_for_a_message_that_nobody_sends" in recv
    compiled = session.cases["test_in_compiled_code_with_the_interpreter_locked[n2]"].text
    assert "in test_in_compiled_code_with_the_interpreter_locked" in compiled
    waits = session.cases["test_waits_for_a_rank_that_failed[n2]"]
    assert "still waiting 2 s after another rank has failed: rank 0 of 2" in waits.text
    assert "ValueError: the first cause" in waits.text
    assert "in test_waits_for_a_rank_that_failed" in waits.text
    assert not session.done.left


def test_lost_ranks_are_failures(nested):
    session = nested(
        HEAD
        + """
@pytest.mark.parametrize("code", [0, 3])
def test_exits(comm, code):
    if comm.rank == 1:
        os._exit(code)
    comm.Barrier()

def test_killed(comm):
    if comm.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.Barrier()

def test_crashes(comm):
    if comm.rank == 1:
        ctypes.string_at(0)
    comm.Barrier()

def test_stopped(comm):
    if comm.rank == 1:
        pytest.exit("one rank has had enough")
    comm.Barrier()

def test_leaves_somebody_waiting_at_the_end(comm):
    if comm.rank == 1:
        atexit.register(time.sleep, 1000)
""",
        limits=AT_THE_END,
    )
    assert session.outcomes() == {
        "test_exits[n2-0]": "failure",
        "test_exits[n2-3]": "failure",
        "test_killed[n2]": "failure",
        "test_crashes[n2]": "failure",
        "test_stopped[n2]": "failure",
        "test_leaves_somebody_waiting_at_the_end[n2]": "error",
    }, session.done.transcript
    assert "Segmentation fault" in session.cases["test_crashes[n2]"].text
    assert "had enough" in session.cases["test_stopped[n2]"].text
    assert "do not end within 6 s" in session.cases["test_leaves_somebody_waiting_at_the_end[n2]"].text
    for name, case in session.cases.items():
        assert "is still running" not in case.text, name  # nobody has waited for the limit of the test
    assert not session.done.left


def test_a_module_that_one_rank_cannot_import(nested):
    session = nested(
        HEAD
        + """
if os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == "1":
    raise ImportError("missing on rank one")

def test_first(comm):
    pass

def test_second(comm):
    pass
"""
    )
    assert session.outcomes() == {"test_first[n2]": "failure", "test_second[n2]": "failure"}, session.done.transcript
    assert "missing on rank one" in session.cases["test_second[n2]"].text


@pytest.mark.parametrize("kind", ["parallel", "launch"])
def test_sigterm_ends_what_tests_have_started(launch, tmp_path, kind):
    (tmp_path / "pytest.ini").write_text(INI)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_nested.py").write_text(
        HEAD.replace("pytestmark", "parallel")
        + f"""
import sys
from pathlib import Path

UP = Path({str(tmp_path / "up")!r})

@parallel
def test_parallel(comm):
    UP.touch()
    time.sleep(1000)

def test_launch(launch):
    launch(2, [sys.executable, "-c", f"import time; open({{str(UP)!r}}, 'w'); time.sleep(1000)"])
"""
    )
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", kind, "test_nested.py"]
    session = launch.start(None, argv, cwd=tmp_path)
    assert session.wait_until((tmp_path / "up").exists, UP), session.stdout
    session.signal(signal.SIGTERM)
    done = launch.finish(session, 20)
    assert done.returncode == 128 + signal.SIGTERM, done.transcript
    assert not done.left


def test_the_first_failure_may_be_the_last(nested):
    session = nested(
        HEAD
        + """
def test_fails(comm):
    assert False

def test_sleeps(comm):
    time.sleep(1000)
""",
        "-x",
    )
    assert session.outcomes() == {"test_fails[n2]": "failure"}
    assert not session.done.left


def test_a_quick_session_has_a_cross_section(nested, tmp_path):
    files = {
        "unit": """
@pytest.mark.parametrize("variant", "ab")
def test_unit(variant): pass

@pytest.mark.slow
def test_slow(): pass
""",
        "parallel": """
@pytest.mark.parallel([1, 3, 6])
@pytest.mark.parametrize("variant", "ab")
def test_few_ranks(comm, variant): pass

@pytest.mark.parallel([1, 2, 3])
def test_two_ranks(comm): pass

@pytest.mark.parallel([6])
def test_many_ranks(comm): pass
""",
        "failure": """
@pytest.mark.parametrize("variant", ["a", pytest.param("b", marks=pytest.mark.quick)])
def test_job(variant): pass
""",
    }
    for folder, source in files.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"test_{folder}.py").write_text("import pytest\n" + source)
    session = nested("", "--quick", "--collect-only", "-q")
    chosen = {line.partition("::")[2] for line in session.done.stdout.splitlines() if "::" in line}
    assert chosen == {
        "test_unit[a]",
        "test_unit[b]",
        "test_few_ranks[n3-a]",
        "test_two_ranks[n2]",
        "test_job[b]",
    }, session.done.transcript
    assert "10 deselected" in session.done.stdout


def test_each_value_runs_on_each_number_of_several_ranks_though_not_every_combination(nested):
    session = nested(
        """
import pytest

@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("way", "abcd")
def test_ways(comm, way): pass

@pytest.mark.parallel([1])
@pytest.mark.parametrize("way", "ab")
def test_one_rank(comm, way): pass

@pytest.mark.parametrize(("first", "second"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_values_that_belong_together(first, second): pass

@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("second", "ab")
def test_pairs(first, second): pass

@pytest.mark.combinations
@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("second", "ab")
def test_all(first, second): pass

def test_plain(): pass
""",
        "--each-value",
        "--collect-only",
        "-q",
    )
    chosen = {line.partition("::")[2] for line in session.done.stdout.splitlines() if "::" in line}
    assert chosen == {
        *("test_ways[n2-a]", "test_ways[n3-b]", "test_ways[n2-c]", "test_ways[n2-d]"),
        *("test_one_rank[n1-a]", "test_one_rank[n1-b]"),
        *(f"test_values_that_belong_together[{first}-{second}]" for first in (1, 2) for second in (1, 2)),
        *("test_pairs[a-1]", "test_pairs[b-2]"),
        *(f"test_all[{second}-{first}]" for first in (1, 2) for second in "ab"),
        "test_plain",
    }, session.done.transcript


@pytest.mark.parametrize(("chosen", "code"), [("passes", 0), ("unit", 1), ("parallel", 1), ("nothing", 5)], ids=str)
def test_three_sessions_have_one_outcome(launch, tmp_path, chosen, code):
    for folder in ("parallel", "unit", "harness", "failure", "cluster", "families"):
        (tmp_path / "tests" / folder).mkdir(parents=True)
        (tmp_path / "tests" / folder / f"test_{folder}.py").write_text(
            f"def test_passes_{folder}():\n    pass\n\n\ndef test_{folder}_fails():\n    assert False\n"
        )
    (tmp_path / "pytest.ini").touch()
    sessions = [sys.executable, Path(__file__).with_name("sessions.py"), "-p", "no:cacheprovider"]
    done = launch(None, [*sessions, "-k", f"passes or {chosen}" if code == 1 else chosen], cwd=tmp_path)
    assert done.returncode == code, done.transcript
    assert done.stdout.count("test session starts") == 3
    assert (f"test_{chosen}_fails" in done.stdout) == (code == 1), done.transcript


def test_without_a_launcher_hangs_are_ended_and_marks_missed(nested):
    session = nested(
        """
import threading, time
import pytest

@pytest.mark.timeout(0.6)
def test_sleeps():
    time.sleep(1000)

@pytest.mark.timeout(0.6)
def test_waits_for_a_thread():
    threading.Event().wait()

@pytest.fixture
def sleepy():
    yield
    time.sleep(1000)

@pytest.mark.timeout(0.6)
def test_ends_late(sleepy):
    pass

def test_passes():
    pass

def test_needs_the_mark(comm):
    pass

def test_needs_it_too(shared_path):
    pass
"""
    )
    assert session.outcomes() == {
        "test_needs_the_mark": "error",
        "test_needs_it_too": "error",
        "test_sleeps": "failure",
        "test_waits_for_a_thread": "failure",
        "test_ends_late": "error",
        "test_passes": "passed",
    }, session.done.transcript
    assert "needs @pytest.mark.parallel" in session.cases["test_needs_the_mark"].text
    assert "still running after 0.6 s" in session.cases["test_sleeps"].text
    assert "in test_sleeps" in session.cases["test_sleeps"].text


def test_watchdog_in_compiled_code(nested):
    session = nested(
        HELD
        + """
import pytest

@pytest.mark.timeout(0.6)
def test_holds_the_interpreter():
    hold_the_interpreter()
""",
        limits=GRACE,
    )
    assert session.done.returncode == 1
    assert "in test_holds_the_interpreter" in session.done.stderr


def test_by_hand_under_the_launcher(nested):
    session = nested(
        HEAD
        + """
def test_passes(comm):
    assert comm.size == 2

@pytest.mark.parallel([3])
def test_of_another_size(comm):
    assert False

def test_fails_on_rank_1(comm):
    assert comm.rank == 0
""",
        "-m",
        "parallel",
        ranks=2,
    )
    assert "1 failed, 1 passed, 1 deselected" in session.done.stdout, session.done.transcript
    assert session.done.stdout.count("test session starts") == 1
    assert "failed on rank 1 of 2" in session.done.stdout
    assert session.done.returncode == 1


def test_by_hand_a_hang_ends_with_stacks(nested):
    session = nested(
        HEAD
        + """
def test_hangs(comm):
    if comm.rank == 1:
        raise ValueError("the first cause")
    comm.Barrier()
""",
        ranks=2,
        limits=AFTER_FAILURE,
    )
    assert session.done.returncode != 0
    assert "ValueError: the first cause" in session.done.stderr, session.done.transcript
    assert "waits in vain for the other ranks" in session.done.stderr
    assert "in test_hangs" in session.done.stderr


def test_launch_ends_the_whole_program_and_shows_stacks(launch, tmp_path):
    program = tmp_path / "hangs.py"
    program.write_text(
        "import subprocess, sys, time\n"
        "from mpi4py import MPI\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'], start_new_session=True)\n"
        "def stuck():\n"
        "    print('about to hang', flush=True)\n"
        "    MPI.COMM_WORLD.Recv(bytearray(1), source=(MPI.COMM_WORLD.rank + 1) % 2)\n"
        "stuck()\n"
    )
    started = launch.start(2, [sys.executable, program])
    assert started.wait_until(lambda: started.stdout.count("about to hang") == 2, UP), started.stderr
    with pytest.raises(pytest.fail.Exception, match="still running after") as caught:
        launch.finish(started, timeout=0.2)
    assert caught.value.msg is not None
    assert caught.value.msg.count("in stuck") == 2
    assert caught.value.msg.count("about to hang") == 2


def test_launch_sees_what_is_left_behind(launch, tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "PATIENCE", 0.5)
    program = tmp_path / "leaves.py"
    program.write_text(
        "import subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(999)'], start_new_session=True,\n"
        "                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "print('out'); print('err', file=sys.stderr); sys.exit(4)\n"
    )
    done = launch(None, [sys.executable, program])
    assert (done.returncode, done.stdout, done.stderr) == (4, "out\n", "err\n")
    assert len(done.left) == 1
    assert "time.sleep(999)" in done.left[0]


def test_launch_can_kill_one_rank(launch, tmp_path):
    program = tmp_path / "waits.py"
    program.write_text("from mpi4py import MPI\nimport time\nprint('up', flush=True)\ntime.sleep(1000)\n")
    started = launch.start(3, [sys.executable, program])
    assert started.wait_until(lambda: started.stdout.count("up") == 3, UP)
    assert list(started.ranks()) == [0, 1, 2]
    segments = set().union(*(shared_memory_of(pid) for pid in started.ranks().values()))
    started.signal(signal.SIGKILL, rank=1)
    done = launch.finish(started, timeout=20)
    assert done.returncode != 0
    assert not done.left
    assert segments
    assert not [path for path in segments if path.exists()]
