"""Modules of PyTorch as objectives: beside PyTorch's own loop, on several ranks, and where they cannot be trained."""

from __future__ import annotations

import numpy as np
import pytest
from parallel import tiny
from parallel.test_own_objective import describe

from dbmpi.data.source import Source
from dbmpi.data.stream import Order
from dbmpi.errors import UserError
from dbmpi.objective import Samples
from dbmpi.runs.training import train

torch = pytest.importorskip("torch", reason="needs PyTorch: the extra dbmpi[torch]")
nn = torch.nn

from dbmpi.torch import ModuleObjective  # noqa: E402

CROSS_ENTROPY = nn.functional.cross_entropy


def module(*between):
    """Return a network for the tiny samples, with the same first values whenever it is made."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(tiny.FEATURES, 8), nn.Tanh(), *between, nn.Linear(8, tiny.CLASSES))


def samples(count=5, step=0):
    random = np.random.default_rng(step)
    inputs = random.normal(size=(tiny.FEATURES, count)).astype(np.float32)
    return Samples(inputs.T, random.integers(0, tiny.CLASSES, count).astype(np.int32), step=step)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize(
    "server", [{}, {"fetch": "shared"}, {"gradients": "layers"}], ids=["copied", "shared", "arrays"]
)
def test_one_worker_learns_what_pytorch_learns(comm, place, server) -> None:
    run = describe(
        place,
        topology={"shards": max(1, comm.size - 1), "replicas": 1, "colocate": comm.size == 1},
        server=server | {"align": "equal"},
        optimizer={"rule": "sgd", "learning_rate": 0.1, "epochs": 8},
    )
    result = train(run, comm, objective=ModuleObjective(module(), CROSS_ENTROPY))
    assert result.steps == 56
    theirs = module()
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1)
    order = Order(tiny.SAMPLES, 6, 8, run.run.seed)
    with Source.open(run.data.train, 100) as source:
        for number in range(order.batches):
            batch = source.batch(order.indices(number))
            sgd.zero_grad()
            outputs = theirs(torch.from_numpy(batch.inputs.T.copy()))
            CROSS_ENTROPY(outputs, torch.from_numpy(batch.targets).long()).backward()
            sgd.step()
    expected = np.concatenate([one.detach().numpy().reshape(-1) for one in theirs.parameters()])
    np.testing.assert_allclose(tiny.vectors(result.checkpoint)["parameters"], expected, atol=2e-6)


@pytest.mark.parallel([1, 3, 4])
@pytest.mark.parametrize("method", ["downpour", "sandblaster"])
def test_replicas_learn_and_go_on(comm, place, method) -> None:
    for epochs in (6, 12):
        optimizer = {"method": method, "learning_rate": 0.05, "epochs": epochs}
        run = describe(place, topology={"colocate": comm.size == 1}, optimizer=optimizer)
        objective = ModuleObjective(module(nn.Dropout(0.1)) if method == "downpour" else module(), CROSS_ENTROPY)
        result = train(run, comm, objective=objective)
    assert result.test is not None
    assert result.test.accuracy is not None
    assert result.test.accuracy > 0.9


def test_parameters_are_views_and_gradients_are_autograds():
    objective = ModuleObjective(module(), CROSS_ENTROPY)
    mine = {name: values.copy() for name, values in objective.parameters.items()}
    for values in mine.values():
        values.flags.writeable = False
    loss, gradients = objective.loss_and_gradient(mine, samples())
    for name, one in objective.module.named_parameters():
        assert one.data_ptr() == mine[name].ctypes.data
        assert gradients[name].ctypes.data == one.grad.data_ptr()
    theirs = module()
    expected = CROSS_ENTROPY(
        theirs(torch.from_numpy(samples().inputs.copy())), torch.from_numpy(samples().targets).long()
    )
    expected.backward()
    assert loss == pytest.approx(float(expected), rel=1e-6)
    for name, one in theirs.named_parameters():
        np.testing.assert_allclose(gradients[name], one.grad.numpy(), atol=1e-7)


def test_dropout_follows_from_the_step_and_is_off_in_evaluations():
    objective = ModuleObjective(module(nn.Dropout(0.5)), CROSS_ENTROPY)
    mine = objective.parameters
    losses = [objective.loss_and_gradient(mine, samples(40)._replace(step=step))[0] for step in (3, 4, 3)]
    assert losses[0] == losses[2] != losses[1]
    loss, correct = objective.evaluate(mine, samples(40))
    outputs = objective.predict(mine, samples(40).inputs)
    assert outputs.shape == (40, tiny.CLASSES)
    assert correct == (outputs.argmax(axis=1) == samples(40).targets).sum()
    assert loss == pytest.approx(
        float(CROSS_ENTROPY(torch.from_numpy(outputs), torch.from_numpy(samples(40).targets).long()))
    )


def test_frozen_and_shared_parameters_and_weights():
    torch.manual_seed(2)
    shared = nn.Linear(tiny.FEATURES, tiny.FEATURES)
    net = nn.Sequential(shared, shared, nn.Linear(tiny.FEATURES, 1))
    net[2].bias.requires_grad_(False)

    def loss(outputs, targets, weights):
        return ((outputs - targets).square().squeeze(1) * weights).mean()

    objective = ModuleObjective(net, loss)
    assert set(objective.parameters) == {"0.weight", "0.bias", "2.weight"}
    targets = np.ones((5, 1), np.float32)
    batch = samples()._replace(targets=targets, weights=np.arange(5, dtype=np.float32))
    value, gradients = objective.loss_and_gradient(objective.parameters, batch)
    outputs = objective.predict(objective.parameters, batch.inputs)
    assert value == pytest.approx(((outputs - 1) ** 2 * np.arange(5)[:, None]).mean(), rel=1e-5)
    assert set(gradients) == set(objective.parameters)
    assert isinstance(objective.evaluate(objective.parameters, batch), float)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: module().double(), r"0\.weight is torch\.float64 on the device cpu: expected float32"),
        (lambda: module().to("meta"), "on the device meta"),
        (lambda: module(nn.BatchNorm1d(8)), "2 keeps running statistics"),
        (lambda: module().requires_grad_(False), "no parameter that requires a gradient"),
    ],
    ids=["double", "device", "statistics", "frozen"],
)
def test_modules_that_cannot_be_trained(made, message):
    with pytest.raises(UserError, match=message):
        ModuleObjective(made(), CROSS_ENTROPY)
    ModuleObjective(module(nn.BatchNorm1d(8, track_running_stats=False)), CROSS_ENTROPY)
