"""The parameter server in a loop of one's own: one worker is serial SGD, and what several push adds up."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from parallel.test_paramserver import WAYS

from dbmpi.config import ServerSection
from dbmpi.errors import UserError
from dbmpi.loops import parameter_server
from dbmpi.loops.parameter_server import ParameterServer
from dbmpi.loops.service import Service, serve
from dbmpi.mpi import waiting
from dbmpi.paramserver.rules import Adagrad, Sgd

RULES = {"sgd": Sgd(0.1), "adagrad": Adagrad(0.1)}


def arrays(dtype=np.float32, seed=0):
    """Return parameters of several shapes: nested, of no element, of one number, and not contiguous."""
    random = np.random.default_rng(seed)
    return {
        "b": {"weights": random.normal(size=(7, 5)).astype(dtype), "bias": np.zeros(5, dtype)},
        "a": np.asfortranarray(random.normal(size=(4, 3)).astype(dtype)),
        "nothing": np.empty((0, 2), dtype),
        "number": np.array(0.5, dtype),
    }


def leaves(tree):
    """Yield the arrays in the order of their names."""
    for name in sorted(tree):
        yield from leaves(tree[name]) if isinstance(tree[name], dict) else (tree[name],)


def like(tree, function):
    return {key: like(value, function) if isinstance(value, dict) else function(value) for key, value in tree.items()}


def gradients(tree, step):
    random = np.random.default_rng(step)
    return like(tree, lambda array: random.normal(size=array.shape).astype(array.dtype) + array)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_worker_is_serial(comm, name, dtype):
    """To the last bit, also when gradients are computed in the memory that they are pushed from."""
    mine = arrays(dtype, seed=comm.rank)  # that of the worker counts
    serial = arrays(dtype, seed=comm.size - 1)
    with ParameterServer(comm, mine, name, learning_rate=0.1, shards=max(comm.size - 1, 1)) as server:
        if not server.serve():
            for step in range(6):
                server.fetch()
                if step % 2:
                    server.push(gradients(mine, step))
                else:
                    by_name = dict(zip(server.gradients, leaves(gradients(mine, step)), strict=True))
                    for key, value in by_name.items():
                        server.gradients[key][...] = value
                    server.push()
            assert server.version == 5
    rule = RULES[name]
    states = [rule.init(array.reshape(-1, order="C")) for array in leaves(serial)]
    for step in range(6):
        for array, gradient, state in zip(leaves(serial), leaves(gradients(serial, step)), states, strict=True):
            flat = array.flatten()
            rule.apply(flat, gradient.flatten(), state)
            array[...] = flat.reshape(array.shape)
    if comm.rank == comm.size - 1:
        assert [array.tobytes() for array in leaves(mine)] == [array.tobytes() for array in leaves(serial)]


@pytest.mark.parallel([1, 2, 3, 4, 6])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("colocate", [False, True])
def test_what_workers_push_adds_up(comm, monkeypatch, way, colocate):
    """Integers: whatever is lost, doubled or torn shows.  All workers have the same at the end."""
    if "transport" in WAYS[way]:
        real = parameter_server.Connection.__init__.__globals__["Store"]
        monkeypatch.setitem(
            parameter_server.Connection.__init__.__globals__, "Store", lambda *given: real(*given, shared=False)
        )
    shards = max(comm.size // 2, 1)
    mine = like(arrays(seed=1), lambda array: np.asarray(np.round(array), order="K"))
    before = like(mine, np.copy)
    pushed = 0.0
    section = ServerSection(**WAYS[way])
    server = ParameterServer(comm, mine, "sgd", learning_rate=1.0, shards=shards, colocate=colocate, server=section)
    if not server.serve():
        random = np.random.default_rng(comm.rank)
        for step in range(20):
            number = float(random.integers(-8, 8))
            pushed -= number
            server.push(like(mine, lambda array, number=number: np.full_like(array, number)))
            if step % 3 == 0:
                server.fetch()
            if comm.rank == 1:
                time.sleep(0.001)
    server.close()
    total = comm.allreduce(pushed)
    worker = colocate or comm.size == 1 or comm.rank not in [n * comm.size // shards for n in range(shards)]
    for array, start in zip(leaves(mine), leaves(before), strict=True):
        np.testing.assert_array_equal(array, start + (total if worker else 0))


@pytest.mark.parallel([1, 2, 3])
def test_arrays_stay_those_of_the_user(comm):
    """Fetch writes in place; a gradient that lies in the server's memory is pushed from there."""
    mine = {"w": np.zeros(1000, np.float32)}
    kept = mine["w"]
    server = ParameterServer(comm, mine, Sgd(1.0))
    if server.worker is not None:
        place = server.gradients["w"]
        assert np.shares_memory(place, server._connection.client.gradients[0])
        place[:] = -1
        server.push({"w": place})
        server.wait()
        place[:] = np.nan  # it has been applied
        server.fetch()
        assert mine["w"] is kept
        assert kept.min() >= 1
    server.close()
    server.close()
    for call in (server.fetch, server.push, lambda: server.version):
        with pytest.raises(UserError, match="it is closed"):
            call()


@pytest.mark.parallel([1, 3])
def test_workers_may_compute_on_the_shards_memory(comm):
    """It changes where it is; the user's arrays have the first values, and the last."""
    mine = {"w": np.full((2, 3), float(comm.rank)), "v": np.asfortranarray(np.ones((3, 2)))}
    first = 0.0 if comm.size == 1 else 1.0
    server = ParameterServer(comm, mine, Sgd(1.0), server=ServerSection(fetch="shared"))
    if server.worker is not None:
        assert (mine["w"] == first).all()
        places = {name: array.ctypes.data for name, array in server.parameters.items()}
        for _ in range(3):
            server.push({name: np.full_like(array, -1) for name, array in mine.items()})
            server.fetch()
        assert server.parameters["w"].min() >= first + 3
        assert places == {name: array.ctypes.data for name, array in server.parameters.items()}
        assert (mine["w"] == first).all()
        with pytest.raises(ValueError, match="read-only"):
            server.parameters["w"][:] = 0
    server.close()
    if comm.rank == comm.size - 1:
        assert (mine["w"] == first + 3 * server.workers).all()
        assert (mine["v"] == 1 + 3 * server.workers).all()
    assert server.parameters == {}


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"w": np.zeros(3)}, r"'w' has the dtype float64 on rank 1, and float32 on rank 0"),
        ({"w": np.zeros(4, np.float32)}, r"'w' has the shape \[4\] on rank 1, and \[3\] on rank 0"),
        ({"v": np.zeros(3, np.float32)}, "rank 1 has an array 'v', which rank 0 has not"),
        ({"w": np.zeros(3, np.float32), "x": np.ones(1, np.float32)}, "rank 1 has an array 'x', which rank 0 has not"),
        ({}, "there are no parameters"),
        ({"w": np.zeros(3, int)}, "'w' has the dtype int64: expected float32 or float64"),
        ({"w": np.zeros(3, np.float32), "x": np.ones(1)}, "expected one dtype"),
        ({"w": np.full(3, np.nan, np.float32)}, r"'w' is not finite: its element \[0\] is nan"),
        ({"w": [0.0]}, "'w' is a list: expected a NumPy array"),
        ([np.zeros(3)], "arrays is a list: expected a dict"),
        ({1: np.zeros(3)}, "the key 1 is a int: expected a string"),
        ({"a": {"b": np.zeros(3)}, "a/b": np.zeros(3)}, "two arrays have the name 'a/b'"),
    ],
)
def test_ranks_that_were_given_different_arrays(comm, other, message):
    mine = other if comm.rank == 1 else {"w": np.zeros(3, np.float32)}
    with pytest.raises(UserError, match=message if comm.rank == 1 else "rank 1 reports a mistake"):
        ParameterServer(comm, mine, "sgd", learning_rate=0.1)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "sdg"}, "known are sgd"),
        ({"rule": "sgd", "learning_rate": -1.0}, "learning_rate"),
        ({"rule": "sgd", "lerning_rate": 1.0}, "learning_rate"),
        ({"rule": "sgd", "batch_size": 3}, "the rule 'sgd' has no 'batch_size'"),
        ({"rule": 3}, "rule is a int: expected a name or a rule object"),
        ({"rule": Sgd(1.0), "learning_rate": 1.0}, "has its settings already"),
        ({"shards": 0}, "shards = 0: expected a whole number"),
        ({"server": ServerSection(gradients="layers")}, "server.gradients = 'layers': expected 'whole'"),
        ({"server": ServerSection(fetch="shared", consistent=True)}, "consistent = True needs copies"),
    ],
)
def test_settings_that_are_none(comm, settings, message):
    given = {"rule": "sgd"} | settings
    with pytest.raises(UserError, match=message if comm.rank == 0 else "rank 0 reports"):
        ParameterServer(comm, {"w": np.zeros(3)}, **given)


@pytest.mark.parallel([2, 3])
def test_ranks_that_were_given_different_settings(comm):
    with pytest.raises(UserError, match=r"the rule on rank 1.*0\.2.*rank 0.*0\.1" if comm.rank == 1 else "rank 1"):
        ParameterServer(comm, {"w": np.zeros(3)}, "sgd", learning_rate=0.2 if comm.rank == 1 else 0.1)
    with pytest.raises(UserError, match=f"at most {comm.size - 1}, so that a worker" if comm.rank == 0 else "rank 0"):
        ParameterServer(comm, {"w": np.zeros(3)}, shards=comm.size)
    shared = np.zeros(3)
    with pytest.raises(UserError, match="are the same array" if comm.rank == 0 else "rank 0"):
        ParameterServer(comm, {"w": shared, "v": shared})


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"w": np.ones(3), "x": np.ones(1)}, "no parameter has the name 'x'"),
        ({}, "the gradient of 'w' is missing"),
        ({"w": np.ones((3, 1))}, r"'w' has the shape \(3, 1\), and the parameter \(3,\)"),
        ({"w": np.ones(3, np.float32)}, "'w' has the dtype float32, and the parameter float64"),
        ({"w": np.array([0, np.inf, 0])}, r"'w' is not finite: its element \[1\] is inf; nothing was pushed"),
        ({"w": np.array([0, np.nan, 0, np.nan, 0, 0])[::2]}, None),
        ({"w": np.array([0, 0, np.nan, 0, 1, 0])[::2]}, r"'w' is not finite: its element \[1\] is nan"),
    ],
)
def test_gradients_that_do_not_fit(comm, wrong, message):
    mine = {"w": np.arange(3.0)}
    with ParameterServer(comm, mine, "sgd", learning_rate=1.0) as server:
        if not server.serve():
            if message is None:
                server.push(wrong)
            else:
                with pytest.raises(UserError, match=message):
                    server.push(wrong)
    assert mine["w"].tolist() == [0, 1, 2]


@pytest.mark.parallel([1, 2])
def test_gradients_are_only_checked_if_asked_for(comm):
    mine = {"w": np.zeros(3)}
    with ParameterServer(comm, mine, "sgd", finite=False) as server:
        if not server.serve():
            server.push({"w": np.array([0, np.inf, 0])})
    assert (mine["w"][1] == -np.inf) == (comm.rank == comm.size - 1)


@pytest.mark.parallel([2, 3])
def test_a_shard_is_no_worker(comm):
    with ParameterServer(comm, {"w": np.zeros(3)}, "sgd") as server:
        if comm.rank == 0:
            with pytest.raises(UserError, match="push is for workers, and this rank is a shard"):
                server.push({"w": np.zeros(3)})
            assert server.version == 0
            assert server.gradients == {}


@pytest.mark.parallel([1, 2, 3, 4])
def test_shards_serve_several_parameter_servers(comm):
    """At the same time and one after the other, each with a rule of its own."""
    shards = max(comm.size // 2, 1)
    served = serve(comm, shards=shards)
    assert served == (comm.size > 1 and comm.rank in [n * comm.size // shards for n in range(shards)])
    if served:
        return
    service, workers = Service.current, max(comm.size - shards, 1)
    assert (service is None) == (comm.size == 1)
    group = comm if comm.size == 1 else None
    one, two = {"w": np.zeros(5)}, {"v": np.ones((2, 2), np.float32)}
    first = ParameterServer(group, one, "sgd", learning_rate=1.0)
    second = ParameterServer(group, two, "adagrad", learning_rate=0.5)
    for _ in range(4):
        first.push({"w": np.full(5, -1.0)})
        second.push({"v": np.zeros((2, 2), np.float32)})
    first.close()
    second.push({"v": np.ones((2, 2), np.float32)})
    second.close()
    assert one["w"].tolist() == 5 * [4 * workers]
    assert two["v"][0, 0] == two["v"][1, 1] < 0.51
    if service is not None:
        with pytest.raises(UserError, match="expected float32 or float64" if comm.rank == 1 else "mistake"):
            ParameterServer(None, {"w": np.zeros(3, int) if comm.rank == 1 else np.zeros(3)})
    with ParameterServer(group, one, Sgd(1.0)) as third:
        third.push(one)
    assert one["w"].max() <= 0
    if service is not None:
        service.leave()


class Halves:
    """A rule of one's own, which halves all parameters, whatever the gradient is."""

    state_names = ()

    def init(self, parameters):
        return {}

    def apply(self, parameters, gradient, state, moment):
        parameters *= 0.5


@pytest.mark.parallel([1, 2])
def test_a_rule_of_ones_own(comm):
    mine = {"w": np.ones(5)}
    with ParameterServer(comm, mine, Halves()) as server:
        if not server.serve():
            server.push({"w": np.zeros(5)})
    assert mine["w"].tolist() == 5 * [0.5 if comm.rank == comm.size - 1 else 1]


@pytest.mark.parallel([2])
def test_the_shards_of_serve_do_not_know_a_rule_of_ones_own(comm):
    if serve(comm):
        return
    with pytest.raises(UserError, match="know dbmpi's own rules alone"):
        ParameterServer(None, {"w": np.zeros(3)}, Halves())
    Service.current.leave()


@pytest.mark.parallel([2])
def test_serve_is_called_once_and_alike(comm):
    with pytest.raises(UserError, match="shards = 2" if comm.rank == 0 else "rank 0"):
        serve(comm, shards=2 if comm.rank == 0 else 1)
    waiting.barrier(comm, "the other rank")


@pytest.mark.parametrize(
    ("script", "ranks"), [("ratings_loop", None), ("ratings_downpour", None), ("ratings_downpour", 3)]
)
def test_the_converted_script(launch, script, ranks):
    done = launch(ranks, [sys.executable, str(Path(__file__).parents[2] / "examples" / f"{script}.py")], 60)
    assert done.returncode == 0, done.transcript
    errors = re.findall(r"mean squared error (\S+)", done.stdout)
    assert len(errors) == (1 if ranks is None else ranks - 1), done.transcript
    assert max(map(float, errors)) < 0.05  # of ratings whose variance is 5, with noise of 0.01
