"""Mirrors of shards: whole versions, never older than promised, for any sizes, paces and numbers of shards."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from dbmpi.downpour import mirrors as mirrors_module
from dbmpi.downpour.mirrors import Mirrors, holders
from dbmpi.mpi import waiting
from dbmpi.mpi.topology import Plan


def test_a_mirror_is_on_another_host_where_there_is_one() -> None:
    plan = Plan(shards=4, replicas=2, colocate=False)
    assert plan.shard_ranks == (0, 1, 3, 4)
    assert holders(plan, ["a"] * 6) == (1, 2, 3, 0)
    assert holders(plan, ["a", "a", "a", "b", "b", "b"]) == (2, 3, 0, 1)
    assert holders(plan, ["a", "a", "a", "b", "c", "c"]) == (2, 2, 3, 0)


class Updates:
    """Stands for a shard's server: so many updates, each of which sets all elements to its number."""

    def __init__(self, size: int, version: int) -> None:
        self.parameters = np.full(size, version, np.float32)
        self.state = {"squares": np.full(size, -version, np.float64)}
        self.version, self.quiet, self.most = version, True, None

    @property
    def unfinished(self) -> int:
        """Updates that are half applied."""
        return int(not self.quiet)

    def step(self, random: np.random.Generator) -> None:
        """Begin an update, or end the one that is begun."""
        half = self.parameters.size // 2
        if not self.quiet:
            self.version, self.quiet = self.version + 1, True
            self.parameters[half:] = self.version
            self.state["squares"][:] = -self.version
        elif random.random() < 0.7 and (self.most is None or self.version < self.most):
            self.parameters[:half] = self.version + 1
            self.quiet = False


@pytest.mark.parallel([2, 3, 6])
@pytest.mark.parametrize(("every", "part"), [(1, 64), (7, 8), (1000, 1 << 24)])
def test_a_mirror_is_a_whole_version_and_lacks_no_more_than_promised(comm, monkeypatch, every: int, part: int) -> None:
    monkeypatch.setattr(mirrors_module, "_PART", part)
    monkeypatch.setattr(mirrors_module, "_PATIENCE", 1e9)
    random = np.random.default_rng(100 * comm.rank + every)
    sizes = [5 + 7 * rank for rank in range(comm.size)]
    held_by = [(rank + 1) % comm.size for rank in range(comm.size)]
    server = Updates(sizes[comm.rank], version=3)
    mirrors = Mirrors(comm, range(comm.size), comm.rank, held_by, sizes, every, server)  # type: ignore[arg-type]
    held = next((shard for shard in range(1, comm.size) if mirrors.holds(shard)), 0)
    assert mirrors.holds(held) == (held > 0)  # the lead's shard is not mirrored
    versions: list[int] = []

    def poll() -> bool:
        moved = mirrors.poll()
        mirror = mirrors.mirror(held) if held else None
        if mirror is not None and (not versions or mirror.version > versions[-1]):
            versions.append(mirror.version)
            assert (mirror.vectors["parameters"] == mirror.version).all()
            assert (mirror.vectors["squares"] == -mirror.version).all()
            assert {len(values) for values in mirror.vectors.values()} == {sizes[held]}
        return moved

    def learned() -> bool:
        poll()
        server.step(random)
        return server.version >= 60 and server.quiet

    waiting.until(learned, "the updates")
    mirrors.end()
    waiting.until(lambda: mirrors.closed, "the other shards", serve=poll)
    newest = waiting_for_all(comm, server.version)
    if held:
        assert versions[0] == 3
        assert versions == sorted(versions)
        assert newest[held] - versions[-1] <= every


def waiting_for_all(comm, version: int) -> np.ndarray:
    """Return the versions of all shards."""
    found = np.empty(comm.size, np.int64)
    waiting.complete(comm.Iallgather(np.array([version], np.int64), found), "the versions of the others")
    return found


def test_halted_pushes_hold_up_neither_the_next_copy_nor_other_pushes(monkeypatch):
    monkeypatch.setattr(mirrors_module, "_PATIENCE", 0.0)
    server = SimpleNamespace(parameters=np.zeros(3), state={}, version=0, unfinished=2, most=None)
    sent, confirmed = [], []

    def receive(word: np.ndarray, *_: int) -> None:
        word[0] = confirmed.pop()

    done = SimpleNamespace(Test=lambda: True)
    comm = SimpleNamespace(
        Isend=lambda *words: sent.append(words) or done, Iprobe=lambda *_: bool(confirmed), Recv=receive
    )
    mirrors = Mirrors(comm, (0, 1), 1, (1, 0), (3, 3), 1, server)  # type: ignore[arg-type]
    mirrors._arriving.clear()
    for version in range(5):
        server.version = version
        for _ in range(6):
            mirrors.poll()
        confirmed.append(version)
        mirrors.poll()
        # Another push may begin, though two are half applied.
        assert server.version + server.unfinished < server.most
    assert sent
