"""Vectors that change while they are written: what is written is what they were at the beginning."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from harness.environment import timeout_scale

from dbmpi.checkpoint import snapshot as snapshots
from dbmpi.checkpoint.snapshot import Snapshot


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(snapshots, "BLOCK", 16)


def taken(snapshot: Snapshot, vectors: dict[str, np.ndarray], pause: float = 0.0) -> dict[str, np.ndarray]:
    """Return what the blocks of a snapshot make up; each element must come once."""
    found = {name: np.full_like(vector, np.nan) for name, vector in vectors.items()}
    for name, start, values in snapshot.blocks():
        part = found[name][start : start + len(values)]
        assert np.isnan(part).all()
        part[:] = values
        time.sleep(pause)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_changes_do_not_show(seed):
    """One thread changes ranges at random, another one copies ahead, this one takes the blocks."""
    random = np.random.default_rng(seed)
    sizes = {"parameters": 1000, "state": 1000, "small": 3, "none": 0}
    vectors = {name: random.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    before = {name: vector.copy() for name, vector in vectors.items()}
    most = float("inf") if seed % 2 else 20 * 16 * 4
    snapshot, ended = Snapshot(vectors, most), threading.Event()

    def change() -> None:
        other = np.random.default_rng(seed + 100)
        while not ended.is_set():
            name = str(other.choice(list(vectors)))
            start, stop = sorted(other.integers(0, sizes[name] + 1, 2).tolist())
            whole = bool(other.integers(2))
            snapshot.keep(name, *(() if whole else (start, stop)))
            vectors[name][slice(None) if whole else slice(start, stop)] += 1
            snapshot.keep("unknown")
            assert snapshot._held <= most

    threads = [threading.Thread(target=change), threading.Thread(target=snapshot.ahead, args=(lambda: None,))]
    for thread in threads[: 1 + seed % 3]:
        thread.start()
    found = taken(snapshot, vectors, 1e-4)
    ended.set()
    for thread in threads[: 1 + seed % 3]:
        thread.join(60 * timeout_scale())
        assert not thread.is_alive()
    assert not np.array_equal(vectors["parameters"], before["parameters"])
    for name, vector in before.items():
        np.testing.assert_array_equal(found[name], vector)
    assert not snapshot._copies
    assert snapshot._held == 0


def test_a_change_waits_only_while_somebody_takes_blocks():
    vectors = {"parameters": np.zeros(160, np.float32)}
    snapshot = Snapshot(vectors, 64)
    snapshot.keep("parameters", 0, 16)  # all the memory there is
    waiting = threading.Thread(target=snapshot.keep, args=("parameters",))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    snapshot.release()  # as where the disk fails
    waiting.join(60 * timeout_scale())
    assert not waiting.is_alive()
    assert list(snapshot.blocks()) == []  # the vectors may be gone by now
