"""Replicas that join after a warmstart by steps, samples or loss, at once or one after the other."""

from __future__ import annotations

import math

import numpy as np
import pytest
from parallel import tiny

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.runs.training import train

EPOCHS = 100
BATCHES = EPOCHS * -(-tiny.SAMPLES // 6)


class Falling:
    """Every parameter is the number of pushes applied, and the loss falls with it from 200 to 0."""

    parameters = {"weights": np.zeros(5)}  # noqa: RUF012

    def __init__(self) -> None:
        self.first = math.inf

    def loss_and_gradient(self, parameters, batch):
        version = float(parameters["weights"].max())
        self.first = min(self.first, version)
        return max(0.0, 200.0 - version), {"weights": -np.ones(5)}


def learned(comm, place, epochs: int = EPOCHS, **optimizer: object):
    """Train; return the result, and how many pushes had been applied when each replica computed its first gradient."""
    run = tiny.describe(
        place,
        network={"layers": ()},
        topology={"shards": 1, "colocate": comm.size == 2},
        optimizer={"rule": "sgd", "learning_rate": 1.0, "epochs": epochs, **optimizer},
    )
    objective = Falling()
    result = train(run, comm, objective=objective)
    firsts = comm.allgather(objective.first)
    return result, firsts if comm.size == 2 else firsts[1:]


def assert_each_batch_counts_once(result, batches: int) -> None:
    with Checkpoint.open(result.checkpoint) as checkpoint:
        assert (checkpoint.info.step, checkpoint.info.holes) == (batches, ())
        np.testing.assert_array_equal(checkpoint.parameters(), np.float32(batches))


@pytest.mark.parallel([2, 3, 4, 6])
@pytest.mark.parametrize("release", [0, 120])
@pytest.mark.parametrize("end", [{"warmstart": 30}, {"warmstart_samples": 172}])
def test_after_a_given_number_they_join(comm, place, end, release) -> None:
    result, firsts = learned(comm, place, **end, release_samples=release)
    assert result.steps == BATCHES
    assert_each_batch_counts_once(result, BATCHES)
    assert firsts[0] == 0
    for replica, first in enumerate(firsts[1:], 1):
        samples = 172 + (replica - 1) * release
        assert first * 6 >= samples, "it has waited"
        assert first <= BATCHES


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("release", [0, 120])
def test_a_loss_ends_the_warmstart_and_a_resumed_run_knows(comm, place, release) -> None:
    """The mean loss of 100 pushes is at most 100 when about 150 are applied."""
    first_part = BATCHES // 2
    result, firsts = learned(comm, place, EPOCHS // 2, warmstart_loss=100.0, release_samples=release)
    assert_each_batch_counts_once(result, first_part)
    assert firsts[0] == 0
    for replica, first in enumerate(firsts[1:], 1):
        assert first >= 149 + (replica - 1) * release / 6
    with Checkpoint.open(result.checkpoint) as checkpoint:
        warm = checkpoint.info.warm_samples
    assert len(firsts) == 1 or 149 * 40 / 7 - 6 <= warm <= 50 * tiny.SAMPLES
    comm.Barrier()
    result, firsts = learned(comm, place, EPOCHS, warmstart_loss=100.0, release_samples=release)
    assert result.steps == BATCHES - first_part
    assert_each_batch_counts_once(result, BATCHES)
    assert max(firsts) <= BATCHES, "all take part from the beginning, and none waits for the loss again"


@pytest.mark.parallel([3, 4])
def test_a_loss_that_is_never_reached_leaves_all_to_one_replica(comm, place) -> None:
    result, firsts = learned(comm, place, 10, warmstart_loss=-1.0)
    assert_each_batch_counts_once(result, 70)
    assert firsts[0] == 0
    assert min(firsts[1:]) >= 70, "others evaluate at the end"


@pytest.mark.parallel([4])
def test_shares_are_balanced_where_replicas_join_one_after_the_other(comm, place) -> None:
    result, _ = learned(comm, place, 30, warmstart_samples=120, release_samples=240)
    with Checkpoint.open(result.checkpoint) as checkpoint:
        done = checkpoint.info.done
    # 21 alone, 40 by two (20 each), and what is left by three.
    rest = 210 - 21 - 40
    assert sum(done) == 210
    assert abs(done[0] - (21 + 20 + rest / 3)) <= 2
    assert abs(done[1] - (20 + rest / 3)) <= 2
    assert abs(done[2] - rest / 3) <= 2
