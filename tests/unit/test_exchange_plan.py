"""Plans move what must be moved, and nothing else: counted from the layers' definitions, and replayed without MPI."""

import math
import time
from functools import cache, partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.partition_cases import covers, networks, random_placements, shares
from unit.partition_layers import NETWORKS, Dense, Elementwise, Filter, SplitDense, indices

from dbmpi.index.boxes import Box
from dbmpi.replica.describe import describe
from dbmpi.replica.placement import Placement, automatic, can_split_by_inputs, explicit, values_moved
from dbmpi.replica.plan import ExchangePlan, interior, plan_exchanges


def by_elements(layer, output, needed, owned):
    """Hold needed inputs to the layer's definition; return how many of them are not owned."""
    found = {index for place in indices(output) for index in layer.inputs_of(place)}
    assert found == set(indices(needed))
    return len(found - set(indices(owned)))


def by_axes(layer, output, needed, owned):
    """As `by_elements`, for layers whose needs along an axis do not depend on the others: all of the paper's."""
    if output.empty:
        assert needed.empty
        return 0
    if isinstance(layer, Dense):
        axes = [set(range(n)) for n in layer.input_shape]
    else:
        axes = [set().union(*(along(layer, axis, y) for y in range(*ends))) for axis, ends in enumerate(pairs(output))]
    assert axes == [set(range(*ends)) for ends in pairs(needed)]
    inside = [axis & set(range(*ends)) for axis, ends in zip(axes, pairs(owned), strict=True)]
    return math.prod(map(len, axes)) - math.prod(map(len, inside))


def pairs(box):
    return zip(box.starts, box.stops, strict=True)


@cache
def along(layer, axis, y):
    """Return the places along an axis that outputs in place `y` of that axis depend on."""
    output = tuple(y if number == axis else 0 for number in range(len(layer.output_shape)))
    return {index[axis] for index in layer.inputs_of(output)}


def of_everything(part, needed, owned):
    """The same for a part of a plan that needs all or nothing."""
    assert needed == part
    return len(set(indices(needed)) - set(indices(owned)))


def replay(plan, least):
    """Carry out a plan on arrays; hold it to what every worker needs in the end, and to the least that must move.

    Parameters
    ----------
    plan
        The plan.
    least
        For each worker, a function that checks its needed box and returns how much of it, not owned, must arrive.

    Returns
    -------
    int
        Values that moved.
    """
    numbers = np.arange(np.prod(plan.shape)).reshape(plan.shape)
    workers = range(len(plan.owned))
    ways = [plan.forward(worker) for worker in workers]
    mailbox = {}
    for worker in workers:
        destinations = [message.worker for message in ways[worker].sends]
        assert len(set(destinations)) == len(destinations)
        assert worker not in destinations
        local = numbers[plan.owned[worker].slices()]
        for destination, box in ways[worker].sends:
            assert plan.owned[worker].holds(box)
            mailbox[worker, destination] = local[box.slices(plan.owned[worker])]
    moved = 0
    for worker in workers:
        needed = plan.needed[worker]
        inputs = np.full(needed.shape, -1)
        times = np.zeros(needed.shape, int)
        box = plan.owned[worker].meet(needed)
        inputs[box.slices(needed)] = numbers[plan.owned[worker].slices()][box.slices(plan.owned[worker])]
        times[box.slices(needed)] += 1
        arrived = 0
        for source, box in ways[worker].receives:
            message = mailbox.pop((source, worker))
            assert message.shape == box.shape
            inputs[box.slices(needed)] = message
            times[box.slices(needed)] += 1
            arrived += message.size
        assert (times == 1).all()
        assert np.array_equal(inputs, numbers[needed.slices()])
        assert arrived == plan.received(worker) == least[worker](needed, plan.owned[worker])
        moved += arrived
    assert mailbox == {}
    assert moved == plan.values
    check_shelves(plan, ways)
    return moved


def check_shelves(plan, ways):
    """What others take from a worker's shelf lies there without gap or overlap, forward and in reverse."""
    if plan.kind == "none":
        return
    workers = range(len(ways))
    gives = {worker: [] for worker in workers}
    for worker in workers:
        assert set(plan.offered(worker)) == {box for _, box in ways[worker].sends}
        shelf = sorted((start, box.size) for box, start in plan.offered(worker).items())
        assert [start for start, _ in shelf] == np.cumsum([0, *(size for _, size in shelf)])[:-1].tolist()
        for other, box in ways[worker].sends:
            gives[other].append((plan.returned(other, worker), box.size))
    for worker in workers:
        shelf = sorted(gives[worker])
        assert [start for start, _ in shelf] == np.cumsum([0, *(size for _, size in shelf)])[:-1].tolist()
        assert sum(size for _, size in shelf) == plan.received(worker)


def check_network(layers, placement, least=by_elements):
    """Replay the plans of all layers and hold their bytes to the minimum; what comes twice, once."""
    results = {}

    def replayed(plan, counts):
        if plan not in results:
            results[plan] = replay(plan, counts)
        return results[plan]

    plans = plan_exchanges(layers, placement)
    for place, (layer, plan) in enumerate(zip(layers, plans, strict=True)):
        below, owned = placement.boxes[place - 1], placement.boxes[place]
        if place == 0:
            assert plan.inputs.kind == "none"
            for box, needed in zip(owned, plan.inputs.needed, strict=True):
                least(layer, box, needed, needed)
            moved = 0
        elif plan.split == "outputs":
            assert plan.outputs is None
            moved = replayed(plan.inputs, [partial(least, layer, box) for box in owned])
        else:
            # Inputs stay.  Whoever has any makes a part of every output, and each owner gets it, once.
            assert plan.inputs.values == 0
            whole = Box.whole(layer.output_shape)
            nothing = Box(whole.starts, whole.starts)
            parts = [nothing if inputs.empty else whole for inputs in below]
            moved = replayed(plan.outputs, [partial(of_everything, part) for part in parts])
        assert place == 0 or moved == values_moved(layer, below, owned, plan.split)
        assert moved == plan.values
        exchange = plan.outputs or plan.inputs
        for worker in range(len(owned)):
            way = exchange.forward(worker)
            assert way.reversed.reversed == way
            assert (way.reversed.sends, way.reversed.receives) == (way.receives, way.sends)


@settings(max_examples=50)
@given(networks(), st.data())
def test_automatic_placements_move_the_least_possible(layers, data):
    weights = data.draw(shares())
    check_network(layers, automatic(layers, len(weights), weights))


@settings(max_examples=50)
@given(networks(), st.data())
def test_any_placement_moves_the_least_possible(layers, data):
    check_network(layers, data.draw(random_placements(layers)))


@given(networks(), st.data())
def test_needs_can_be_counted_by_axes(layers, data):
    layer = data.draw(st.sampled_from(layers))
    corner = data.draw(st.tuples(*(st.integers(0, n - 1) for n in layer.output_shape)))
    output, owned = Box(corner, layer.output_shape), data.draw(covers(layer.input_shape, 3))[0]
    needed = layer.input_box(output)
    assert by_axes(layer, output, needed, owned) == by_elements(layer, output, needed, owned)


@pytest.mark.parametrize(
    ("network", "partitions"),
    [(network, 144) for network in NETWORKS] + [("images-8", n) for n in (1, 2, 5, 36, 100)] + [("speech", 8)],
)
@pytest.mark.slow
def test_the_papers_networks_move_the_least_possible(network, partitions):
    layers = NETWORKS[network]()
    placement = automatic(layers, partitions)
    check_network(layers, placement, by_axes)


def test_uneven_machines_change_the_boxes_and_not_the_rule():
    layers = NETWORKS["images-8"]()
    weights = [1 + worker % 3 for worker in range(30)]
    check_network(layers, automatic(layers, 30, weights), by_axes)


def test_dense_layers_gather_and_others_send_messages():
    layers = NETWORKS["images-8"]()
    plans = plan_exchanges(layers, automatic(layers, 9))
    assert [plan.inputs.kind for plan in plans] == ["none", *["messages"] * 8, "gather"]
    assert not plans[-1].inputs.in_order  # a grid's boxes are no runs of the image
    speech = plan_exchanges(NETWORKS["speech"](), automatic(NETWORKS["speech"](), 7))
    assert [plan.inputs.kind for plan in speech] == ["none", *["gather"] * 4]
    assert all(plan.inputs.in_order for plan in speech[1:])
    assert all(plan.inputs.members == tuple(range(7)) for plan in speech[1:])


def test_a_gather_is_among_those_that_own_or_need():
    layers = [Dense("a", (4,), 3), Dense("b", (3,), 3), Dense("c", (3,), 5), Dense("d", (5,), 2)]
    placement = automatic(layers, 8)
    plans = plan_exchanges(layers, placement)
    own = [{worker for worker, box in enumerate(owned) if not box.empty} for owned in placement.boxes]
    assert [len(workers) for workers in own] == [3, 3, 5, 2]
    assert plans[1].inputs.kind == "gather"
    assert set(plans[1].inputs.members) == own[0] == own[1]
    # Of the five that own inputs of the last layer, some need none.
    assert plans[3].inputs.kind == "messages"
    assert not own[2] <= own[3]


def test_order_in_the_flat_array_is_seen():
    whole = Box.whole((4, 2))
    rows = (Box((0, 0), (3, 2)), Box((3, 0), (3, 2)), Box((3, 0), (4, 2)))
    assert ExchangePlan((4, 2), rows, (whole,) * 3).in_order
    assert not ExchangePlan((4, 2), rows[::-1], (whole,) * 3).in_order
    columns = (Box((0, 0), (4, 1)), Box((0, 1), (4, 2)))
    assert not ExchangePlan((4, 2), columns, (whole,) * 2).in_order
    # Columns are runs where there is only one row.
    assert ExchangePlan((1, 4), (Box((0, 0), (1, 1)), Box((0, 1), (1, 4))), (Box.whole((1, 4)),) * 2).in_order


def test_parts_of_a_layer_split_by_inputs_add_up_to_the_layer():
    """Carried out on numbers: products of own columns, summed into own units as planned, are the whole product."""
    generator = np.random.default_rng(1)
    layers = [SplitDense("wide", (5,), 40), SplitDense("narrow", (40,), 6)]
    for partitions in (1, 2, 3, 7):
        placement = automatic(layers, partitions)
        assert placement.splits == ("outputs", "inputs" if partitions > 1 else "outputs")
        if partitions == 1:
            continue
        plan = plan_exchanges(layers, placement)[1]
        weights, inputs = generator.standard_normal((6, 40)), generator.standard_normal(40)
        below, owned = placement.boxes
        parts = [
            weights[layers[1].partial_tensor_box("weights", *boxes).slices()] @ inputs[boxes[0].slices()]
            for boxes in zip(below, owned, strict=True)
        ]
        for worker, box in enumerate(owned):
            total = parts[worker][box.slices()].copy() if not below[worker].empty else np.zeros(box.shape)
            # In reverse, what would be sent arrives.
            for source, piece in plan.outputs.forward(worker).sends:
                total[piece.slices(box)] += parts[source][piece.slices()]
            assert np.allclose(total, (weights @ inputs)[box.slices()])


@settings(max_examples=60)
@given(networks(), st.data())
def test_the_interior_is_all_that_own_inputs_are_enough_for(layers, data):
    layer = data.draw(st.sampled_from(layers))
    boxes = []
    for shape in (layer.output_shape, layer.input_shape):
        pairs = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in shape]
        boxes.append(Box(tuple(a for a, _ in pairs), tuple(b for _, b in pairs)))
    output, owned = boxes
    if output.empty:
        return
    inside, rest = interior(layer, output, owned)
    at_hand = set(indices(owned))
    enough = {index for index in indices(output) if set(layer.inputs_of(index)) <= at_hand}
    assert set(indices(inside)) == enough
    found = [index for part in rest for index in indices(part)]
    assert len(found) == len(set(found))
    assert set(found) == set(indices(output)) - enough


@pytest.mark.parametrize("network", NETWORKS)
def test_144_partitions_are_planned_in_seconds(network):
    layers = NETWORKS[network]()
    began = time.process_time()
    plans = plan_exchanges(layers, automatic(layers, 144))
    assert sum(plan.values for plan in plans) > 0
    assert time.process_time() - began < 10


@pytest.mark.slow
@pytest.mark.parametrize("network", ["speech", "images-36"])
def test_10000_partitions_are_planned_in_seconds(network):
    """What each of 10,000 ranks has to do: place, plan, and its own messages; then what a cost model wants."""
    layers = NETWORKS[network]()
    began = time.process_time()
    plans = plan_exchanges(layers, automatic(layers, 10_000))
    moved = sum(plan.values for plan in plans)
    for plan in plans:
        for worker in (0, 4321, 9_999):
            for messages in (plan.inputs.forward(worker).receives, plan.inputs.forward(worker).sends):
                assert not any(box.empty or other == worker for other, box in messages)
            assert sum(box.size for _, box in plan.inputs.forward(worker).receives) == plan.inputs.received(worker)
    assert time.process_time() - began < 60
    assert moved > 0


def test_the_work_of_planning_grows_with_the_workers_and_not_their_square():
    class Counting(Filter):
        asked = 0

        def input_box(self, output):
            Counting.asked += 1
            return super().input_box(output)

    counts = []
    for partitions in (100, 400, 1600):
        layers = [Counting("a", (1, 200, 200), 2, (5, 5)), Counting("b", (2, 196, 196), 2, (5, 5))]
        Counting.asked = 0
        placement = automatic(layers, partitions)
        plans = plan_exchanges(layers, placement)
        counts.append(Counting.asked / partitions)
        cells = [plans[1].inputs._owners._cells, plans[1].inputs._needers._cells]
        assert sum(len(found) for cell in cells for found in cell.values()) < 40 * partitions
    assert counts[2] < counts[0] + 4


def test_a_plan_of_a_placement_with_a_gap_is_refused():
    layers = [Filter("local", (1, 6, 6), 2, (3, 3)), Elementwise("on", (2, 4, 4))]
    placement = automatic(layers, 2)
    with pytest.raises(ValueError, match=r"'on'.*belong to no partition"):
        plan_exchanges(
            layers,
            Placement((placement.boxes[0], (Box((0,) * 3, (1,) * 3), Box((0,) * 3, (0,) * 3))), placement.splits),
        )


def test_the_table_says_what_was_chosen_and_why():
    layers = [Filter("local", (3, 19, 19), 4, (4, 4)), SplitDense("wide", (4, 16, 16), 300)]
    layers.append(SplitDense("narrow", (300,), 10))
    placement = automatic(layers, 4)
    assert [can_split_by_inputs(layer) for layer in layers] == [False, False, True]
    rows = describe(layers, placement, samples=256, itemsize=4).splitlines()
    assert len({row.index("because") for row in rows[:1]}) == 1
    local, wide, narrow = (row.split("  ") for row in rows[1:])
    columns = [[cell.strip() for cell in row if cell.strip()] for row in (local, wide, narrow)]
    assert columns[0][:6] == ["local", "4 x 16 x 16", "1 x 2 x 2", "4 x 8 x 8", "1.00", "outputs"]
    # Each of four gets the other three quarters of 1024 inputs, 256 samples of 4 bytes: 768 KiB.
    assert columns[1][5:9] == ["outputs", "gather", "768.0", "3072.0"]
    # Three parts of each of 10 outputs; the most that one owns is 3.
    assert columns[2][5:9] == ["inputs", "reduction", "9.0", "30.0"]
    assert columns[2][9] == "30 values a sample move; split by outputs, 900 would"
    idle = describe(layers, explicit(layers, {"narrow": [":", "", "", ""]}))
    assert "(3 idle)" in idle
