"""A function of one's own on any number of ranks: beside SciPy, and what goes wrong is told to all."""

import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI
from scipy import optimize

from dbmpi import _minimize
from dbmpi._minimize import minimize
from dbmpi.errors import RunFailed, UserError
from dbmpi.index.layout import cut
from dbmpi.methods.gradients import gradient_descent
from dbmpi.mpi import waiting

SAMPLES, SHAPE = 240, (3, 4)
DOCS = Path(__file__).parents[2] / "docs" / "minimize.md"


def logistic(part):
    """Return the loss of some samples, of which all ranks together have `SAMPLES`."""
    random = np.random.default_rng(3)
    inputs = random.normal(size=(SAMPLES, 12))
    labels = np.where(inputs @ random.normal(size=12) + random.normal(size=SAMPLES) > 0, 1.0, -1.0)
    inputs, labels = inputs[part.start : part.stop], labels[part.start : part.stop]

    def objective(weights):
        margins = labels * (inputs @ weights.ravel())
        gradient = -inputs.T @ (labels / (1 + np.exp(margins)))
        return np.logaddexp(0, -margins).sum(), gradient.reshape(weights.shape)

    return objective


def mine(comm):
    return logistic(cut(SAMPLES, comm.size)[comm.rank])


def same_everywhere(comm, values):
    """Return whether all ranks have the same bits."""
    everything = np.empty((comm.size, *np.shape(values)))
    waiting.complete(comm.Iallgather(np.array(values, float), everything), "the other ranks")
    return len({row.tobytes() for row in everything}) == 1


@pytest.fixture(params=["whole", "cut"])
def vectors(request, monkeypatch):
    """Let few parameters lie whole on every rank, as they do, or cut as many parameters are."""
    if request.param == "cut":
        monkeypatch.setattr(_minimize, "SMALL", 0)


@pytest.mark.parallel([1, 2, 3, 6])
@pytest.mark.usefixtures("vectors")
def test_samples_of_several_ranks_beside_scipy(comm):
    start, told = np.zeros(SHAPE), []
    watch = lambda progress, x: told.append((progress.iteration, x.copy()))  # noqa: E731
    found = minimize(mine(comm), start, comm, l2=0.5, gtol=1e-7, ftol=0, callback=watch)
    whole = logistic(range(SAMPLES))
    theirs = optimize.minimize(
        lambda x: (whole(x)[0] + 0.25 * x @ x, whole(x)[1] + 0.5 * x),
        np.zeros(12),
        jac=True,
        method="L-BFGS-B",
        options={"gtol": 1e-7, "ftol": 0},
    )
    assert found.loss == pytest.approx(theirs.fun, rel=1e-12)
    assert found.evaluations <= 1.1 * theirs.nfev
    np.testing.assert_allclose(found.x.ravel(), theirs.x, atol=1e-7)
    assert same_everywhere(comm, found.x)
    assert same_everywhere(comm, [found.loss, found.largest, found.evaluations])
    assert [iteration for iteration, _ in told] == list(range(1, found.iterations + 1))
    np.testing.assert_array_equal(told[-1][1], found.x)
    assert not start.any()  # a start is not written to


@pytest.mark.usefixtures("vectors")
@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("settings", [{"method": "conjugate_gradients"}, {"l1": 3.0}, {"method": gradient_descent}])
def test_other_methods(comm, settings):
    found = minimize(mine(comm), np.zeros(SHAPE), comm, gtol=1e-3, **settings)
    assert found.converged
    assert same_everywhere(comm, found.x)
    _, gradient = logistic(range(SAMPLES))(found.x)
    if "l1" in settings:
        assert np.abs(gradient).max() <= 3.0 + 1e-3
        np.testing.assert_allclose(gradient[found.x != 0], -3.0 * np.sign(found.x[found.x != 0]), atol=1e-3)
        assert not found.x.all()
    else:
        assert np.abs(gradient).max() <= 1.1e-3


@pytest.mark.parallel([2, 3])
def test_an_evaluation_of_few_parameters_costs_one_exchange(comm, monkeypatch):
    waits = []
    complete = waiting.complete

    def counted(request, what, **settings):
        waits.append(what)
        return complete(request, what, **settings)

    limits = {"gtol": 0, "ftol": 0}
    minimize(mine(comm), np.zeros(SHAPE), comm, iterations=2, **limits)  # whatever is done once
    monkeypatch.setattr(waiting, "complete", counted)
    numbers = []
    for iterations in (4, 9):
        waits.clear()
        found = minimize(mine(comm), np.zeros(SHAPE), comm, iterations=iterations, **limits)
        numbers.append((len(waits), found.evaluations))
    (few, fewer), (many, more) = numbers
    assert many - few == more - fewer >= 5


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_parameters_that_lie_cut_over_the_ranks(comm, dtype):
    """The iterates are those of one process to the last bit, where the gradient is."""
    size = 50 + 7 * comm.size
    held = cut(size, comm.size)[comm.rank]

    def objective(part):
        whole = np.zeros(size)
        whole[held.start : held.stop] = part
        whole = waiting.allreduce(comm, whole, MPI.SUM, "the other ranks")
        gradient = optimize.rosen_der(whole)[held.start : held.stop]
        return optimize.rosen(whole) if comm.rank == 0 else 0.0, gradient

    start = np.linspace(-1, 1, size).astype(dtype)
    limits = {"iterations": 8, "gtol": 0, "ftol": 0}
    found = minimize(objective, start[held.start : held.stop], comm, parameters="cut", **limits)
    alone = MPI.Intracomm(comm.Split(comm.rank))
    rosenbrock = lambda x: (optimize.rosen(x.astype(float)), optimize.rosen_der(x.astype(float)))  # noqa: E731
    theirs = minimize(rosenbrock, start, alone, parameters="cut", **limits)
    alone.Free()
    assert found.x.dtype == dtype
    assert found.x.tobytes() == theirs.x[held.start : held.stop].tobytes()
    assert found[1:] == theirs[1:]
    assert found.reason == "iterations"


@pytest.mark.parallel([1, 2, 3])
def test_what_one_rank_raises_all_ranks_hear_of(comm):
    calls = []

    def objective(x):
        calls.append(1)
        if len(calls) == 3 and comm.rank == comm.size - 1:
            raise ZeroDivisionError("no samples here")
        return mine(comm)(x)

    own = comm.rank == comm.size - 1
    message = "^no samples here" if own else f"objective failed on rank {comm.size - 1}: ZeroDivisionError: no samples"
    with pytest.raises(ZeroDivisionError if own else UserError, match=message):
        minimize(objective, np.zeros(SHAPE), comm)

    def callback(progress, x):
        raise KeyError(comm.rank)

    with pytest.raises(UserError if comm.rank else KeyError, match="callback failed on rank 0" if comm.rank else "0"):
        minimize(mine(comm), np.zeros(SHAPE), comm, callback=callback)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("parameters", ["whole", "cut"])
def test_what_is_handed_out_is_never_written_to(comm, parameters):
    """Who keeps it, or a part of it, keeps what it was; and memory that nobody keeps is used again."""
    seen, copies, told, told_copies, places = [], [], [], [], set()

    def objective(x):
        places.add(x.__array_interface__["data"][0])
        return float(x @ x), 2 * x * np.linspace(0.1, 1, x.size)

    def keeping(x):
        seen.append(x[:2])
        copies.append(x[:2].copy())
        with pytest.raises(ValueError, match="read-only"):
            x[0] = 1
        return objective(x)

    def callback(progress, x):
        told.append(x)
        told_copies.append(x.copy())

    start = np.linspace(1, 2, 7)
    settings = {"parameters": parameters, "iterations": 6, "gtol": 0, "ftol": 0}
    minimize(keeping, start, comm, callback=callback, **settings)
    np.testing.assert_array_equal(seen, copies)
    np.testing.assert_array_equal(told, told_copies)
    assert len({x.tobytes() for x in copies}) == len(copies) >= 6
    places.clear()
    minimize(objective, start, comm, **settings)
    assert len(places) == 1


@pytest.mark.usefixtures("vectors")
@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("method", ["lbfgs", "conjugate_gradients", "gradient_descent"])
def test_large_numbers_outside_of_the_domain_on_several_ranks(comm, method):
    """Whose sum is more than a number can hold."""

    def objective(x):
        return (1.7e308, 0 * x) if x.min() <= 0 else (float(x.sum() - np.log(x).sum()), 1 - 1 / x)

    found = minimize(objective, np.array([1e-3, 30.0]), comm, method=method, ftol=0)
    assert found.converged
    np.testing.assert_allclose(found.x, 1, rtol=1e-3)


@pytest.mark.usefixtures("vectors")
@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("settings", [{}, {"method": "conjugate_gradients"}, {"l1": 1e199}, {"l2": 1e199}], ids=str)
def test_a_gradient_without_a_square_is_minimised_all_the_same(comm, settings):
    """As the same loss is in other units."""
    told, unit = [], 2.0**660

    def scaled(unit):
        return lambda x: (unit * float((x - 2) @ (x - 2)) / comm.size, 2 * unit * (x - 2) / comm.size)

    def watch(progress, x):
        told.append((progress.loss, progress.largest))

    found = minimize(scaled(unit), np.ones(3), comm, gtol=1e-6 * unit, ftol=0, callback=watch, **settings)
    small = {name: value / unit if isinstance(value, float) else value for name, value in settings.items()}
    other = minimize(scaled(1.0), np.ones(3), comm, gtol=1e-6, ftol=0, **small)
    assert (found.reason, found.iterations) == (other.reason, other.iterations)
    np.testing.assert_array_equal(found.x, other.x)
    assert (found.loss, found.largest) == (unit * other.loss, unit * other.largest) == told[-1]


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("method", ["lbfgs", "conjugate_gradients", "gradient_descent"])
def test_a_loss_without_a_minimum_has_not_converged(comm, method):
    found = minimize(lambda x: (float(-(x**3).sum()), -3 * x**2), np.ones(2), comm, method=method)
    assert (found.converged, found.reason) == (False, "unbounded")
    assert "without a bound" in found.message


@pytest.mark.usefixtures("vectors")
@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "must return .loss, gradient., not NoneType"),
        ((1.0, np.zeros((4, 3))), r"gradient has shape \(4, 3\) and dtype float64, where x has \(3, 4\)"),
        ((1.0, np.zeros(SHAPE, complex)), "dtype complex128"),
        ((np.zeros(3), np.zeros(SHAPE)), r"its loss is no number but has shape \(3,\)"),
        ((np.nan, np.zeros(SHAPE)), "loss is nan at the point where the search"),
        ((1.0, np.full(SHAPE, np.nan)), "gradient has elements that are nan"),
        ((1.0, np.full(SHAPE, np.inf)), "gradient has elements that are inf"),
    ],
)
def test_what_an_objective_must_not_return(comm, result, message):
    other = comm.size - 1

    def objective(x):
        return result if comm.rank == other else (1.0, np.zeros(SHAPE))

    with pytest.raises((UserError, RunFailed), match=message if comm.rank == other else "rank 1|at the point where"):
        minimize(objective, np.zeros(SHAPE), comm)


@pytest.mark.parallel([2])
def test_ranks_that_were_not_given_the_same(comm):
    with pytest.raises(UserError, match=r"ranks 0 and 1 were not given the same start: broadcast|rank 0 reports"):
        minimize(mine(comm), np.full(SHAPE, float(comm.rank)), comm)
    with pytest.raises(UserError, match=r"ranks 0 and 1 were not given the same settings|rank 0 reports"):
        minimize(mine(comm), np.zeros(SHAPE), comm, memory=comm.rank + 3)


@pytest.mark.parallel([1])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "newton"}, "method = 'newton': expected one of 'lbfgs'"),
        ({"parameters": "sharded"}, "expected one of 'whole', 'cut'"),
        ({"memory": -1}, "memory = -1: expected"),
        ({"gtol": float("nan")}, "gtol = nan: expected"),
        ({"l1": 1.0, "method": "gradient_descent"}, "l1 = 1 needs method = 'lbfgs'"),
        ({"method": lambda space, evaluate: None}, "minimize: method: it takes (space, evaluate); expected"),
        ({"objective": 3}, "objective is a int: expected"),
        ({"x": np.zeros(2, complex)}, "dtype complex128: expected"),
        ({"x": np.full(2, np.inf)}, "not finite"),
    ],
)
def test_mistakes_are_named(comm, settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        minimize(**{"objective": lambda x: (0.0, x), "x": np.zeros(2), "comm": comm} | settings)


@pytest.mark.parallel([1, 3])
def test_a_signal_or_a_callback_of_one_rank_ends_all_at_the_last_iterate(comm, capfd):
    told = []

    def objective(x):
        if len(told) == 3 and comm.rank == comm.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return mine(comm)(x)

    note = lambda progress, x: told.append((progress.loss, x.copy()))  # noqa: E731
    found = minimize(objective, np.zeros(SHAPE), comm, callback=note, progress=True)
    assert (found.reason, found.iterations, found.converged) == ("signal", 4, False)
    np.testing.assert_array_equal(found.x, told[-1][1])
    assert found.loss == told[-1][0]
    shown = capfd.readouterr().err
    assert ("iteration 4, " in shown and "a signal asked for the end" in shown) == (comm.rank == 0)
    found = minimize(mine(comm), np.zeros(SHAPE), comm, callback=lambda progress, x: comm.rank == comm.size - 1)
    assert (found.reason, found.iterations) == ("callback", 1)


@pytest.mark.parallel([2])
def test_the_page_in_the_documentation(comm, capfd, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which it sets
    blocks = re.findall(r"```python\n(from dbmpi import minimize.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    names = {}
    exec(compile(blocks[0], str(DOCS), "exec"), names)
    assert names["found"].converged
    assert names["found"].largest < 0.01
    assert (names["found"].message in capfd.readouterr().out) == (comm.rank == 0)
