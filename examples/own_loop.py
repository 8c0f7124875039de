"""A loop of one's own over the parameter server: Downpour factorises a matrix of ratings, in NumPy alone.

Run it with ``dbmpi launch -n 4 -- python own_loop.py``: one rank holds the factors, three learn, each from ratings of
its own; or with ``python own_loop.py``, in one process.
"""

import numpy as np
from mpi4py import MPI

import dbmpi

USERS, ITEMS, FACTORS, STEPS, BATCH = 300, 200, 5, 1500, 256


def main() -> None:
    """Learn factors whose products are the ratings."""
    comm = MPI.COMM_WORLD
    shared, own = np.random.default_rng(0), np.random.default_rng(1 + comm.rank)
    true_users, true_items = shared.normal(size=(USERS, FACTORS)), shared.normal(size=(ITEMS, FACTORS))
    factors = {"users": 0.3 * shared.normal(size=(USERS, FACTORS)), "items": 0.3 * shared.normal(size=(ITEMS, FACTORS))}
    with dbmpi.ParameterServer(comm, factors, rule="adagrad", learning_rate=0.3) as server:
        if server.serve():  # on the first rank, until all others have finished
            return
        for _ in range(STEPS):
            server.fetch()  # into the arrays of `factors`
            u, i = own.integers(USERS, size=BATCH), own.integers(ITEMS, size=BATCH)
            errors = (factors["users"][u] * factors["items"][i]).sum(1) - (true_users[u] * true_items[i]).sum(1)
            gradients = {name: np.zeros_like(array) for name, array in factors.items()}
            np.add.at(gradients["users"], u, errors[:, None] * factors["items"][i] / BATCH)
            np.add.at(gradients["items"], i, errors[:, None] * factors["users"][u] / BATCH)
            server.push(gradients)
    if comm.rank == comm.size - 1:
        errors = factors["users"] @ factors["items"].T - true_users @ true_items.T
        print(f"mean squared error of a rating: {np.square(errors).mean():.5f}")


if __name__ == "__main__":
    main()
