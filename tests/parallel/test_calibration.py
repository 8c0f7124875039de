"""The constants of a machine, measured by two ranks, on few and small layers and vectors."""

from __future__ import annotations

import pytest

from dbmpi import config
from dbmpi.plan import constants
from dbmpi.runs import calibration, layer_speeds


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Let everything be small; the ranks may be in different directories."""
    monkeypatch.chdir(tmp_path)
    layers = {kind: described[:1] for kind, described in layer_speeds._LAYERS.items()}
    layers["dense"] = ((config.Dense(units=16), (16,)), (config.Dense(units=48), (48,)))
    monkeypatch.setattr(layer_speeds, "_LAYERS", layers)
    monkeypatch.setattr(layer_speeds, "_SAMPLES", (8, 16))
    monkeypatch.setattr(layer_speeds, "_BYTES", (1 << 12, 1 << 14))
    monkeypatch.setattr(calibration, "_SIDES", ((32, 20),))
    monkeypatch.setattr(calibration, "_STEPS", 30)
    monkeypatch.setattr(calibration, "_LONG", (16, 16, 20, 60))


@pytest.mark.parallel([2], timeout=300)
def test_two_ranks_measure_the_constants_of_a_host(comm, small, tmp_path):
    said: list[str] = []
    found = calibration.calibrate(comm, said.append)
    assert (found.ranks, found.hosts) == (2, 1)
    assert {*constants.KINDS} == {*found.rates}
    assert [row[:2] for row in found.rates["dense_first"]] == [(256, 8), (256, 16), (2304, 8), (2304, 16)]
    assert [row[0] for row in found.updates["2"]] == [32 * 33 + 2 * 33]
    assert 0 < found.step_seconds < 10
    assert 0 < found.service_seconds < 10
    assert {"step_seconds", "exchange_seconds", "updates", "rates", "batch_bandwidth"} <= {*found.measured}
    assert {"latency", "bandwidth"}.isdisjoint(found.measured)
    assert found.latency == constants.reference().latency
    assert len(said) == 2
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / "machine.toml"
    path.write_text(constants.as_toml(found))
    assert constants.load(path).measured == found.measured
