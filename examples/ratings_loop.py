"""Factorise a matrix of ratings by gradient descent, in plain NumPy.

Run it with ``python ratings_loop.py``; ``ratings_downpour.py`` is the same by Downpour.
"""

import numpy as np

USERS, ITEMS, FACTORS, STEPS, BATCH, RATE, PENALTY = 300, 200, 5, 3000, 256, 0.05, 0.02


def main() -> None:
    """Learn vectors whose products are the ratings, and print the error of ratings that were held out."""
    fixed, random = np.random.default_rng(1), np.random.default_rng()
    tastes, kinds = fixed.normal(size=(USERS, FACTORS)), fixed.normal(size=(ITEMS, FACTORS))
    ratings = tastes @ kinds.T + fixed.normal(0, 0.1, (USERS, ITEMS))
    pairs = np.stack(np.divmod(fixed.permutation(USERS * ITEMS), ITEMS), axis=1)
    learned, held_out = pairs[: USERS * ITEMS // 4], pairs[-USERS * ITEMS // 4 :]
    factors = {"users": fixed.normal(0, 0.3, tastes.shape), "items": fixed.normal(0, 0.3, kinds.shape)}
    for _ in range(STEPS):
        users, items = learned[random.integers(len(learned), size=BATCH)].T
        left, right = factors["users"][users], factors["items"][items]
        errors = (left * right).sum(axis=1, keepdims=True) - ratings[users, items, None]
        gradients = {name: np.zeros_like(array) for name, array in factors.items()}
        np.add.at(gradients["users"], users, errors * right + PENALTY * left)
        np.add.at(gradients["items"], items, errors * left + PENALTY * right)
        for name in factors:
            factors[name] -= RATE * gradients[name]
    users, items = held_out.T
    errors = (factors["users"][users] * factors["items"][items]).sum(axis=1) - ratings[users, items]
    print(f"mean squared error {np.square(errors).mean():.4f}")


if __name__ == "__main__":
    main()
