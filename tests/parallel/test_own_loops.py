"""Loops of one's own beside serial ones: schedules, clipping, and checkpoints from which they go on."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace

import numpy as np
import pytest

from dbmpi.checkpoint import summary
from dbmpi.cli import inspect_text
from dbmpi.config import ServerSection
from dbmpi.errors import RunFailed, UserError
from dbmpi.loops.connection import Connection
from dbmpi.loops.parameter_server import ParameterServer
from dbmpi.loops.service import Service, serve
from dbmpi.loops.snapshot import save
from dbmpi.mpi import waiting
from dbmpi.paramserver.rules import Adam
from dbmpi.paramserver.schedule import Moment, Schedule

SETTINGS = {
    "rule": "adam",
    "learning_rate": 0.1,
    "schedule": "cosine",
    "warmup_samples": 40,
    "decay_samples": 100,
    "decay_factor": 0.2,
}
NORM = 2.0


def arrays():
    return {"deep": {"w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}, "b": np.ones(5, np.float32)}


def flat(tree):
    return np.concatenate([tree["b"], tree["deep"]["w"].reshape(-1)])


def gradient(tree, step):
    """Return a gradient that depends on the parameters, and how many samples are behind it."""
    random = np.random.default_rng(step)
    of = {name: random.normal(size=part.shape).astype(np.float32) for name, part in (("b", tree["b"]),)}
    return {"b": of["b"] + tree["b"], "deep": {"w": 2 * tree["deep"]["w"]}}, 7 + step % 3


def serial(steps):
    """Return the parameters after so many steps of the same loop, without shards: formulas as in books."""
    tree = arrays()
    rule = Adam(0.1, schedule=Schedule("cosine", 40, 100, 0.2))
    values, before = flat(tree), 0
    state = rule.init(values)
    for step in range(steps):
        tree = {"b": values[:5], "deep": {"w": values[5:].reshape(3, 4)}}
        found, samples = gradient(tree, step)
        pushed = flat(found)
        norm = math.sqrt(sum(float(value) ** 2 for value in pushed))
        if norm > NORM:
            pushed *= np.float32(NORM / norm)
        rule.apply(values, pushed, state, Moment(step + 1, before, samples))
        before += samples
    return values


def learn(server, mine, steps, save=None, at=None):
    """Take these steps on the first worker; the others only watch."""
    for step in steps if server.worker == 0 else ():
        if step == at:
            server.save(save)
        server.fetch()
        found, samples = gradient(mine, step)
        server.push(found, samples=samples)


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("colocate", [False, True])
def test_a_loop_goes_on_where_another_one_was_killed(comm, shared_path, colocate):
    """On other ranks, shards and workers; what came after the checkpoint is forgotten."""
    path = shared_path / "loop.h5"
    few = comm.Split(comm.rank < 2)
    if comm.rank < 2:
        mine = arrays()
        with ParameterServer(few, mine, clip_norm=NORM, colocate=colocate, **SETTINGS) as server:
            if not server.serve():
                learn(server, mine, range(6), path, 4)
        if comm.rank == few.size - 1:
            np.testing.assert_array_equal(flat(mine), serial(6))
    waiting.barrier(comm, "the first session")
    few.Free()
    shards, mine = max(comm.size - (1 if comm.size < 4 else 2), 1), arrays()
    ways = {"shards": shards, "colocate": colocate, "server": ServerSection(consistent=colocate)}
    with ParameterServer(comm, mine, clip_norm=NORM, resume=path, **ways, **SETTINGS) as server:
        if not server.serve():
            assert server.version == 4
            np.testing.assert_array_equal(flat(mine), serial(4))
            learn(server, mine, range(4, 9))
    if server.worker is not None:
        np.testing.assert_array_equal(flat(mine), serial(9))
    found = summary.describe(path)
    assert (found["step"], found["samples"], found["configuration"]["loop"]["rule"]) == (4, 7 + 8 + 9 + 7, "Adam")
    assert {array["name"] for array in found["arrays"]} >= {"deep/w", "b", "first_moment: deep/w"}
    assert not any(line.startswith(("  stream", "  inputs")) for line in inspect_text.lines(found))
    assert [file.name for file in shared_path.iterdir()] == ["loop.h5"]


@pytest.mark.parallel([2, 3, 4])
def test_checkpoints_are_taken_while_others_push(comm, shared_path):
    """By all workers at once, with shards on their ranks: each saves a state in which its own pushes are contained."""
    mine = {"w": np.zeros(5000, np.float32)}
    ways = {"shards": comm.size, "colocate": True, "server": ServerSection(consistent=True, chunk_kib=4)}
    with ParameterServer(comm, mine, "sgd", learning_rate=1.0, **ways) as server:
        for step in range(12):
            server.push({"w": np.full(5000, -1, np.float32)})
            if step == 6:
                server.save(shared_path / f"{comm.rank}.h5")
    with ParameterServer(comm, mine, "momentum", resume=shared_path / f"{comm.size - 1}.h5", colocate=True) as server:
        per_shard = np.unique(mine["w"])
        assert server.version == per_shard.max()
    assert 7 <= per_shard.min() <= per_shard.max() <= 12 * comm.size
    assert len(per_shard) <= comm.size


@pytest.mark.parallel([1, 2, 3])
def test_the_shards_of_serve_save_and_resume(comm, shared_path):
    if serve(comm, shards=max(comm.size - 1, 1)):
        return
    group = comm if comm.size == 1 else None
    for _ in range(2):
        mine = {"w": np.zeros(5)}
        resume = shared_path / "w.h5"
        resumed = resume.exists()
        with ParameterServer(group, mine, "adagrad", learning_rate=0.5, resume=resume if resumed else None) as server:
            for _ in range(3):
                server.push({"w": np.full(5, -1.0)})
            server.save(resume)
    expected = 0.5 * sum(1 / math.sqrt(count) for count in range(1, 7))
    np.testing.assert_allclose(mine["w"], expected)
    with pytest.raises(UserError, match="w is 5 in the file and 6 in the network"):
        ParameterServer(group, {"w": np.zeros(6)}, "adagrad", resume=resume)
    if Service.current is not None:
        Service.current.leave()


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("serving", [False, True])
def test_a_damaged_checkpoint_leaves_nothing_behind(comm, shared_path, monkeypatch, serving, capfd):
    """Every rank learns of it, and a shard that serves goes on with the next parameter server."""
    path, mine = shared_path / "w.h5", {"w": np.arange(1000.0)}
    freed, ending = [], os._exit
    monkeypatch.setattr(Connection, "free", lambda self, free=Connection.free: (free(self), freed.append(self)))
    with ParameterServer(comm, mine, "sgd") as server:
        if not server.serve():
            server.save(path)
    waiting.barrier(comm, "the checkpoint")
    if comm.rank == 0:
        data, some = path.read_bytes(), mine["w"][500:600].tobytes()
        path.write_bytes(data.replace(some, some[::-1]))
    waiting.barrier(comm, "the damage")
    if serving and serve(comm):
        assert len(freed) == 3
        assert "/parameters/w is damaged" in capfd.readouterr().err
        return
    group = comm if comm.size == 1 or not serving else None
    with pytest.raises(UserError, match="w is damaged" if comm.rank == 0 else "rank 0 reports a mistake"):
        ParameterServer(group, mine, "sgd", resume=path)
    assert len(freed) == 2
    assert os._exit is ending
    with ParameterServer(group, mine, "sgd", learning_rate=1.0) as server:
        if not server.serve():
            server.push({"w": np.ones(1000)})
    if server.worker is not None:
        assert mine["w"][0] == -1
    if Service.current is not None:
        Service.current.leave()


@pytest.mark.parallel([1])
def test_ones_own_shard_is_saved_between_two_pushes(comm):
    """Where a push is half applied, the rest comes first."""
    written = []
    server = SimpleNamespace(parameters=np.zeros(4), state={}, pushing=True, version=1, samples=0, begun=0)
    writer = SimpleNamespace(path="w.h5", write=lambda name, start, values: written.append((name, values.copy())))

    def serve_one():
        server.parameters += 1
        server.pushing = False
        return True

    assert save(comm, [(0, range(4))], server, writer, ["parameters"], serve_one) == [(1, 0, 0)]
    [(name, values)] = written
    assert (name, values.tolist()) == ("parameters", [1, 1, 1, 1])


class Keeps:
    """A rule with one vector of state."""

    def __init__(self, first=np.zeros_like, names=("sums",), then=lambda sums: sums):
        self.first, self.state_names, self.then = first, names, then

    def init(self, parameters):
        return {"sums": self.first(parameters)}

    def apply(self, parameters, gradient, state, moment):
        state["sums"] = self.then(state["sums"])


@pytest.mark.parallel([1, 2])
def test_a_rule_whose_state_cannot_be_kept(comm):
    for rule, message in (
        (Keeps(names=()), r"its state is \['sums'\]: .* with the names in state_names, \[\]"),
        (Keeps(names=("sums", "means")), r"its state is \['sums'\]: .* state_names, \['sums', 'means'\]"),
        (Keeps(lambda parameters: np.zeros(1, np.float32)), r"'sums' is an array of float32 of shape \(1,\): expected"),
        (Keeps(lambda parameters: 0.0), "'sums' is a float: expected an array of float32"),
        (Keeps(lambda parameters: parameters * np.float64(1)), "'sums' is an array of float64 of shape"),
        (Keeps(then=lambda sums: sums * np.float64(2)), "'sums' is an array of float64 of shape"),
        (Keeps(names=("a/b",)), "the name of a vector has no '/'"),
        (Keeps(names=("parameters",)), "expected vectors with different names"),
    ):
        with pytest.raises(UserError, match=message if comm.rank == 0 else "rank 0 reports a mistake"):
            ParameterServer(comm, {"w": np.zeros(3, np.float32)}, rule)
    for name, message in (("", "the name '' cannot"), ("a//b", "the name 'a//b' cannot"), ("a", "others lie below")):
        with pytest.raises(UserError, match=message if comm.rank == 0 else "rank 0 reports a mistake"):
            ParameterServer(comm, {name: np.zeros(3), "a/b": np.zeros(3)}, "sgd")


@pytest.mark.parallel([1])
def test_mistakes(comm, shared_path):
    mine = {"w": np.zeros(3, np.float32)}
    for settings, message in (
        ({"schedule": "cosine"}, "schedule = 'cosine' needs decay_samples"),
        ({"schedule": "step"}, "schedule = 'step' needs decay_samples, the samples from one"),
        ({"schedule": "cosine", "decay_samples": -1.0}, "decay_samples"),
        ({"warmup_epochs": 1.0}, "has no 'warmup_epochs'; known are learning_rate.*warmup_samples"),
        ({"clip_norm": -1.0}, "clip_norm = -1.0: expected a number of at least 0"),
        ({"resume": shared_path / "none.h5"}, "none.h5"),
    ):
        with pytest.raises(UserError, match=message):
            ParameterServer(comm, mine, "sgd", **settings)
    with ParameterServer(comm, mine, "sgd", schedule="step", decay_samples=10) as server:
        with pytest.raises(UserError, match="samples = 0: expected how many the gradients are of"):
            server.push({"w": np.ones(3, np.float32)})
        with pytest.raises(RunFailed, match="cannot be written"):
            server.save("/proc/none/w.h5")
    server = ParameterServer(comm, mine, "sgd", learning_rate=1e38, finite=False)
    server.push({"w": np.full(3, 1e38, np.float32)})
    with pytest.raises(RunFailed, match="some parameters are NaN or infinite; it was not written"):
        server.save(shared_path / "w.h5")
    assert not list(shared_path.iterdir())
    server.close()
