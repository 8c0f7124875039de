"""Threads follow from the work, unless the user has said how many."""

from __future__ import annotations

import pytest

from dbmpi.config import Dense, NetworkSection
from dbmpi.kernels import compile as compiling
from dbmpi.machine import openblas, threads
from dbmpi.machine.threads import Node, Preparation
from dbmpi.network.description import Network
from dbmpi.replica import thread_count


def layers(units: int):
    section = NetworkSection(loss="softmax", layers=[Dense(units=units), Dense(units=10)])
    return Network(section, (units,), 1, targets="classes").layers


def test_small_layers_are_worth_one_thread_and_large_ones_many():
    assert thread_count.worthwhile(layers(32), 1, 32) == 1
    assert thread_count.worthwhile(layers(2048), 1, 128) > 8
    assert thread_count.worthwhile(layers(2048), 4, 128) < thread_count.worthwhile(layers(2048), 1, 128)


@pytest.mark.parametrize(("given", "used"), [({}, 1), ({"OMP_NUM_THREADS": "2"}, 2)])
def test_the_users_number_wins(monkeypatch, given, used):
    prepared = Preparation(2, Node(1, 2, 2), {}, False, "", given)
    monkeypatch.setattr(threads, "_prepared", prepared)
    before = [library.threads for library in openblas.loaded()]
    with thread_count.fitted(layers(32), 1, 32) as remark:
        assert compiling._Limit.threads == min(used, compiling.THREADS)
        assert bool(remark) == (not given)
    assert compiling._Limit.threads == min(2, compiling.THREADS)
    assert [library.threads for library in openblas.loaded()] == before
