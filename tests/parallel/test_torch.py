"""Downpour as an optimizer of PyTorch, beside PyTorch's own and beside the same loop in NumPy."""

from __future__ import annotations

import copy
import doctest
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: the extra dbmpi[torch]")
nn = torch.nn

from dbmpi.config import ServerSection  # noqa: E402
from dbmpi.errors import UserError  # noqa: E402
from dbmpi.loops.service import Service, serve  # noqa: E402
from dbmpi.torch import Downpour  # noqa: E402

pytestmark = pytest.mark.timeout(120)

EXAMPLES = Path(__file__).parents[2] / "examples"


class Net(nn.Module):
    """Convolution, batch normalisation, and a weight that is used twice."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.convolution, self.normalisation = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.one, self.two = nn.Linear(36, 36), nn.Linear(36, 36, bias=False)
        self.two.weight = self.one.weight
        self.last = nn.Linear(36, 3)

    def forward(self, x):
        x = self.normalisation(self.convolution(x)).flatten(1).tanh()
        return self.last(self.two(self.one(x)).tanh())


def batch(number):
    random = torch.Generator().manual_seed(number)
    x = torch.randn(8, 1, 5, 5, generator=random)
    return x, (x.sum((1, 2, 3)) > 0).long()


def loss_of(net, number):
    x, y = batch(number)
    return nn.functional.cross_entropy(net(x), y)


@pytest.fixture
def shards(comm):
    """Serve on all ranks but the last; the value is whether this rank was a shard."""
    served = serve(comm, shards=max(comm.size - 1, 1))
    yield served
    if Service.current is not None:
        Service.current.leave()


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize(("to_none", "fetch"), [(True, "copied"), (False, "copied"), (True, "shared")])
def test_one_worker_learns_what_pytorch_does(comm, shards, to_none, fetch):
    """By SGD within rounding, as PyTorch fuses products and additions; and what the same loop in NumPy does exactly."""
    if shards:
        return
    net = Net()
    theirs, exact = copy.deepcopy(net), copy.deepcopy(net)
    before = {name: parameter.data_ptr() for name, parameter in net.named_parameters()}
    optimizer = Downpour(
        net.named_parameters(), rule="sgd", learning_rate=0.1, server=ServerSection.model_validate({"fetch": fetch})
    )
    assert (net.one.weight.data_ptr() == before["one.weight"]) == (fetch == "copied")
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for number in range(50):
        for each, model in ((optimizer, net), (sgd, theirs)):
            each.zero_grad(set_to_none=to_none)
            loss_of(model, number).backward()
            each.step()
        exact.zero_grad()
        loss_of(exact, number).backward()
        for parameter in exact.parameters():
            parameter.data.numpy()[...] -= np.float32(0.1) * parameter.grad.numpy()
    assert optimizer.version == 50
    assert (optimizer.worker, optimizer.workers) == (0, 1)
    optimizer.close()
    for name, value in exact.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name
        assert torch.allclose(theirs.state_dict()[name], value, atol=1e-6), name
    assert {name: parameter.data_ptr() for name, parameter in net.named_parameters()} == before


@pytest.mark.parallel([1, 3])
def test_schedule_and_clipping_are_those_of_a_loop_in_pytorch(comm, shards, shared_path):
    """And a loop that resumes in the middle, with a module of other values, ends with the same bits."""
    if shards:
        return
    settings = {
        "learning_rate": 0.1,
        "schedule": "cosine",
        "warmup_samples": 40,
        "decay_samples": 300,
        "clip_norm": 1.5,
    }
    net, theirs, other = Net(), Net(), Net(seed=1)
    optimizer = Downpour(net.named_parameters(), "momentum", **settings)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    clipped = 0
    for number in range(50):
        for each, model in ((optimizer, net), (sgd, theirs)):
            each.zero_grad()
            loss_of(model, number).backward()
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * min(1, max(0, 8 * number - 40) / 300))) / 2
        sgd.param_groups[0]["lr"] = 0.1 * min(1, 8 * (number + 1) / 40) * cosine
        clipped += float(nn.utils.clip_grad_norm_(theirs.parameters(), 1.5)) > 1.5
        sgd.step()
        optimizer.step(samples=8)
        if number == 29:
            optimizer.save(shared_path / "loop.h5")
    assert 5 < clipped < 45
    optimizer.close()
    for name, value in theirs.named_parameters():
        assert torch.allclose(net.get_parameter(name), value, atol=2e-6), name
    optimizer = Downpour(other.named_parameters(), "momentum", resume=shared_path / "loop.h5", **settings)
    assert optimizer.version == 30
    for number in range(30, 50):
        optimizer.zero_grad()
        loss_of(other, number).backward()
        optimizer.step(samples=np.int64(8))
    optimizer.close()
    for name, value in net.named_parameters():
        assert torch.equal(other.get_parameter(name), value), name


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("colocate", [False, True])
def test_what_workers_push_adds_up(comm, colocate):
    """Each adds its own number, in turns of two steps; all begin with the first worker's parameters."""
    if not colocate and serve(comm):
        return
    module = nn.Linear(3, 2)
    nn.init.constant_(module.weight, float(comm.rank))
    nn.init.zeros_(module.bias)
    group = comm if colocate else None
    optimizer = Downpour(
        module.parameters(), "sgd", learning_rate=1.0, n_push=2, n_fetch=3, comm=group, colocate=colocate
    )
    first = 0.0 if colocate else 1.0
    assert module.weight.unique().item() == first
    for _ in range(6):
        optimizer.zero_grad()
        (-(optimizer.worker + 1.0) * module.weight.sum()).backward()
        optimizer.step()
    optimizer.close()
    total = 6 * sum(range(1, optimizer.workers + 1))
    assert module.weight.unique().item() == first + total
    assert not module.bias.any()  # it had no gradient
    if Service.current is not None:
        Service.current.leave()


@pytest.mark.parallel([1, 2])
def test_frozen_parameters_and_buffers_stay(comm, shards):
    if shards:
        return
    net = Net()
    net.last.requires_grad_(False)
    frozen, used = copy.deepcopy(net.last.state_dict()), net.one.weight.detach().clone()
    optimizer = Downpour(net.parameters(), "adagrad", learning_rate=0.1)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net, 0)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(20)]
    optimizer.close()
    assert losses[-1] < losses[0]
    assert all(torch.equal(frozen[name], value) for name, value in net.last.state_dict().items())
    assert not torch.equal(used, net.one.weight)
    assert net.one.weight is net.two.weight
    assert net.normalisation.num_batches_tracked == 20


@pytest.mark.parallel([1, 2])
def test_gradients_lie_where_they_are_pushed_from(comm, shards):
    """What happens to them before a step is pushed, as PyTorch's own optimizers see it."""
    if shards:
        return
    net = Net()
    theirs = copy.deepcopy(net)
    optimizer = Downpour(net.named_parameters(), rule="sgd", learning_rate=0.1)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1)
    found = []
    for number, to_none in enumerate((True, True, False, False, True)):
        for each, model in ((optimizer, net), (sgd, theirs)):
            each.zero_grad(set_to_none=to_none)
            for _ in range(1 + number % 2):  # of several backward passes, gradients add up
                loss_of(model, number).backward()
            if number == 2:
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            if number == 4:
                model.last.bias.grad = torch.ones(3)
            found.append([parameter.grad.data_ptr() for parameter in net.parameters()])
            each.step()
    for name, value in theirs.state_dict().items():
        assert torch.allclose(net.state_dict()[name], value, atol=1e-6), name
    assert found[:8] == found[:1] * 8
    before = net.one.weight.detach().clone()
    optimizer.zero_grad()
    loss_of(net, 0).backward()
    net.one.weight.grad[0, 2] = float("nan")
    with pytest.raises(UserError, match=r"the gradient of 'one.weight' is not finite: its element \[0, 2\] is nan"):
        optimizer.step()
    assert torch.equal(net.one.weight, before)
    optimizer.zero_grad()
    loss_of(net, 0).backward(create_graph=True)  # a gradient that is differentiated itself
    (penalty,) = torch.autograd.grad(net.one.weight.grad.square().sum(), net.last.weight)
    assert penalty.any()
    pushed = net.one.weight.grad.detach().clone()
    optimizer.step()
    assert torch.equal(net.one.weight, before - np.float32(0.1) * pushed)
    optimizer.zero_grad()
    optimizer.close()
    assert net.one.weight.grad is None


@pytest.mark.parallel([1, 2])
def test_gradients_of_other_forms(comm, shards):
    """Sparse ones, and parameters that lie otherwise in memory."""
    if shards:
        return
    table, image = nn.Embedding(5, 3, sparse=True), nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
    start = copy.deepcopy(table.weight.data), image.weight.detach().clone()
    optimizer = Downpour([*table.parameters(), *image.parameters()], "sgd", learning_rate=0.5)
    (table(torch.tensor([1, 1, 4])).sum() + image.weight.sum()).backward()
    optimizer.step()
    optimizer.close()
    expected = start[0] - torch.tensor([[0.0], [1], [0], [0], [0.5]])
    assert torch.equal(table.weight.data, expected)
    assert torch.equal(image.weight.data, start[1] - 0.5)


@pytest.mark.parallel([1])
def test_mistakes(comm):
    weight = lambda **settings: nn.Parameter(torch.ones(2, **settings))  # noqa: E731
    tied = weight()
    for params, settings, message in (
        ([weight(device="meta")], {}, "parameter 0 is on the device meta: expected the CPU"),
        ([("w", weight(dtype=torch.bfloat16))], {}, "w is torch.bfloat16: expected dense"),
        ([{"params": [weight()], "lr": 0.1}], {}, "a group of parameters has lr: all are updated by one rule"),
        ([weight()], {"n_push": 0}, "n_push = 0: expected a whole number"),
        ([weight()], {"n_fetch": 2, "server": ServerSection(fetch="shared")}, "n_fetch = 2 needs parameters that stay"),
        ([weight(), weight(dtype=torch.float64)], {}, "expected one dtype"),
        ([weight().requires_grad_(False)], {}, "there are no parameters"),
        ([weight()], {"lerning_rate": 0.1}, "learning_rate"),
        (
            [tied, nn.Parameter(tied.data[:1])],
            {},
            "parameter 0 and parameter 1 are different parameters in the same mem",
        ),
    ):
        with pytest.raises(UserError, match=message):
            Downpour(params, "sgd", **settings)
    module = nn.Linear(2, 1)
    optimizer = Downpour(module.named_parameters(), "sgd", learning_rate=0.1)
    with pytest.raises(UserError, match="cannot be added later"):
        optimizer.add_param_group({"params": [weight()]})
    (module.weight.sum() * float("inf")).backward()
    before = module.weight.detach().clone()
    with pytest.raises(UserError, match=r"the gradient of 'weight' is not finite: its element \[0, 0\] is inf"):
        optimizer.step()
    assert torch.equal(module.weight, before)
    module.weight.data = module.weight.data.clone()
    with pytest.raises(UserError, match="the memory of weight was replaced"):
        optimizer.step()
    optimizer.close()


@pytest.mark.parallel([2])
def test_several_ranks_need_shards(comm):
    with pytest.raises(UserError, match=r"there are no shards: begin the program with `if dbmpi.serve"):
        Downpour(nn.Linear(1, 1).parameters(), comm=comm)


@pytest.mark.parallel([3])
def test_workers_with_different_modules_are_refused(comm):
    if serve(comm):
        return
    units = 3 if comm.rank == 2 else 2
    message = r"'bias' has the shape \[3\] on rank 2, and \[2\] on rank 1"
    with pytest.raises(UserError, match=message if comm.rank == 2 else "rank 2 reports"):
        Downpour(nn.Linear(2, units).named_parameters())
    Service.current.leave()


@pytest.mark.parametrize(
    ("script", "ranks"),
    [
        ("images_loop", None),
        ("images_downpour", None),
        ("images_downpour", 3),
        ("text_loop", None),
        ("text_downpour", 3),
    ],
)
def test_the_converted_scripts(launch, tmp_path, script, ranks):
    """Each learns what the one that it was made of learns; each worker says so, and one of them saves."""
    pytest.importorskip("sklearn", reason="its digits are the data")
    options = ("--save", str(tmp_path / "saved.pt"), "--epochs", "6") if "images" in script else ("--steps", "200")
    done = launch(ranks, [sys.executable, str(EXAMPLES / f"{script}.py"), *options], 90)
    assert done.returncode == 0, done.transcript
    workers = 1 if ranks is None else ranks - 1
    if "images" in script:
        accuracies = re.findall(r"epoch 6: accuracy (\S+)", done.stdout)
        assert len(accuracies) == workers, done.transcript
        assert min(map(float, accuracies)) > 0.8
        assert torch.load(tmp_path / "saved.pt", weights_only=True)["classes.2.bias"].shape == (10,)
    else:
        losses = re.findall(r"loss of the rest (\S+)", done.stdout)
        assert len(losses) == workers, done.transcript
        assert len(set(losses)) == 1  # of the final parameters
        assert float(losses[0]) < 3  # of 4.6 for characters that are equally frequent


@pytest.mark.parallel([1])
def test_the_example_of_the_docstring(comm):
    runner = doctest.DocTestRunner()
    (example,) = doctest.DocTestFinder(recurse=False).find(Downpour, "Downpour", globs={})
    assert runner.run(example).failed == 0
