"""Placements cover every output exactly once, are well-shaped, and are refused where they do not fit."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.partition_cases import networks, random_placements, shares
from unit.partition_layers import NETWORKS, Dense, Elementwise, Filter, Normalisation, Pooling, SplitDense

from dbmpi.config import PlacementSection
from dbmpi.errors import UserError
from dbmpi.index.boxes import Box
from dbmpi.replica.cut import Reach
from dbmpi.replica.placement import Placement, automatic, check, explicit, from_config, needed_inputs, values_moved


def times_owned(layer, owned):
    times = np.zeros(layer.output_shape, int)
    for box in owned:
        times[box.slices()] += 1
    return times


def cuts(boxes):
    """Return into how many intervals each axis is cut."""
    full = [box for box in boxes if not box.empty]
    return tuple(len({(box.starts[axis], box.stops[axis]) for box in full}) for axis in range(len(full[0].starts)))


def received(layer, below, owned):
    return values_moved(layer, below, owned, "outputs")


@settings(max_examples=60)
@given(networks(), st.data())
def test_every_output_is_owned_once(layers, data):
    weights = data.draw(shares())
    placement = automatic(layers, len(weights), weights)
    assert placement.partitions == len(weights)
    for layer, owned in zip(layers, placement.boxes, strict=True):
        assert (times_owned(layer, owned) == 1).all()
    check(layers, placement)


@settings(max_examples=60)
@given(networks(), st.data())
def test_elementwise_layers_exchange_nothing(layers, data):
    """Whatever the placement below them, also one that a user has made."""
    placement = data.draw(random_placements(layers))
    shape = layers[-1].output_shape
    named = {layer.name: boxes for layer, boxes in zip(layers, placement.boxes, strict=True)}
    above = [Elementwise("above", shape), Elementwise("further", shape)]
    whole = explicit([*layers, *above], named)
    assert whole.boxes == (*placement.boxes, placement.boxes[-1], placement.boxes[-1])
    assert [received(layer, placement.boxes[-1], placement.boxes[-1]) for layer in above] == [0, 0]


@pytest.mark.parametrize(("partitions", "side"), [(36, 6), (100, 10), (144, 12)])
@pytest.mark.parametrize("network", ["images-8", "images-16", "images-36"])
def test_square_numbers_cut_images_into_squares(network, partitions, side):
    layers = NETWORKS[network]()
    placement = automatic(layers, partitions)
    for layer, owned in zip(layers[:7], placement.boxes, strict=False):
        assert cuts(owned) == (1, side, side), layer.name
    # Rows and columns alike, and sizes as even as they can be.
    assert max(box.size for box in placement.boxes[0]) == layers[0].maps * (-(-91 // side)) ** 2


@pytest.mark.parametrize(
    ("shape", "partitions", "expected"),
    [((3, 59, 209), 36, (1, 3, 12)), ((3, 209, 59), 36, (1, 12, 3)), ((3, 109, 109), 12, (1, 3, 4))],
)
def test_grids_have_the_shape_of_the_image(shape, partitions, expected):
    layers = [Filter("local", shape, 8, (10, 10))]
    layers.append(Pooling("pool", layers[0].output_shape, 5))
    found = cuts(automatic(layers, partitions).boxes[0])
    assert found in (expected, (expected[0], expected[2], expected[1]) if shape[1] == shape[2] else expected)


@pytest.mark.parametrize("partitions", [2, 3, 5, 7, 11, 13, 23, 37, 74, 101, 127])
def test_odd_and_prime_numbers_cut_as_evenly_as_squares_do(partitions):
    layers = NETWORKS["images-8"]()
    placement = automatic(layers, partitions)
    owned = placement.boxes[0]
    load = max(box.size for box in owned) * partitions / (8 * 91 * 91)
    assert load <= 1.25
    # Strips would have this much more border; from a few on, they are no choice.
    strips = tuple(Box((0, 91 * n // partitions, 0), (8, 91 * (n + 1) // partitions, 91)) for n in range(partitions))
    followed = tuple(Reach(layers[1]).follow(box) for box in strips)
    moved, by_strips = received(layers[1], owned, placement.boxes[1]), received(layers[1], strips, followed)
    assert moved <= by_strips
    if partitions >= 7:
        assert moved < 0.7 * by_strips


@pytest.mark.parametrize("partitions", [5, 24, 41])
def test_maps_are_cut_where_no_space_is_left(partitions):
    layers = [Filter("local", (3, 5, 7), 16, (4, 5))]  # 16 maps of 2 x 3
    owned = automatic(layers, partitions).boxes[0]
    assert not any(box.empty for box in owned)
    if partitions == 24:
        assert {box.size for box in owned} == {4}
    assert (cuts(owned)[0] > 1) == (partitions > 6)


def test_more_partitions_than_outputs_leave_some_idle():
    layers = [Filter("local", (1, 4, 4), 2, (3, 3)), Dense("out", (2, 2, 2), 3)]
    placement = automatic(layers, 11)
    assert sorted(box.size for box in placement.boxes[0]) == [0] * 3 + [1] * 8
    assert sorted(box.size for box in placement.boxes[1]) == [0] * 8 + [1] * 3
    check(layers, placement)
    assert [n.empty for n in needed_inputs(layers, placement)[1]] == [own.empty for own in placement.boxes[1]]


def test_boxes_are_in_proportion_to_weights():
    layers = NETWORKS["images-8"]()
    slow, fast = automatic(layers, 2, (1, 2)).boxes[0]
    assert {slow.size, fast.size} == {8 * 91 * 30, 8 * 91 * 61}
    assert slow.size < fast.size
    units = automatic(NETWORKS["speech"](), 3, (1, 2, 1)).boxes[0]
    assert [box.size for box in units] == [640, 1280, 640]


def test_slow_machines_are_spared_also_where_the_layer_below_is_cut_evenly():
    """To go with the layer below would exchange the least, and leave everybody waiting for the slow ones."""
    layers = [Filter("below", (3, 48, 48), 4, (9, 9)), Filter("above", (4, 40, 40), 4, (9, 9))]
    even = ["0:4, 0:10, :", "0:4, 10:20, :", "0:4, 20:30, :", "0:4, 30:40, :"]
    weights = (1, 1, 1, 5)
    above = explicit(layers, {"below": even}, 4, weights).boxes[1]
    share = 4 * 32 * 32 / sum(weights)
    assert [round(box.size / share) for box in above] == list(weights)


@pytest.mark.parametrize(("field", "stride"), [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3), (4, 3), (5, 2), (5, 4)])
@pytest.mark.parametrize("partitions", [2, 3])
def test_no_other_cut_of_a_pooling_layer_needs_fewer_values(field, stride, partitions):
    """All cuts along an axis are tried, for all cuts of the layer below whose parts are no smaller than the field."""
    for height in range(partitions * field, 4 * field if partitions == 2 else 3 * field + 3):
        layer = Filter("pool", (1, height, 1), 1, (field, 1), stride)
        outputs = layer.output_shape[1]
        for below in product(range(height + 1), repeat=partitions - 1):
            rows = [0, *below, height]
            if min(np.diff(rows)) < field:
                continue
            inputs = [Box((0, a, 0), (1, b, 1)) for a, b in pairwise(rows)]
            ours = received(layer, inputs, [Reach(layer).follow(box) for box in inputs])
            for cut in product(range(outputs + 1), repeat=partitions - 1):
                ends = [0, *cut, outputs]
                if min(np.diff(ends)) >= 0:
                    boxes = [Box((0, a, 0), (1, b, 1)) for a, b in pairwise(ends)]
                    assert received(layer, inputs, boxes) >= ours, (height, below, cut)


def test_pooling_without_overlap_follows_its_fields():
    layers = [Filter("local", (1, 40, 20), 2, (1, 1)), Pooling("pool", (2, 40, 20), 5, 5)]
    placement = automatic(layers, 8)
    assert cuts(placement.boxes[0]) == (1, 4, 2)
    assert received(layers[1], *placement.boxes) == 0


def test_a_layer_that_needs_all_maps_keeps_its_place():
    layers = [Filter("local", (3, 20, 20), 4, (3, 3)), Normalisation("normalise", (4, 18, 18), 5)]
    by_maps = [Box((n, 0, 0), (n + 1, 18, 18)) for n in range(4)]
    placement = explicit(layers, {"local": by_maps})
    assert placement.boxes[1] == tuple(by_maps)


def test_a_narrow_dense_layer_is_split_by_inputs():
    layers = [SplitDense("wide", (50,), 300), SplitDense("narrow", (300,), 10), SplitDense("last", (10,), 400)]
    placement = automatic(layers, 4)
    assert placement.splits == ("outputs", "inputs", "outputs")
    below, own = placement.boxes[:2]
    assert values_moved(layers[1], below, own, "inputs") == 3 * 10
    assert values_moved(layers[1], below, own, "outputs") == 3 * 300
    # Equal numbers are no reason; nor is anything for a layer that cannot add up parts, or on one worker.
    assert automatic(NETWORKS["speech"](), 4).splits == ("outputs",) * 5
    plain = [Dense(layer.name, layer.input_shape, layer.units) for layer in layers]
    assert automatic(plain, 4).splits == ("outputs",) * 3
    assert automatic(layers, 1).splits == ("outputs",) * 3


def test_a_user_places_some_layers_and_the_rest_follows():
    layers = [
        Filter("local", (3, 12, 12), 4, (3, 3)),
        Elementwise("on", (4, 10, 10)),
        SplitDense("out", (4, 10, 10), 6),
    ]
    given_boxes = {"local": ["0:4, :7, :", "[0:4, 7:10, 0:3]", "", ":, 7:, 3 : 10"]}
    placement = explicit(layers, given_boxes)
    expected = (
        Box((0, 0, 0), (4, 7, 10)),
        Box((0, 7, 0), (4, 10, 3)),
        Box((0,) * 3, (0,) * 3),
        Box((0, 7, 3), (4, 10, 10)),
    )
    assert placement.boxes[:2] == (expected, expected)
    assert sum(box.size for box in placement.boxes[2]) == 6
    # What a box prints is what is read.
    assert explicit(layers, {"local": [str(box) for box in expected]}) == placement
    chosen = explicit([SplitDense("a", (4,), 6), SplitDense("b", (6,), 2)], {}, 3, splits={"b": "outputs"})
    assert chosen.splits == ("outputs", "outputs")


LAYERS = [Filter("local", (1, 6, 6), 2, (3, 3)), Dense("out", (2, 4, 4), 5)]


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        ({"local": ["0:2, 0:2, :", "0:2, 3:4, :"]}, ["'local'", "8 of 32", "no partition", "[0:2, 2:3, 0:4]"]),
        (
            {"local": ["0:2, 0:3, :", "0:2, 2:4, :"]},
            ["'local'", "overlap", "[0:2, 2:3, 0:4]", "partition 0", "partition 1"],
        ),
        ({"local": ["0:2, 0:4, 0:4", "0:2, 0:4, 4:5"]}, ["'local'", "(2, 4, 4)", "partition 1", "[0:2, 0:4, 4:5]"]),
        ({"local": ["0:2, 0:4", ""]}, ["'local'", "partition 0", "(2, 4, 4)", "0:2, 0:4, 0:4"]),
        ({"local": ["a:b, :, :", ""]}, ["'local'", "partition 0", "0:2, 0:4, 0:4"]),
        ({"local": ["-1:2, :, :", ""]}, ["'local'", "partition 0"]),
        ({"local": [":, 3:1, :", ":, 0:4, :"]}, ["'local'", "partition 0", "':, 3:1, :'"]),
        ({"local": [":, :, :", ""], "out": [":", "", ""]}, ["'local'", "2 boxes", "3 partitions"]),
        ({"lokal": [":, :, :"]}, ["'lokal'", "local, out"]),
        ({"out": ["0:2", "2:4"]}, ["'out'", "1 of 5", "[4:5]"]),
    ],
)
def test_a_placement_that_does_not_fit_is_refused(boxes, words):
    with pytest.raises(UserError) as refused:
        explicit(LAYERS, boxes)
    assert [word for word in words if word not in str(refused.value)] == []


@settings(max_examples=60)
@given(networks(), st.data())
def test_any_gap_and_any_overlap_is_found(layers, data):
    placement = data.draw(random_placements(layers))
    check(layers, placement)
    place = data.draw(st.integers(0, len(layers) - 1))
    owned = list(placement.boxes[place])
    worker = data.draw(st.integers(0, len(owned) - 1))
    axis = data.draw(st.integers(0, len(owned[0].starts) - 1))
    old = owned[worker]
    start, stop = sorted(data.draw(st.integers(0, layers[place].output_shape[axis])) for _ in range(2))
    owned[worker] = Box(
        (*old.starts[:axis], start, *old.starts[axis + 1 :]), (*old.stops[:axis], stop, *old.stops[axis + 1 :])
    )
    changed = Placement((*placement.boxes[:place], tuple(owned), *placement.boxes[place + 1 :]), placement.splits)
    times = times_owned(layers[place], owned)
    if (times == 1).all():
        check(layers, changed)
        return
    with pytest.raises(UserError, match=f"'{layers[place].name}'") as refused:
        check(layers, changed)
    if (times > 1).any():
        assert f"partition {worker}" in str(refused.value)
        assert str(owned[worker]) in str(refused.value)
    else:
        assert f"{(times == 0).sum()} of {times.size}" in str(refused.value)


@pytest.mark.parametrize("weights", [(1, 0), (1, -2), (1, float("nan")), (1, float("inf")), (1,), (1, 1, 1)])
def test_weights_that_mean_nothing_are_refused(weights):
    with pytest.raises(UserError, match="weight"):
        automatic(LAYERS, 2, weights)


def test_other_mistakes_are_refused():
    with pytest.raises(UserError, match="at least 1"):
        automatic(LAYERS, 0)
    with pytest.raises(UserError, match=r"'out' takes inputs of shape \(2, 4, 4\).*'local' below it gives \(3, 4, 4\)"):
        automatic([Filter("local", (1, 6, 6), 3, (3, 3)), LAYERS[1]], 2)
    with pytest.raises(UserError, match="'out' cannot be split by inputs"):
        explicit(LAYERS, {}, 2, splits={"out": "inputs"})
    with pytest.raises(UserError, match="'only' cannot be split by inputs"):
        explicit([SplitDense("only", (5,), 5)], {}, 2, splits={"only": "inputs"})
    with pytest.raises(UserError, match="network has 2"):
        check(LAYERS, Placement(automatic(LAYERS, 2).boxes[:1], ("outputs",)))


@pytest.mark.parametrize("wrong", [Box((0, 0, 0), (2, 9, 9)), Box((0, 0), (1, 1)), Box((0, 3, 3), (2, 3, 3))])
def test_a_layer_that_asks_for_inputs_it_does_not_have_is_named(wrong):
    class Wrong(Filter):
        def input_box(self, output):
            return wrong

    layers = [LAYERS[0], Wrong("own", (2, 4, 4), 2, (2, 2))]
    with pytest.raises(UserError, match=r"'own'.*shape \(2, 4, 4\)"):
        automatic(layers, 3)


@settings(max_examples=30)
@given(st.data())
def test_the_stand_ins_ask_for_what_real_layers_ask_for(data):
    """What the tests of placements and plans use instead of layers is not easier than these."""
    from dbmpi import config
    from dbmpi.network.dense import DenseLayer
    from dbmpi.network.dropout import DropoutLayer
    from dbmpi.network.field import ConvolutionLayer, LocalLayer
    from dbmpi.network.normalisation import NormalisationLayer
    from dbmpi.network.pooling import PoolingLayer

    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(3, 9), st.integers(3, 9)))
    field, window = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 3, 5]))
    stride = data.draw(st.integers(1, field))
    for real, stand_in in [
        (PoolingLayer("a", shape, config.Pooling(size=field, stride=stride)), Pooling("a", shape, field, stride)),
        (NormalisationLayer("a", shape, config.Normalisation(window=window)), Normalisation("a", shape, window)),
        (DropoutLayer("a", shape, config.Dropout(rate=0.5)), Elementwise("a", shape)),
        (DenseLayer("a", shape, config.Dense(units=5)), Dense("a", shape, 5)),
        (
            LocalLayer("a", shape, config.Local(maps=2, field=(field, 2), stride=stride)),
            Filter("a", shape, 2, (field, 2), stride),
        ),
        (
            ConvolutionLayer("a", shape, config.Convolution(maps=2, field=(field, 2), stride=stride)),
            Filter("a", shape, 2, (field, 2), stride, True),
        ),
    ]:
        assert real.output_shape == stand_in.output_shape
        mine, theirs = dict(real.tensors), dict(stand_in.tensors)
        untied = isinstance(real, LocalLayer)  # has its tensors' axes in another order
        assert {name: tensor.size for name, tensor in mine.items()} == {name: one.size for name, one in theirs.items()}
        assert untied or mine == theirs
        pairs = [sorted((data.draw(st.integers(0, n - 1)), data.draw(st.integers(1, n)))) for n in real.output_shape]
        box = Box(tuple(a for a, _ in pairs), tuple(max(a + 1, b) for a, b in pairs))
        assert real.input_box(box) == stand_in.input_box(box)
        for tensor in real.tensors:
            here, there = real.tensor_box(tensor, box), stand_in.tensor_box(tensor, box)
            assert here.size == there.size
            assert untied or here == there


def chain():
    return [SplitDense("lower", (6,), 7), SplitDense("upper", (7,), 3)]


def test_a_placement_by_the_configuration():
    layers = chain()
    assert from_config(PlacementSection(), layers, 3) == automatic(layers, 3)
    assert from_config(PlacementSection(weights=(1, 2, 4)), layers, 3) == automatic(layers, 3, (1, 2, 4))
    section = {"weights": [1, 3], "layers": {"lower": {"boxes": ["0:1", ":7"], "split": "outputs"}}}
    section["layers"]["lower"]["boxes"][1] = "1:"
    section["layers"]["upper"] = {"split": "inputs"}
    placement = from_config(PlacementSection.model_validate(section), layers, 2)
    assert placement.boxes[0] == (Box((0,), (1,)), Box((1,), (7,)))
    assert placement.boxes[1] == automatic(layers, 2, (1, 3)).boxes[1]
    assert placement.splits == ("outputs", "inputs")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"layers": {"lower": {"boxes": ["0:7"]}}}, "'lower' has 1 boxes for 2 partitions"),
        ({"layers": {"lower": {"boxes": ["0:3", "3:8"]}}}, r"'lower' has outputs of shape \(7,\), .* box \[3:8\]"),
        ({"layers": {"lower": {"boxes": ["0:3", "rest"]}}}, "'lower', partition 1: 'rest' is not a box"),
        ({"layers": {"lower": {"split": "inputs"}}}, "'lower' cannot be split by inputs"),
        ({"layers": {"other": {}}}, "no layer 'other'; the layers are lower, upper"),
        ({"weights": [1, 2, 3]}, "3 weights are given for 2 partitions"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(section, words):
    with pytest.raises(UserError, match=words):
        from_config(PlacementSection.model_validate(section), chain(), 2)
