"""A network cut over partitions computes what it computes in one piece."""

from __future__ import annotations

import numpy as np
import pytest

from dbmpi import config
from dbmpi.index.boxes import Box
from dbmpi.index.layout import Tensor, cut
from dbmpi.network.layer import Backward, Forward
from dbmpi.objective import Batch
from dbmpi.replica import placement
from dbmpi.replica.group import Group
from dbmpi.replica.placement import Placement
from dbmpi.replica.replica import Replica
from dbmpi.replica.team import Team
from dbmpi.replica.whole import WholeNetwork

TOLERANCE = {np.float32: 1e-5, np.float64: 1e-12}


def dense_network(loss: str, dtype: type, *units: int, activation: str = "tanh", inputs=(12,)) -> WholeNetwork:
    layers = [config.Dense(units=count, activation=activation) for count in units[:-1]]
    layers.append(config.Dense(units=units[-1]))
    return WholeNetwork(config.NetworkSection(loss=loss, layers=tuple(layers)), inputs, seed=3, dtype=dtype)


def by_units(network: WholeNetwork, parts: int) -> Placement:
    boxes = tuple(
        tuple(Box((units.start,), (units.stop,)) for units in cut(layer.output_shape[0], parts))
        for layer in network.layers
    )
    return Placement(boxes, ("outputs",) * len(boxes))


def random_batch(network: WholeNetwork, samples: int) -> Batch:
    rng = np.random.default_rng(samples)
    inputs = rng.standard_normal((*network.input_shape, samples)).astype(network.dtype)
    return Batch(inputs, rng.integers(0, network.outputs, samples).astype(np.int32))


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-30))


def check(comm, network: WholeNetwork, placed: Placement, samples: int, steps: int = 20, rate=0.1, shared=True) -> None:
    """Outputs, loss, gradient, and `steps` training steps, are the same as in one piece."""
    tolerance = TOLERANCE[network.dtype.type]
    whole = np.empty(network.layout.size, network.dtype)
    network.initial(0, whole)
    replica = Replica(network, placed, comm, shared=shared)
    mine = replica.parameters.take(whole)
    batch = random_batch(network, samples)
    expected = network._replica.outputs(whole, batch.inputs)
    assert relative(replica.outputs(mine, batch.inputs), expected) <= tolerance
    assert replica.evaluate(mine, batch).mean_loss == pytest.approx(
        network.evaluate(whole, batch).mean_loss, rel=tolerance
    )
    gradient, part = np.empty_like(whole), np.empty_like(mine)
    replica.loss_and_gradient(mine, batch, part, step=steps)
    twice = part.copy()
    replica.loss_and_gradient(mine, batch, twice, step=steps, add=True)
    assert relative(twice, 2 * part) <= tolerance
    for step in range(steps):
        there = network.loss_and_gradient(whole, batch, gradient, step=step)
        here = replica.loss_and_gradient(mine, batch, part, step=step)
        assert here.correct == there.correct
        assert here.loss == pytest.approx(there.loss, rel=tolerance)
        if step == 0:
            assert relative(part, replica.parameters.take(gradient)) <= tolerance
        whole -= network.dtype.type(rate) * gradient
        mine -= network.dtype.type(rate) * part
    assert relative(mine, replica.parameters.take(whole)) <= tolerance
    replica.__exit__(None, None, None)


@pytest.mark.parallel([1, 2, 3, 4, 6], timeout=300)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("loss", ["softmax", "logistic", "squared"])
def test_dense_networks_cut_by_units(comm, loss, dtype) -> None:
    network = dense_network(loss, dtype, 20, 7, 10)
    check(comm, network, by_units(network, comm.size), samples=9)


@pytest.mark.parallel([1, 2, 3, 4, 6], timeout=300)  # the first one compiles
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(3, 9, 8), (1, 6, 7)])
def test_images_through_layers_of_many_kinds(comm, dtype, shape) -> None:
    """Masks of dropout, windows over the boundaries, and halos of two radii do not depend on the cut."""
    layers = (
        config.Dropout(rate=0.2),
        config.Normalisation(window=3),
        config.Pooling(kind="max", size=2),
        config.Pooling(kind="average", size=(3, 2), stride=2),
        config.Dense(units=11, activation="sigmoid"),
        config.Dropout(rate=0.5),
        config.Dense(units=4),
    )
    network = WholeNetwork(config.NetworkSection(layers=layers), shape, seed=3, dtype=dtype)
    check(comm, network, placement.automatic(network.layers, comm.size), samples=5)


class Gain:
    """One factor for all inputs: every worker needs it; it adds to the gradient if asked."""

    accruing = True

    def __init__(self, name: str, input_shape: tuple[int, ...]) -> None:
        self.name, self.input_shape, self.output_shape = name, input_shape, input_shape
        self.tensors = {"factor": Tensor(f"{name}/factor", (1,))}

    def input_box(self, output: Box) -> Box:
        return output

    def tensor_box(self, tensor: str, output: Box) -> Box:
        return Box((0,), (1,))

    def flops(self, output: Box, samples: int, *, input_gradient: bool = True) -> int:
        return 0

    def initial(self, tensor: str, out: np.ndarray, seed: int, number: int, start: int) -> None:
        out[:] = 0.5

    def forward(self, task: Forward) -> None:
        np.multiply(task.parameters["factor"], task.inputs, out=task.outputs)

    def backward(self, task: Backward) -> None:
        before = task.parameter_gradient["factor"] if task.add else 0
        task.parameter_gradient["factor"][:] = before + (task.gradient * task.inputs).sum()
        if task.input_gradient is not None:
            np.multiply(task.parameters["factor"], task.gradient, out=task.input_gradient)


@pytest.mark.parallel([1, 2, 3])
def test_a_layer_that_adds_to_gradients_that_several_workers_have(comm) -> None:
    section = config.NetworkSection.model_validate({"layers": [{"type": "m:Gain"}, {"type": "dense", "units": 4}]})
    network = WholeNetwork(section, (2, 6, 5), seed=3, dtype=np.float64, load=lambda kind, layer: Gain)
    check(comm, network, placement.automatic(network.layers, comm.size), samples=3, steps=3)


@pytest.mark.parallel([2, 3])
def test_uneven_and_explicit_placements(comm) -> None:
    layers = (config.Normalisation(window=3), config.Pooling(size=2, stride=2), config.Dense(units=5))
    network = WholeNetwork(config.NetworkSection(layers=layers), (2, 8, 8), seed=3, dtype=np.float64)
    uneven = placement.automatic(network.layers, comm.size, weights=[1.0, 3.0, 2.0][: comm.size])
    check(comm, network, uneven, samples=3, steps=3)
    rows = [f":, {part.start}:{part.stop}, :" for part in cut(4, comm.size)]
    explicit = placement.explicit(network.layers, {"pooling2": rows}, comm.size)
    check(comm, network, explicit, samples=3, steps=3)


@pytest.mark.parallel([3, 4])
def test_more_partitions_than_units(comm) -> None:
    network = dense_network("softmax", np.float64, 2, 5, 3)
    check(comm, network, by_units(network, comm.size), samples=2)


@pytest.mark.parallel([2, 3])
def test_what_each_worker_pushes_covers_the_parameters_once(comm) -> None:
    network = dense_network("softmax", np.float32, 20, 7, 10)
    replica = Replica(network, by_units(network, comm.size), comm)
    count = np.zeros(network.layout.size, np.int64)
    for run in replica.parameters.runs:
        if run.pushed:
            count[run.start : run.start + run.length] += 1
    total = np.empty_like(count)
    comm.Allreduce(count, total)
    np.testing.assert_array_equal(total, 1)


def image_layers(rng: np.random.Generator) -> tuple[config.AnyLayer, ...]:
    """Some layers on images, any of which may follow any other, and dense ones on top.

    Of maps there are few: each number that a cut leaves to a worker is compiled anew.
    """
    kinds = {
        "local": lambda: config.Local(maps=int(rng.choice([2, 3])), field=(2, 3), activation="tanh"),
        "strided": lambda: config.Local(maps=2, field=3, stride=2, activation="sigmoid"),
        "convolution": lambda: config.Convolution(maps=int(rng.choice([2, 3])), field=(3, 2), activation="tanh"),
        "l2": lambda: config.Pooling(kind="l2", size=2),
        "max": lambda: config.Pooling(kind="max", size=(2, 3), stride=2),
        "normalisation": lambda: config.Normalisation(window=3),
        "dropout": lambda: config.Dropout(rate=0.3),
    }
    below = [kinds[name]() for name in rng.choice(list(kinds), 3)]
    return (*below, config.Dense(units=9, activation="tanh"), config.Dense(units=3))


def random_cover(rng: np.random.Generator, shape: tuple[int, ...], parts: int) -> tuple[Box, ...]:
    """Boxes that cover a shape once, cut and dealt at random; some workers may get nothing."""
    boxes = [Box.whole(shape)]
    for _ in range(int(rng.integers(0, parts))):
        box = boxes.pop(int(rng.integers(len(boxes))))
        axis = int(rng.integers(len(shape)))
        at = int(rng.integers(box.starts[axis], box.stops[axis] + 1))
        boxes.append(Box(box.starts, (*box.stops[:axis], at, *box.stops[axis + 1 :])))
        boxes.append(Box((*box.starts[:axis], at, *box.starts[axis + 1 :]), box.stops))
    boxes += [Box((0,) * len(shape), (0,) * len(shape))] * (parts - len(boxes))
    return tuple(boxes[place] for place in rng.permutation(parts))


@pytest.mark.parallel([1, 2, 3, 4, 6], timeout=300)  # the first one compiles
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", [0, 2, 9])  # which together have all kinds of layers
def test_random_networks_on_random_placements(comm, dtype, seed) -> None:
    rng = np.random.default_rng(seed)
    network = WholeNetwork(config.NetworkSection(layers=image_layers(rng)), (2, 11, 12), seed=3, dtype=dtype)
    check(comm, network, placement.automatic(network.layers, comm.size), samples=5, rate=0.01)
    for _ in range(2):
        boxes = [random_cover(rng, layer.output_shape, comm.size) for layer in network.layers]
        splits = [
            str(rng.choice(["outputs", "inputs"])) if place and placement.can_split_by_inputs(layer) else "outputs"
            for place, layer in enumerate(network.layers)
        ]
        placed = Placement(tuple(boxes), tuple(splits))
        check(comm, network, placed, samples=3, steps=3)
        check(comm, network, placed, samples=2, steps=3, shared=False)


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("splits", [("outputs", "inputs", "outputs"), ("outputs", "outputs", "inputs")])
def test_dense_layers_split_by_inputs(comm, splits) -> None:
    network = dense_network("softmax", np.float64, 20, 7, 10)
    for shared in (True, False):
        check(comm, network, Placement(by_units(network, comm.size).boxes, splits), samples=4, shared=shared)


def autoencoder(dtype: type, *, tied: bool = False) -> WholeNetwork:
    """Two stages of the nine-layer network of Le et al. 2012, small; the first on inputs that nobody owns."""
    kind = config.Convolution if tied else config.Local
    layers = (
        kind(maps=3, field=4, reconstruction=1.0),
        config.Pooling(kind="l2", size=3, penalty=0.1),
        config.Normalisation(window=3),
        kind(maps=2, field=2, stride=2, reconstruction=0.5, activation="tanh"),
        config.Pooling(kind="l2", size=2, penalty=0.2),
    )
    return WholeNetwork(config.NetworkSection(loss="reconstruction", layers=layers), (2, 11, 12), seed=3, dtype=dtype)


@pytest.mark.parallel([1, 2, 3, 4, 6], timeout=300)  # the first one compiles
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("tied", [False, True])
def test_reconstruction_without_targets(comm, dtype, tied) -> None:
    network = autoencoder(dtype, tied=tied)
    check(comm, network, placement.automatic(network.layers, comm.size), samples=5, rate=1e-4)
    rng = np.random.default_rng(comm.size)
    boxes = tuple(random_cover(rng, layer.output_shape, comm.size) for layer in network.layers)
    check(comm, network, Placement(boxes, ("outputs",) * len(boxes)), samples=3, steps=3, rate=1e-4, shared=False)


@pytest.mark.parallel([2, 3, 4])
def test_shelves_are_given_back_though_a_decision_was_left_unfinished(comm) -> None:
    """As in a replica that is given up, of which one partition was stopped in the middle of a step."""
    team = Team(comm, lambda: False)
    with Group(comm) as group:
        group.shelf(fixed=3)
        group.reserve(1, 4)
        if comm.rank:
            assert team.poll(None) is None
        group.free()
    assert team.agree((7,))[0] == 7
