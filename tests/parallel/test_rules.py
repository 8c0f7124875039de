"""Whole runs under each update rule: equal to a serial twin bit for bit, also when they are resumed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from parallel import tiny
from parallel.test_paramserver import parameter_server, push
from parallel.test_train import describe_one
from unit.rule_twins import RuleTwin

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.errors import UserError
from dbmpi.paramserver.schedule import Moment
from dbmpi.runs import trained_network
from dbmpi.runs.training import train

UNIT = Path(__file__).parents[1] / "unit"
SETTINGS = {
    "sgd": {"rule": "sgd", "weight_decay": 0.01},
    "momentum": {"rule": "momentum", "momentum": 0.8, "learning_rate": 0.02},
    "nesterov": {"rule": "momentum", "nesterov": True, "learning_rate": 0.02, "weight_decay": 0.01},
    "adagrad": {"rule": "adagrad", "weight_decay": 0.01},
    "rmsprop": {"rule": "rmsprop", "learning_rate": 0.005},
    "adam": {"rule": "adam", "learning_rate": 0.02, "weight_decay": 0.01},
    "adamw": {"rule": "adamw", "learning_rate": 0.02, "weight_decay": 0.1},
}


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("kind", SETTINGS)
def test_a_resumed_run_equals_the_serial_loop_bit_for_bit(comm, place, kind) -> None:
    """On 4 ranks with shards on all of them."""
    whole = describe_one(place, comm.size, comm.size == 4, **SETTINGS[kind] | {"epochs": 5.0})
    for epochs in (1.3, 2.0, 5.0):
        result = train(describe_one(place, comm.size, comm.size == 4, **SETTINGS[kind] | {"epochs": epochs}), comm)
    twin = tiny.Twin(whole)
    expected, found = twin.learn(), tiny.vectors(result.checkpoint)
    assert set(found) == {"parameters", *twin.rule.state}
    np.testing.assert_array_equal(found["parameters"], expected)
    for name, array in twin.rule.state.items():
        np.testing.assert_array_equal(found[name], array)
    assert twin.test(expected).accuracy > 0.5
    with Checkpoint.open(result.checkpoint) as checkpoint:
        assert checkpoint.info.begun == 0


@pytest.mark.parallel([1, 3])
def test_another_rule_counts_its_updates_afresh(comm, place) -> None:
    """And the count survives another checkpoint, and ends with a third rule."""
    adam = SETTINGS["adam"]
    sessions = [(1.0, {"rule": "sgd"}), (2.0, adam), (3.0, adam), (4.0, SETTINGS["adamw"]), (5.0, SETTINGS["rmsprop"])]
    whole = describe_one(place, comm.size, False, epochs=5.0)
    twin, done = tiny.Twin(whole), 0
    for number, (epochs, settings) in enumerate(sessions):
        run = describe_one(place, comm.size, False, **settings | {"epochs": epochs})
        result = train(run, comm)
        if number not in (2, 3):  # Adam and AdamW have the same state
            twin.rule = RuleTwin(run.optimizer, twin.server)
        twin.rule.section = run.optimizer
        gradient = np.empty_like(twin.server)
        for step in range(done, result.steps + done):
            twin.network.loss_and_gradient(twin.server.copy(), twin.batch(step), gradient)
            twin.apply(gradient)
        done += result.steps
        np.testing.assert_array_equal(tiny.vectors(result.checkpoint)["parameters"], twin.server)
        with Checkpoint.open(result.checkpoint) as checkpoint:
            assert checkpoint.info.begun == (0, 7, 7, 7, 28)[number]


@pytest.mark.parallel([4, 6])
def test_adam_learns_with_several_replicas_of_two_partitions(comm, place) -> None:
    topology = {"shards": 2, "replicas": comm.size // 2, "partitions": 2, "colocate": True}
    for epochs in (4.0, 12.0):
        optimizer = {**SETTINGS["adam"], "learning_rate": 0.01, "epochs": epochs}
        result = train(tiny.describe(place, topology=topology, optimizer=optimizer), comm)
    assert result.test.accuracy > 0.8
    assert set(tiny.vectors(result.checkpoint)) == {"parameters", "first_moment", "second_moment"}


@pytest.mark.parallel([1, 3])
def test_a_session_of_sandblaster_in_between_keeps_state_and_count(comm, place) -> None:
    """Adam after SGD, so that its count did not begin with the run."""
    for epochs, settings in ((1.0, {"rule": "sgd"}), (2.0, SETTINGS["adam"])):
        result = train(describe_one(place, comm.size, False, **settings | {"epochs": epochs}), comm)
    before = tiny.vectors(result.checkpoint)
    batch = describe_one(place, comm.size, False, method="sandblaster", epochs=2.9, batch_size=6)
    result = train(batch, comm)
    between = tiny.vectors(result.checkpoint)
    for name in ("first_moment", "second_moment"):
        np.testing.assert_array_equal(between[name], before[name])
    with Checkpoint.open(result.checkpoint) as checkpoint:
        assert (checkpoint.info.begun, set(checkpoint.info.shard_versions)) == (7, {14})


SCHEDULES = {
    "warm-up": {"warmup_epochs": 1.5},
    "step": {"schedule": "step", "decay_epochs": 0.7, "decay_factor": 0.5},
    "cosine": {"schedule": "cosine", "warmup_epochs": 0.5},
    "inverse root": {"schedule": "inverse_root", "warmup_epochs": 1.2},
}


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("others", [{"rule": "sgd"}, {"rule": "adamw", "weight_decay": 0.1, "learning_rate": 0.02}])
def test_a_schedule_follows_the_samples_on_every_shard(comm, place, kind, others) -> None:
    """Also in a run that is resumed; to a few units in the last place, for its formulas may be written in many ways."""
    settings = SCHEDULES[kind] | others
    if kind == "cosine":
        settings = settings | {"decay_epochs": 2.5}  # the sessions of a test end earlier
    for epochs in (1.3, 3.0):
        result = train(describe_one(place, comm.size, comm.size == 4, **settings | {"epochs": epochs}), comm)
    expected = tiny.Twin(describe_one(place, comm.size, comm.size == 4, **settings | {"epochs": 3.0})).learn()
    np.testing.assert_allclose(tiny.vectors(result.checkpoint)["parameters"], expected, rtol=1e-4, atol=1e-5)
    constant = tiny.Twin(describe_one(place, comm.size, False, **others | {"epochs": 3.0})).learn()
    assert np.abs(expected - constant).max() > 1e-2


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize(("n_push", "n_fetch", "local_rate"), [(3, 2, 0.05), (1, 4, 0.2), (4, 1, 0.1)])
@pytest.mark.parametrize("clip_norm", [0.0, 0.4])
def test_local_steps_follow_the_same_schedule(comm, place, n_push, n_fetch, local_rate, clip_norm) -> None:
    """And are not clipped."""
    settings = {"schedule": "step", "decay_epochs": 1.0, "decay_factor": 0.25, "warmup_epochs": 0.5, "epochs": 4.0}
    settings |= {"rule": "sgd", "n_push": n_push, "n_fetch": n_fetch, "local_rate": local_rate}
    run = describe_one(place, comm.size, False, **settings, clip_norm=clip_norm)
    result = train(run, comm)
    twin = tiny.Twin(run)
    tolerance = 1e-5 if clip_norm else 0
    found = tiny.vectors(result.checkpoint)["parameters"]
    np.testing.assert_allclose(found, twin.learn(), rtol=tolerance, atol=tolerance)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("overlap", ["none", "threads"])
@pytest.mark.parametrize("n_push", [1, 3])
def test_the_gradient_of_a_replica_is_clipped(comm, place, overlap, n_push) -> None:
    partitions = max(comm.size - 1, 1)
    topology = {"shards": 1, "replicas": 1, "partitions": partitions, "colocate": comm.size == 1}
    found = {}
    for largest in (0.0, 0.3, 1e9):
        run = tiny.describe(
            place,
            run={"directory": place / f"run-{largest:g}"},
            topology=topology,
            optimizer={"rule": "sgd", "clip_norm": largest, "n_push": n_push},
            server={"overlap": overlap, "align": "equal" if n_push == 3 else "partition"},
        )
        result = train(run, comm)
        found[largest] = tiny.vectors(result.checkpoint)["parameters"]
        if overlap == "none":
            np.testing.assert_allclose(found[largest], tiny.Twin(run).learn(), rtol=1e-4, atol=1e-5)
    if overlap == "none":
        np.testing.assert_array_equal(found[1e9], found[0.0])
    assert np.abs(found[0.3] - found[0.0]).max() > 1e-2


@pytest.mark.parallel([1, 2, 4])
def test_a_rule_of_ones_own_trains_and_is_resumed(comm, place) -> None:
    """And its checkpoint is evaluated without its code."""
    own = {"rule": "own_rules:mean_of_all", "learning_rate": 0.05}
    for epochs in (1.3, 3.0):
        run = describe_one(place, comm.size, comm.size == 4, **own | {"epochs": epochs})
        run = run.model_copy(update={"network": run.network.model_copy(update={"code": UNIT})})
        result = train(run, comm)
    twin = tiny.Twin(run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"rule": "sgd"})}))
    mean, gradient = np.zeros_like(twin.server), np.empty_like(twin.server)
    for step in range(21):
        twin.network.loss_and_gradient(twin.server.copy(), twin.batch(step), gradient)
        mean += (gradient - mean) / np.float32(step + 1)
        twin.server -= np.float32(0.05) * mean
    found = tiny.vectors(result.checkpoint)
    np.testing.assert_array_equal(found["parameters"], twin.server)
    np.testing.assert_array_equal(found["mean"], mean)
    sys.modules["own_rules"] = None  # what imports it fails
    try:
        with trained_network.load(result.checkpoint).checkpoint as checkpoint:
            np.testing.assert_array_equal(checkpoint.parameters(), twin.server)
    finally:
        del sys.modules["own_rules"]
    comm.Barrier()
    with pytest.raises(UserError, match="that is a function" if comm.rank == 0 else "rank 0"):
        train(run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"rule": "own_rules:plain"})}), comm)


class Recorded:
    """A rule that notes when it is applied, and to how much."""

    state_names = ()

    def __init__(self) -> None:
        self.moments: list[tuple[Moment, int]] = []

    def init(self, parameters: np.ndarray) -> dict[str, np.ndarray]:
        return {}

    def apply(self, parameters, gradient, state, moment) -> None:
        self.moments.append((moment, gradient.size))


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("way", ["in place", "copied", "p2p"])
@pytest.mark.parametrize("consistent", [True, False])
def test_shards_count_updates_and_samples(comm, way, consistent) -> None:
    """A push at a time if they are consistent; otherwise pushes that overlap may have the same numbers."""
    elements, pushes, rule = 300, 6, Recorded()
    with parameter_server(comm, elements, shards=2, rule=rule, way=way, consistent=consistent) as bench:
        if bench.server is not None:
            bench.server.begin({}, 40, begun=30, samples=500)
        bench.together()
        if bench.client is not None:
            for number in range(pushes):
                bench.client.samples = 1 + number % 3
                push(bench.client, np.ones(elements, np.float32))
            bench.client.wait()
        bench.together()
        if bench.server is not None:
            total = pushes * bench.plan.workers
            covered: dict[int, int] = {}
            for moment, length in rule.moments:
                covered[moment.update] = covered.get(moment.update, 0) + length
                assert 1 <= moment.pushed <= 3
                assert 500 <= moment.samples < 500 + 2 * total
            updates = [moment.update for moment, _ in rule.moments]
            assert (updates[0], updates) == (11, sorted(updates))
            assert sum(covered.values()) == total * len(bench.held)
            if consistent or bench.plan.workers == 1:
                assert covered == dict.fromkeys(range(11, 11 + total), len(bench.held))
                seen = dict(rule.moments)
                for moment in seen:
                    earlier = {one.update: one.pushed for one in seen if one.update < moment.update}
                    assert moment.samples == 500 + sum(earlier.values())
            assert bench.server.version == 40 + total
        bench.together()
