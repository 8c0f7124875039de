"""Every way into the package prepares the process, at the right moment, and costs nothing before."""

from __future__ import annotations

import json
import os
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest

from dbmpi.machine import threads

_OURS = {*threads.VARIABLES, *threads.PATIENCE, threads.MARK, "NUMBA_CACHE_DIR"}
_SHOW = """
import json, os, sys
from dbmpi.machine import environment, openblas, threads
import numba
print(json.dumps({
    "prepared": environment._prepared is not None,
    "threads": os.environ.get("OMP_NUM_THREADS"),
    "numba": numba.config.NUMBA_NUM_THREADS,
    "cache": numba.config.CACHE_DIR,
    "blas": [library.threads for library in openblas.loaded()],
    "losses": environment.prepare().losses,
    "line": environment.prepare().line,
    "bytecode": sys.pycache_prefix,
}))
"""


def python(program: str, tmp_path: Path, **variables: str) -> str:
    """Run a program in a process to which nothing has been done."""
    kept = {name: value for name, value in os.environ.items() if name not in _OURS and "SLURM" not in name}
    kept |= {"TMPDIR": str(tmp_path), "OMPI_COMM_WORLD_LOCAL_SIZE": "100000"}  # a thread for each of so many ranks
    done = subprocess.run(
        [sys.executable, "-c", program], env=kept | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def shown(program: str, tmp_path: Path, **variables: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(python(program + _SHOW, tmp_path, **variables).splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The temporary directory of a node."""
    return tmp_path_factory.mktemp("node")


WAYS = (
    "import dbmpi; import numpy",
    "import dbmpi; import mpi4py",
    "from dbmpi import load; import numpy",
    "from dbmpi import train",
    "from dbmpi import minimize",
    "import dbmpi.runs.training",
    "import dbmpi.runs.inference",
    "from dbmpi.methods.lbfgs import lbfgs",
    "from dbmpi.kernels import matmul",
    "from dbmpi.paramserver import rules",
    "from dbmpi.mpi import world",
    "from dbmpi.data.source import Source",
    "import dbmpi.cli.main; import dbmpi.runs.inference",
)
_FORKED = """
import os, sys
def forked(work):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_every_way_in_prepares_before_numpy(node: Path) -> None:
    """Each in a process of its own, up to the moment at which the first of the libraries would be loaded."""
    program = f"""{_FORKED}
import json
from importlib.abc import Loader
from importlib.machinery import PathFinder
import pydantic, tomllib  # which take long, and load none of the libraries
libraries = ("numpy", "numba", "mpi4py", "llvmlite")
assert not [name for name in libraries if name in sys.modules]

class Loaded(BaseException):
    pass

class Last(Loader):
    def find_spec(self, name, path=None, target=None):
        if name in libraries:
            spec = PathFinder.find_spec(name, path)
            spec.loader = self
            return spec

    def exec_module(self, module):
        raise Loaded

def enter(way):
    # Behind dbmpi's finder, which takes itself out of the list while Python walks through it.
    sys.meta_path.insert(0, Last())
    try:
        exec(way, {{}})
    except Loaded:
        pass
    else:
        raise AssertionError(way + " has loaded none")
    from dbmpi.machine import environment
    chosen = environment._prepared
    assert chosen is not None, way
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "NUMBA_CACHE_DIR")
    print(json.dumps([way, [os.environ.get(name) for name in names], chosen.line, chosen.losses]))

for way in {WAYS!r}:
    forked(lambda: enter(way))
"""
    rows = [json.loads(line) for line in python(program, node).splitlines()]
    assert [way for way, *_ in rows] == list(WAYS)
    for way, (*threads_of, cache), line, losses in rows:
        assert threads_of == ["1", "1", "1"], way
        assert cache.startswith(str(node)), way
        assert "loaded before" not in line, way
        assert not [loss for loss in losses if "loaded before" in loss], way


@pytest.mark.parametrize("program", ["import dbmpi; import numpy", "from dbmpi import train"])
@pytest.mark.slow
def test_libraries_follow_what_was_prepared(program: str, node: Path) -> None:
    found = shown(program, node)
    assert found["prepared"]
    assert found["threads"] == "1"
    assert found["numba"] == 1
    assert str(found["cache"]).startswith(str(node))
    assert set(found["blas"]) <= {1}  # type: ignore[call-overload]
    assert "loaded before" not in found["line"]  # type: ignore[operator]
    assert not [loss for loss in found["losses"] if "loaded before" in loss]  # type: ignore[attr-defined]


@pytest.mark.parametrize("before", ["numpy", "numpy, numba", "scipy.linalg, numba"])
@pytest.mark.slow
def test_numpy_and_numba_loaded_before_are_adapted(before: str, node: Path) -> None:
    ways = ("dbmpi.runs.training", "dbmpi._minimize", "dbmpi.runs.inference", "dbmpi.kernels.vectors")
    program = f"""{_FORKED}
import {before}
show = compile({_SHOW!r}, "show", "exec")
for way in {ways!r}:
    forked(lambda: exec("import " + way) or exec(show))
"""
    lines = python(program, node).splitlines()
    assert len(lines) == len(ways)
    for way, found in zip(ways, map(json.loads, lines), strict=True):
        assert found["prepared"], way
        assert set(found["blas"]) <= {1}, way
        assert str(found["cache"]).startswith(str(node)), way


@pytest.mark.slow
def test_numba_with_threads_that_run_already_still_compiles(node: Path) -> None:
    """Numba refuses to compile once it sees another NUMBA_NUM_THREADS in the environment."""
    program = """
import numba, numpy as np
numba.config.NUMBA_NUM_THREADS
numba.set_num_threads(1)
from dbmpi.kernels import compile, vectors
assert compile.THREADS == 1
x = np.ones(100_000, np.float32)
assert vectors.largest_magnitude(x) == 1
later = numba.njit(lambda x: x + 1)
assert later(1) == 2
"""
    found = shown(program, node)
    assert "NUMBA_NUM_THREADS" not in os.environ or found["prepared"]


@pytest.mark.slow
def test_what_the_user_has_set_for_numpy_stays(node: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    found = shown("import numpy\nimport dbmpi.runs.training", node, OPENBLAS_NUM_THREADS="2")
    assert set(found["blas"]) == {2}  # type: ignore[call-overload]


@pytest.mark.slow
def test_threads_that_spin_are_named(node: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    variables = {"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    found = shown("import numpy\nimport dbmpi.runs.training", node, **variables)
    assert any("spin" in loss and "import dbmpi before numpy" in loss for loss in found["losses"])  # type: ignore[attr-defined]


@pytest.mark.slow
def test_libraries_that_a_prepared_process_has_started_are_left_as_they_are(node: Path) -> None:
    """As of a program of a user's own under `dbmpi launch`, which loads them before dbmpi."""
    program = """
import numba, numpy as np
@numba.njit(parallel=True)
def total(values):
    found = 0.0
    for place in numba.prange(len(values)):
        found += values[place]
    return found
assert total(np.ones(10)) == 10
from dbmpi.kernels import vectors
assert vectors.largest_magnitude(np.ones(100_000, np.float32)) == 1
assert numba.njit(lambda x: x + 1)(1) == 2
"""
    for ranks in ("100000", "1"):
        start = f"""
import os, sys
from dbmpi.machine import own_program
own_program.main([sys.executable, "-c", {program + _SHOW!r}])
"""
        found = json.loads(python(start, node, OMPI_COMM_WORLD_LOCAL_SIZE=ranks).splitlines()[-1])
        assert not [loss for loss in found["losses"] if "spin" in loss]


@pytest.mark.slow
def test_settings_for_finding_mistakes_are_named(node: Path) -> None:
    found = shown("import dbmpi.runs.training", node, NUMBA_OPT="0", NUMBA_BOUNDSCHECK="1")
    for setting, said in (("NUMBA_OPT=0", "optimised"), ("NUMBA_BOUNDSCHECK=1", "every index")):
        assert any(setting in loss and said in loss for loss in found["losses"])  # type: ignore[attr-defined]


def test_kernels_are_compiled_even_where_numba_is_told_not_to(node: Path) -> None:
    program = """
import numba, numpy as np
from dbmpi.kernels import updates
theirs = numba.njit(lambda x: x)
assert not hasattr(theirs, "py_func"), "what the user wanted for code of their own"
x = np.ones(3, np.float32)
updates.add(x, x.copy())
assert x.tolist() == [2, 2, 2] and updates.add.signatures
"""
    python(program, node, NUMBA_DISABLE_JIT="1", OMP_NUM_THREADS="1")


def test_importing_it_does_nothing(node: Path) -> None:
    program = """
import os, sys
before = dict(os.environ)
import dbmpi, dbmpi.cli.main
from dbmpi.machine import early
assert dict(os.environ) == before
assert "dbmpi.machine.environment" not in sys.modules
assert early._finder in sys.meta_path
import numpy
assert early._finder not in sys.meta_path
"""
    python(program, node)


@pytest.mark.slow
def test_kernels_work_where_nothing_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    nowhere = str(tmp_path / "file" / "nowhere")
    program = f"""
import tempfile
tempfile.tempdir = None
tempfile._candidate_tempdir_list = lambda: []
import dbmpi
from numba.core import caching
caching.InTreeCacheLocator.from_function = classmethod(lambda *_: None)  # an installation that is not ours
from dbmpi.machine import environment
from dbmpi.kernels import updates
import numpy as np
x = np.ones(3, np.float32)
updates.add(x, x.copy())
assert x.tolist() == [2, 2, 2]
(loss,) = [loss for loss in environment.prepare().losses if "compiled again" in loss]
assert {nowhere!r} in loss
"""
    python(program, tmp_path, NUMBA_CACHE_DIR=nowhere, HOME=nowhere, XDG_RUNTIME_DIR=nowhere)


def test_kernels_work_where_the_disk_is_full(node: Path, tmp_path: Path) -> None:
    program = """
import numpy as np
from dbmpi.kernels import store, updates
from numba.core import caching
def full(self, *args): raise OSError(28, "No space left on device")
caching.IndexDataCacheFile.save = full
x = np.ones(3, np.float32)
updates.add(x, x.copy())
assert x.tolist() == [2, 2, 2] and "No space left" in store.KernelStore.unkept
"""
    python(program, node, NUMBA_CACHE_DIR=str(tmp_path))


@pytest.mark.parametrize("compiled", [set(), {"numba"}, {"dbmpi"}, {"numba", "dbmpi"}])
def test_bytecode_is_kept_where_the_installation_has_none(node: Path, tmp_path: Path, compiled: set[str]) -> None:
    """Also where only one of the two was installed with it."""
    for name in ("numba", "dbmpi"):
        source = tmp_path / name / "__init__.py"
        source.parent.mkdir()
        source.write_text("")
        if name in compiled:
            kept = source.parent / "__pycache__" / f"__init__.{sys.implementation.cache_tag}.pyc"
            py_compile.compile(str(source), cfile=str(kept))
    program = f"""
import sys
from importlib.util import spec_from_file_location
from dbmpi.machine import early, environment
early.leave()
sys.path.insert(0, {str(tmp_path)!r})
environment.__spec__ = spec_from_file_location("dbmpi", {str(tmp_path / "dbmpi" / "__init__.py")!r})
print(environment.keep_bytecode(), sys.dont_write_bytecode)
"""
    off = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": ""}
    place, switched_off = python(program, node, **off).split()
    if len(compiled) == 2:
        assert (place, switched_off) == ("None", "True")
    else:
        assert place.startswith(str(node))
        assert switched_off == "False"
    assert python(program, node, **off | {"PYTHONDONTWRITEBYTECODE": ""}).split()[0] == "None", (
        "Python writes it by itself"
    )
    assert python(program, node, **off | {"PYTHONPYCACHEPREFIX": str(tmp_path)}).split() == ["None", "True"]
