"""The launchers' texts, as Open MPI 5.0.11 and MPICH 5.0.2 write them, in output that comes in any pieces."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dbmpi.machine.banners import Sieve

RULE = "-" * 74 + "\n"
ENDED = (
    f"{RULE}prterun detected that one or more processes exited with non-zero status,\n"
    "thus causing the job to be terminated. The first process to do so was:\n\n"
    f"   Process name: [prterun-vm-7236@1,1]\n   Exit code:    2\n{RULE}"
)
KILLED = f"{RULE}prterun noticed that process rank 1 with PID 7324 on node vm exited on\nsignal 9 (Killed).\n{RULE}"
ABORTED = (
    f"{RULE}MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD\n  Proc: [[25698,1],1]\n  Errorcode: 1\n\n"
    "NOTE: invoking MPI_ABORT causes Open MPI to kill all MPI processes.\n"
    "You may or may not see output from other processes, depending on\n"
    f"exactly when Open MPI kills them.\n{RULE}"
    f"{RULE}prterun has exited due to process rank 1 with PID 0 on node vm calling\n"
    '"abort". This may have caused other processes in the application to be\n'
    f"terminated by signals sent by prterun (as reported here).\n{RULE}"
)
UNREACHED = (
    "[vm:07412] PMIX ERROR: PMIX_ERR_UNREACH in file /openmpi-5.0.11/3rd-party/openpmix/src/server/pmix_server.c "
    "at line 3146\n"
)
WIDE = "=" * 83 + "\n"
BAD = (
    f"{WIDE}=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES\n=   PID 7611 RUNNING AT vm\n=   EXIT CODE: 9\n"
    f"=   CLEANING UP REMAINING PROCESSES\n=   YOU CAN IGNORE THE BELOW CLEANUP MESSAGES\n{WIDE}"
    "YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Killed (signal 9)\n"
    "This typically refers to a problem with your application.\n"
    "Please see the FAQ page for debugging suggestions\n"
)
CALLED = "Abort(1) on node 1 (rank 1 in comm 0): application called MPI_Abort(MPI_COMM_WORLD, 1) - process 1\n"
TEXTS = {
    "ended": ENDED,
    "killed": KILLED,
    "aborted": ABORTED,
    "unreached": UNREACHED,
    "bad": BAD,
    "called": CALLED,
    "ended, unreached": ENDED + UNREACHED,
    "unreached, ended": UNREACHED + ENDED,
}
UNTESTED = (
    f"{RULE}WARNING: The selected 'osc' module 'sm' is not tested for post-failure\n"
    "operation, yet you have requested support for fault tolerance.\n"
    "When using this component, normal failure free operation is expected;\n"
    "However, failures may cause the application to abort, crash or deadlock.\n\n"
    "In this framework, the following components are tested to operate under\n"
    f"failure scenarios: {{}}\n{RULE}"
)
BEFORE = "\r  epoch 1\r  epoch 2\ndbmpi: the loss is no longer finite\n"
AFTER = "\0last words\n"


def sieved(data: bytes, length: int, said: bool) -> bytes:
    sieve = Sieve(lambda: said)
    pieces = [sieve(data[start : start + length]) for start in range(0, len(data), length)]
    return b"".join([*pieces, sieve.flush()])


@pytest.mark.parametrize("length", [1, 2, 7, 75, 100, 10_000])
@pytest.mark.parametrize("name", TEXTS)
def test_a_text_goes_after_a_message_and_stays_without(name: str, length: int) -> None:
    data = (BEFORE + TEXTS[name] + AFTER).encode()
    assert sieved(data, length, said=False) == data
    assert sieved(data, length, said=True) == (BEFORE + AFTER).encode()


@pytest.mark.parametrize("length", [1, 7, 75, 10_000])
@pytest.mark.parametrize("said", [False, True])
def test_the_warning_that_windows_are_untested_goes_in_any_case(said: bool, length: int) -> None:
    assert sieved((BEFORE + UNTESTED + AFTER).encode(), length, said=said) == (BEFORE + AFTER).encode()


def test_the_number_of_further_warnings_goes_with_it() -> None:
    for count in ("1 more process has", "6 more processes have"):
        line = f"{count} sent help message help-mpi-ft.txt / module:untested:failundef\n"
        assert sieved((BEFORE + line + AFTER).encode(), 10_000, said=False) == (BEFORE + AFTER).encode()


OTHERS = {
    "another framework": UNTESTED.replace("osc", "pml"),
    "a rule": f"{RULE}a table of the user's\n{RULE}",
    "rules": RULE * 4,
    "long rule": "-" * 500 + "\n",
    "cut off": ENDED[:-20],
    "too long": ENDED.replace("Exit code", "x" * 9_000),
    "a list": "[1, 2, 3]\n[vm:1] mine\n[vm:12] PMIX ERROR: PMIX_ERR_OTHER in file x\n",
    "of mpirun": f"{RULE}The value of the MCA parameter is wrong\n{RULE}",
    "binary": bytes(range(256)).decode("latin-1") * 4,
    "aborting": "Abort(1) is what the user says\nAbort",
}


@pytest.mark.parametrize("length", [3, 75, 10_000])
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.slow
def test_everything_else_stays_byte_for_byte(name: str, length: int) -> None:
    data = OTHERS[name].encode("latin-1")
    assert sieved(data, length, said=True) == data


def test_progress_passes_at_once() -> None:
    """Nothing waits for the end of a line, nor for more than what may become a text."""
    sieve = Sieve(lambda: True)
    for piece in (b"\r  epoch 1", b"\r\x1b[2K  epoch 2", b"what is typed: ", b"[x] done"):
        assert sieve(piece) == piece
    assert sieve(b"--- ") == b"--- "
    assert sieve(b"half ---") == b"half "
    assert sieve.holds
    assert sieve.flush() == b"---"
    assert sieve(b"--") + sieve.flush() == b"--"


PASS = """
import subprocess, sys
from dbmpi.machine.banners import Outputs
outputs = Outputs(False, lambda: True)
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=outputs.stdout, stderr=outputs.stderr,
    pass_fds=outputs.kept)
outputs.start()
code = child.wait()
outputs.finish()
sys.exit(code)
"""


def passing(program: str, **streams: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", PASS, program], **streams)


def test_both_streams_to_one_file_keep_their_order() -> None:
    program = "import os\nfor n in range(3000): os.write(1 + n % 2, b'%d\\n' % n)"
    with passing(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        assert [int(line) for line in process.stdout] == list(range(3000))


def test_much_output_on_two_streams_is_whole() -> None:
    program = "import os\nfor n in range(200): os.write(1, b'o-' * 30000); os.write(2, b'e=' * 3000)"
    with passing(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate()
    assert (out, err) == (b"o-" * 6_000_000, b"e=" * 600_000)


def test_a_job_outlives_its_reader() -> None:
    program = "import os, sys\nfor n in range(1000): os.write(1, b'x' * 1000)\nsys.exit(7)"
    with passing(program, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 10)
        process.stdout.close()
        assert process.wait() == 7


def test_a_helper_that_lives_on_is_not_waited_for() -> None:
    program = "import subprocess, sys; print(subprocess.Popen(['sleep', '1000']).pid)"
    with passing(program, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        try:
            assert process.wait() == 0
        finally:
            os.kill(pid, 9)
