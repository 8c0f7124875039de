"""Ratings of films, say: an objective of one's own, and, as a program, samples to try it on.

A sample has two inputs, the numbers of a user and of an item; its target is the rating.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dbmpi.objective import NamedArrays, Samples


class Factorisation:
    """``rating = user . item + bias of the item``, with a penalty on the size of the vectors.

    Parameters
    ----------
    users, items : int
        How many there are.
    rank : int
        Elements of each vector.
    penalty : float
        Half of this times the squares of the vectors of each sample is added to its loss.
    """

    def __init__(self, users: int, items: int, rank: int = 8, penalty: float = 0.01) -> None:
        self._shapes = {"users": (users, rank), "items": (items, rank)}
        self._penalty = penalty

    def initial(self, seed: int) -> NamedArrays:
        """Return small random vectors: with zeros, no gradient would ever say in which direction to go."""
        random = np.random.default_rng(seed)
        vectors = {name: random.normal(0, 0.3, shape) for name, shape in self._shapes.items()}
        return {"vectors": vectors, "bias": np.zeros(self._shapes["items"][0])}

    def loss_and_gradient(self, parameters: NamedArrays, batch: Samples) -> tuple[float, NamedArrays]:
        """Return half the mean squared error with the penalty, and its gradient."""
        users, items = batch.inputs["user"], batch.inputs["item"]
        vectors = parameters["vectors"]
        left, right = vectors["users"][users], vectors["items"][items]
        errors = (left * right).sum(axis=1) + parameters["bias"][items] - batch.targets[:, 0]
        gradient = {name: np.zeros_like(values) for name, values in vectors.items()}
        np.add.at(gradient["users"], users, (errors[:, None] * right + self._penalty * left) / len(errors))
        np.add.at(gradient["items"], items, (errors[:, None] * left + self._penalty * right) / len(errors))
        bias = np.bincount(items, errors, len(parameters["bias"])) / len(errors)
        loss = (errors**2 + self._penalty * (left**2 + right**2).sum(axis=1)).mean() / 2
        return float(loss), {"vectors": gradient, "bias": bias}

    def evaluate(self, parameters: NamedArrays, batch: Samples) -> float:
        """Return half the mean squared error, without the penalty."""
        errors = self.predict(parameters, batch.inputs) - batch.targets[:, 0]
        return float((errors**2).mean() / 2)

    def predict(self, parameters: NamedArrays, inputs: dict[str, np.ndarray]) -> Any:
        """Return the rating of each pair in `inputs`, the numbers of users and of items."""
        users, items = inputs["user"], inputs["item"]
        vectors = parameters["vectors"]
        return (vectors["users"][users] * vectors["items"][items]).sum(axis=1) + parameters["bias"][items]


def write_ratings(directory: Path, users: int = 60, items: int = 40, rank: int = 3) -> None:
    """Write ratings-train.h5 and ratings-test.h5: ratings that vectors of `rank` elements make, and some noise.

    Parameters
    ----------
    directory : Path
        Made if missing.
    users, items : int
        How many there are; each user rates about three of four items.
    rank : int
        Elements of the vectors.
    """
    random = np.random.default_rng(1)
    tastes, kinds = random.normal(size=(users, rank)), random.normal(size=(items, rank))
    pairs = np.stack(np.divmod(random.permutation(users * items), items), axis=1)
    ratings = (tastes[pairs[:, 0]] * kinds[pairs[:, 1]]).sum(axis=1) + random.normal(0, 0.1, len(pairs))
    directory.mkdir(exist_ok=True)
    for name, chosen in (("test", slice(0, len(pairs) // 8)), ("train", slice(len(pairs) // 4, None))):
        with h5py.File(directory / f"ratings-{name}.h5", "w") as file:
            file["user"], file["item"] = pairs[chosen].T
            file["targets"] = ratings[chosen]


if __name__ == "__main__":
    write_ratings(Path("data"))
