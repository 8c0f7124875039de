"""The pytest plugin: ``@pytest.mark.parallel([1, 2, 3])`` tests run under a launcher, all others under a watchdog.

In a plain ``pytest`` session all selected tests of one rank count share one start of the launcher
(harness.supervisor); a session that a launcher started, by the supervisor or by hand with

    mpirun -n 3 python -m pytest -m parallel

runs in step with the other ranks (harness.rank).  Every test has a time limit of 60 s: ``parallel([2], timeout=90)``
or ``timeout(90)`` change it.

A parallel test may use these fixtures:

`comm`
    a duplicate of the world's communicator, made for this test.
`ranks`
    the number of ranks.
`shared_path`
    an empty directory, the same one on every rank; `tmp_path` is every rank's own.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import rank, supervisor, watchdog
from harness.environment import rank_by_environment
from harness.launching import Launch
from harness.selection import each_value, quick, sizes_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mpi4py import MPI

_CHANGED_BY_OTHERS = ("PYTEST_", "HDF5_PLUGIN_PATH", "KMP_")
"""How variables begin that pytest, hdf5plugin and scikit-learn set."""
_RANK = pytest.StashKey[rank.RankSession]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="run a cross-section of the tests, in two minutes or less")
    parser.addoption(
        "--each-value", action="store_true", help="run every value of every parameter of a test, not all combinations"
    )


@pytest.hookimpl(tryfirst=True)  # the terminal and the temporary directories find what a rank prepares for them
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "parallel(sizes, timeout=60): run under the launcher, once with each number of ranks; seconds allowed",
    )
    config.addinivalue_line("markers", "timeout(seconds): time allowed to each phase of a test, by default 60 s")
    config.addinivalue_line("markers", "slow: takes more than a few seconds, and is left out by --quick")
    config.addinivalue_line("markers", "combinations: run by --each-value with all combinations of its parameters")
    config.addinivalue_line("markers", "quick: run by --quick although it starts whole jobs")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's background job ignores Ctrl-C, and so would all programs that are tested.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if rank_by_environment() is not None:
        config.stash[_RANK] = rank.RankSession(config)
        config.pluginmanager.register(config.stash[_RANK], "harness-rank")
    else:
        config.pluginmanager.register(watchdog.Watchdog(config), "harness-watchdog")
        config.pluginmanager.register(supervisor.Supervisor(config), "harness-supervisor")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for wanted, choose in ((config.option.quick, quick), (config.option.each_value, each_value)):
        if wanted:
            kept = choose(items)
            chosen = {item.nodeid for item in kept}
            config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
            items[:] = kept


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = sizes_of(metafunc.definition)
    if sizes is not None:
        if "ranks" not in metafunc.fixturenames:
            metafunc.fixturenames.append("ranks")
        metafunc.parametrize("ranks", sizes, ids=[f"n{size}" for size in sizes])


@pytest.fixture(autouse=True)
def _kept_environment() -> Iterator[None]:
    """Fails a test that leaves the process's environment changed for those that come after it."""
    before = _environment()
    yield
    after = _environment()
    for name in after.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        pytest.fail(f"the test left the environment changed: {', '.join(changed)}", pytrace=False)


def _environment() -> dict[str, str]:
    """Return the environment variables that neither pytest nor libraries change, as they are imported."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_CHANGED_BY_OTHERS)}


@pytest.fixture
def comm(request: pytest.FixtureRequest) -> MPI.Intracomm:
    """A duplicate of the world's communicator, freed after the test."""
    session = request.config.stash.get(_RANK, None)
    if session is None:
        pytest.fail("the fixture 'comm' needs @pytest.mark.parallel([...]) on the test", pytrace=False)
    return session.comm


@pytest.fixture
def shared_path(request: pytest.FixtureRequest) -> Path:
    """An empty directory that is the same on every rank."""
    session = request.config.stash.get(_RANK, None)
    if session is None:
        pytest.fail("the fixture 'shared_path' needs @pytest.mark.parallel([...]) on the test", pytrace=False)
    return session.shared_path()


@pytest.fixture
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """Runs programs under the launcher; whatever still runs when the test ends is killed."""
    with Launch(tmp_path_factory.mktemp("launch")) as started:
        yield started
