"""Modules of PyTorch as objectives: beside PyTorch's own loop, on several ranks, and where they cannot be trained."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from parallel import tiny
from parallel.test_own_objective import describe

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.data.source import Source
from dbmpi.data.stream import Order
from dbmpi.errors import UserError
from dbmpi.formats.export import export
from dbmpi.mpi import waiting
from dbmpi.mpi.topology import plan
from dbmpi.objective import Samples
from dbmpi.replica.own_objective import OwnModel, OwnReplica
from dbmpi.runs.training import train

torch = pytest.importorskip("torch", reason="needs PyTorch: the extra dbmpi[torch]")
nn = torch.nn

import dbmpi.torch  # noqa: E402
from dbmpi.torch import ModuleObjective, objective  # noqa: E402

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE_PAGES = _SETTING.read_text() if _SETTING.exists() else "[never]"
CROSS_ENTROPY = nn.functional.cross_entropy


def module(*between, width=8):
    """Return a network for the tiny samples, with the same first values whenever it is made."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(tiny.FEATURES, width), nn.Sigmoid(), *between, nn.Linear(width, tiny.CLASSES))


def speech_net():
    """Return a network of the kind of the paper's for speech, with few units."""
    torch.manual_seed(1)
    widths = tiny.FEATURES, 8, 8, 8
    hidden = [each for pair in itertools.pairwise(widths) for each in (nn.Linear(*pair), nn.Sigmoid())]
    return nn.Sequential(*hidden, nn.Linear(8, tiny.CLASSES))


def tied(units):
    """Return layers whose weights are transposed to each other, as PyTorch cannot know."""
    net = nn.Sequential(nn.Linear(units, units), nn.Linear(units, units))
    net[1].weight = nn.Parameter(net[0].weight.data.t())
    return net


def samples(count=5, step=0):
    random = np.random.default_rng(step)
    inputs = random.normal(size=(tiny.FEATURES, count)).astype(np.float32)
    return Samples(inputs.T, random.integers(0, tiny.CLASSES, count).astype(np.int32), step=step)


def as_tensors(inputs, targets):
    return torch.from_numpy(np.ascontiguousarray(inputs)), torch.from_numpy(targets).long()


def pytorchs_loop(run, theirs):
    """Let PyTorch's own loop learn the batches of a run; return the parameters."""
    settings = run.optimizer
    sgd = torch.optim.SGD(theirs.parameters(), lr=settings.learning_rate)
    order = Order(tiny.SAMPLES, settings.batch_size, settings.epochs, run.run.seed)
    with Source.open(run.data.train, 100) as source:
        for number in range(order.batches):
            batch = source.batch(order.indices(number))
            inputs, targets = as_tensors(batch.inputs.T, batch.targets)
            sgd.zero_grad()
            CROSS_ENTROPY(theirs(inputs), targets).backward()
            sgd.step()
    return np.concatenate([one.detach().numpy().reshape(-1) for one in theirs.parameters()])


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize(
    "server", [{}, {"fetch": "shared"}, {"gradients": "layers"}], ids=["copied", "shared", "arrays"]
)
def test_one_worker_learns_what_pytorch_learns(comm, place, server) -> None:
    """Within the roundings of the update: PyTorch rounds the product of rate and gradient and the sum at once."""
    run = describe(
        place,
        topology={"shards": max(1, comm.size - 1), "replicas": 1, "colocate": comm.size == 1},
        server=server | {"align": "equal"},
        optimizer={"rule": "sgd", "learning_rate": 0.1, "epochs": 7.14},
    )
    net = speech_net()
    result = train(run, comm, objective=objective(net, CROSS_ENTROPY))
    assert result.steps == 50
    expected = pytorchs_loop(run, speech_net())
    np.testing.assert_allclose(tiny.vectors(result.checkpoint)["parameters"], expected, rtol=0, atol=1e-6)
    # The module's values are its own again, and a checkpoint's can be loaded into it.
    assert all(bool(one.isfinite().all()) for one in net.parameters())
    net.load_state_dict(dbmpi.torch.state_dict(result.checkpoint))
    found = torch.cat([one.detach().reshape(-1) for one in net.parameters()]).numpy()
    np.testing.assert_array_equal(found, tiny.vectors(result.checkpoint)["parameters"])


class AllAtOnce:
    """An objective by the other way: all gradients are returned together."""

    def __init__(self, net):
        self._inner = objective(net, CROSS_ENTROPY)
        self.parameters, self.evaluate = self._inner.parameters, self._inner.evaluate

    def loss_and_gradient(self, parameters, batch):
        return self._inner.loss_and_gradient(parameters, batch)


SETTINGS = {
    "sums": {"optimizer": {"n_push": 3, "n_fetch": 2}},
    "local steps": {"optimizer": {"n_push": 3, "n_fetch": 6, "local_rate": 0.05}},
    "clipped": {"optimizer": {"clip_norm": 0.1}},
    "arrays": {"server": {"gradients": "layers", "fetch": "shared"}},
    "overlap": {"server": {"overlap": "threads"}, "optimizer": {"n_push": 2}},
    "batch": {"optimizer": {"method": "sandblaster"}},
}


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("which", SETTINGS)
def test_gradients_handed_over_one_by_one_are_those_returned_together(comm, place, which) -> None:
    settings = SETTINGS[which]
    found = []
    for number, made in enumerate((objective(module(), CROSS_ENTROPY), AllAtOnce(module()))):
        run = describe(
            place,
            run={"directory": place / f"run{number}"},
            topology={"shards": 1, "replicas": 1, "colocate": comm.size == 1},
            server=settings.get("server", {}),
            optimizer={"learning_rate": 0.05, "rule": "sgd"} | settings.get("optimizer", {}),
        )
        found.append(tiny.vectors(train(run, comm, objective=made).checkpoint)["parameters"])
    if which == "overlap":  # what a fetch in the background brings is a matter of time
        assert np.isfinite(found).all()
        return
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parallel([1, 3, 4])
@pytest.mark.parametrize("method", ["downpour", "sandblaster"])
def test_replicas_learn_and_go_on(comm, place, method) -> None:
    for epochs in (6, 12):
        optimizer = {"method": method, "learning_rate": 0.05, "epochs": epochs}
        run = describe(place, topology={"colocate": comm.size != 3}, optimizer=optimizer)
        net = module(nn.Dropout(0.1)) if method == "downpour" else module()
        result = train(run, comm, objective=objective(net, CROSS_ENTROPY))
    assert result.test is not None
    assert result.test.accuracy is not None
    assert result.test.accuracy > 0.9


class Noted(ModuleObjective):
    """Batch normalisation and a frozen layer; notes its state before the first step that is not the trial's."""

    def __init__(self, frozen=0.5):
        net = module(nn.BatchNorm1d(8), nn.Linear(8, 8))
        nn.init.constant_(net[3].weight, frozen)
        net[3].requires_grad_(False)
        super().__init__(net, CROSS_ENTROPY)
        self.seen: list[dict[str, np.ndarray]] = []

    def write_gradient(self, parameters, batch, gradients):
        self.seen.append({name: values.copy() for name, values in self.state.items()})
        return super().write_gradient(parameters, batch, gradients)


@pytest.mark.parallel([1, 3])
def test_state_is_in_checkpoints_and_the_same_for_all_that_evaluate(comm, place) -> None:
    stored = {}
    for session, epochs in enumerate((6, 12)):
        run = describe(
            place,
            topology={"colocate": comm.size == 1},
            server={"gradients": "layers"},
            optimizer={"learning_rate": 0.02, "epochs": epochs},
        )
        first_worker = plan(run.topology, comm.size).worker_ranks[0]
        mine = Noted(frozen=0.5 if comm.rank == first_worker else 7.0)
        result = train(run, comm, objective=mine)
        seen = mine.seen[1 if comm.rank == first_worker else 0 :]  # without the trial
        assert session or (mine.state["3.weight"] == 0.5).all()
        for name, values in seen[0].items() if seen else ():
            np.testing.assert_array_equal(values, stored[name] if session else {"2.running_var": 1}.get(name, values))
        with Checkpoint.open(result.checkpoint) as checkpoint:
            stored = checkpoint.objective_state()
            checkpoint.verify()
        assert [*stored] == ["2.running_mean", "2.running_var", "2.num_batches_tracked", "3.weight", "3.bias"]
        waiting.barrier(comm, "the others to have read")
    assert stored["2.num_batches_tracked"].dtype == np.int64
    assert 0 < stored["2.num_batches_tracked"] <= 84
    theirs = module(nn.BatchNorm1d(8), nn.Linear(8, 8))
    theirs.load_state_dict(dbmpi.torch.state_dict(run.run.directory))
    theirs.train(False)
    with Source.open(run.data.test, 100) as source:
        batch = source.batch(np.arange(source.samples))
    with torch.no_grad():
        inputs, targets = as_tensors(batch.inputs.T, batch.targets)
        loss = float(CROSS_ENTROPY(theirs(inputs), targets))
    assert result.test is not None
    assert result.test.mean_loss == pytest.approx(loss, rel=1e-5)
    for usual in ({"allow_code": [__file__]}, {"objective": Noted()}):
        assert dbmpi.evaluate(result, run.data.test, comm, **usual).mean_loss == pytest.approx(loss, rel=1e-5)
    exported = place / "exported.npz"
    if comm.rank == 0:
        theirs.load_state_dict(
            {name: torch.from_numpy(array) for name, array in np.load(export(result, exported)).items()}
        )
    waiting.barrier(comm, "the file")
    again = describe(
        place, run={"directory": place / "again"}, topology={"colocate": comm.size == 1}, optimizer={"epochs": 1}
    )
    mine = Noted(frozen=3.0)
    train(again, comm, objective=mine, initial=exported)
    for name, values in mine.seen[1 if comm.rank == first_worker else 0].items() if mine.seen else ():
        np.testing.assert_array_equal(values, stored[name])


@pytest.mark.parallel([1])
def test_a_checkpoint_without_state_leaves_that_as_it_is(comm, place, capsys) -> None:
    for epochs in (1, 2):
        run = describe(place, optimizer={"epochs": epochs}, monitor={"progress": "lines"})
        mine = Noted()
        result = train(run, comm, objective=mine)
        with h5py.File(result.checkpoint, "r+") as file:
            for name in ("objective_state", "run/objective_state"):
                del file[name], file[f"checksums/{name}"]
    assert "has no state of the objective, which begins with its first values" in capsys.readouterr().out
    assert mine.seen[1]["2.num_batches_tracked"] == 0


@pytest.mark.parallel([1])
def test_state_that_changes_is_refused_for_batch_methods(comm, place) -> None:
    run = describe(place, optimizer={"method": "sandblaster"})
    with pytest.raises(UserError, match="learning changes its state"):
        train(run, comm, objective=Noted())


def test_parameters_are_views_and_gradients_leave_while_others_are_computed():
    net = module()
    mine = objective(net, CROSS_ENTROPY)
    model = OwnModel(mine, 1, "it")
    replica, vector, gradient = OwnReplica(model), np.empty(model.layout.size, np.float32), np.empty(83, np.float32)
    model.initial(0, vector)
    events = []
    net[0].weight.register_hook(lambda _: events.append("the first layer's"))
    batch = samples()
    replica.loss_and_gradient(vector, batch, gradient, events.append)
    assert events.index(3) < events.index("the first layer's") < events.index(0)
    assert [event for event in events if isinstance(event, int)] == [3, 2, 1, 0]
    start = vector.ctypes.data
    for (name, one), part in zip(net.named_parameters(), replica.parameters.parts, strict=True):
        assert one.data_ptr() == start + 4 * part.start, name
        assert one.grad is None  # its memory is free: it has left
    theirs = module()
    inputs, targets = as_tensors(batch.inputs, batch.targets)
    CROSS_ENTROPY(theirs(inputs), targets).backward()
    expected = np.concatenate([one.grad.numpy().reshape(-1) for one in theirs.parameters()])
    np.testing.assert_allclose(gradient, expected, atol=1e-7)
    mine.close()
    for one, part in zip(net.parameters(), replica.parameters.parts, strict=True):
        assert one.data_ptr() != start + 4 * part.start


def test_grad_attributes_of_users_do_no_harm():
    """Also a parameter that takes no part in some step, and one that two layers use."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.unused = nn.Linear(tiny.FEATURES, tiny.FEATURES), nn.Linear(2, 2)
            self.last = nn.Linear(tiny.FEATURES, tiny.CLASSES)
            self.tied = self.shared

        def forward(self, x):
            self.last.weight.grad = torch.zeros_like(self.last.weight)
            return self.last(self.tied(self.shared(x)))

    net = Net()
    mine = objective(net, CROSS_ENTROPY)
    _, expected = mine.loss_and_gradient(mine.parameters, samples())
    expected = {name: values.copy() for name, values in expected.items()}
    assert not expected["unused.weight"].any()
    for one in net.parameters():
        one.grad = torch.ones_like(one)
    model = OwnModel(mine, 1, "it")
    vector, gradient = np.empty(model.layout.size, np.float32), np.empty(model.layout.size, np.float32)
    model.initial(0, vector)
    OwnReplica(model).loss_and_gradient(vector, samples(), gradient)
    np.testing.assert_array_equal(gradient, np.concatenate([expected[name].reshape(-1) for name in model.shapes]))
    assert "tied.weight" not in model.shapes
    net.zero_grad(set_to_none=True)
    CROSS_ENTROPY(net(torch.zeros(2, tiny.FEATURES)), torch.zeros(2, dtype=torch.int64)).backward()
    assert net.last.bias.grad is not None  # outside of a run, hooks leave gradients alone


def test_dropout_follows_from_the_step_and_is_off_in_evaluations():
    mine = objective(module(nn.Dropout(0.5)), CROSS_ENTROPY)
    losses = [mine.loss_and_gradient(mine.parameters, samples(40)._replace(step=step))[0] for step in (3, 4, 3)]
    assert losses[0] == losses[2] != losses[1]
    loss, correct = mine.evaluate(mine.parameters, samples(40))
    outputs = mine.predict(mine.parameters, samples(40).inputs)
    assert outputs.shape == (40, tiny.CLASSES)
    assert correct == (outputs.argmax(axis=1) == samples(40).targets).sum()
    assert loss == pytest.approx(
        float(CROSS_ENTROPY(torch.from_numpy(outputs), torch.from_numpy(samples(40).targets).long()))
    )


@pytest.mark.parallel([1])
@pytest.mark.parametrize("method", ["downpour", "sandblaster"])
def test_tied_and_frozen_parameters_come_back_from_a_checkpoint(comm, place, method):
    def net():
        torch.manual_seed(2)
        shared = nn.Linear(tiny.FEATURES, tiny.FEATURES)
        found = nn.Sequential(shared, shared, nn.Linear(tiny.FEATURES, tiny.CLASSES))
        found.register_buffer("mask", torch.tensor([True, False]))
        found.register_buffer("scratch", torch.zeros(2), persistent=False)
        found[2].bias.requires_grad_(False)
        return found

    mine = objective(net(), CROSS_ENTROPY)
    assert set(mine.parameters) == {"0.weight", "0.bias", "2.weight"}
    assert set(mine.state) == {"mask", "2.bias"}
    result = train(describe(place, optimizer={"method": method}), comm, objective=mine)
    theirs = net()
    with torch.no_grad():
        for one in theirs.parameters():
            one.zero_()
    assert not theirs.load_state_dict(dbmpi.torch.state_dict(result.checkpoint), strict=False).unexpected_keys
    theirs.load_state_dict(dbmpi.torch.state_dict(result.checkpoint, theirs))
    values = {name: one.numpy() for name, one in theirs.state_dict().items()}
    stored = tiny.vectors(result.checkpoint)["parameters"]
    np.testing.assert_array_equal(np.concatenate([values[name].reshape(-1) for name in mine.parameters]), stored)
    assert values["1.weight"].any()
    assert values["mask"].tolist() == [True, False]
    np.testing.assert_array_equal(values["2.bias"], net()[2].bias.detach().numpy())


def test_several_inputs_are_arguments_and_gradients_are_checked_in_double_precision():
    class Rating(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.users, self.bias = nn.Embedding(4, 3), nn.Linear(1, 1)
            self.register_buffer("scale", torch.full((3,), 0.5))

        def forward(self, *, user, age):
            return (self.users(user) * self.scale).sum(dim=1, keepdim=True).tanh() + self.bias(age)

    mine = objective(Rating(), nn.functional.mse_loss)
    inputs = {"user": np.array([1, 3, 1], np.uint16), "age": np.ones((3, 1), np.float32)}
    batch = Samples(inputs, np.zeros((3, 1), np.float32))
    first = {name: values.copy() for name, values in mine.parameters.items()}
    loss, gradient = mine.loss_and_gradient(first, batch)
    assert mine.predict(first, inputs).shape == (3, 1)
    double = {name: values.astype(float) for name, values in first.items()}
    exact, wide = mine.loss_and_gradient(double, batch)
    assert exact == pytest.approx(loss, rel=1e-6)
    for name, values in wide.items():
        assert values.dtype == float
        np.testing.assert_allclose(gradient[name], values, atol=1e-6)
    assert mine.loss_and_gradient(first, batch)[1]["bias.bias"].dtype == np.float32
    assert mine.state["scale"].dtype == np.float32


def test_weights_are_the_third_argument_of_the_loss():
    def loss(outputs, targets, weights):
        return ((outputs - targets).square().squeeze(1) * weights).mean()

    torch.manual_seed(2)
    mine = objective(nn.Linear(tiny.FEATURES, 1), loss)
    batch = samples()._replace(targets=np.ones((5, 1), np.float32), weights=np.arange(5, dtype=np.float32))
    value, _ = mine.loss_and_gradient(mine.parameters, batch)
    outputs = mine.predict(mine.parameters, batch.inputs)
    assert value == pytest.approx(((outputs - 1) ** 2 * np.arange(5)[:, None]).mean(), rel=1e-5)
    assert isinstance(mine.evaluate(mine.parameters, batch), float)


@pytest.mark.skipif("[never]" in HUGE_PAGES, reason="the system has no huge pages")
def test_large_tensors_are_in_huge_pages():
    code = """
import resource, torch, dbmpi.torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.empty(2**24).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**24 * 4 / 4096 / 10


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: module().double(), r"0\.weight is torch\.float64 on the device cpu: expected float32"),
        (lambda: module().to("meta"), "on the device meta"),
        (lambda: module().requires_grad_(False), "no parameter that requires a gradient"),
        (lambda: module(nn.LazyLinear(8)), "2.weight has no shape yet"),
        (lambda: module(nn.BatchNorm1d(8, device="meta")), "on the device meta"),
        (lambda: module(tied(8)), "2.0.weight and 2.1.weight are different parameters in the same"),
    ],
    ids=["double", "device", "frozen", "lazy", "statistics", "tied"],
)
def test_modules_that_cannot_be_trained(made, message):
    with pytest.raises(UserError, match=message):
        objective(made(), CROSS_ENTROPY)


@pytest.mark.parallel([3])
def test_different_modules_on_different_ranks_are_refused(comm, place) -> None:
    different = module(nn.BatchNorm1d(8)) if comm.rank == 1 else module(nn.BatchNorm1d(8, track_running_stats=False))
    with pytest.raises(UserError) as raised:
        train(describe(place), comm, objective=objective(different, CROSS_ENTROPY))
    assert sum("differs between ranks" in text for text in comm.allgather(str(raised.value))) == 1
