"""One layer or loss of ours as a contestant: one_layer.py THREADS BATCH CASE.

The arguments are those of the peer ``peers/layers.py``: CASE is a :class:`Case` as a JSON list.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import common

if TYPE_CHECKING:
    from dbmpi.network.layer import Layer

LOSSES = {
    "softmax": "softmax cross-entropy",
    "one-vs-all": "one-vs-all logistic loss, labels",
    "logistic": "logistic loss of values",
    "squared": "squared loss of values",
}
"""What each is called in a table.  The first two are of classes."""
RECONSTRUCTIONS = ("local reconstruction", "convolution reconstruction")
"""Layers with a decoder under L2 pooling with a penalty: one stage that learns without targets."""
POOLS = 5
"""Rows and columns of that pooling."""
PENALTY = 0.1
"""And its weight."""


class Case(NamedTuple):
    """What is to be measured."""

    kind: str
    """A layer, or one of `LOSSES` or `RECONSTRUCTIONS`."""
    inputs: tuple[int, ...]
    size: int = 1
    stride: int = 1
    maps: int = 0
    """For layers that have maps, or units, of their own."""
    activation: Literal["sigmoid", "tanh", "relu", "linear"] = "linear"

    def __str__(self) -> str:
        """Describe it in a table."""
        if self.kind in LOSSES:
            return f"{LOSSES[self.kind]}, {self.inputs[0]} outputs"
        window = f" of {self.size}x{self.size}" if self.size > 1 else ""
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        maps = f", {self.inputs[0]} to {self.maps} {'units' if len(self.inputs) == 1 else 'maps'}" if self.maps else ""
        activation = f", {self.activation}" if self.kind == "dense" else ""
        return f"{self.kind}{window}{stride}{maps}{activation}"

    def contestants(self, batch: int) -> tuple[common.Contestant, common.Contestant]:
        """Start ours and PyTorch's, with one thread each."""
        arguments = ("1", str(batch), json.dumps(self))
        return (
            common.Contestant((sys.executable, __file__, *arguments)),
            common.Contestant((common.peers_python(), common.PEERS / "layers.py", *arguments)),
        )

    def layer(self) -> Layer:
        """Return our layer."""
        from dbmpi import config
        from dbmpi.network.description import layer_of

        window = (self.size, self.size)
        filters = {"maps": self.maps, "field": window, "stride": self.stride, "activation": self.activation}
        sections = {
            "dense": lambda: config.Dense(units=self.maps, activation=self.activation),
            "dropout": lambda: config.Dropout(rate=0.5),
            "normalisation": lambda: config.Normalisation(window=self.size),
            "local": lambda: config.Local(**filters),
            "convolution": lambda: config.Convolution(**filters),
        }
        pooling = partial(config.Pooling, kind=self.kind, size=window, stride=self.stride)
        return layer_of(sections.get(self.kind, pooling)(), self.kind, self.inputs)


def main() -> None:
    """Serve steps of what is asked for."""
    batch, case = int(sys.argv[2]), Case(*json.loads(sys.argv[3]))
    common.prepare_runtime()
    if case.kind in LOSSES:
        actions = loss(case, batch)
    elif case.kind in RECONSTRUCTIONS:
        actions = reconstruction(case, batch)
    else:
        actions = passes(case, batch)
    common.serve(copy=common.copy_bandwidth(64), peak=common.fma_peak(), **actions)


def passes(case: Case, batch: int) -> dict[str, common.Action]:
    """Return the forward and the backward pass of a layer, and both."""
    import numpy as np

    from dbmpi.index.boxes import Box
    from dbmpi.kernels.memory import aligned_empty
    from dbmpi.network.layer import Backward, Context, Forward

    layer = case._replace(inputs=tuple(case.inputs)).layer()
    box, context, random = Box.whole(layer.output_shape), Context(), np.random.default_rng(1)
    inner, outer = ((*shape, batch) for shape in (layer.input_box(box).shape, layer.output_shape))
    below, below_gradient, above, above_gradient = map(aligned_empty, (inner, inner, outer, outer))
    below[...] = random.normal(size=inner)
    parameters = {short: aligned_empty(tensor.shape) for short, tensor in layer.tensors.items()}
    parameter_gradient = {short: aligned_empty(tensor.shape) for short, tensor in layer.tensors.items()}
    for values in parameters.values():
        values[...] = 0.01 * random.standard_normal(values.shape, np.float32)

    task = Backward(box, parameters, below, above, context, above_gradient, parameter_gradient, below_gradient)

    def forward() -> None:
        layer.forward(Forward(box, parameters, below, above, context))

    def backward() -> None:
        layer.backward(task)

    def step() -> None:
        forward()
        backward()

    def fill() -> None:
        above_gradient[...] = 1

    arrays = (below, above, *parameters.values())
    return {
        "step": after(fill, step),
        "forward": common.timed(forward),
        "backward": after(fill, backward),
        "work": work(sum(array.nbytes for array in arrays), layer.flops(box, batch) if parameters else 0),
    }


def loss(case: Case, batch: int) -> dict[str, common.Action]:
    """Return a loss with its gradient, which takes the place of the last layer's outputs."""
    import numpy as np

    from dbmpi.kernels.memory import aligned_empty
    from dbmpi.network.losses import Loss

    random, shape = np.random.default_rng(1), (case.inputs[0], batch)
    outputs, values = aligned_empty(shape), aligned_empty(shape)
    outputs[...] = random.normal(size=shape)
    if case.kind in ("softmax", "one-vs-all"):
        found = Loss("softmax" if case.kind == "softmax" else "logistic", "classes")
        targets = random.integers(0, shape[0], batch).astype(np.int32)
    else:
        found, targets = Loss(case.kind, "values"), random.random(shape, np.float32)
    return {
        "step": after(lambda: np.copyto(values, outputs), lambda: found.apply(values, targets)),
        "work": work(values.nbytes, 0),
    }


def reconstruction(case: Case, batch: int) -> dict[str, common.Action]:
    """Return the objective of a stage that learns without targets, and its gradient for the parameters."""
    import numpy as np

    from dbmpi import config
    from dbmpi.kernels.memory import aligned_empty
    from dbmpi.objective import Batch
    from dbmpi.replica.whole import WholeNetwork

    kind = config.Local if case.kind.startswith("local") else config.Convolution
    filters = kind(maps=case.maps, field=case.size, stride=case.stride, reconstruction=1.0)
    pooling = config.Pooling(kind="l2", size=POOLS, penalty=PENALTY)
    network = WholeNetwork(
        config.NetworkSection(loss="reconstruction", layers=(filters, pooling)), tuple(case.inputs), 1
    )
    parameters, gradient = aligned_empty(network.size), aligned_empty(network.size)
    network.initial(0, parameters)
    inputs = aligned_empty((*case.inputs, batch))
    inputs[...] = np.random.default_rng(1).normal(size=inputs.shape)
    samples = Batch(inputs, np.empty(0, np.int32))
    outputs = 4 * batch * math.prod(network.layers[0].output_shape)
    # Beyond the layer's own passes, the estimate and its two gradients: three more products.
    products = network.flops(batch) * 5 // 2
    return {
        "step": common.timed(lambda: network.loss_and_gradient(parameters, samples, gradient)),
        "work": work(inputs.nbytes + outputs + parameters.nbytes, products),
    }


def after(prepare: Callable[[], Any], measured: Callable[[], Any]) -> common.Action:
    """Return an action that does some work which is timed, after what is not: it overwrites what it works on."""
    action = common.timed(measured)

    def both() -> Mapping[str, Any]:
        prepare()
        return action()

    return both


def work(nbytes: int, flops: int) -> common.Action:
    """Return an action that tells the bytes of reading and writing some memory once, and the operations of a step."""
    return lambda: {"bytes": 2 * nbytes, "flops": flops}


if __name__ == "__main__":
    main()
