"""No setting makes a run take more memory than its data and its network can fill: it is lowered or refused."""

from __future__ import annotations

import resource
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from parallel import tiny
from pydantic import BaseModel
from unit.checkpoint_files import as_version_1

from dbmpi import config
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.config import Run
from dbmpi.errors import UserError
from dbmpi.machine import capacity
from dbmpi.mpi import waiting
from dbmpi.runs.training import train

HUGE = (10**9, 2**53)
SPARE_MIB = 300
"""What all these runs together may take beyond the first one."""
NO_SIZES = {
    "run.seed",  # a seed
    "optimizer.epochs",  # time, and nothing else
}
FLOATS = {"server.inbox_mib": (1e9, 1e308), "server.chunk_kib": (1e9, 1e308), "sandblaster.batch_growth": (1e9, 1e308)}
"""Settings that size memory and are no whole numbers."""


def whole_numbers(model: type[BaseModel]) -> Iterator[str]:
    """Yield the settings of a section that may be whole numbers."""
    for key, field in model.model_fields.items():
        if "int" in str(field.annotation).replace("Point", "").replace("hint", "") and "Literal" not in str(
            field.annotation
        ):
            yield key


def settings() -> list[str]:
    found = [
        f"{name}.{key}"
        for name, field in Run.model_fields.items()
        if name not in ("placement", "objective")  # tables by name, and of the user's own
        for key in whole_numbers(field.annotation)
    ]
    return [name for name in (*found, *FLOATS) if name not in NO_SIZES]


def attempt(comm, run: Run) -> str:
    """Train, and return why that was refused, or an empty text."""
    try:
        train(run, comm)
    except UserError as error:
        return str(error)
    return ""


def test_the_settings_are_found() -> None:
    assert {"optimizer.batch_size", "sandblaster.portions_per_push", "topology.shards", "checkpoint.keep"} <= set(
        settings()
    )


@pytest.mark.parallel([1], timeout=600)
@pytest.mark.parametrize("method", ["downpour", "sandblaster"])
def test_no_setting_of_a_run_takes_the_memory(comm, place, method) -> None:
    attempts = 0

    def described(**sections: dict[str, Any]) -> Run:
        nonlocal attempts
        attempts += 1
        usual = {"batch_size": 6, "epochs": 2, "method": method, "learning_rate": 0.01}
        given = {"optimizer": usual | sections.pop("optimizer", {}), "run": {"directory": place / f"run{attempts}"}}
        return tiny.describe(place, **(given | sections))

    train(described(), comm)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in settings():
        section, key = name.split(".")
        for value in FLOATS.get(name, HUGE):
            with suppress(ValueError):  # of pydantic's: it has an upper bound
                said = attempt(comm, described(**{section: {key: value}}))
                assert not said or key in said or section == "topology", (name, value, said)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < SPARE_MIB * 1024, f"{grown / 1024:.0f} MiB"


LAYER_NUMBERS = [(layer, key) for layer in config.LAYERS for key in whole_numbers(layer) if key not in ("type", "name")]


@pytest.mark.parallel([1], timeout=600)
def test_no_setting_of_a_layer_takes_the_memory(comm, shared_path) -> None:
    random = np.random.default_rng(3)
    for name in ("train", "test"):
        tiny.write_file(shared_path / f"{name}.h5", random.normal(size=(20, 2, 8, 8)), random.integers(0, 3, 20), 3)
    usual = {
        "dense": {"units": 5},
        "local": {"maps": 2, "field": 3},
        "convolution": {"maps": 2, "field": 3},
        "pooling": {"size": 2},
        "normalisation": {"window": 3},
    }
    assert {kind.model_fields["type"].default for kind, _ in LAYER_NUMBERS} == set(usual)
    before = None
    for number, (kind, key) in enumerate([(config.Dense, "units"), *LAYER_NUMBERS]):
        name = kind.model_fields["type"].default
        for value in (usual[name].get(key, 1),) if before is None else (10**12 + 1, 2**53 - 1):
            layers = ({"type": name} | usual[name] | {key: value}, {"units": 3})
            run = tiny.describe(
                shared_path,
                run={"directory": shared_path / f"run{number}-{value}"},
                network={"layers": layers},
                optimizer={"batch_size": 6, "epochs": 1, "learning_rate": 0.01},
            )
            said = attempt(comm, run)
            assert not said or f"{name}1" in said or "'dense2/weights'" in said, (name, key, value, said)
            assert said or key in ("stride", "window") or before is None
        if before is None:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < SPARE_MIB * 1024, f"{grown / 1024:.0f} MiB"


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("method", ["downpour", "sandblaster"])
def test_a_batch_larger_than_the_data_is_all_of_them(comm, place, capfd, method) -> None:
    results = {}
    for size in (tiny.SAMPLES, 10**9):
        run = tiny.describe(
            place,
            run={"directory": place / f"of-{size}", "seed": 3},
            optimizer={"batch_size": size, "epochs": 3, "method": method, "rule": "sgd"},
            sandblaster={"deterministic": True},
            topology={"replicas": 1},
            monitor={"progress": "lines"},
        )
        result = train(run, comm)
        results[size] = tiny.vectors(result.checkpoint)["parameters"]
        said = capfd.readouterr().out
        lowered = "optimizer.batch_size = 1,000,000,000 is more than the samples to learn from: taken as 40"
        assert (lowered in said) == (size == 10**9 and comm.rank == 0)
    np.testing.assert_array_equal(*results.values())
    # It goes on, under either number.
    again = run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"epochs": 4.0})})
    assert train(again, comm).steps > 0


@pytest.mark.parallel([1, 2])
def test_what_does_not_fit_the_memory_is_refused(comm, place, monkeypatch) -> None:
    def refused(memory: int, **sections: dict[str, Any]) -> str:
        monkeypatch.setattr(capacity, "available", lambda: memory)
        with pytest.raises(UserError) as caught:
            train(tiny.describe(place, topology={"colocate": True}, **sections), comm)
        return max(comm.allgather(str(caught.value)), key=len)

    train_bytes = (tiny.SAMPLES + tiny.TEST_SAMPLES) * 4 * (tiny.FEATURES + 1)
    said = refused(comm.size * train_bytes - 1)
    assert "data.memory_mib" in said
    assert ("in each of 2 workers" in said) == (comm.size == 2)
    activations = 4 * (6 + 7 + 3 + 2 * 7) * 40 * comm.size
    said = refused(activations - 1, optimizer={"batch_size": 40}, data={"train": place / "train.h5", "test": None})
    assert "optimizer.batch_size = 40: the activations" in said
    assert "set it to 39 or less" in said
    optimizer = {"method": "sandblaster", "batch_size": 6, "epochs": 100}
    said = refused(10_000, optimizer=optimizer, sandblaster={"memory": 1000})
    assert "sandblaster.memory = 1,000: so many steps" in said
    assert not list((place / "run").glob("checkpoints/*.h5"))
    waiting.barrier(comm, "the other rank")


@pytest.mark.parallel([1])
def test_checkpoints_of_larger_batches_than_the_data_are_gone_on_from(comm, place) -> None:
    """Earlier versions stored the number as it was given."""
    run = tiny.describe(place, optimizer={"batch_size": 40, "epochs": 2, "learning_rate": 0.1})
    result = train(run, comm)
    import h5py

    with h5py.File(result.checkpoint, "r+") as file:
        stored = file["run/configuration"][()].decode().replace('"batch_size":40', '"batch_size":99')
        as_version_1(file)
        del file["run/configuration"]
        file["run/configuration"] = np.bytes_(stored.encode())
    with Checkpoint.open(result.checkpoint) as checkpoint:
        assert Run.from_json(checkpoint.info.configuration).optimizer.batch_size == 99
    longer = run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"epochs": 3.0, "batch_size": 77})})
    assert train(longer, comm).steps == 1


def test_numbers_that_cannot_be_counted_are_refused(tmp_path) -> None:
    for number in ("9007199254740993", "1" + "0" * 400, "1" + "0" * 5000):
        (tmp_path / "run.toml").write_text(
            f'[data]\ntrain = "x.h5"\n[[network.layers]]\nunits = {number}\n[optimizer]\nbatch_size = 3\n'
        )
        with suppress(ValueError):
            tomllib.loads((tmp_path / "run.toml").read_text())
        with pytest.raises(UserError, match=r"run\.toml"):
            config.load(tmp_path / "run.toml")
