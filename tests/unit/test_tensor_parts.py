"""Which parameters a worker needs and pushes: everybody's together are the whole vector, each element pushed once."""

from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.partition_cases import Seat, networks, random_placements, shares
from unit.partition_layers import NETWORKS, Dense, Filter, SplitDense, indices, layout_of

from dbmpi.errors import UserError
from dbmpi.index.boxes import Box
from dbmpi.index.layout import pieces
from dbmpi.replica.parameters import LocalParameters
from dbmpi.replica.placement import automatic, explicit
from dbmpi.replica.tensors import tensor_boxes, tensor_parts


def runs_of(layers, placement, worker):
    """Return where a worker's own vector lies in the whole, merged; and whether it pushes the gradient."""
    parameters = LocalParameters(layers, layout_of(layers), placement, Seat(worker), np.dtype(np.float32))
    (runs,) = pieces(parameters.runs, [range(layout_of(layers).size)])
    assert [run.local for run in runs] == [0, *accumulate(run.length for run in runs)][:-1]
    assert sum(run.length for run in runs) == parameters.size
    return [(range(run.start, run.start + run.length), run.pushed) for run in runs]


@settings(max_examples=60)
@given(networks(), st.data())
def test_everything_is_pushed_once_by_one_who_needs_it(layers, data):
    if data.draw(st.booleans()):
        placement = data.draw(random_placements(layers))
    else:
        weights = data.draw(shares())
        placement = automatic(layers, len(weights), weights)
    layout = layout_of(layers)
    parts = tensor_parts(layers, placement)
    numbers = np.arange(layout.size)
    needers = [set() for _ in range(layout.size)]
    pushes = np.zeros(layout.size, int)
    for worker in range(placement.partitions):
        runs = runs_of(layers, placement, worker)
        assert all(len(run) for run, _ in runs)
        boxes = tensor_boxes(layers, placement, worker)
        views = layout.views(numbers)
        expected = [n for tensor in layout.tensors for n in views[tensor.name][boxes[tensor.name].slices()].ravel()]
        assert [position for run, _ in runs for position in run] == expected
        for position in expected:
            needers[position].add(worker)
        for run, pushed in runs:
            pushes[run.start : run.stop] += pushed
    # Fields reach everything, so that every parameter is needed by somebody.
    assert (pushes == 1).all()
    for part in parts:
        view = layout.views(numbers)[part.tensor.name]
        assert part.owner in part.workers
        assert part.shared == (len(part.workers) > 1)
        for index in indices(part.box):
            assert needers[view[index]] == set(part.workers)


def test_untied_weights_belong_to_one_and_tied_ones_to_all_of_space():
    untied = [Filter("local", (3, 12, 12), 4, (3, 3))]
    assert not any(part.shared for part in tensor_parts(untied, automatic(untied, 6)))
    tied = [Filter("convolution", (3, 12, 12), 4, (3, 3), tied=True)]
    parts = tensor_parts(tied, automatic(tied, 6))
    assert [(part.tensor.name, part.workers) for part in parts] == [
        ("convolution/weights", tuple(range(6))),
        ("convolution/bias", tuple(range(6))),
    ]
    # Not everything is pushed by the same worker.
    assert len({part.owner for part in parts}) == 2


def test_overlapping_needs_are_divided():
    layers = [Filter("convolution", (1, 5, 5), 6, (2, 2), tied=True)]
    boxes = ["0:4, 0:2, :", "2:6, 2:4, :", "4:6, 0:2, :", "0:2, 2:4, :"]
    found = [
        (part.box.starts[0], part.box.stops[0], part.workers)
        for part in tensor_parts(layers, explicit(layers, {"convolution": boxes}))
        if part.tensor.name.endswith("bias")
    ]
    assert found == [(0, 2, (0, 3)), (2, 4, (0, 1)), (4, 6, (1, 2))]


def test_pushes_are_evenly_dealt():
    """Many shared tensors of one size: no worker pushes more than one more than another."""
    layers, shape = [], (2, 30, 30)
    for number in range(8):
        layers.append(Filter(f"convolution{number}", shape, 2, (3, 3), tied=True))
        shape = layers[-1].output_shape
    parts = tensor_parts(layers, automatic(layers, 4))
    pushed = [sum(part.box.size for part in parts if part.owner == worker) for worker in range(4)]
    assert max(pushed) - min(pushed) <= layers[0].tensors["weights"].size


def test_columns_of_a_layer_split_by_inputs():
    layers = [SplitDense("wide", (5,), 40), SplitDense("narrow", (40,), 6)]
    placement = automatic(layers, 4)
    assert placement.splits[1] == "inputs"
    layout = layout_of(layers)
    start = layout.offsets["narrow/weights"]
    runs = [run for run, _ in runs_of(layers, placement, 1)]
    assert runs[2:-1] == [range(start + 40 * unit + 10, start + 40 * unit + 20) for unit in range(6)]
    assert [len(run) for run in runs[:2]] == [50, 10]
    assert len(runs[-1]) == placement.boxes[1][1].size


def test_one_worker_needs_the_whole_vector_as_one_run():
    for network in NETWORKS.values():
        layers = network()
        layout = layout_of(layers)
        placement = automatic(layers, 1)
        assert runs_of(layers, placement, 0) == [(range(layout.size), True)]


@pytest.mark.parametrize("network", NETWORKS)
def test_the_papers_networks_are_divided_without_remainder(network):
    layers = NETWORKS[network]()
    placement = automatic(layers, 144)
    layout = layout_of(layers)
    parts = tensor_parts(layers, placement)
    assert not any(part.shared for part in parts)
    assert sum(part.box.size for part in parts) == layout.size
    boxes = [tensor_boxes(layers, placement, worker) for worker in range(144)]
    sizes = [sum(box.size for box in its.values()) for its in boxes]
    assert sum(sizes) == layout.size
    if network == "speech":
        assert layout.size == 41_777_152
        # 2560 units are 17 or 18 a worker, 8192 are 56 or 57.
        assert max(sizes) == 18 * (441 + 3 * 2561) + 57 * 2561


def test_a_layer_that_asks_for_parameters_it_does_not_have_is_named():
    class Wrong(Dense):
        def tensor_box(self, tensor, output):
            return Box((0,), (99,))

    layers = [Wrong("own", (4,), 5)]
    with pytest.raises(UserError, match=r"'own'.*'weights'.*\(5, 4\)"):
        tensor_parts(layers, automatic(layers, 2))
