"""Losses in JAX as objectives: beside JAX's own loop, on several ranks, and where they cannot be trained."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from parallel import tiny
from parallel.test_own_objective import describe

import dbmpi
from dbmpi.data.source import Source
from dbmpi.data.stream import Order
from dbmpi.errors import UserError
from dbmpi.kernels.memory import aligned_empty
from dbmpi.machine import threads
from dbmpi.objective import Samples
from dbmpi.runs.gradient_check import check_gradient
from dbmpi.runs.training import train

jax = pytest.importorskip("jax", reason="needs JAX: the extra dbmpi[jax]")

import jax.numpy as jnp  # noqa: E402

from dbmpi.jax import LossObjective, objective  # noqa: E402

HERE = Path(__file__)
pytestmark = pytest.mark.timeout(120)


class Layer(NamedTuple):
    weights: Any
    bias: Any


def initial(key, units=16):
    """Return a tree of all kinds of nodes."""
    one, two = jax.random.split(key)
    first = Layer(jax.random.normal(one, (tiny.FEATURES, units)) / 3, jnp.zeros(units))
    last = {"weights": jax.random.normal(two, (units, tiny.CLASSES)) / 4, "bias": jnp.zeros(tiny.CLASSES)}
    return {"layers": [first, last], "scale": jnp.ones(())}


def outputs(parameters, inputs, keep=1.0):
    first, last = parameters["layers"]
    units = jnp.tanh(inputs @ first.weights + first.bias) * keep
    return parameters["scale"] * (units @ last["weights"] + last["bias"])


def loss(parameters, batch, dropout=0.0):
    keep = 1.0
    if dropout:
        keep = jax.random.bernoulli(jax.random.key(batch.step), 1 - dropout, (len(batch.inputs), 16)) / (1 - dropout)
    found = jax.nn.log_softmax(outputs(parameters, batch.inputs, keep))
    return -jnp.take_along_axis(found, batch.targets[:, None], axis=1).mean()


class Tiny(LossObjective):
    """For descriptions of runs, which name it."""

    def __init__(self, dropout=0.0):
        super().__init__(partial(loss, dropout=dropout), initial, evaluate=loss, predict=outputs)


def samples(count=5, step=0):
    random = np.random.default_rng(step)
    inputs = random.normal(size=(tiny.FEATURES, count)).astype(np.float32)
    return Samples(inputs.T, random.integers(0, tiny.CLASSES, count).astype(np.int32), step=step)


@pytest.mark.parallel([1, 3])
def test_one_worker_learns_what_jax_learns(comm, place) -> None:
    """Bit for bit: gradients are those of the same compiled function, and a step of SGD is rounded twice in both."""
    run = describe(
        place,
        topology={"shards": max(1, comm.size - 1), "replicas": 1, "colocate": comm.size == 1},
        server={"gradients": "layers"} if comm.size == 3 else {},
        optimizer={"rule": "sgd", "learning_rate": 0.1, "epochs": 8},
    )
    mine = objective(loss, initial)
    result = train(run, comm, objective=mine)
    assert result.steps == 56
    parameters, gradient = initial(jax.random.key(run.run.seed)), jax.jit(jax.grad(loss))
    order = Order(tiny.SAMPLES, 6, 8, run.run.seed)
    with Source.open(run.data.train, 100) as source:
        for number in range(order.batches):
            batch = source.batch(order.indices(number))
            found = gradient(parameters, Samples(jnp.array(batch.inputs.T), jnp.array(batch.targets), step=number))
            parameters = jax.tree.map(lambda w, g: w - 0.1 * g, parameters, found)
    trained = mine.tree(dbmpi.parameters(result))
    assert jax.tree.structure(trained) == jax.tree.structure(parameters)
    jax.tree.map(np.testing.assert_array_equal, trained, parameters)


@pytest.mark.parallel([3])
@pytest.mark.parametrize("method", ["downpour", "sandblaster"])
def test_replicas_learn_go_on_and_are_evaluated(comm, place, method) -> None:
    settings = {"use": "test_jax:Tiny"} | ({"dropout": 0.1} if method == "downpour" else {})
    for epochs in (6, 12):
        optimizer = {"method": method, "learning_rate": 0.05, "epochs": epochs}
        run = describe(place, network={"code": HERE.parent}, objective=settings, optimizer=optimizer)
        result = train(run, comm)
    assert result.test is not None
    assert result.test.accuracy is not None
    assert result.test.accuracy > 0.9
    for usual in ({"allow_code": [HERE]}, {"objective": Tiny()}):
        outcome = dbmpi.evaluate(result, place / "test.h5", comm, batch_size=7, **usual)
        assert outcome.correct == result.test.correct
        assert outcome.loss == pytest.approx(result.test.loss, rel=1e-5)
        rows = dbmpi.predict(result, place / "test.h5", comm, batch_size=7, **usual)
        if comm.rank == 0:
            with Source.open(place / "test.h5", 100) as source:
                targets = source.batch(np.arange(tiny.TEST_SAMPLES)).targets
            assert (rows.argmax(axis=1) == targets).sum() == outcome.correct


def test_the_gradient_is_compared_with_differences_in_float64(tmp_path):
    tiny.write_data(tmp_path)
    run = describe(tmp_path, network={"code": HERE.parent}, objective={"use": "test_jax:Tiny", "dropout": 0.1})
    findings = list(check_gradient(run))
    assert [finding.status for finding in findings] == 5 * ["ok"]
    assert all(float(finding.found.rpartition(" ")[2]) < 1e-7 for finding in findings)


def test_what_begins_at_a_line_is_not_copied():
    """Parameters on the way to JAX, which takes arguments of a compiled function as device_put does, and gradients."""
    one = objective(loss, initial)
    first = one.initial(0)
    assert [*first] == ["layers.0.weights", "layers.0.bias", "layers.1.weights", "layers.1.bias", "scale"]
    vector = aligned_empty(sum(values.size for values in first.values()))
    start, copied = 0, {}
    for name, values in first.items():
        place = vector[start : start + values.size].reshape(values.shape)
        np.copyto(place, values)
        place.flags.writeable = False
        copied[name] = jax.device_put(place).unsafe_buffer_pointer() != place.ctypes.data
        start += values.size
    assert copied == {name: name == "scale" for name in first}  # which follows 3 numbers
    found = jax.jit(jnp.ones, static_argnums=0)(100)
    assert np.asarray(found).ctypes.data == found.unsafe_buffer_pointer()


def test_the_loss_sees_the_step_the_weights_and_the_correct_ones():
    mine = Tiny(dropout=0.5)
    first = mine.initial(3)
    losses = [mine.loss_and_gradient(first, samples(40)._replace(step=step))[0] for step in (3, 2**40, 3)]
    assert losses[0] == losses[2] != losses[1]
    expected = float(loss(initial(jax.random.key(3)), samples(40)))
    correct = (mine.predict(first, samples(40).inputs).argmax(axis=1) == samples(40).targets).sum()
    assert mine.evaluate(first, samples(40)) == (pytest.approx(expected, rel=1e-5), correct)

    def counted(parameters, batch):
        errors = batch.inputs @ parameters - batch.targets[:, 0]
        return (batch.weights * errors**2).mean(), (abs(errors) < 1).sum()

    of_array = objective(counted, np.ones(tiny.FEATURES))
    batch = samples()._replace(targets=np.ones((5, 1), np.float32), weights=np.arange(5, dtype=np.float32))
    errors = batch.inputs.sum(axis=1) - 1
    (value, correct), gradients = of_array.loss_and_gradient(of_array.initial(0), batch)
    assert value == pytest.approx((batch.weights * errors**2).mean(), rel=1e-5)
    assert correct == (abs(errors) < 1).sum()
    assert of_array.evaluate(of_array.initial(0), batch) == (value, correct)
    gradient = 2 * (batch.weights * errors) @ batch.inputs / 5
    np.testing.assert_allclose(gradients["parameters"], gradient, rtol=1e-4)
    with pytest.raises(UserError, match="made without predict="):
        of_array.predict(of_array.initial(0), batch.inputs)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "there are no parameters"),
        ({"a": np.zeros(3, int)}, r"the parameter 'a' is int32: expected float32"),
        ({"a": [jnp.zeros(3, jnp.bfloat16)]}, r"the parameter 'a\.0' is bfloat16: expected float32"),
        ({"a": "word"}, "the parameter 'a' is str: expected float32"),
        ({"a/b": np.zeros(3), "a b": np.zeros(3)}, "two parameters have the name 'a_b'"),
    ],
)
def test_parameters_that_cannot_be_trained(parameters, message):
    with pytest.raises(UserError, match=message):
        objective(loss, parameters)


def test_jax_gets_the_threads_of_the_rank_and_the_processor_alone():
    """In a process of its own, as JAX chooses once; starting another process raises no warning of JAX about threads."""
    program = (
        "import os, subprocess, dbmpi.jax, jax\n"
        "named = [open(f'/proc/self/task/{task}/comm').read() for task in os.listdir('/proc/self/task')]\n"
        "print(jax.devices(), 'NPROC' in os.environ, sum('XLAEigen' in name for name in named))\n"
        "subprocess.run(['true'])\n"
    )
    for number in (1, 3):
        environment = threads.without_prepared(os.environ) | {"OMP_NUM_THREADS": str(number)}
        words = [sys.executable, "-c", program]
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
        assert (done.stdout, done.stderr) == (f"[CpuDevice(id=0)] False {number}\n", "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sys.modules['jax'] = None", "ImportError: dbmpi.jax needs JAX: pip install 'dbmpi[jax]'"),
        ("os.environ['JAX_PLATFORMS'] = 'cuda'", "JAX has none: JAX_PLATFORMS is 'cuda'; add cpu to it, or unset it"),
    ],
)
def test_what_is_missing_is_said(line, message):
    program = f"import os, sys\n{line}\nimport dbmpi\ndbmpi.jax"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert message in done.stderr


def test_the_example_of_the_docstring():
    runner = doctest.DocTestRunner()
    (example,) = doctest.DocTestFinder(recurse=False).find(LossObjective, "LossObjective", globs={})
    assert runner.run(example).failed == 0
