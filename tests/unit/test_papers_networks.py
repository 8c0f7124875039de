"""The paper's networks: their parameters, as the documentation says, and no room taken for what nobody asked for."""

import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from unit import partition_layers

from dbmpi import config
from dbmpi.cli.main import main
from dbmpi.network.description import Network
from dbmpi.replica.placement import automatic, check
from dbmpi.replica.plan import plan_exchanges

PROJECT = Path(__file__).parents[2]
DOCUMENTED = (PROJECT / "docs" / "networks.md").read_text(encoding="utf-8")
NETWORKS = {
    "speech": ((440,), 41_777_152, 42e6),
    "images-8": ((3, 100, 100), 79_923_128, 80e6),
    "images-16": ((3, 100, 100), 330_302_696, 330e6),
    "images-36": ((3, 100, 100), 1_691_754_816, 1.7e9),
}


def network(name: str) -> Network:
    return Network(config.load(PROJECT / "examples" / f"{name}.toml").network, NETWORKS[name][0], 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_are_those_of_the_paper(name):
    _, parameters, paper = NETWORKS[name]
    tracemalloc.start()
    made = network(name)
    assert made.size == parameters
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()
    assert made.size == pytest.approx(paper, rel=0.01)
    assert f"{parameters:,}" in DOCUMENTED
    for layer in made.layers:
        shape = " x ".join(f"{length:,}" for length in layer.output_shape)
        own = sum(tensor.size for tensor in layer.tensors.values())
        rows = [line for line in DOCUMENTED.splitlines() if re.match(rf"\| [^|]*\b{layer.name}\b", line)]
        assert any(re.search(rf"\| {shape} \| {f'{own:,}' if own else ''}", row) for row in rows), layer.name


def test_the_image_networks_are_the_papers():
    for maps in (8, 16, 36):
        layers = config.load(PROJECT / "examples" / f"images-{maps}.toml").network.layers
        assert [layer.type for layer in layers] == [*["local", "pooling", "normalisation"] * 3, "dense"]
        assert {(layer.maps, layer.field) for layer in layers[:-1:3]} == {(maps, 10)}
        assert {layer.kind for layer in layers[1:-1:3]} == {"l2"}
        assert layers[-1].units == 21_000


@pytest.mark.parametrize("name", NETWORKS)
def test_the_plans_that_are_counted_are_of_these_networks(name):
    """Tests of placements and plans replay stand-ins for their layers."""
    layers, stand_ins = network(name).layers, partition_layers.NETWORKS[name]()
    for layer, stand_in in zip(layers, stand_ins, strict=True):
        assert layer.output_shape == stand_in.output_shape
        assert sum(tensor.size for tensor in layer.tensors.values()) == sum(t.size for t in stand_in.tensors.values())
    for partitions in (4, 144):
        mine, theirs = (automatic(found, partitions) for found in (layers, stand_ins))
        plans = zip(plan_exchanges(layers, mine), plan_exchanges(stand_ins, theirs), strict=True)
        assert all(plan.values == other.values for plan, other in plans)


@pytest.mark.parametrize(("name", "partitions"), [("speech", 8), ("images-8", 144), ("images-36", 36)])
def test_they_can_be_cut(name, partitions):
    layers = network(name).layers
    check(layers, automatic(layers, partitions))


def test_their_placement_can_be_looked_at(capsys):
    words = ["inspect", str(PROJECT / "examples" / "images-8.toml"), "--placement", "--partitions", "6"]
    assert main([*words, "--input-shape", "3,100,100"]) == 0
    shown = capsys.readouterr().out
    assert "79,923,128 parameters over 6 partitions; batches of 32" in shown
    assert [line.split()[0] for line in shown.splitlines()[3:]] == [layer.name for layer in network("images-8").layers]
    assert main(words) == 2
    assert "--input-shape" in capsys.readouterr().err
    assert main([*words, "--input-shape", "3,9,9"]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in ("layer 'local1'", "(10, 10)", "(3, 9, 9)"))
    own = str(PROJECT / "examples" / "own-layer.toml")
    assert main(["inspect", own, "--placement", "--input-shape", "8,8"]) == 2
    assert "--allow-code own_layer.py" in capsys.readouterr().err


def test_one_vs_all_writes_no_targets_out():
    """21,000 outputs of 256 samples are 21 MB, and as many zeros and ones would be as much again."""
    program = """
import resource
import numpy as np
from dbmpi.network.losses import Loss
loss = Loss("logistic", "classes")
loss.apply(np.zeros((4, 256), np.float32), np.zeros(256, np.int32))
values = np.zeros((21_000, 256), np.float32)
values.fill(0.5)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss.apply(values, np.arange(256, dtype=np.int32))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4_000  # KiB
