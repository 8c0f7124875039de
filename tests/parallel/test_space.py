"""Batch methods on shards that are ranks: the same bits as in one process, whatever the number of ranks."""

import tracemalloc

import numpy as np
import pytest
from mpi4py import MPI
from scipy import optimize
from unit.two_loop import two_loop

from dbmpi.index.layout import cut
from dbmpi.methods.descent import Limits
from dbmpi.methods.gradients import conjugate_gradients, owlqn
from dbmpi.methods.lbfgs import History, lbfgs
from dbmpi.methods.local_space import LocalSpace
from dbmpi.mpi import waiting
from dbmpi.sandblaster.commands import Command, RemoteSpace, execute

SIZE = 5003


class Problem:
    """Rosenbrock's function of a vector that lies cut over ranks, each of which runs the method with the others."""

    def __init__(self, comm, dtype):
        self.comm, self.reductions = comm, 0
        self.held = cut(SIZE, comm.size)[comm.rank]
        whole = np.linspace(-1.5, 1.5, SIZE).astype(dtype)
        self.parameters = whole[self.held.start : self.held.stop].copy()
        self.space = LocalSpace(
            len(self.held), dtype, self.reduce, comm.rank, comm.size, {"parameters": self.parameters}
        )

    def reduce(self, values):
        self.reductions += 1
        return waiting.allreduce(self.comm, values, MPI.SUM, "the other shards")

    def whole(self, name):
        values = np.zeros(SIZE)
        values[self.held.start : self.held.stop] = self.space.array(name)
        return waiting.allreduce(self.comm, values, MPI.SUM, "the other shards")

    def evaluate(self, point, gradient):
        x = self.whole(point)
        self.space.writable(gradient)[:] = optimize.rosen_der(x)[self.held.start : self.held.stop]
        return float(optimize.rosen(x))


METHODS = {
    "lbfgs": lambda space, evaluate, **more: lbfgs(space, evaluate, memory=4, **more),
    "conjugate gradients": conjugate_gradients,
    "owlqn": lambda space, evaluate, **more: owlqn(space, evaluate, strength=0.1, memory=4, **more),
}


@pytest.mark.parallel([1, 2, 3, 5])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_iterates_have_the_same_bits_on_ranks_as_in_one_process(comm, method, dtype):
    ours, alone = Problem(comm, dtype), Problem(MPI.Intracomm(comm.Split(comm.rank)), dtype)
    told = []
    for problem in (ours, alone):
        steps = []
        METHODS[method](problem.space, problem.evaluate, limits=Limits(0, 0, iterations=12), callback=steps.append)
        told.append(steps)
    assert told[0] == told[1]
    assert len(told[0]) == 12
    part = alone.parameters[ours.held.start : ours.held.stop]
    assert part.tobytes() == ours.parameters.tobytes()
    if method == "lbfgs":
        # One for every evaluation; to begin with two for each of gradient and point, whose sizes are not known yet; and
        # another one where numbers have become larger than was expected.
        assert ours.reductions <= told[0][-1].evaluations + 5
    alone.comm.Free()


@pytest.mark.parallel([1, 2, 3, 5])
def test_the_direction_is_that_of_the_two_loop_recursion(comm):
    problem = Problem(comm, np.float64)
    space, history = problem.space, History(problem.space, 4)
    lbfgs(space, problem.evaluate, history=history, limits=Limits(0, 0, iterations=9))
    for name in ("g", "slow"):
        space.create(name)
    problem.evaluate("parameters", "g")
    history.measure("g", float(space.dots([("g", "g")])[0]))
    line = history.choose("g")
    two_loop(space, history, "g", "slow")
    np.testing.assert_allclose(problem.whole(line.direction), problem.whole("slow"), rtol=1e-8, atol=1e-12)


@pytest.mark.parallel([2, 3])
def test_the_coordinator_holds_no_vector(comm):
    """Rank 0 runs L-BFGS over vectors of 4 MB on the other ranks, and allocates a small part of one."""
    size, end = 1_000_000 // (comm.size - 1), np.empty(0, np.uint8)
    shards = MPI.Intracomm(comm.Split(min(comm.rank, 1), comm.rank))
    if comm.rank > 0:
        reduce = lambda values: waiting.allreduce(shards, values, MPI.SUM, "the other shards")  # noqa: E731
        space = LocalSpace(size, np.float32, reduce, shards.rank, shards.size)
        space.create("parameters")
        status = MPI.Status()
        while True:
            waiting.until(lambda: comm.Iprobe(0, 1, status), "a command")
            data = np.empty(status.Get_count(MPI.BYTE), np.uint8)
            comm.Recv(data, 0, 1)
            if data.size == 0:
                break
            command = Command.decode(data.tobytes())
            if command.operation == "multiply":  # stands for the replicas: the gradient of |x - 3|^2 / 2
                point, _, gradient = command.arguments
                space.writable(gradient)[:] = space.array(point) - 3
            else:
                result = execute(space, command)
                if comm.rank == 1:
                    comm.Send(result, 0, 2)
    else:

        def submit(command):
            for rank in range(1, comm.size):
                comm.Send(np.frombuffer(command.encode(), np.uint8), rank, 1)
            if command.operation == "multiply":
                return np.empty(0)
            status = MPI.Status()
            waiting.until(lambda: comm.Iprobe(1, 2, status), "the numbers")
            result = np.empty(status.Get_count(MPI.DOUBLE))
            comm.Recv(result, 1, 2)
            return result

        space = RemoteSpace(submit, ["parameters"])

        def evaluate(point, gradient):
            space.multiply(point, point, gradient)
            return 0.5 * float(space.dots([(gradient, gradient)])[0])

        tracemalloc.start()
        report = lbfgs(space, evaluate, memory=10, limits=Limits(1e-6, 0))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert report.converged
        assert peak < 300_000 < 4 * size
        for rank in range(1, comm.size):
            comm.Send(end, rank, 1)
    shards.Free()
