"""Compiled kernels on disk: compiled once, found again wherever the sources are the same, and by nobody else's hand."""

import ast
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba.core.errors import TypingError

from dbmpi.kernels import store
from dbmpi.kernels.compile import kernel
from dbmpi.machine import kernel_cache

SOURCE = Path(__file__).parents[2] / "src"
FOLDER = SOURCE / "dbmpi" / "kernels"

PROGRAM = """
import sys
from numba.core import event
import numpy as np
from dbmpi.kernels import updates

def add(dtype):
    values = np.ones(3, dtype)
    updates.add(values, values.copy())
    assert values.tolist() == [2, 2, 2]

with event.install_recorder("numba:compile") as recorder:
    for name in sys.argv[1:]:
        add(name)
print(sum(happening.is_start for _, happening in recorder.buffer))
"""


def start(cache: Path, *dtypes: str, sources: Path = SOURCE) -> subprocess.Popen:
    """Start a process that adds vectors of some dtypes, and prints how many kernels it has compiled for that."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache), "NUMBA_NUM_THREADS": "1", "PYTHONPATH": str(sources)}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *dtypes], env=environment, stdout=subprocess.PIPE)


def compiled(process: subprocess.Popen) -> int:
    output, _ = process.communicate()
    assert process.returncode == 0
    return int(output)


@pytest.mark.slow
def test_processes_that_start_together_compile_each_kernel_once(tmp_path: Path) -> None:
    processes = [start(tmp_path, *dtypes) for dtypes in (["f4", "f8"], ["f8", "f4"], ["f4"])]
    assert sum(map(compiled, processes)) == 2
    assert compiled(start(tmp_path, "f4", "f8")) == 0


@pytest.mark.slow
def test_code_is_found_by_the_sources_wherever_they_are(tmp_path: Path) -> None:
    cache, other = tmp_path / "cache", tmp_path / "other"
    shutil.copytree(SOURCE / "dbmpi", other / "dbmpi", ignore=shutil.ignore_patterns("__pycache__"))
    assert compiled(start(cache, "f4")) == 1
    (directory,) = cache.iterdir()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    with (other / "dbmpi" / "kernels" / "pooling.py").open("a") as file:
        file.write("# updates do not depend on this\n")
    assert compiled(start(cache, "f4", sources=other)) == 0
    for file in directory.iterdir():  # as after a crash of the machine
        os.truncate(file, file.stat().st_size // 2)
    assert compiled(start(cache, "f4")) == 1
    with (other / "dbmpi" / "kernels" / "compile.py").open("a") as file:
        file.write("# but on this they do\n")
    assert compiled(start(cache, "f4", sources=other)) == 1


def test_a_kernel_that_cannot_be_compiled_keeps_nobody_waiting() -> None:
    @kernel
    def impossible(values):
        return values.nothing_of_an_array

    with pytest.raises(TypingError):
        impossible(np.ones(1))
    begun = list(Path(impossible.stats.cache_path).glob("impossible-*.nbc"))
    assert begun
    for path in begun:
        with kernel_cache.locked(path, 0.0) as mine:
            assert mine


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.stem)
def test_the_digest_covers_every_imported_kernel(path: Path) -> None:
    assert set(store.sources_of(path)) == everything_imported(path)


def everything_imported(path: Path) -> set[Path]:
    """Return the files of kernels that a module imports, itself included, as Python's parser sees them."""
    found, wanted = set(), [path]
    while wanted:
        found.add(path := wanted.pop())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("dbmpi.kernels"):
                continue
            module = SOURCE.joinpath(*node.module.split("."))
            names = [module.with_suffix(".py"), *((module / alias.name).with_suffix(".py") for alias in node.names)]
            wanted += [name for name in names if name.is_file() and name not in found]
    return found


def test_kernels_that_differ_in_a_constant_alone_are_told_apart() -> None:
    def made(number):
        @kernel
        def scaled(x):
            return x[0] * number

        return scaled

    @kernel
    def added(x):
        return x[0] + 1.0

    first = added

    @kernel
    def added(x):
        return x[0] + 2.0

    one = np.ones(1)
    assert (first(one), added(one)) == (2, 3)
    assert [made(np.float64(number))(one) for number in (2, 3)] == [2, 3]
    assert made(2.0)(one) == 2


def test_a_kernel_outside_of_the_package_depends_on_all_of_its_kernels(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import dbmpi.kernels.elementary as e\n")
    assert set(store.sources_of(tmp_path / "own.py")) == {tmp_path / "own.py", *FOLDER.rglob("*.py")}


def test_a_cache_that_other_users_can_change_is_not_used(tmp_path: Path) -> None:
    for mode, used in ((0o755, True), (0o1777, True), (0o775, False), (0o777, False)):
        tmp_path.chmod(mode)
        assert (kernel_cache.private_part(tmp_path, "kernels") is not None) == used


def test_kept_kernels_load_no_linear_algebra():
    """Numba would import SciPy's into every rank for NumPy's own sums, or where it installs all of its functions."""
    program = """
import sys
import numpy as np
from dbmpi.kernels import losses, reconstruction
values = np.ones((3, 2), np.float32)
losses.softmax_cross_entropy(values, np.zeros(2, np.int32), np.ones(2, np.float32))
losses.squared_values(values, values.copy(), np.ones(2, np.float32))
print("scipy.linalg" in sys.modules)
"""
    for _ in range(2):  # the first one may have to compile
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
