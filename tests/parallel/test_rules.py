"""Whole runs under each update rule: equal to a serial twin bit for bit, also when they are resumed."""

from __future__ import annotations

import numpy as np
import pytest
from parallel import tiny
from parallel.test_train import describe_one
from unit.rule_twins import RuleTwin

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.runs.training import train

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
