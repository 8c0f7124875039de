"""What doctor says about NumPy's products: real probes, and machines on which they fail or are slow."""

import os
import platform
from collections.abc import Mapping
from typing import Any

import pytest

from dbmpi.machine import blas, doctor


def test_a_real_probe() -> None:
    answer = blas.probe("", os.environ)
    assert answer is not None
    assert answer["gflops"] > 0.1


def test_a_forced_kernel_is_the_one_that_numpy_runs() -> None:
    """All of OpenBLAS's builds for x86 contain the Haswell kernels."""
    if platform.machine() != "x86_64" or " avx2 " not in open("/proc/cpuinfo").read():  # noqa: SIM115
        pytest.skip("not an x86 processor with AVX2")
    answer = blas.probe("HASWELL", os.environ)
    assert answer is not None
    if not answer["core"]:
        pytest.skip("NumPy is not built on OpenBLAS here")
    assert answer["core"].lower() in ("haswell", "zen")


@pytest.mark.parametrize(
    "program", ["import os; os.kill(os.getpid(), 4)", "print('no JSON')", "print('[]')", "print('{}')", "exit(1)"]
)
def test_a_probe_that_fails_is_no_answer(tmp_path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Also one that dies of an instruction that the processor does not know (signal 4)."""
    (tmp_path / "openblas.py").write_text(program)
    monkeypatch.setattr(blas, "__file__", str(tmp_path / "blas.py"))
    assert blas.probe("SKYLAKEX", os.environ) is None


def test_a_probe_that_hangs_is_no_answer(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "openblas.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(blas, "__file__", str(tmp_path / "blas.py"))
    monkeypatch.setattr(blas, "_SECONDS", 0.3)
    assert blas.probe("SKYLAKEX", os.environ) is None


def answers(speeds: Mapping[str, float]) -> Any:
    """Return a stand-in for `probe`: the speed of kernels by their names, of which others end the process."""

    def probe(kernel: str, environment: Mapping[str, str]) -> dict[str, Any] | None:
        known = {"numpy": "2.4", "core": kernel or "Zen", "gflops": speeds.get(kernel)}
        return known if kernel in speeds else None

    return probe


@pytest.mark.parametrize(
    ("speeds", "given", "status", "said"),
    [
        ({"": 95.0}, "", "ok", "95 GFLOP/s a core by OpenBLAS's kernels Zen"),
        ({"": 95.0, "HASWELL": 94.0}, "HASWELL", "ok", "is set: HASWELL, 94 GFLOP/s"),
        ({"": 95.0, "NEHALEM": 25.0}, "NEHALEM", "note", "unset OPENBLAS_CORETYPE: products become 3.8 x as fast"),
        ({"": 95.0}, "SKYLAKEX", "broken", "unset OPENBLAS_CORETYPE: this processor lacks what its kernels need"),
        ({"": 1.5}, "", "note", "install NumPy from its wheel"),
        ({}, "", "broken", "python -c 'import numpy'"),
    ],
)
def test_doctor_says_how_fast_numpy_is(monkeypatch, speeds, given, status, said) -> None:
    monkeypatch.setattr(blas, "probe", answers(speeds))
    finding = doctor._blas({blas.VARIABLE: given} if given else {})
    assert finding.status == status
    assert said in f"{finding.found} {finding.advice}"
