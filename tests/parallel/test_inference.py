"""A checkpoint evaluated under any cut: the same outcome and predictions, and no rank holds more than its part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from parallel import tiny
from unit.checkpoint_files import make_info

from dbmpi import config
from dbmpi.checkpoint.directory import checkpoint_path
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.checkpoint.writer import CheckpointWriter
from dbmpi.cli import evaluate_text
from dbmpi.data.source import Source
from dbmpi.errors import KnownToAll, UserError
from dbmpi.kernels import matmul
from dbmpi.mpi import waiting
from dbmpi.objective import Batch
from dbmpi.replica.warmup import agree_on_products
from dbmpi.replica.whole import WholeNetwork
from dbmpi.runs import details
from dbmpi.runs.inference import Inference

SHAPE, CLASSES, SAMPLES = (2, 8, 8), 6, 41
NETWORK = config.NetworkSection(
    loss="softmax",
    layers=(
        config.Local(maps=3, field=3, activation="tanh"),
        config.Pooling(size=2),
        config.Normalisation(window=3),
        config.Dropout(rate=0.5),
        config.Dense(units=9, activation="relu"),
        config.Dense(units=CLASSES),
    ),
)


PLACEMENT = config.PlacementSection(layers={"dense5": config.PlacedLayer(boxes=("0:8", "8:9"))})


@pytest.fixture
def place(comm, shared_path) -> Path:
    """A directory that all ranks share, with a checkpoint of two partitions and data."""
    if comm.rank == 0:
        random = np.random.default_rng(4)
        inputs, labels = random.normal(size=(SAMPLES, *SHAPE)), random.integers(0, CLASSES, SAMPLES)
        tiny.write_file(shared_path / "data.h5", inputs, labels, CLASSES)
        network = WholeNetwork(NETWORK, SHAPE, 1)
        configuration = f'{{"network": {NETWORK.model_dump_json()}, "placement": {PLACEMENT.model_dump_json()}}}'
        with CheckpointWriter(checkpoint_path(shared_path / "run", 5), network.layout) as writer:
            writer.write("parameters", 0, random.normal(0, 0.3, network.size).astype(np.float32))
            writer.commit(
                make_info(configuration=configuration, input_shape=SHAPE, classes=CLASSES, step=5, partitions=2)
            )
    waiting.barrier(comm, "the data")
    return shared_path


def whole(place: Path) -> tuple[WholeNetwork, np.ndarray, Batch]:
    with Checkpoint.open(place / "run") as checkpoint, Source.open(place / "data.h5", 100) as source:
        return WholeNetwork(NETWORK, SHAPE, 1), checkpoint.parameters(), source.batch(np.arange(SAMPLES))


@pytest.mark.parallel([1, 2, 3, 4, 6], timeout=300)
def test_any_cut_gives_what_one_process_gives(comm, place) -> None:
    network, parameters, batch = whole(place)
    expected = network.evaluate(parameters, batch)
    outputs = network.predict(parameters, batch.inputs).T
    replicated = None
    for partitions in [number for number in range(1, comm.size + 1) if comm.size % number == 0]:
        with (
            Source.open(place / "data.h5", 100) as source,
            Inference(place / "run", comm, partitions, batch_size=5) as inference,
        ):
            assert (inference.partitions, inference.replicas) == (partitions, comm.size // partitions)
            outcome = inference.evaluate(source)
            assert (outcome.samples, outcome.correct) == (SAMPLES, expected.correct)
            assert outcome.mean_loss == pytest.approx(expected.mean_loss, rel=1e-5)
            found = list(inference.predict(source))
            held = np.array([inference._parameters.size])
        if partitions == 1:
            replicated = outcome
        # What only replicas share, and not the arithmetic, changes no bit: compared with a process alone.
        if comm.rank == 0:
            assert [first for first, _ in found] == list(range(0, SAMPLES, 5))
            np.testing.assert_allclose(np.concatenate([rows for _, rows in found]), outputs, rtol=1e-4, atol=1e-6)
            assert all(rows.dtype == np.float32 and rows.flags.c_contiguous for _, rows in found)
        else:
            assert found == []
        largest, total = np.empty_like(held), np.empty_like(held)
        from mpi4py import MPI

        comm.Allreduce(held, largest, MPI.MAX)
        comm.Allreduce(held, total)
        # Biases of a dense layer that is split by inputs are all that several may hold.
        assert largest[0] <= 1.5 * network.size / partitions + CLASSES
        assert total[0] >= network.size * (comm.size // partitions)
    with Inference(place / "run", None, batch_size=5) as alone, Source.open(place / "data.h5", 100) as source:
        assert alone.evaluate(source) == replicated


@pytest.mark.parallel([1, 2, 3, 4])
def test_the_default_is_the_cut_of_the_training_or_all_ranks(comm, place) -> None:
    with Inference(place / "run", comm) as inference:
        assert inference.partitions == {1: 1, 2: 2, 3: 3, 4: 2}[comm.size]
        assert inference.is_first == (comm.rank == 0)
        if inference.partitions == 2:  # cut by hand, too
            weights = whole(place)[0].layout.offsets["dense5/weights"]
            rows = [
                run.length // 75 for run in inference._replica.parameters.runs if run.start - weights in (0, 8 * 75)
            ]
            assert rows[-1:] == ([8], [1])[comm.rank % 2]
    with pytest.raises(UserError) as caught:
        Inference(place / "run", comm, 5)
    if comm.rank == 0:
        assert f"partitions = 5: {comm.size} rank" in str(caught.value)
    with pytest.raises(KnownToAll if comm.size > 1 else UserError):
        Inference(place / "missing", comm)


@pytest.mark.parallel([1, 3])
def test_all_ranks_use_the_first_ones_products(comm, monkeypatch) -> None:
    large = WholeNetwork(config.NetworkSection(layers=(config.Dense(units=400),)), (400,), 1).layers
    first, others = ("numpy", "tiles", "numpy"), ("tiles", "numpy", "tiles")
    monkeypatch.setattr(matmul._Choice, "names", first if comm.rank == 0 else others)
    assert agree_on_products(comm, large, 10) == agree_on_products(comm, (), 128) == ()
    assert matmul.providers() == (first if comm.rank == 0 else others)
    assert agree_on_products(comm, large, 128) == first
    assert matmul.providers() == first
    monkeypatch.setattr(matmul._Choice, "names", ())
    monkeypatch.setenv(matmul.VARIABLE, "abacus" if comm.rank == 0 else "numpy")
    with pytest.raises(UserError) as caught:
        agree_on_products(comm, large, 128)
    assert ("abacus: no such provider" in str(caught.value)) == (comm.rank == 0)


@pytest.mark.parallel([2, 3, 6], timeout=300)
def test_details_are_the_same_on_any_number_of_ranks(comm, place, monkeypatch) -> None:
    """With replicas to the last bit, whether outputs are kept or computed again; with partitions up to rounding."""
    with Inference(place / "run", None, batch_size=5) as alone, Source.open(place / "data.h5", 100) as source:
        expected = evaluate_text.as_json(details.details(alone, source))
    partitions = [number for number in range(1, comm.size + 1) if comm.size % number == 0]
    for cut, kept in [*((number, 1 << 20) for number in partitions), (1, 0)]:
        monkeypatch.setattr(details, "_KEPT_BYTES", kept)
        with (
            Source.open(place / "data.h5", 100) as source,
            Inference(place / "run", comm, cut, batch_size=5) as inference,
        ):
            found = evaluate_text.as_json(details.details(inference, source))
        if cut == 1:
            assert found == expected
        assert found["confusion_matrix"] == expected["confusion_matrix"]
        areas = [[one["auc"] for one in each["classes"]] for each in (found, expected)]
        np.testing.assert_allclose(*areas, atol=0.02)


@pytest.mark.parallel([2, 3])
def test_details_of_values_are_the_same_on_any_number_of_ranks(comm, shared_path, monkeypatch) -> None:
    section = config.NetworkSection(loss="squared", layers=(config.Dense(units=3, activation="tanh"),))
    if comm.rank == 0:
        random = np.random.default_rng(5)
        tiny.write_file(shared_path / "data.h5", random.normal(size=(SAMPLES, 4)), random.normal(size=(SAMPLES, 3)))
        network = WholeNetwork(section, (4,), 1, targets="values")
        with CheckpointWriter(checkpoint_path(shared_path / "run", 5), network.layout) as writer:
            writer.write("parameters", 0, random.normal(0, 0.3, network.size).astype(np.float32))
            configuration = f'{{"network": {section.model_dump_json()}}}'
            writer.commit(make_info(configuration=configuration, input_shape=(4,), classes=0, step=5, partitions=1))
    waiting.barrier(comm, "the data")
    found = []
    for ranks, block in ((None, 1 << 20), (comm, 1 << 20), (comm, 1)):
        monkeypatch.setattr(details, "_BLOCK_BYTES", block)
        with (
            Source.open(shared_path / "data.h5", 100) as source,
            Inference(shared_path / "run", ranks, 1, batch_size=4) as inference,
        ):
            found.append(evaluate_text.as_json(details.details(inference, source)))
    assert found[0] == found[1] == found[2]
