"""The choice of BLAS kernels: what is possible, what is taken, what is kept; and one real probe."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmpi.machine import blas, kernel_cache, openblas, threads
from dbmpi.machine.blas import KERNELS, Measurement, measure, runnable

ALL_FLAGS = frozenset().union(*KERNELS.values())
AVX2 = KERNELS["HASWELL"]
AVX512 = KERNELS["SKYLAKEX"]
FOUND = Measurement(True, "Haswell", 100.0, "SKYLAKEX", 190.0, "2.4.6", "OpenBLAS 0.3")


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node where nothing has been measured, on which this process has not decided yet."""
    monkeypatch.setattr(kernel_cache, "_private_root", lambda: tmp_path)
    monkeypatch.setattr(blas, "_prepared", None)
    monkeypatch.setattr(blas, "processor_flags", lambda: AVX512)
    monkeypatch.setenv(blas.VARIABLE, "")  # so that what a test chooses is undone, also where nothing was set before
    monkeypatch.delenv(blas.VARIABLE)
    monkeypatch.setenv(threads.MARK, "{}")
    for name in [name for name in sys.modules if name.split(".")[0] in ("numpy", "mpi4py")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def machine(speeds: Mapping[str, float | None], own: str) -> Any:
    """Return a stand-in for `probe` on a machine with these kernels (None: the process dies of it)."""
    asked: list[str | None] = []

    def probe(kernel: str | None, environment: Mapping[str, str], known: Sequence[str] = ()) -> dict[str, Any] | None:
        asked.append(kernel)
        core = own if kernel is None else kernel
        gflops = speeds.get(core, speeds[own])  # a build without these kernels falls back on its own choice
        core = core if core in speeds else own
        if gflops is None:
            return None
        answer = {"numpy": "2", "openblas": True, "core": core, "configuration": "", "gflops": gflops}
        return answer | ({"gflops": None} if core in known else {})

    probe.asked = asked  # type: ignore[attr-defined]
    return probe


@given(st.sets(st.sampled_from(sorted(ALL_FLAGS | {"sse2", "avx"}))))
def test_never_a_kernel_that_the_processor_lacks(flags: set[str]) -> None:
    for kernel in runnable(frozenset(flags)):
        assert KERNELS[kernel] <= flags
    assert set(runnable(ALL_FLAGS)) == set(KERNELS)
    assert runnable(frozenset()) == ()


@pytest.mark.parametrize(
    ("speeds", "own", "expected"),
    [
        ({"HASWELL": 100.0, "SKYLAKEX": 190.0}, "HASWELL", "SKYLAKEX"),
        ({"HASWELL": 100.0, "SKYLAKEX": 190.0}, "SKYLAKEX", None),
        ({"HASWELL": 100.0, "SKYLAKEX": 104.0}, "HASWELL", None),  # noise
        ({"HASWELL": 100.0, "SKYLAKEX": None}, "HASWELL", None),  # SIGILL
        ({"HASWELL": 100.0, "SKYLAKEX": 80.0, "ZEN": 120.0}, "SKYLAKEX", "ZEN"),
        ({"HASWELL": 100.0}, "HASWELL", None),  # the others are not in this build
    ],
)
def test_takes_the_fastest_that_works(
    monkeypatch: pytest.MonkeyPatch, speeds: dict[str, float | None], own: str, expected: str | None
) -> None:
    monkeypatch.setattr(blas, "probe", machine(speeds, own))
    found = measure(AVX512, {})
    assert found is not None
    assert found.kernel == expected
    assert found.own_core == own
    assert found.gflops == speeds[expected or own]


def test_times_no_kernel_that_the_processor_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = machine({"HASWELL": 100.0, "SKYLAKEX": 500.0}, "HASWELL")
    monkeypatch.setattr(blas, "probe", probe)
    found = measure(AVX2, {})
    assert found is not None
    assert found.kernel is None
    assert set(probe.asked) <= {None, "ZEN"}


def test_a_bad_moment_of_the_own_choice_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    steady = machine({"HASWELL": 100.0, "SKYLAKEX": 190.0}, "SKYLAKEX")
    first = True

    def probe(kernel: str | None, environment: Mapping[str, str], known: Sequence[str] = ()) -> Any:
        nonlocal first
        answer = steady(kernel, environment, known)
        if first:
            answer["gflops"] = 40.0
            first = False
        return answer

    monkeypatch.setattr(blas, "probe", probe)
    found = measure(AVX512, {})
    assert found is not None
    assert found.kernel is None


@pytest.mark.parametrize(
    "answer", [None, {"numpy": "2", "openblas": False}, {"numpy": "2", "openblas": True, "gflops": None}]
)
def test_without_openblas_nothing_is_chosen(monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any] | None) -> None:
    monkeypatch.setattr(blas, "probe", lambda *_: answer)
    found = measure(AVX512, {})
    assert found is None or (found.kernel is None and not found.openblas)


def test_chooses_and_keeps(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = machine({"HASWELL": 100.0, "SKYLAKEX": 190.0}, "HASWELL")
    monkeypatch.setattr(blas, "probe", probe)
    choice = blas.prepare()
    assert choice.kernel == os.environ[blas.VARIABLE] == "SKYLAKEX"
    assert "1.9 x" in str(choice)
    assert blas.prepare() is choice, "a second call sees its own setting as the user's"
    count = len(probe.asked)
    # Another process of the node: it finds the answer, and probes no more.
    monkeypatch.setattr(blas, "_prepared", None)
    monkeypatch.delenv(blas.VARIABLE)
    assert blas.prepare().kernel == "SKYLAKEX"
    assert len(probe.asked) == count


def test_the_users_kernel_stays(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "probe", lambda *_: pytest.fail("nothing was to be probed"))
    monkeypatch.setenv(blas.VARIABLE, "Haswell")
    choice = blas.prepare()
    assert os.environ[blas.VARIABLE] == choice.kernel == "Haswell"
    assert "SKYLAKEX" in choice.line, "that there is a wider one was worth a word"


def test_a_users_kernel_that_cannot_run_is_warned_of(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(blas.VARIABLE, "Cooperlake")
    assert "lacks avx512_bf16" in blas.prepare().line


def test_leaves_other_processors_alone(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "processor_flags", frozenset)
    monkeypatch.setattr(blas, "probe", lambda *_: pytest.fail("nothing was to be probed"))
    assert blas.prepare().kernel is None
    assert blas.VARIABLE not in os.environ


def test_after_numpy_it_says_what_is_lost(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", numpy)
    monkeypatch.setattr(openblas, "loaded", lambda: [SimpleNamespace(core="Haswell")])
    blas.remember(FOUND)
    choice = blas.prepare()
    assert blas.VARIABLE not in os.environ
    assert choice.kernel is None
    (loss,) = choice.losses
    assert "Haswell, 100 GFLOP/s a core, where SKYLAKEX would do 190: import dbmpi before numpy" in loss


@pytest.mark.parametrize("found", [replace(FOUND, kernel=None, gflops=100.0), replace(FOUND, own_core="Zen")])
def test_after_numpy_nothing_is_lost_where_its_kernel_is_the_best(
    node: Path, monkeypatch: pytest.MonkeyPatch, found: Measurement
) -> None:
    monkeypatch.setitem(sys.modules, "numpy", numpy)
    monkeypatch.setattr(openblas, "loaded", lambda: [SimpleNamespace(core="Haswell")])
    blas.remember(found)
    assert blas.prepare().losses == ()


def test_does_not_start_processes_under_mpi(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", object())  # type: ignore[arg-type]
    monkeypatch.setattr(blas, "probe", lambda *_: pytest.fail("nothing was to be probed"))
    assert "import dbmpi first" in blas.prepare().losses[0]
    blas.remember(FOUND)
    monkeypatch.setattr(blas, "_prepared", None)
    assert blas.prepare().kernel == "SKYLAKEX"


def test_a_blas_as_slow_as_none_is_named(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {"numpy": "2", "openblas": False, "core": "", "configuration": "", "gflops": 1.5}
    monkeypatch.setattr(blas, "probe", lambda *_: slow)
    assert "1.5 GFLOP/s" in blas.prepare().losses[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        json.dumps(asdict(replace(FOUND, kernel="SAPPHIRERAPIDS"))),  # kept by a better processor
        json.dumps(asdict(replace(FOUND, kernel="rm -rf"))),
        json.dumps(asdict(FOUND) | {"gflops": "fast"}),
        json.dumps(asdict(FOUND) | {"own_gflops": 0.0}),
        json.dumps(asdict(FOUND) | {"more": 1}),
    ],
)
def test_what_is_kept_is_not_trusted(node: Path, text: str) -> None:
    blas.answer_file().write_text(text)
    assert blas.remembered() is None


def test_keeps_what_was_measured(node: Path) -> None:
    blas.remember(FOUND)
    assert blas.remembered() == FOUND
    file = blas.answer_file()
    assert file is not None
    assert list(file.parent.iterdir()) == [file], "something was left over"


def test_only_one_process_probes(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand in for the ranks of a node: a lock on a file of one's own is held against the others alike."""
    steady = machine({"HASWELL": 100.0, "SKYLAKEX": 190.0}, "HASWELL")
    started, release = threading.Event(), threading.Event()

    def probe(*arguments: Any) -> Any:
        started.set()
        assert release.wait(30)
        return steady(*arguments)

    monkeypatch.setattr(blas, "probe", probe)
    answers: list[blas.Choice] = []
    ranks = [threading.Thread(target=lambda: answers.append(blas.decide({}))) for _ in range(4)]
    for rank in ranks:
        rank.start()
    assert started.wait(30)
    release.set()
    for rank in ranks:
        rank.join(30)
    assert [answer.kernel for answer in answers] == ["SKYLAKEX"] * 4
    assert steady.asked.count("SKYLAKEX") == 1


def test_does_not_wait_for_ever_for_another_process(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "_WAIT_SECONDS", 0.1)
    monkeypatch.setattr(blas, "probe", lambda *_: pytest.fail("nothing was to be probed"))
    with kernel_cache.locked(blas.answer_file().with_suffix(".lock"), 5) as mine:
        assert mine
        choice = blas.prepare()
    assert choice.kernel is None
    assert blas.VARIABLE not in os.environ


def test_a_real_probe() -> None:
    environment = {name: value for name, value in os.environ.items() if name != blas.VARIABLE}
    answer = blas.probe(None, environment)
    assert answer is not None
    if not answer["openblas"]:
        pytest.skip("NumPy is not built on OpenBLAS here")
    assert answer["gflops"] > 0.1
    again = blas.probe(None, environment, [answer["core"]])
    assert again is not None
    assert again["core"] == answer["core"]
    assert again["gflops"] is None, "a known kernel was timed again"


def test_a_forced_kernel_is_the_one_that_numpy_runs() -> None:
    """What `prepare` sets must be what OpenBLAS takes; all its builds for x86 contain the Haswell kernels."""
    if "HASWELL" not in runnable(blas.processor_flags()):
        pytest.skip("not an x86 processor with AVX2")
    answer = blas.probe("HASWELL", os.environ)
    assert answer is not None
    if not answer["openblas"] or "DYNAMIC_ARCH" not in answer["configuration"]:
        pytest.skip("NumPy is not built on an OpenBLAS with a choice of kernels here")
    assert answer["core"].lower() in ("haswell", "zen")


@pytest.mark.parametrize(
    "program", ["import os; os.kill(os.getpid(), 4)", "print('no JSON')", "print('[]')", "exit(1)"]
)
def test_a_probe_that_fails_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Also one that dies of an instruction that the processor does not know (signal 4)."""
    (tmp_path / "openblas.py").write_text(program)
    monkeypatch.setattr(blas, "__file__", str(tmp_path / "blas.py"))
    assert blas.probe("SKYLAKEX", os.environ) is None


def test_a_probe_that_hangs_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "openblas.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(blas, "__file__", str(tmp_path / "blas.py"))
    monkeypatch.setattr(blas, "_PROBE_SECONDS", 0.3)
    assert blas.probe("SKYLAKEX", os.environ) is None


def test_numpy_is_not_imported_by_choosing(tmp_path: Path) -> None:
    program = """
import os, sys
from dbmpi.machine import blas
choice = blas.prepare()
assert "numpy" not in sys.modules
assert choice.kernel is None or os.environ[blas.VARIABLE] == choice.kernel
print(choice)
"""
    environment = {name: value for name, value in os.environ.items() if name != blas.VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("BLAS: ")
