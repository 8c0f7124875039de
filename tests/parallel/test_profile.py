"""``dbmpi bench network``: every layer's time, operations and bytes; alone and over partitions."""

from __future__ import annotations

import json
import time

import pytest

from dbmpi import config
from dbmpi.cli.main import main
from dbmpi.network.dense import DenseLayer
from dbmpi.network.description import Network
from dbmpi.replica.placement import automatic
from dbmpi.replica.plan import plan_exchanges
from dbmpi.runs.profile import profile, table

CONFIGURATION = """
data.train = "absent.h5"
optimizer.batch_size = 6
[[network.layers]]
type = "local"
maps = 2
field = 3
[[network.layers]]
type = "pooling"
size = 2
[[network.layers]]
units = 5
"""


@pytest.mark.parallel([1, 2, 3], timeout=300)
def test_what_a_profile_says(comm) -> None:
    described = (config.Local(maps=2, field=3), config.Pooling(size=2), config.Dense(units=5))
    network = Network(config.NetworkSection(layers=described), (3, 9, 9), 1)
    placed = automatic(network.layers, comm.size)
    found = profile(network, placed, 4, 3, comm)
    assert [layer.name for layer in found.layers] == ["local1", "pooling2", "dense3"]
    assert found.flops == network.flops(4)
    plans = plan_exchanges(network.layers, placed)
    assert found.nbytes == 2 * sum(plan.values for plan in plans) * 4 * 4
    assert (found.nbytes > 0) == (comm.size > 1)
    assert all(0 <= rank < comm.size for layer in found.layers for rank in layer.slowest)
    assert all(min(layer.seconds[:2]) > 0 for layer in found.layers)
    assert found.peak > 1e9
    assert len(found.hosts) == comm.size
    if comm.size == 1:
        # Medians of parts and of the whole, of three steps.
        assert sum(sum(layer.seconds[:2]) for layer in found.layers) < 3 * found.step
    lines = table(found)
    assert [line.split()[0] for line in lines[:5]] == ["layer", "local1", "pooling2", "dense3", "all"]
    assert ("slowest rank" in lines[0]) == (comm.size > 1)


@pytest.mark.parallel([2, 3], timeout=300)
def test_the_slowest_rank_of_a_phase_is_named(comm, monkeypatch) -> None:
    """One that sleeps in one layer's forward pass; in the exchange above it the others wait for it."""
    network = Network(config.NetworkSection(layers=(config.Dense(units=6), config.Dense(units=5))), (4,), 1)
    forward, late = DenseLayer.forward, comm.size - 1

    def slowly(self, *arguments) -> None:
        if comm.rank == late and self.name == "dense1":
            time.sleep(0.1)
        forward(self, *arguments)

    monkeypatch.setattr(DenseLayer, "forward", slowly)
    first, second = profile(network, automatic(network.layers, comm.size), 4, 3, comm).layers
    assert (first.slowest[0], first.seconds[0] > 0.1) == (late, True)
    assert (second.slowest[2] != late, second.seconds[2] > 0.05) == (True, True)


def test_the_command(tmp_path, capsys) -> None:
    path = tmp_path / "config.toml"
    path.write_text(CONFIGURATION)
    words = ["bench", "network", str(path)]
    assert main([*words, "--input-shape", "3,9,9", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["partitions"], len(found["layers"])) == (6, 1, 3)
    assert main([*words, "--input-shape", "3x9x9", "--batch", "4", "--steps", "2"]) == 0
    shown = capsys.readouterr().out
    assert "batches of 4; 1 partition" in shown
    assert "% of the peak" in shown
    mistakes = {
        (): "--input-shape 3,100,100",
        ("--input-shape", "3,9,9", "--set", "topology.partitions=2"): "dbmpi launch -n 2 -- bench network",
        ("--input-shape", "3,2,2"): "layer 'local1': a field of shape (3, 3) does not fit",
    }
    for more, message in mistakes.items():
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err
    for wrong in ("3,a", "0", ""):
        with pytest.raises(SystemExit):
            main([*words, "--input-shape", wrong])
