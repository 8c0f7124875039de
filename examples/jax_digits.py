"""Handwritten digits by a convolutional network in JAX: the objective of jax-digits.toml.

It needs the extra ``dbmpi[jax]``.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import dbmpi.jax
from dbmpi.objective import Samples


class Digits(dbmpi.jax.LossObjective):
    """A convolution, a dense layer with dropout, and one output for each digit.

    Parameters
    ----------
    maps, units : int
        Outputs of the two layers.
    dropout : float
        Fraction of the units that each step leaves out.
    """

    def __init__(self, maps: int = 16, units: int = 64, dropout: float = 0.2) -> None:
        super().__init__(partial(loss, dropout=dropout), partial(initial, maps, units), evaluate=loss, predict=outputs)


def initial(maps: int, units: int, key: Any) -> Any:
    """Return random parameters."""
    keys = jax.random.split(key, 3)
    return {
        "convolution": {"filters": jax.random.normal(keys[0], (maps, 1, 3, 3)) / 3, "bias": jnp.zeros((maps, 1, 1))},
        "dense": dense(keys[1], 36 * maps, units),
        "last": dense(keys[2], units, 10),
    }


def dense(key: Any, inputs: int, units: int) -> Any:
    """Return random parameters of one layer."""
    return {"weights": jax.random.normal(key, (inputs, units)) / inputs**0.5, "bias": jnp.zeros(units)}


def outputs(parameters: Any, inputs: Any, kept: Any = 1.0) -> Any:
    """Return ten numbers for each image; `kept` multiplies the units of the dense layer."""
    first, middle, last = (parameters[name] for name in ("convolution", "dense", "last"))
    maps = jax.lax.conv(inputs.reshape(-1, 1, 8, 8), first["filters"], (1, 1), "VALID") + first["bias"]
    flat = jax.nn.relu(maps).reshape(len(inputs), -1)
    units = jax.nn.relu(flat @ middle["weights"] + middle["bias"]) * kept
    return units @ last["weights"] + last["bias"]


def loss(parameters: Any, batch: Samples, dropout: float = 0.0) -> Any:
    """Return the mean cross-entropy of a batch, and how many of its digits are recognised."""
    kept: Any = 1.0
    if dropout:
        shape = len(batch.inputs), len(parameters["dense"]["bias"])
        kept = jax.random.bernoulli(jax.random.key(batch.step), 1 - dropout, shape) / (1 - dropout)
    found = jax.nn.log_softmax(outputs(parameters, batch.inputs, kept))
    of_class = jnp.take_along_axis(found, batch.targets[:, None], axis=1)
    return -of_class.mean(), (found.argmax(axis=1) == batch.targets).sum()
