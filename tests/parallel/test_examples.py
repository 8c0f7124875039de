"""Examples of objectives in whole runs, as they are written for users."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import pytest

import dbmpi
from dbmpi.data.importers.digits import import_digits
from dbmpi.mpi import waiting
from dbmpi.runs.gradient_check import check_gradient

EXAMPLES = Path(__file__).parents[2] / "examples"


def module(name: str) -> ModuleType:
    """Import a file of the examples."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def describe(name: str, directory: Path, *settings: str) -> dbmpi.Run:
    """Return the run of an example, with its data and its results in another directory."""
    run = dbmpi.load(EXAMPLES / f"{name}.toml", [f"run.directory={directory / 'run'}", *settings])
    data = {half: directory / "data" / getattr(run.data, half).name for half in ("train", "test")}
    return run.model_copy(update={"data": run.data.model_copy(update=data)})


@pytest.mark.parallel([1, 3])
def test_the_conductivity_is_recovered(comm, shared_path) -> None:
    heat = module("heat_conductivity")
    if comm.rank == 0:
        heat.write_experiments(shared_path / "data")
    waiting.barrier(comm, "the experiments")
    run = describe("heat-conductivity", shared_path, "monitor.progress=none")
    if comm.rank == 0:
        assert [finding for finding in check_gradient(run) if finding.status != "ok"] == []
    result = dbmpi.train(run, comm)
    assert result.test is not None
    assert result.test.mean_loss == pytest.approx(heat.NOISE**2 / 2, rel=0.3)  # the noise alone
    with h5py.File(result.checkpoint) as file:
        profile = file["parameters/log_conductivity"][()]
    assert np.abs(profile - heat.true_log_conductivity(np.arange(1, 64) / 64)).mean() < 0.1
    if comm.rank == 0:
        heat.draw(result.checkpoint, shared_path / "heat.png")
        assert (shared_path / "heat.png").stat().st_size > 10_000


@pytest.mark.parallel([2])
@pytest.mark.parametrize(("example", "extra"), [("torch-cnn", "torch"), ("jax-digits", "jax")])
def test_networks_of_other_frameworks_learn(comm, shared_path, example, extra) -> None:
    pytest.importorskip(extra, reason=f"the extra dbmpi[{extra}] is not installed")
    pytest.importorskip("sklearn", reason="its digits are the data")
    if comm.rank == 0:
        import_digits(shared_path / "data")
    waiting.barrier(comm, "the data")
    result = dbmpi.train(describe(example, shared_path, "monitor.progress=none"), comm)
    assert result.test is not None
    assert result.test.accuracy is not None
    assert result.test.accuracy > 0.9
