"""Ranks that are not alike: other versions and descriptions are refused, other processors are named."""

from __future__ import annotations

import numpy as np
import pytest
from mpi4py import MPI
from parallel import tiny

from dbmpi.errors import ToldElsewhere, UserError
from dbmpi.machine import capacity, threads
from dbmpi.runs import likeness, memory_plan
from dbmpi.runs.training import train


def refused(comm, run) -> str:
    """Return the message by which all ranks are refused; one of them has it."""
    with pytest.raises(UserError) as caught:
        train(run, comm)
    said = comm.allgather(None if isinstance(caught.value, ToldElsewhere) else str(caught.value))
    [message] = [text for text in said if text is not None]
    return message


@pytest.mark.parallel([3])
def test_other_versions_on_one_rank_are_refused(comm, place, monkeypatch) -> None:
    if comm.rank == 2:
        monkeypatch.setattr(np, "__version__", "1.0.0")
    message = refused(comm, tiny.describe(place))
    assert "the ranks do not run the same software: NumPy" in message
    assert "1.0.0 on rank 2" in message
    assert not (place / "run").exists()


@pytest.mark.parallel([3])
def test_another_description_on_one_rank_is_refused(comm, place) -> None:
    rate = 0.2 if comm.rank == 1 else 0.1
    message = refused(comm, tiny.describe(place, optimizer={"learning_rate": rate}))
    assert "optimizer.learning_rate = 0.1 on rank 0, 0.2 on rank 1" in message


@pytest.mark.parallel([3])
def test_more_threads_than_processors_on_one_rank_are_refused(comm, place, monkeypatch) -> None:
    if comm.rank == 1:
        monkeypatch.setattr(threads, "_affinity", lambda pid: {0})
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert "OMP_NUM_THREADS=7: this rank may use 1 processor" in refused(comm, tiny.describe(place))


@pytest.mark.parallel([3])
def test_other_processors_are_named_and_learn(comm, place, monkeypatch, capfd) -> None:
    if comm.rank > 0:
        monkeypatch.setattr(likeness, "processor", lambda: "another (123456)")
    train(tiny.describe(place, monitor={"progress": "lines"}), comm)
    said = capfd.readouterr().out
    assert ("processors differ: " in said) == (comm.rank == 0)
    if comm.rank == 0:
        assert "another kind on 2 of 3 ranks, another (123456) on rank 1" in said


@pytest.mark.parallel([1])
def test_a_processor_is_named_with_its_features() -> None:
    name, digest = likeness.processor().split()
    assert name
    assert len(digest) == 8


@pytest.mark.parallel([1, 4])
@pytest.mark.parametrize("method", ["downpour", "sandblaster"])
def test_memory_is_added_up_before_it_is_taken(comm, place, monkeypatch, method) -> None:
    layers = ({"units": 300}, {"units": tiny.CLASSES})
    run = tiny.describe(place, network={"layers": layers}, optimizer={"method": method, "rule": "adam"})
    size = 7 * 300 + 301 * 3
    # Just enough for each of the earlier checks, but not for all together.
    workers = max(comm.size - 1, 1)
    activations = 4 * 6 * (tiny.FEATURES + 3 * 300 + tiny.CLASSES) * workers
    monkeypatch.setattr(capacity, "available", lambda: 4 * size + activations)
    message = refused(comm, run)
    lines = message.splitlines()
    assert "this run needs" in lines[0]
    assert MPI.Get_processor_name() in lines[0]
    state = "vectors of the batch method" if method == "sandblaster" else "state of the rule on shards"
    table = {line[:30].strip(): line for line in lines[1:-1]}
    assert f"{8 * size / 2**20:.1f} MiB  on 1 rank" in table[state]
    assert f"{4 * size * workers / 2**20:.1f} MiB  on {workers} rank" in table["parameters of workers"]
    assert len(lines[-1]) > 20
    assert not (place / "run" / "checkpoints").exists()


@pytest.mark.parallel([1])
def test_what_is_added_up_is_what_is_taken(comm, shared_path, monkeypatch) -> None:
    """A network of 40 MB: the process grows by what the plan says, and not by much more."""
    random = np.random.default_rng(3)
    for name in ("train", "test"):
        tiny.write_file(shared_path / f"{name}.h5", random.normal(size=(40, 1000)), random.integers(0, 3, 40))
    plans: list[int] = []
    original = memory_plan.needs

    def noted(*arguments: object) -> dict[str, int]:
        found = original(*arguments)
        plans.append(sum(found.values()))
        return found

    monkeypatch.setattr(memory_plan, "needs", noted)

    def grown(units: int) -> int:
        def resident() -> int:
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024

        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak begins anew
        before = resident()
        layers = ({"units": units}, {"units": tiny.CLASSES})
        run = {"directory": shared_path / f"run-{units}"}
        optimizer = {"rule": "adagrad", "batch_size": 20, "epochs": 1}
        train(tiny.describe(shared_path, run=run, network={"layers": layers}, optimizer=optimizer), comm)
        return resident() - before

    grown(10)  # compiles, and loads what is loaded late
    taken = grown(10_000)
    assert plans[-1] > 100e6
    # The checkpoint is copied from, and what is added on the way is not in the plan.
    assert 0.8 * plans[-1] < taken < 1.6 * plans[-1] + 50e6, (taken, plans[-1])


class InTurn(MPI.Intracomm):
    """Ranks that a launcher has dealt to two hosts in turn."""

    def Split_type(self, kind: int, key: int = 0, info: MPI.Info = MPI.INFO_NULL) -> MPI.Intracomm:  # noqa: N802
        return self.Split(self.rank % 2, key)


@pytest.mark.parallel([6])
def test_replicas_on_one_host_each_learn_the_same(comm, place, capfd) -> None:
    """Two replicas of two partitions on hosts that ranks were dealt to in turn, in a fixed order of portions."""
    results = []
    for number, world in enumerate((comm, InTurn(comm))):
        run = tiny.describe(
            place,
            run={"directory": place / f"run{number}", "seed": 3},
            topology={"shards": 2, "replicas": 2, "partitions": 2},
            optimizer={"method": "sandblaster", "epochs": 4},
            sandblaster={"deterministic": True},
            monitor={"progress": "lines"},
        )
        results.append(tiny.vectors(train(run, world).checkpoint)["parameters"])
        said = capfd.readouterr().out
        assert ("(ranks 0, 2, 4): shard 0, replica 0" in said) == (comm.rank == 0 and number == 1)
        assert ("(ranks 1, 3, 5): shard 1, replica 1" in said) == (comm.rank == 0 and number == 1)
    np.testing.assert_array_equal(*results)
