"""Kernels that share their loops among threads are compiled differently: each layer, on two threads as on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

PROGRAM = """
import json, os
import numpy as np
from dbmpi import config
from dbmpi.kernels import matmul
from dbmpi.objective import Batch
from dbmpi.replica.whole import WholeNetwork

CASES = {
    "dense": ((10,), [
        config.Dense(units=40, activation=name) for name in ("sigmoid", "tanh", "relu", "linear")
    ], "softmax"),
    "local": ((3, 12, 12), [
        config.Local(maps=11, field=(3, 3), activation="sigmoid", reconstruction=0.1),
        config.Pooling(kind="l2", size=(2, 2), stride=2, penalty=0.1), config.Normalisation(window=3),
    ], "reconstruction"),
    "convolution": ((3, 12, 12), [
        config.Convolution(maps=11, field=(3, 3), activation="tanh"), config.Pooling(kind="max", size=(2, 2)),
        config.Convolution(maps=11, field=(3, 3)), config.Pooling(kind="average", size=(3, 3), stride=2),
        config.Dropout(rate=0.5), config.Dense(units=5),
    ], "logistic"),
}
found = {}
random = np.random.default_rng(3)
for name, (shape, layers, loss) in CASES.items():
    network = WholeNetwork(config.NetworkSection(layers=tuple(layers), loss=loss), shape, 1)
    inputs = random.random((*shape, 40), dtype=np.float32)
    targets = None if loss == "reconstruction" else random.integers(0, 5, 40).astype(np.int32)
    parameters, gradient = np.empty(network.size, np.float32), np.empty(network.size, np.float32)
    network.initial(0, parameters)
    for provider in ("tiles", "numpy"):
        matmul.use([provider] * 3)
        outcome = network.loss_and_gradient(parameters, Batch(inputs, targets), gradient, step=7)
        found[f"{name} {provider}"] = [outcome.loss, *gradient[::97].tolist(), float(np.square(gradient).sum())]
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_threads_compute_what_one_does():
    results = []
    for threads in ("1", "2"):
        environment = {**os.environ, "NUMBA_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        results.append(json.loads(done.stdout))
    one, two = results
    assert one.keys() == two.keys()
    assert len(one) == 6
    for case, values in one.items():
        assert values[0] > 0, case
        assert max(map(abs, values[1:])) > 0, case
        np.testing.assert_allclose(two[case], values, rtol=2e-5, atol=1e-6, err_msg=case)
