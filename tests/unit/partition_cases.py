"""Random networks and placements, for tests that hold for all of them."""

from __future__ import annotations

from hypothesis import strategies as st
from unit.partition_layers import Dense, Elementwise, Filter, Normalisation, Pooling, SplitDense

from dbmpi.index.boxes import Box
from dbmpi.replica.group import Group
from dbmpi.replica.placement import Placement, can_split_by_inputs


class Seat(Group):
    """A place in a group of workers of which only the plans are asked."""

    def __init__(self, rank: int) -> None:
        super().__init__(None)
        self.rank = rank


def shares():
    """Weights of 1 to 12 workers."""
    counts = st.sampled_from(range(1, 13))
    return counts.flatmap(lambda n: st.one_of(st.none(), mixed(n)).map(lambda found: found or [1] * n))


def mixed(workers):
    return st.lists(st.sampled_from([1, 2, 0.3, 5]), min_size=workers, max_size=workers)


@st.composite
def networks(draw):
    """Some layers on an image, then perhaps dense ones; fields are no smaller than strides."""
    sides = st.sampled_from([1, 2, 4, 7, 8, 9, 10])
    shape = (draw(st.integers(1, 3)), draw(sides), draw(sides))
    layers = []
    for number in range(draw(st.sampled_from([0, 1, 2, 3, 4]))):
        kind = draw(st.sampled_from(["local", "tied", "pooling", "normalisation", "elementwise"]))
        least = min(shape[1:])
        if kind in ("local", "tied"):
            field = (
                draw(st.sampled_from(range(1, min(shape[1], 4) + 1))),
                draw(st.sampled_from(range(1, min(shape[2], 4) + 1))),
            )
            stride = draw(st.integers(1, min(field)))
            layer = Filter(f"{kind}{number}", shape, draw(st.sampled_from([1, 2, 3])), field, stride, kind == "tied")
        elif kind == "pooling":
            field = draw(st.integers(1, min(least, 3)))
            layer = Pooling(f"{kind}{number}", shape, field, draw(st.integers(1, field)))
        elif kind == "normalisation":
            layer = Normalisation(f"{kind}{number}", shape, draw(st.sampled_from([1, 3, 5])))
        else:
            layer = Elementwise(f"{kind}{number}", shape)
        layers.append(layer)
        shape = layer.output_shape
    for number in range(draw(st.integers(0 if layers else 1, 3))):
        kind = draw(st.sampled_from([Dense, SplitDense, Elementwise] if number else [Dense, SplitDense]))
        extra = () if kind is Elementwise else (draw(st.sampled_from([1, 3, 8, 15])),)
        layers.append(kind(f"flat{number}", shape, *extra))
        shape = layers[-1].output_shape
    return layers


@st.composite
def covers(draw, shape, workers):
    """Boxes that cover a shape exactly once, cut at random, dealt to the workers at random; some get nothing."""
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.sampled_from(range(workers)))):
        box = boxes.pop(draw(st.sampled_from(range(len(boxes)))))
        axis = draw(st.integers(0, len(shape) - 1))
        at = draw(st.sampled_from(range(box.starts[axis], box.stops[axis] + 1)))
        boxes.append(Box(box.starts, (*box.stops[:axis], at, *box.stops[axis + 1 :])))
        boxes.append(Box((*box.starts[:axis], at, *box.starts[axis + 1 :]), box.stops))
    nothing = Box((0,) * len(shape), (0,) * len(shape))
    return tuple(draw(st.permutations([*boxes, *[nothing] * (workers - len(boxes))])))


@st.composite
def random_placements(draw, layers, most=8):
    """Any placement of the layers that is allowed."""
    workers = draw(st.sampled_from(range(1, most + 1)))
    boxes = tuple(draw(covers(layer.output_shape, workers)) for layer in layers)
    splits = tuple(
        draw(st.sampled_from(["outputs", "inputs"])) if place and can_split_by_inputs(layer) else "outputs"
        for place, layer in enumerate(layers)
    )
    return Placement(boxes, splits)
